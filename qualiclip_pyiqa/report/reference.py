"""References: the scores of other images, which say how usual a score is.

`TableReference` is a table of `qualiclip score`, whose columns are matched by name. `shipped_reference()` holds
percentiles of the embedded models' scores on photographs of their training set, by model file and prompt pair; it is
written by `benchmarks/reference.py`.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError, counted, did_you_mean
from ..evaluation.scores import read_scores
from ..explain.large import FAR
from ..metrics.prompts import Pair
from ..scoring.tables import meta_path

# Images below which the 5th and 95th percentile rest on less than five images each.
FEW = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Distribution:
    """Scores of other images for one attribute.

    Attributes:
        values: sorted scores.
        quantiles: whether these are quantiles of the scores in even steps, from the lowest to the highest, instead of
            the scores themselves.
    """

    values: NDArray[np.float64]
    quantiles: bool = False

    def percentile(self, score: float, lower_better: bool = False) -> float:
        """Return the percentage of scores on the worse side of a score; equal ones count half.

        Between two quantiles, scores count as evenly spread.

        Example:
            >>> Distribution(np.array([1.0, 2.0, 3.0, 4.0])).percentile(3.5)
            75.0
            >>> Distribution(np.array([1.0, 2.0, 3.0]), quantiles=True).percentile(1.5)
            25.0
        """
        first, end = (int(np.searchsorted(self.values, score, side)) for side in ("left", "right"))
        if not self.quantiles:
            below = (first + end) / 2 / len(self.values)
        elif first == end:
            below = float(np.interp(score, self.values, np.linspace(0, 1, len(self.values))))
        else:
            below = (first + end - 1) / 2 / (len(self.values) - 1)
        return 100 * (1 - below if lower_better else below)


@dataclass(frozen=True)
class Sides:
    """Longer sides of a reference's images in pixels: those of the middle 90 % lie between `low` and `high`."""

    low: float
    high: float

    def note(self, width: int, height: int) -> str | None:
        """Return one line if an image is far smaller or larger than these, else None."""
        side = max(width, height)
        if self.low / FAR <= side <= self.high * FAR:
            return None
        usual = f"{self.low:.0f}" if round(self.low) == round(self.high) else f"{self.low:.0f} to {self.high:.0f}"
        return (
            f"far {'smaller' if side < self.low else 'larger'} than the images of the reference (most have {usual} "
            "pixels on their longer side): percentiles can mislead, above all those of sharpness and noise"
        )


class Reference(Protocol):
    """Scores of other images.

    Attributes:
        description: whose scores they are, such as "250 images of scores.csv".
        sides: how large the images are; None if unknown.
    """

    @property
    def description(self) -> str: ...

    @property
    def sides(self) -> Sides | None: ...

    def check(self, columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise SettingsError if the reference cannot be that of these columns, as `Scorer.describe` describes them."""
        ...

    def values(self, column: str, described: Mapping[str, Any], pairs: Sequence[Pair]) -> Distribution | None:
        """Return the scores of a column, or None if there are none.

        Args:
            column: its name.
            described: its metric, as `Scorer.describe` describes it.
            pairs: the antonym prompt pairs of its attribute.
        """
        ...


class TableReference:
    """The scores in a table of `qualiclip score`, matched by the names of columns.

    Raises:
        SettingsError: not a table of scores.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        scores = read_scores(path)
        self._settings = (scores.settings or {}).get("columns", {})
        self._values = {name: np.sort(found[np.isfinite(found)]) for name, found in scores.values.items()}
        # Images that could not be scored are no part of the reference.
        scored = np.zeros(len(scores.paths), bool)
        for found in scores.values.values():
            scored |= np.isfinite(found)
        self.description = f"{counted(int(scored.sum()), 'image')} of {path.name}"
        paths = [each for each, known in zip(scores.paths, scored, strict=True) if known]
        sides = [max(scores.sizes[each]) for each in paths if each in scores.sizes]
        self.sides = Sides(*(float(each) for each in np.percentile(sides, (5, 95)))) if sides else None

    def check(self, columns: Mapping[str, Mapping[str, Any]]) -> None:
        shared = [column for column in columns if len(self._values.get(column, ()))]
        if not shared:
            first = next(iter(columns))
            has = ", ".join(name for name, values in self._values.items() if len(values)) or "none"
            raise SettingsError(
                f"{self.path} has no scores of {', '.join(columns)}; its scores: {has}"
                f"{did_you_mean(first, self._values)}"
            )
        for column in shared:
            before = self._settings.get(column) or {}
            for what, known, now in _decisive(before, columns[column]):
                if known is not None and now is not None and known != now:
                    raise SettingsError(
                        f"{self.path} has scores of another {column}: its {what} differ; score its images again"
                    )
        self._warn(min(len(self._values[column]) for column in shared))

    def _warn(self, count: int) -> None:
        """Log what makes the reference weak; `count` is the number of images that have the scores."""
        if not self._settings:
            logger.warning(
                "%s has no description beside it (%s), so whether its scores are of the same model and prompts is not "
                "known; score its images with `qualiclip score -o`",
                self.path,
                meta_path(self.path).name,
            )
        if count < FEW:
            logger.warning(
                "%s has %s with these scores: percentiles of so few say little, and none may be unusual; "
                "better %d or more",
                self.path,
                counted(count, "image"),
                FEW,
            )

    def values(self, column: str, described: Mapping[str, Any], pairs: Sequence[Pair]) -> Distribution | None:
        found = self._values.get(column)
        return None if found is None or not len(found) else Distribution(found)


class ShippedReference:
    """Percentiles of the embedded models' scores on the photographs of their training set.

    A model is known by the sha256 of its file, so that another one is not compared with them.

    Attributes:
        description: whose scores they are.
        sides: how large the photographs are.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.sides = Sides(*content["longer_side"])
        self.description = f"{content['photographs']:,} {content['description']}"
        self._models: dict[str, Mapping[str, Sequence[float]]] = {
            model["sha256"]: model["pairs"] for model in content["models"]
        }

    def check(self, columns: Mapping[str, Mapping[str, Any]]) -> None:
        """Accept every metric: those that are not in the table have no percentiles."""

    def values(self, column: str, described: Mapping[str, Any], pairs: Sequence[Pair]) -> Distribution | None:
        model = self._models.get((described.get("weights") or {}).get("sha256", ""))
        # A score of several pairs, at another temperature or of windows has another distribution.
        usual = described.get("temperature") == 1.0 and str(described.get("resize", "")).endswith("at its own size")
        if model is None or len(pairs) != 1 or not usual:
            return None
        found = model.get("/".join(pairs[0]))
        return None if found is None else Distribution(np.array(found, float), quantiles=True)


@cache
def shipped_reference() -> ShippedReference:
    """Return the reference that comes with the package."""
    path = Path(__file__).with_name("reference.toml")
    return ShippedReference(tomllib.loads(path.read_text(encoding="utf-8")))


def _decisive(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """Return what decides the scores of a column, by name: before and now; None where it is unknown."""
    fields: list[tuple[str, object, object]] = [
        (what, before.get(what), now.get(what)) for what in ("prompts", "temperature", "resize")
    ]
    for what in ("weights", "context"):
        old, new = ((each.get(what) or {}).get("sha256") for each in (before, now))
        fields.append((what, old, new))
    return fields
