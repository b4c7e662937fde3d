"""Reads tables of scores, as this package wrote them and as pandas and spreadsheets write them again."""

from __future__ import annotations

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

SUFFIXES = (".csv", ".jsonl", ".parquet")
PART = ".part"  # of a Parquet table's rows, as JSON lines, until it is complete


@dataclass(frozen=True)
class Table:
    """A table of scores. Iterating over it reads the file and yields a `Record` per row.

    Attributes:
        path: its file.
        columns: names of the scores, in the file's order.
        others: every other column but `path`, `width`, `height` and `error`, with the reason why it is passed over.
        meta: what scored it, see `read_meta`; None if nobody says.
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
        """Whether lower scores are better, as the table itself says; None if it does not."""
        return lower_better_of(self.meta, column)


def read_table(path: str | Path) -> Table:
    """Open a table and find its scores: every column of numbers, whatever the order of the columns.

    Args:
        path: `*.csv` (with commas, semicolons or tabs), `*.jsonl` or `*.parquet`; also the `NAME.parquet.part` of a
            run that has not ended.

    Raises:
        SettingsError: no such table, or not one of scores; from iterating over it too.
    """
    path = Path(path)
    try:
        rows = open_rows(path)
        columns, others, _ = find_scores(rows)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); expected a table of scores") from error
    meta = read_meta(path)
    described = meta["columns"] if meta else {}
    broken = next((name for name in others if name in described), None)
    if broken is not None:
        raise not_scores(path, f"column {broken!r}, {others[broken]}")
    return Table(path, columns, others, meta, rows)


def open_rows(path: Path) -> Rows:
    """Open a file by its suffix and check that its columns are those of a table of scores."""
    if path.suffix == ".csv":
        return CsvRows(path)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    if path.suffix != PART:
        check_suffix(path)
    return JsonRows(path)


def check_suffix(path: Path) -> None:
    """Raise SettingsError for a name that is not a table's."""
    if path.suffix not in SUFFIXES:
        raise SettingsError(
            f"{path} is not the name of a table that can be written or read; expected one in {', '.join(SUFFIXES)}"
        )
