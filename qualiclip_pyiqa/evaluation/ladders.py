"""Photographs at every type and level of the degradation bank, and whether scores follow: QualiCLIP's first figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from ..degradations.bank import DEGRADATIONS, degrade
from ..degradations.base import LEVELS
from ..errors import ImageError
from ..images.convert import source_name
from ..images.tensors import load_image
from ..metrics.registry import lower_is_better
from ..scoring.scorer import Scorer

STEPS = 1 + LEVELS * len(DEGRADATIONS)  # pictures that one photograph makes


@dataclass(frozen=True)
class Behaviour:
    """What scores do along the levels of one type.

    Attributes:
        means: over photographs, at level 0 (the photograph itself) to LEVELS.
        falls: whether the mean is worse at each of levels 2 to LEVELS than at the one before it.
        in_order: share, in 0..1, of the pairs of levels of one photograph of which one is known to be worse
            (`Degradation.pairs`) whose scores say so.
    """

    means: list[float]
    falls: bool
    in_order: float


def behaviour(name: str, scores: ArrayLike, lower_better: bool = False) -> Behaviour:
    """Of degradation `name`; scores: (V, LEVELS + 1) of V photographs at level 0 to LEVELS."""
    levels = np.asarray(scores, dtype=np.float64)
    means = levels.mean(0)
    sign = -1 if lower_better else 1
    right = [sign * levels[:, i] > sign * levels[:, j] for i, j in DEGRADATIONS[name].pairs]
    falls = all(sign * a > sign * b for a, b in pairwise(means[1:]))
    return Behaviour(means.tolist(), falls, float(np.mean(right)))


def ladder(rgb: Tensor, seed: int) -> Iterator[Tensor]:
    """A photograph (3, H, W) in 0..1 -> the same, then every type at levels 1 to LEVELS, as files of 8 bits hold them:
    STEPS pictures (3, H, W) in 0..1."""
    yield rgb
    for name in DEGRADATIONS:
        for level in range(1, LEVELS + 1):
            yield (degrade(rgb[None], name, level, seed=seed)[0] * 255).round() / 255


def behaviours(scores: ArrayLike, lower_better: bool = False) -> dict[str, Behaviour]:
    """By type; scores: (V * STEPS,), those of each photograph's `ladder` in turn."""
    table = np.asarray(scores).reshape(-1, STEPS)
    return {
        name: behaviour(name, table[:, [0, *range(first, first + LEVELS)]], lower_better)
        for name, first in zip(DEGRADATIONS, range(1, STEPS, LEVELS), strict=True)
    }


def score_degraded(
    paths: Sequence[str | Path], metrics: Any, device: str | None = None, seed: int = 0
) -> dict[str, dict[str, Behaviour]]:
    """By metric and type.

    Args:
        paths: pristine photographs, at least one.
        metrics, device: as `Scorer` takes them.
        seed: of the first photograph's degradations; the next one has the next.

    Raises:
        ImageError: a photograph cannot be scored.
    """
    scorer = Scorer(metrics, device=device, workers=0)
    pictures = (rgb for number, path in enumerate(paths) for rgb in ladder(load_image(path), seed + number))
    scores: dict[str, list[float]] = {column: [] for column in scorer.columns}
    watched = tqdm(scorer.score(pictures), total=STEPS * len(paths), unit="picture", file=sys.stderr)
    for number, record in enumerate(watched):
        if record.error is not None:
            raise ImageError(f"{source_name(paths[number // STEPS])}: {record.error}")
        for column, score in record.scores.items():
            scores[column].append(score)
    return {column: behaviours(found, lower_is_better(column)) for column, found in scores.items()}
