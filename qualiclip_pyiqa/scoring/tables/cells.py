"""What the cells of a table mean, whatever its format: the one rule for CSV, JSON lines and Parquet.

`path`, `width`, `height` and `error` are known by name, in any order; only `path` must be there. Every other column of
numbers holds scores. Columns of text and the index that pandas writes are passed over. An empty cell, a null and a NaN
mean that there is no value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Protocol

from ...errors import SettingsError
from .record import Record

BEFORE, AFTER = ("path", "width", "height"), ("error",)
FIXED = (*BEFORE, *AFTER)
_MISSING = frozenset(("", "nan", "na", "n/a", "<na>", "null", "none"))
# An index column as pandas names it in CSV (first line), after another `read_csv`, and in Parquet.
_INDEX = re.compile(r"|index|level_0|Unnamed: \d+|__index_level_\d+__")
# The csv module reads no cell of more than 131,072 characters.
_LONGEST = 100_000


class Rows(Protocol):
    """A file of one format, opened: its columns and, as often as they are asked for, its rows.

    Attributes:
        names: the columns; of JSON lines, those of the first line.
        unread: columns that `rows` leaves out, and why they cannot hold scores.
    """

    names: tuple[str, ...]
    unread: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield for every row where it stands, such as "line 7", and its cells by column."""
        ...


def not_scores(path: Path, why: object) -> SettingsError:
    return SettingsError(f"{path} is not a table of scores ({why}); expected one that `qualiclip score` wrote")


def check_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file that has `path` and names none of them twice."""
    if "path" not in names:
        raise not_scores(path, f"no column 'path'; its columns are {shown(', '.join(names))}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise not_scores(path, f"two columns are called {twice!r}")
    return tuple(names)


def find_scores(rows: Rows) -> tuple[tuple[str, ...], dict[str, str], int]:
    """Read all rows once.

    Returns:
        The columns of scores in the file's order, every other column with the reason why it holds none, and the number
        of rows.
    """
    scores: dict[str, None] = {}
    others = dict(rows.unread)
    names: dict[str, None] = dict.fromkeys(rows.names)
    known: set[str] = set()
    count = 0

    def sort(new: Iterable[str]) -> None:
        for name in new:
            known.add(name)
            if name not in FIXED and name not in others:
                if _INDEX.fullmatch(name):
                    others[name] = "an index"
                else:
                    scores[name] = None

    sort(names)
    for where, cells in rows.rows():
        count += 1
        if not cells.keys() <= known:
            sort(name for name in cells if name not in known)
        for name in [name for name in scores if name in cells]:
            try:
                number(cells[name])
            except ValueError as error:
                others[name] = f"{where}: {error}"
                del scores[name]
    return tuple(scores), others, count


def read_record(path: Path, where: str, cells: Mapping[str, object], columns: Sequence[str]) -> Record:
    """Make a row's record. Raises SettingsError for a cell that is not what its column holds."""
    name = ""
    try:
        scores = {}
        for name in columns:
            score = number(cells.get(name))
            if score is not None:
                scores[name] = score
        image = _text(cells.get(name := "path"))
        width = _side(cells.get(name := "width"))
        height = _side(cells.get(name := "height"))
        wrong = _text(cells.get(name := "error"))
    except ValueError as error:
        raise not_scores(path, f"{where}, column {name!r}: {error}") from error
    # An empty cell may have been written as "nan".
    return Record(image, width, height, scores, None if wrong and wrong.casefold() in _MISSING else wrong)


def write_cells(record: Record, columns: Sequence[str]) -> dict[str, object]:
    """Cells by column, in the order in which this package writes them; None where there is no value."""
    error = record.error
    if error is not None and len(error) > _LONGEST:
        kept = _LONGEST - len("... (999999999 more characters)")  # so that it is not cut again
        error = f"{error[:kept]}... ({len(error) - kept} more characters)"
    return {
        "path": record.path,
        "width": record.width,
        "height": record.height,
        **{column: record.scores.get(column) for column in columns},
        "error": error,
    }


def number(cell: object) -> float | None:
    """Return the finite number of a cell, or None if it has no value. Raises ValueError for anything else."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        value = _parse(cell)
    elif isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
        try:
            value = float(cell)
        except OverflowError:
            value = math.inf
    else:
        raise ValueError(f"{shown(repr(cell))} is not a number")
    if math.isinf(value):
        raise ValueError(f"{shown(repr(cell))} is not a finite number")
    return None if math.isnan(value) else value


def _parse(text: str) -> float:
    if text.isascii() and "_" not in text:  # `float` also takes "1_000" and the digits of other scripts
        try:
            return float(text)
        except ValueError:
            pass
    if text.strip().casefold() in _MISSING:
        return math.nan
    raise ValueError(f"{shown(repr(text))} is not a number")


def shown(text: str, longest: int = 80) -> str:
    """Text for an error message: cut where it is long."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _side(cell: object) -> int | None:
    """A width or height, which pandas writes as `160.0` where others are missing."""
    value = number(cell)
    if value is None:
        return None
    if value < 1 or not value.is_integer():
        raise ValueError(f"{value:g} is not a number of pixels")
    return int(value)


def _text(cell: object) -> str | None:
    if isinstance(cell, bytes):
        cell = os.fsdecode(cell)
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if not isinstance(cell, str):
        raise ValueError(f"{shown(repr(cell))} is not text")
    return cell
