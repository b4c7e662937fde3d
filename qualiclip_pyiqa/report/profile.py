"""Profiles of images: every attribute's score, what it means, and how usual it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ImageError
from ..images.tensors import Source
from ..metrics.prompts import Pair
from ..metrics.registry import LOOK_METRIC
from ..metrics.words import comparatives
from ..scoring.building import Metrics, blind_metric, blind_only
from ..scoring.description import attributes_of
from ..scoring.scorer import Scorer
from ..scoring.tables import Record
from .reference import Distribution, Reference, TableReference, shipped_reference

# A score is unusual if at most this percentage of the reference lies beyond it.
UNUSUAL = 5.0


@dataclass(frozen=True)
class Attribute:
    """What a column of scores is.

    Attributes:
        column: name of the column, as in a table of `qualiclip score`.
        metric: the metric, as the user named it.
        name: the attribute; `quality` if the metric has only one.
        pairs: antonym prompt pairs, whose mean is the score; empty for a metric without prompts.
        lower_better: whether a lower score is better; with prompts, a high score means the positive one.
        score_range: lowest and highest score; None if unknown.
        reference: scores of the reference; None if it has none.
    """

    column: str
    metric: str
    name: str
    pairs: tuple[Pair, ...]
    lower_better: bool
    score_range: tuple[float, float] | None
    reference: Distribution | None = field(repr=False)

    @property
    def high(self) -> str:
        """What a high score means."""
        return self._side(0, "worse" if self.lower_better else "better")

    @property
    def low(self) -> str:
        """What a low score means."""
        return self._side(1, "better" if self.lower_better else "worse")

    def _side(self, side: int, otherwise: str) -> str:
        if not self.pairs:
            return otherwise
        more = f" (+{len(self.pairs) - 1})" if len(self.pairs) > 1 else ""
        return f"{self.pairs[0][side]}{more}"


@dataclass(frozen=True)
class Trait:
    """The score of one image for one attribute.

    Attributes:
        attribute: what was scored.
        score: its score.
        percentile: percentage of the reference's images with a worse score (with prompts: with a lower one); None
            without a reference.
    """

    attribute: Attribute
    score: float
    percentile: float | None

    @property
    def unusual(self) -> str | None:
        """What is unusual about the score, such as "blurrier than 97 %"; None if nothing is, or nothing is known."""
        if self.percentile is None or UNUSUAL < self.percentile < 100 - UNUSUAL:
            return None
        low = self.percentile <= UNUSUAL
        shown = round(self.percentile)  # as in `percent`, so that a table and these words agree
        beyond = min(99, 100 - shown if low else shown)
        # Without prompts, a percentile counts the images with a worse score, whatever the direction.
        return f"{comparatives(self.attribute.pairs)[low]} than {beyond} %"


@dataclass(frozen=True)
class Profile:
    """The scores of one image.

    Attributes:
        path: as passed in; None for an image that was not a path.
        width, height: pixels, as scored; None if the image could not be decoded.
        traits: one for each score.
        reference: whose scores the percentiles refer to; None if there are no percentiles.
        error: one line; None if every metric scored the image.
        note: one line if the image is far smaller or larger than those of the reference, else None.
    """

    path: str | None
    width: int | None
    height: int | None
    traits: tuple[Trait, ...]
    reference: str | None
    error: str | None = None
    note: str | None = None

    @property
    def unusual(self) -> list[str]:
        """What is unusual about the image, such as "blurrier than 97 %", the most unusual first."""
        found = [(min(t.percentile, 100 - t.percentile), t.unusual) for t in self.traits if t.percentile is not None]
        return [text for _, text in sorted(found, key=lambda each: each[0]) if text is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the profile in plain values, for JSON."""
        return {
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "error": self.error,
            "reference": self.reference,
            "note": self.note,
            "unusual": self.unusual,
            "attributes": [
                {
                    "column": trait.attribute.column,
                    "metric": trait.attribute.metric,
                    "attribute": trait.attribute.name,
                    "score": trait.score,
                    "percentile": None if trait.percentile is None else round(trait.percentile),
                    "lower_better": trait.attribute.lower_better,
                    "score_range": trait.attribute.score_range,
                    "prompts": [list(pair) for pair in trait.attribute.pairs],
                }
                for trait in self.traits
            ],
        }

    def figure(self, picture: Source | None = None) -> Any:
        """Draw the profile; see `report.bars.draw_profiles` for several.

        Args:
            picture: the image, shown above the bars; None: read from `path`, if the image had one.

        Returns:
            A matplotlib Figure.

        Raises:
            SettingsError: matplotlib is not installed.
            ImageError: the image cannot be read.
        """
        from .bars import draw_profiles

        return draw_profiles([self], [picture if picture is not None else self.path])


class Profiler:
    """Makes profiles of images.

    Args:
        metrics: as for `Scorer`.
        against: the reference: a table of `qualiclip score`, matched by the names of columns; None: for the embedded
            models, the photographs of their training set.
        options: as for `Scorer`.

    Raises:
        SettingsError: as for `Scorer`; or a table that has none of the scores, or those of another model.
        PromptError, WeightsError: as for `Scorer`.

    Example:
        >>> profiler = Profiler("qualiclip-mini+:look", device="cpu", workers=0)
        >>> [attribute.name for attribute in profiler.attributes][:3]
        ['quality', 'brightness', 'sharpness']
        >>> (found,) = profiler.profiles(["examples/photos/lighthouse-blurred.jpg"])
        >>> found.traits[2].attribute.low
        'Blurry photo.'
    """

    def __init__(self, metrics: Metrics = LOOK_METRIC, against: str | Path | None = None, **options: Any) -> None:
        reference: Reference = shipped_reference() if against is None else TableReference(Path(against))
        self.scorer = Scorer(blind_only(metrics, "for a profile"), **options)
        described = self.scorer.describe()["columns"]
        reference.check(described)
        self.attributes = tuple(_attributes(self.scorer, described, reference))
        known = any(attribute.reference is not None for attribute in self.attributes)
        #: Whose scores percentiles refer to; None if the reference has none of these scores.
        self.reference = reference.description if known else None
        self._sides = reference.sides if known else None

    def profiles(self, pictures: Iterable[Source | ImageError]) -> Iterator[Profile]:
        """Yield the profile of each image, in order; that of an image that cannot be scored has an error."""
        for record in self.scorer.score(pictures):
            yield self.of(record)

    def of(self, record: Record) -> Profile:
        """Return the profile of a scored image."""
        traits = [
            Trait(
                each,
                record.scores[each.column],
                None
                if each.reference is None
                else each.reference.percentile(record.scores[each.column], each.lower_better),
            )
            for each in self.attributes
            if each.column in record.scores
        ]
        note = None
        if self._sides is not None and record.width is not None and record.height is not None:
            note = self._sides.note(record.width, record.height)
        return Profile(record.path, record.width, record.height, tuple(traits), self.reference, record.error, note)


def profile(
    picture: Source, metrics: Metrics = LOOK_METRIC, against: str | Path | None = None, **options: Any
) -> Profile:
    """Make the profile of one image; for several use `Profiler`, which builds the metrics once.

    Args:
        picture: anything that `load_image` takes.
        metrics, against, options: as for `Profiler`.

    Raises:
        ImageError: the image cannot be read or scored.
        SettingsError, PromptError, WeightsError: as for `Profiler`.

    Example:
        >>> found = profile("examples/photos/lighthouse-blurred.jpg", device="cpu")
        >>> round(found.traits[0].score, 1), found.traits[0].attribute.name
        (0.1, 'quality')
    """
    (found,) = Profiler(metrics, against, **{"workers": 0, **options}).profiles([picture])
    if found.error is not None:
        raise ImageError(found.error)
    return found


def percent(percentile: float) -> str:
    """Format a percentile, whose ends are never reached.

    Example:
        >>> percent(0.2), percent(49.6), percent(100.0)
        ('<1 %', '50 %', '>99 %')
    """
    return "<1 %" if percentile < 1 else ">99 %" if percentile > 99 else f"{percentile:.0f} %"


def _attributes(
    scorer: Scorer, described: Mapping[str, Mapping[str, Any]], reference: Reference
) -> Iterator[Attribute]:
    """Describe the columns of a scorer."""
    metrics = scorer.networks[0].metrics
    for column, (name, pairs) in attributes_of(metrics).items():
        single = sum(metric is metrics[column] for metric in metrics.values()) == 1
        yield Attribute(
            column=column,
            metric=column if single else column.removesuffix(f".{name}"),
            name=name,
            pairs=pairs,
            lower_better=scorer.lower_better[column],
            score_range=_range(getattr(blind_metric(metrics[column]) or metrics[column], "score_range", None)),
            reference=reference.values(column, described[column], pairs),
        )


def _range(text: object) -> tuple[float, float] | None:
    """Parse a range of scores such as "0, 1", or "~0, ~100" where pyiqa knows it roughly; None without a finite one."""
    try:
        low, high = (float(bound.strip().removeprefix("~")) for bound in str(text).split(","))
    except ValueError:
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
