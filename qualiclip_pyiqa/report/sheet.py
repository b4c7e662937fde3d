"""The rows and columns of a report: those of one run, or two runs side by side with their differences."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ..errors import SettingsError
from ..images.identity import image_key
from ..scoring.tables import Record
from .runs import Run

CHANGE = "change"


@dataclass(frozen=True)
class Column:
    """A column of a report.

    Attributes:
        name: as in the table, followed by the run if there are two.
        label: short name for a narrow place.
        lower_better: whether a lower score is better; of a change: whether a negative one is an improvement.
        run: index of the run; None for the change from the first run to the second.
        source: the run's own name of the column.
        limits: range of the score, or of its change, if it is known.
    """

    name: str
    label: str
    lower_better: bool
    run: int | None
    source: str
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """An image of a report.

    Attributes:
        records: its record in each run; None in a run that lacks it.
        files: its file in each run; None if there is none.
        values: score by column; None for a missing score.
    """

    records: tuple[Record | None, ...]
    files: tuple[str | None, ...]
    values: tuple[float | None, ...]

    @property
    def record(self) -> Record:
        """The record of the last run that has the image."""
        return next(record for record in reversed(self.records) if record is not None)

    @property
    def file(self) -> str | None:
        """The file that the page shows: that of the last run that has one."""
        return next((file for file in reversed(self.files) if file is not None), None)

    @property
    def error(self) -> str | None:
        errors = dict.fromkeys(record.error for record in self.records if record and record.error)
        return "; ".join(errors) or None


@dataclass(frozen=True)
class Sheet:
    """Columns and rows.

    Attributes:
        runs: the one or two runs.
        pairs: for two runs, the indices (first, second, change) of the columns that both have.
        joined: for two runs, how their images were matched.
    """

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    pairs: tuple[tuple[int, int, int], ...] = ()
    joined: str = ""
    names: tuple[str, ...] = ()


def sheet_of(run: Run) -> Sheet:
    """Return the sheet of one run."""
    labels = _labels(run.columns)
    columns = tuple(
        Column(name, label, run.lower_better[name], 0, name, run.score_range(name))
        for name, label in zip(run.columns, labels, strict=True)
    )
    rows = tuple(
        Row((record,), (run.file_of(record),), tuple(record.scores.get(name) for name in run.columns))
        for record in run.records
    )
    return Sheet((run,), columns, rows, names=(run.name,))


def compare(first: Run, second: Run) -> Sheet:
    """Put two runs side by side: the columns of both, and the change of each column that both have.

    Images are matched by their path; if no path is in both, by their path below the folder that all images of a run
    share; else by the same without suffix, as after a conversion. If each run has one column, these are compared
    whatever their names.

    Raises:
        SettingsError: no image is in both runs, a run has an image twice, no column is in both, or two that are
            compared differ in direction.
    """
    shared = _shared_columns(first, second)
    keys, joined = _matching(first, second)
    names = _run_names(first, second)
    columns: list[Column] = []
    pairs: list[tuple[int, int, int]] = []
    labels = {
        run: dict(zip(each.columns, _labels(each.columns), strict=True)) for run, each in enumerate((first, second))
    }

    def add(
        run: int | None, source: str, name: str, label: str, lower: bool, limits: tuple[float, float] | None
    ) -> int:
        columns.append(Column(name, label, lower, run, source, limits))
        return len(columns) - 1

    runs = (first, second)
    for one, two in shared:
        label = labels[0][one] if one == two else f"{labels[0][one]} to {labels[1][two]}"
        lower = first.lower_better[one]
        limits = _change_limits(first.score_range(one), second.score_range(two))
        change = add(None, one, f"{one} · {CHANGE}", f"{label} · {CHANGE}", lower, limits)
        places = [
            add(run, source, f"{source} · {names[run]}", f"{labels[run][source]} · {names[run]}", lower,
                runs[run].score_range(source))
            for run, source in enumerate((one, two))
        ]  # fmt: skip
        pairs.append((places[0], places[1], change))
    for run, each in enumerate(runs):
        taken = {pair[run] for pair in shared}
        for source in each.columns:
            if source not in taken:
                add(run, source, f"{source} · {names[run]}", f"{labels[run][source]} · {names[run]}",
                    each.lower_better[source], each.score_range(source))  # fmt: skip
    rows = _joined_rows(runs, keys, columns, pairs)
    return Sheet(runs, tuple(columns), rows, tuple(pairs), joined, names)


def check_comparable(first: Run, second: Run) -> None:
    """Raise SettingsError if two runs, of which neither needs its scores yet, cannot be compared; see `compare`."""
    _shared_columns(first, second)
    _matching(first, second)


def _change_limits(before: tuple[float, float] | None, after: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the largest fall and the largest rise of a score, given its range in each run."""
    return None if before is None or after is None else (after[0] - before[1], after[1] - before[0])


def _joined_rows(
    runs: tuple[Run, Run],
    keys: tuple[Sequence[str], Sequence[str]],
    columns: Sequence[Column],
    pairs: Iterable[tuple[int, int, int]],
) -> tuple[Row, ...]:
    found: dict[str, list[Record | None]] = {}
    for run in (0, 1):
        for key, record in zip(keys[run], runs[run].records, strict=True):
            found.setdefault(key, [None, None])[run] = record
    changes = {change: (one, two) for one, two, change in pairs}
    rows = []
    for records in found.values():
        values: list[float | None] = []
        for column in columns:
            scored = records[column.run] if column.run is not None else None
            values.append(scored.scores.get(column.source) if scored else None)
        for change, (one, two) in changes.items():
            before, after = values[one], values[two]
            values[change] = None if before is None or after is None else after - before
        files = tuple(run.file_of(record) if record else None for run, record in zip(runs, records, strict=True))
        rows.append(Row(tuple(records), files, tuple(values)))
    return tuple(rows)


def _shared_columns(first: Run, second: Run) -> list[tuple[str, str]]:
    shared = [(name, name) for name in first.columns if name in second.columns]
    if not shared and len(first.columns) == len(second.columns) == 1:
        shared = [(first.columns[0], second.columns[0])]
    if not shared:
        raise SettingsError(
            f"{first.source} has the scores {', '.join(first.columns)} and {second.source} "
            f"{', '.join(second.columns)}; expected a score that both have, or one score each"
        )
    for one, two in shared:
        if first.lower_better[one] != second.lower_better[two]:
            raise SettingsError(
                f"a lower {one} is better in only one of {first.source} and {second.source}; "
                "expected scores of the same direction"
            )
    return shared


def _matching(first: Run, second: Run) -> tuple[tuple[Sequence[str], Sequence[str]], str]:
    """Return the keys by which images are matched, and how in words."""
    ways: tuple[tuple[str, Callable[[Run], list[str]]], ...] = (
        ("path", _by_path),
        ("path below each run's folder", _by_place),
        ("path below each run's folder, without suffix", lambda run: [os.path.splitext(k)[0] for k in _by_place(run)]),  # noqa: PTH122
    )
    for words, way in ways:
        one, two = way(first), way(second)
        if not set(one).isdisjoint(two):
            for run, keys in ((first, one), (second, two)):
                twice = next((key for key, count in Counter(keys).items() if count > 1), None)
                if twice is not None:
                    raise SettingsError(f"{run.source} has two rows of {twice!r}; expected one per image")
            return (one, two), words
    raise SettingsError(f"no image of {first.source} is in {second.source}; expected two tables of the same images")


def _by_path(run: Run) -> list[str]:
    return [image_key(record.path) if record.path else f"row {row}" for row, record in enumerate(run.records)]


def _by_place(run: Run) -> list[str]:
    paths = [PurePath(record.path or f"row {row}") for row, record in enumerate(run.records)]
    parents = [path.parent.parts for path in paths]
    common = _common_start(parents)
    return [PurePath(*path.parts[common:]).as_posix() for path in paths]


def _run_names(first: Run, second: Run) -> tuple[str, str]:
    """Return different names of the runs."""
    if first.name != second.name:
        return first.name, second.name
    folders = [run.source.absolute().parent.name for run in (first, second)]
    if folders[0] != folders[1] and all(folders):
        return f"{folders[0]}/{first.name}", f"{folders[1]}/{second.name}"
    return f"{first.name} (first)", f"{second.name} (second)"


def _labels(columns: Sequence[str]) -> list[str]:
    """Shorten names by the metric that all of them share: `METRIC.sharpness` becomes `sharpness`."""
    metrics = {name.rpartition(".")[0] for name in columns}
    if len(columns) > 1 and len(metrics) == 1 and "" not in metrics:
        (metric,) = metrics
        return [name.removeprefix(f"{metric}.") for name in columns]
    return list(columns)


def common_prefix(texts: Iterable[str]) -> str:
    """Return the folder, with its last slash, that all of these paths begin with.

    Example:
        >>> common_prefix(["a/b/c.png", "a/bc.png"])
        'a/'
    """
    known = list(texts)
    start = known[0][: _common_start(known)] if known else ""
    return start[: start.rfind("/") + 1]


def _common_start(sequences: Sequence[str] | Sequence[tuple[str, ...]]) -> int:
    """Return how many items all of these sequences have in common at their beginning."""
    low, high = (min(sequences), max(sequences)) if sequences else ("", "")
    return next((at for at, (one, two) in enumerate(zip(low, high, strict=False)) if one != two), len(low))


def by_column(rows: Iterable[Row], column: int) -> list[float]:
    """Return a column's scores; NaN for missing ones."""
    return [float("nan") if (value := row.values[column]) is None else value for row in rows]
