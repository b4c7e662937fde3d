"""The summary that `qualiclip score` prints at its end."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..errors import counted, decimals
from ..images.convert import source_name
from ..metrics.prompts import Pair
from ..metrics.words import meaning_of
from ..scoring.tables import Record

EXTREMES = 5  # number of worst images, best images and errors shown
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Summary:
    """Summary of records: rows and errors; for each score, mean, quantiles, and the images at both ends.

    Args:
        columns: names of the scores.
        lower_better: whether a lower score is better, by column.
        comparatives: what an image with a higher score is, and one with a lower score, by column.
    """

    def __init__(
        self, columns: Sequence[str], lower_better: Mapping[str, bool], comparatives: Mapping[str, Pair]
    ) -> None:
        self.rows = 0
        self.errors = 0
        self.repeated = 0  # names of images that other names name too
        self._lower_better, self._comparatives = lower_better, comparatives
        self._first_errors: list[str] = []
        self._scores = {column: array("d") for column in columns}
        self._paths: dict[str, list[str]] = {column: [] for column in columns}

    def add(self, record: Record) -> None:
        self.rows += 1
        if record.error is not None:
            self.errors += 1
            if len(self._first_errors) < EXTREMES:
                self._first_errors.append(record.error)
        for column, score in record.scores.items():
            self._scores[column].append(score)
            self._paths[column].append(record.path or "")

    def lines(self, others: int, hidden: int) -> Iterator[str]:
        """Yield the lines of the summary; `others` and `hidden` count skipped entries, see `FoundPaths`."""
        yield f"{counted(self.rows, 'image')}: {self.rows - self.errors} scored, {self.errors} with an error"
        for error in self._first_errors:
            yield f"  {error}"
        if self.errors > len(self._first_errors):
            yield f"  ... and {self.errors - len(self._first_errors)} more; see the column `error`"
        if others:
            yield f"skipped in folders: {counted(others, 'file')} without the suffix of an image"
        if hidden:
            entries = counted(hidden, "hidden entry", "hidden entries")
            yield f"skipped in folders: {entries} (those that are named are scored)"
        if self.repeated:
            yield f"left out: {counted(self.repeated, 'repeated name')} (each image is scored once)"
        for column, scores in self._scores.items():
            if scores:
                yield from self._column(column, np.asarray(scores))

    def _column(self, column: str, scores: np.ndarray) -> Iterator[str]:
        lower_better, words = self._lower_better[column], self._comparatives[column]
        meaning = meaning_of(words, lower_better)
        marks = " ".join(
            f"{q:.0%} {decimals(v)}" for q, v in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True)
        )
        mean = decimals(float(np.mean(scores)))
        yield f"{source_name(column)} ({meaning}): count {len(scores)}, mean {mean}; quantiles {marks}"
        ranked = sorted(zip(scores, self._paths[column], strict=True), reverse=lower_better)
        worst = ranked[: min(EXTREMES, len(ranked) // 2)]
        best = ranked[len(worst) :][::-1][:EXTREMES]
        # What describes an image, such as brightness, has no worst and best.
        ends = ("worst", "best") if "better" in words else ("lowest", "highest")
        for what, rows in zip(ends, (worst, best), strict=True):
            if rows:
                yield f"  {what}: " + ", ".join(f"{decimals(score)} {source_name(path)}" for score, path in rows)
