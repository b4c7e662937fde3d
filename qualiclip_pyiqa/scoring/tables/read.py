"""Read tables of scores as written by this package, or rewritten by pandas and spreadsheets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SettingsError
from .cells import Rows, find_scores, not_scores, read_record
from .csv_rows import CsvRows
from .json_rows import JsonRows
from .meta import lower_better_of, read_meta
from .parquet_rows import ParquetRows
from .record import Record

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".jsonl", ".parquet")
PART = ".part"  # suffix of an unfinished Parquet table's rows in JSON lines


@dataclass(frozen=True)
class Table:
    """A table of scores. Iterating over it reads the file and yields a `Record` per row.

    Attributes:
        path: its file.
        columns: names of the scores, in file order.
        others: every column but those and `path`, `width`, `height` and `error`, with the reason why it is ignored.
        meta: its description, see `read_meta`; None if there is none.
    """

    path: Path
    columns: tuple[str, ...]
    others: Mapping[str, str]
    meta: dict[str, Any] | None
    _rows: Rows

    def __iter__(self) -> Iterator[Record]:
        for where, cells in self._rows.rows():
            yield read_record(self.path, where, cells, self.columns)

    def lower_better(self, column: str) -> bool | None:
        """Return whether lower scores are better according to the table's description; None if not stated."""
        return lower_better_of(self.meta, column)


def read_table(path: str | Path) -> Table:
    """Open a table and find its scores: every column of numbers, in any order.

    Args:
        path: `*.csv` (with commas, semicolons or tabs), `*.jsonl`, `*.parquet`, or the `NAME.parquet.part` of an
            unfinished run.

    Raises:
        SettingsError: no such table, or not a table of scores. Iterating over the table raises it too.
    """
    path = Path(path)
    try:
        rows = open_rows(path)
        columns, others, _ = find_scores(rows)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror or error}); {_unfinished(path) or 'expected a table of scores'}"
        ) from error
    if unfinished := _unfinished(path):
        logger.warning("%s lacks rows: %s", path, unfinished)
    meta = read_meta(path)
    described = meta["columns"] if meta else {}
    broken = next((name for name in others if name in described), None)
    if broken is not None:
        raise not_scores(path, f"column {broken!r}, {others[broken]}")
    return Table(path, columns, others, meta, rows)


def _unfinished(path: Path) -> str:
    """Describe the rows that a killed run has left beside a Parquet table; empty if there are none."""
    part = path.with_name(path.name + PART)
    if path.suffix != ".parquet" or not part.is_file():
        return ""
    return f"{part.name} beside it has the rows of an unfinished run; complete it with --resume, or read that file"


def open_rows(path: Path) -> Rows:
    """Open a table file by its suffix, and check its columns."""
    if path.suffix == ".csv":
        return CsvRows(path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    if path.suffix != PART:
        path.stat()  # of a path that does not exist, the suffix is not the fault
        check_suffix(path)
    return JsonRows(path)


def check_suffix(path: Path) -> None:
    """Raise SettingsError unless a path has the suffix of a table."""
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"{path} has suffix {path.suffix!r}; expected a table with one of {', '.join(SUFFIXES)}")
