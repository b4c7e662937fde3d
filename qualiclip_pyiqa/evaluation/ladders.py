"""Score photographs at every type and level of a degradation bank, as in the first figure of QualiCLIP's paper."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..degradations.bank import DEGRADATIONS, degrade
from ..degradations.base import LEVELS, Bank
from ..errors import ImageError
from ..images.convert import source_name
from ..images.tensors import load_image
from ..optional import require
from ..scoring.scorer import Scorer
from .scores import Watch, unwatched


@dataclass(frozen=True)
class Behaviour:
    """Behaviour of scores along the levels of one type.

    Attributes:
        means: mean score over photographs at levels 0 (pristine) to LEVELS.
        falls: whether the mean at each of levels 2 to LEVELS is worse than at the level before it.
        in_order: share, 0..1, of correctly ranked pairs among those of one photograph's levels whose order is known
            (`Degradation.pairs`).
    """

    means: list[float]
    falls: bool
    in_order: float


@dataclass(frozen=True)
class LadderReport:
    """Behaviour of scores under degradation.

    Attributes:
        behaviours: by metric and type.
        photographs: number of photographs, by metric.
        lower_better: whether a lower score is better, by metric.
        errors: one line for each photograph that some metric could not score, by path.
    """

    behaviours: dict[str, dict[str, Behaviour]]
    photographs: dict[str, int]
    lower_better: dict[str, bool]
    errors: dict[str, str]

    def as_dict(self, bank: Bank = DEGRADATIONS) -> dict[str, dict[str, Any]]:
        """Return the numbers by metric, JSON-ready; `bank` contains the types."""
        return {
            column: {
                "photographs": self.photographs[column],
                "lower_better": self.lower_better[column],
                "types_falling": sum(each.falls for each in found.values()),
                "types": {
                    name: asdict(each) | {"monotone_by_design": bank[name].monotone} for name, each in found.items()
                },
            }
            for column, found in self.behaviours.items()
        }


def steps(bank: Bank = DEGRADATIONS) -> int:
    """Return the number of images in a photograph's ladder: itself, and every type at every level."""
    return 1 + LEVELS * len(bank)


def behaviour(name: str, scores: ArrayLike, lower_better: bool = False, bank: Bank = DEGRADATIONS) -> Behaviour:
    """Summarise scores under one type of degradation.

    Args:
        name: the type.
        scores: (V, LEVELS + 1), of V photographs at levels 0 to LEVELS.
        lower_better: whether a lower score is better.
        bank: contains the type.
    """
    levels = np.asarray(scores, dtype=np.float64)
    means = levels.mean(0)
    sign = -1 if lower_better else 1
    right = [sign * levels[:, i] > sign * levels[:, j] for i, j in bank[name].pairs]
    falls = all(sign * a > sign * b for a, b in pairwise(means[1:]))
    return Behaviour(means.tolist(), falls, float(np.mean(right)))


def ladder(rgb: Tensor, seed: int, bank: Bank = DEGRADATIONS) -> Iterator[Tensor]:
    """Yield a photograph, then every type at levels 1 to LEVELS, rounded to 8 bits as in a file.

    Args:
        rgb: (3, H, W), float, RGB in 0..1.
        seed: of the random choices.
        bank: the types.

    Yields:
        `steps(bank)` images (3, H, W) in 0..1.
    """
    yield rgb
    for name in bank:
        for level in range(1, LEVELS + 1):
            yield (degrade(rgb[None], name, level, seed, bank)[0] * 255).round() / 255


def behaviours(scores: ArrayLike, lower_better: bool = False, bank: Bank = DEGRADATIONS) -> dict[str, Behaviour]:
    """Summarise scores by type; `scores` is (V * steps(bank),), ladder by ladder."""
    table = np.asarray(scores).reshape(-1, steps(bank))
    return {
        name: behaviour(name, table[:, [0, *range(first, first + LEVELS)]], lower_better, bank)
        for name, first in zip(bank, range(1, steps(bank), LEVELS), strict=True)
    }


def score_degraded(
    scorer: Scorer,
    paths: Sequence[str | Path],
    seed: int = 0,
    watch: Watch = unwatched,
    bank: Bank = DEGRADATIONS,
) -> LadderReport:
    """Score photographs at every type and level.

    Photographs that a metric could not score at every step are left out of that metric's results.

    Args:
        scorer: the metrics and reading rules.
        paths: pristine photographs.
        seed: of the first photograph's degradations; the next one has `seed` + 1, and so on.
        watch: wraps the records, for example in a progress bar.
        bank: the types.

    Raises:
        ImageError: no photograph could be scored.
        SettingsError: kornia is not installed.
    """
    require("kornia", "eval", "degrading images")
    rules = scorer.rules
    each = steps(bank)
    errors: dict[str, str] = {}
    read: list[str] = []

    def images() -> Iterator[Tensor]:
        for number, source in enumerate(paths):
            path = os.fspath(source)
            try:
                rgb = load_image(path, **asdict(rules))
            except ImageError as error:
                errors[path] = str(error)
                continue
            read.append(path)
            yield from ladder(rgb, seed + number, bank)

    scores: dict[str, list[float]] = {column: [] for column in scorer.columns}
    for number, record in enumerate(watch(scorer.score(images()), each * len(paths))):
        path = read[number // each]
        if record.error is not None:
            errors.setdefault(path, f"{source_name(path)}: {record.error}")
        for column, values in scores.items():
            values.append(record.scores.get(column, np.nan))
    found: dict[str, dict[str, Behaviour]] = {}
    counts: dict[str, int] = {}
    for column, values in scores.items():
        table = np.array(values, float).reshape(-1, each)
        whole = table[np.isfinite(table).all(1)]
        counts[column] = len(whole)
        if len(whole):
            found[column] = behaviours(whole, scorer.lower_better[column], bank)
    if not found:
        first = next(iter(errors.values()), "no images were given")
        raise ImageError(f"none of {len(paths)} photographs could be scored; the first: {first}")
    return LadderReport(found, counts, dict(scorer.lower_better), errors)
