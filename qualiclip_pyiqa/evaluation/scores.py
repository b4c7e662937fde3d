"""Scores of a set of images: compute them, or read them from a table of `qualiclip score`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import SettingsError, counted, did_you_mean
from ..images.convert import source_name
from ..images.identity import image_key
from ..metrics.registry import guess_lower_better
from ..metrics.specs import column_belongs
from ..scoring.scorer import Scorer
from ..scoring.tables import Record, read_table
from .agreement import Floats
from .ratings import Ratings

#: Wraps an iterable of records, given their number, for example in a progress bar.
Watch: TypeAlias = Callable[[Iterable[Record], int], Iterable[Record]]


def unwatched(records: Iterable[Record], total: int) -> Iterable[Record]:
    """Return the records without a progress bar."""
    return records


@dataclass(frozen=True)
class Scores:
    """Scores of images by column.

    Attributes:
        paths: the images, each once.
        values: (n,) by column, in the order of `paths`; NaN if the image was not scored.
        lower_better: whether a lower score is better, by column.
        errors: one line for each image that some metric could not score, by path.
        settings: as from `Scorer.describe`; None if unknown.
        directions: the source of `lower_better`; for display.
        sizes: width and height in pixels, by path; only of those that are known.
    """

    paths: list[str]
    values: dict[str, Floats]
    lower_better: dict[str, bool]
    errors: dict[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    directions: str = "as stated by the metrics"
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, paths: Iterable[str | Path]) -> dict[str, Floats]:
        """Look up the scores of some of the images, by column."""
        number = {Path(path): k for k, path in enumerate(self.paths)}
        rows = [number[Path(path)] for path in paths]
        return {column: values[rows] for column, values in self.values.items()}

    def known(self, ratings: Ratings) -> Ratings:
        """Replace the paths of rated images by their spelling in `paths`.

        Raises:
            SettingsError: a rated image has no scores here.
        """
        spelled = {image_key(path): Path(path) for path in self.paths}
        keys = [image_key(str(path)) for path in ratings.paths]
        missing = [path for path, key in zip(ratings.paths, keys, strict=True) if key not in spelled]
        if missing:
            raise SettingsError(
                f"{len(missing)} of {counted(len(keys), 'rated image')} not in the table of scores, such as "
                f"{source_name(missing[0])}"
            )
        return replace(ratings, paths=[spelled[key] for key in keys])


def score_images(scorer: Scorer, paths: Sequence[str | Path], watch: Watch = unwatched) -> Scores:
    """Score images; those that cannot be scored become entries of `errors`.

    Args:
        scorer: the metrics and reading rules.
        paths: the images, each once.
        watch: wraps the records, for example in a progress bar.
    """
    names = [os.fspath(path) for path in paths]
    values = {column: np.full(len(names), np.nan) for column in scorer.columns}
    errors: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(watch(scorer.score(names), len(names))):
        sizes |= _sizes([(names[number], record)])
        if record.error is not None:
            errors[names[number]] = record.error
        for column, score in record.scores.items():
            values[column][number] = score
    return Scores(names, values, dict(scorer.lower_better), errors, scorer.describe(), sizes=sizes)


def read_scores(table: Path, columns: Sequence[str] | None = None) -> Scores:
    """Read a table written by `qualiclip score`.

    Args:
        table: `*.csv`, `*.jsonl` or `*.parquet`. Directions come from `NAME.meta.json` beside it; if that is missing,
            they are guessed by the columns' names.
        columns: the scores to read, or metrics, for all of their scores. None: all.

    Raises:
        SettingsError: not a table of scores, no such column, or an image with two different scores.
    """
    found = read_table(table)
    chosen = list(found.columns) if columns is None else _chosen(table, found.columns, columns)
    rows: dict[str, Record] = {}
    for record in found:
        if record.path is None:
            raise SettingsError(f"{table} has a row without a path; expected the scores of files")
        before = rows.setdefault(record.path, record)
        if before != record and before.error is None and record.error is None:
            raise SettingsError(
                f"{table} has two rows of {source_name(record.path)} with different scores; expected one per image"
            )
        if before.error is not None:
            rows[record.path] = record
    directions = {column: found.lower_better(column) for column in chosen}
    unknown = [column for column, lower in directions.items() if lower is None]
    return Scores(
        paths=list(rows),
        values={c: np.array([row.scores.get(c, np.nan) for row in rows.values()], float) for c in chosen},
        lower_better={c: guess_lower_better(c) if lower is None else lower for c, lower in directions.items()},
        errors={
            path: row.error or f"{source_name(path)} has no score of {next(c for c in chosen if c not in row.scores)}"
            for path, row in rows.items()
            if any(column not in row.scores for column in chosen)
        },
        settings=found.meta,
        directions=f"judging by column names, since no meta.json of {table} states that of {unknown[0]}"
        if unknown
        else f"as stated in the meta.json of {table}",
        sizes=_sizes(rows.items()),
    )


def _sizes(records: Iterable[tuple[str, Record]]) -> dict[str, tuple[int, int]]:
    return {path: (row.width, row.height) for path, row in records if row.width is not None and row.height is not None}


def _chosen(table: Path, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Find columns by their own names, or by that of a metric with several attributes."""
    chosen: dict[str, None] = {}
    for column in columns:
        found = [name for name in names if name == column] or [name for name in names if column_belongs(name, column)]
        if not found:
            has = ", ".join(names) or "none"
            raise SettingsError(f"{table} has no score {column!r}{did_you_mean(column, names)}; its scores: {has}")
        chosen |= dict.fromkeys(found)
    return list(chosen)
