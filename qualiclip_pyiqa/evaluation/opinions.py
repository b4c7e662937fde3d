"""Compare scores with opinion scores, for every metric, pair of metrics and group of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .agreement import LEAST, Agreement, Difference, agreement, compare
from .ratings import Ratings
from .scores import Scores


@dataclass(frozen=True)
class OpinionReport:
    """Agreement of metrics with opinion scores.

    Results for a metric are of the images that it scored; for a pair, of those that both scored.

    Attributes:
        agreements: by metric.
        differences: by pair of metrics, SRCC of the first minus SRCC of the second.
        groups: by group and metric.
    """

    agreements: dict[str, Agreement]
    differences: dict[tuple[str, str], Difference]
    groups: dict[str, dict[str, Agreement]]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the numbers by metric, JSON-ready."""
        numbers: dict[str, dict[str, Any]] = {name: each.as_dict() for name, each in self.agreements.items()}
        for (first, second), difference in self.differences.items():
            numbers[first].setdefault("versus", {})[second] = difference.as_dict()
        for group, part in self.groups.items():
            for name, each in part.items():
                numbers[name].setdefault("groups", {})[group] = each.as_dict()
        return numbers


def report_opinions(scores: Scores, ratings: Ratings, seed: int = 0) -> OpinionReport:
    """Correlate scores with opinion scores per image, after averaging repeated ratings.

    Args:
        scores: of at least the images in `ratings`.
        ratings: opinion scores, with or without groups.
        seed: of the bootstraps.

    Raises:
        SettingsError: SciPy is not installed.
    """
    opinions = ratings.mean_opinions()
    opposite = {name: lower != ratings.lower_better for name, lower in scores.lower_better.items()}
    values = scores.of(opinions)
    y = np.array(list(opinions.values()))
    differences = {}
    for first, second in combinations(values, 2):
        both = np.isfinite(values[first]) & np.isfinite(values[second])
        if both.sum() >= LEAST:
            x, z = (np.where(opposite[name], -1, 1) * values[name][both] for name in (first, second))
            difference = compare(x, z, y[both], seed)
            if difference is not None:
                differences[first, second] = difference
    groups = {group: ratings.mean_opinions(group) for group in dict.fromkeys(ratings.groups)}
    return OpinionReport(
        _agreements(scores, opinions, opposite, seed),
        differences,
        {group: _agreements(scores, part, opposite, seed) for group, part in groups.items()},
    )


def _agreements(
    scores: Scores, opinions: Mapping[Path, float], opposite: Mapping[str, bool], seed: int
) -> dict[str, Agreement]:
    y = np.array(list(opinions.values()))
    found = {}
    for name, values in scores.of(opinions).items():
        scored = np.isfinite(values)
        n = int(scored.sum())
        found[name] = Agreement(n) if n < LEAST else agreement(values[scored], y[scored], opposite[name], seed)
    return found
