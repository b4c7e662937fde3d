"""What each kind of map computes for a batch, before it is cut into a `QualityMap` for each image and attribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..metrics.base import BlindMetric
from ..metrics.fitted import FittedIQA
from ..metrics.prompt_iqa import PromptIQA
from ..towers.base import Tower
from ..towers.mobile import MobileTower
from ..towers.resnet import ResNetTower
from ..towers.vit import ViTTower


@dataclass(frozen=True)
class Found:
    """Maps of a batch.

    Attributes:
        values: (N, A, h, w), in the direction of the score.
        scores: (N, A), of the images.
        step: height and width of a place in pixels.
        meaning: what the values are.
        relation: how they relate to the score, of image n and attribute a.
        own_scale: for each attribute, whether its values are scores of another scale than the image's; empty: none is.
    """

    values: Tensor
    scores: Tensor
    step: tuple[float, float]
    meaning: str
    relation: Callable[[int, int], str]
    own_scale: tuple[bool, ...] = ()


def no_such_map(kind: str, what: str, metric: nn.Module) -> SettingsError:
    """Return the error for a kind of map that a metric does not have, with the kinds that it has."""
    kinds = ", ".join(kinds_of(metric))
    return SettingsError(f"a map of kind {kind!r} is not defined for {what}; kinds that work: {kinds}")


@torch.no_grad()
def kinds_of(metric: nn.Module) -> list[str]:
    """Return the kinds of map that a metric has: its tower is asked for the maps of a small image."""
    kinds = []
    if isinstance(metric, BlindMetric) and metric.tile is None:
        tower = metric.tower
        mobile = isinstance(tower, MobileTower) and isinstance(metric, PromptIQA | FittedIQA)
        places = shares = None
        if isinstance(metric, PromptIQA) and isinstance(tower, Tower):
            text = metric.prompt_features
            rgb = metric.prepare(torch.zeros(1, 3, 64, 64)).to(text.device)
            places, shares = tower.place_features(rgb), tower.shares(rgb, torch.zeros_like(text[:1]))
        if mobile or places is not None:
            kinds.append("local")
        if shares is not None:
            kinds.append("contributions")
        if isinstance(tower, MobileTower | ResNetTower) or (isinstance(tower, ViTTower) and is_one_pass(metric)):
            kinds.append("gradcam")
    return [*kinds, "occlusion"]


def is_one_pass(metric: BlindMetric) -> bool:
    """Whether a metric's features are those of one plain pass of its tower, without prompts or windows of its own."""
    return type(metric).encode is BlindMetric.encode


def refuse_tile(kind: str, metric: BlindMetric) -> None:
    """Raise SettingsError for a metric that averages over windows of its own."""
    if metric.tile is not None:
        raise no_such_map(kind, f"a metric with tile={metric.tile}", metric)
