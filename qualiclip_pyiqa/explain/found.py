"""What each kind of map computes for a batch, before it is cut into a `QualityMap` for each image and attribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import SettingsError
from ..metrics.base import BlindMetric


@dataclass(frozen=True)
class Found:
    """Maps of a batch.

    Attributes:
        values: (N, A, h, w), in the direction of the score.
        scores: (N, A), of the images.
        step: height and width of a place in pixels.
        meaning: what the values are.
        relation: how they relate to the score, of image n and attribute a.
    """

    values: Tensor
    scores: Tensor
    step: tuple[float, float]
    meaning: str
    relation: Callable[[int, int], str]


def no_such_map(kind: str, what: str, others: str) -> SettingsError:
    """Return the error for a kind of map that a metric does not have."""
    return SettingsError(f"a map of kind {kind!r} is not defined for {what}; kinds that work: {others}")


def refuse_tile(kind: str, metric: BlindMetric) -> None:
    """Raise SettingsError for a metric that averages over windows of its own."""
    if metric.tile is not None:
        raise no_such_map(kind, f"a metric with tile={metric.tile}", "occlusion")
