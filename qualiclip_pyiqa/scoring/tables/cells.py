"""Interpret the cells of a table, by the same rules for CSV, JSON lines and Parquet.

`path`, `width`, `height` and `error` are recognised by name, in any order; only `path` is required. Every other column
of numbers holds scores. Columns of text and pandas' index are ignored. Empty cells, nulls and NaN are missing values.
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
from .record import Record, is_file_name, storable

BEFORE, AFTER = ("path", "width", "height"), ("error",)
FIXED = (*BEFORE, *AFTER)
_MISSING = frozenset(("", "nan", "na", "n/a", "<na>", "null", "none"))
# Names that pandas gives an index column: none or these in CSV, `Unnamed: 0` read again, the last in Parquet.
_INDEX = re.compile(r"|index|level_0|Unnamed: \d+|__index_level_\d+__")
# The csv module reads no cell of more than 131,072 characters.
_LONGEST = 100_000


class Rows(Protocol):
    """An opened table file of one format, whose rows can be read repeatedly.

    Attributes:
        names: the columns; for JSON lines, those of the first line.
        unread: columns that `rows` omits, with the reason why they cannot hold scores.
    """

    names: tuple[str, ...]
    unread: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield the location of every row, such as "line 7", and its cells by column."""
        ...


def not_scores(path: Path, why: object) -> SettingsError:
    """Return the error for a file that is not a valid table of scores."""
    return SettingsError(f"{path} is not a table of scores ({why}); expected one that `qualiclip score` wrote")


def check_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file. Raise SettingsError unless they contain `path` and no duplicates."""
    if not names:
        raise not_scores(path, "it is empty")
    if "path" not in names:
        raise not_scores(path, f"no column 'path'; its columns are {shown(', '.join(names))}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise not_scores(path, f"two columns are called {twice!r}")
    return tuple(names)


def find_scores(rows: Rows) -> tuple[tuple[str, ...], dict[str, str], int]:
    """Read all rows once to find the columns of scores.

    Returns:
        The columns of scores in file order; every other column with the reason why it holds none; the number of rows.
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
    """Parse a row. Raise SettingsError for a cell that is invalid in its column."""
    name = ""
    try:
        scores = {}
        for name in columns:
            score = number(cells.get(name))
            if score is not None:
                scores[name] = score
        image = _file_name(cells.get(name := "path"))
        width = _side(cells.get(name := "width"))
        height = _side(cells.get(name := "height"))
        wrong = _text(cells.get(name := "error"))
    except ValueError as error:
        raise not_scores(path, f"{where}, column {name!r}: {error}") from error
    # Other programs may write an empty cell as "nan".
    return Record(image, width, height, scores, None if wrong and wrong.casefold() in _MISSING else wrong)


def write_cells(record: Record, columns: Sequence[str]) -> dict[str, object]:
    """Return a record's cells by column, in the order in which they are written; None for missing values."""
    error = record.error
    if error is not None and len(error) > _LONGEST:
        kept = _LONGEST - len("... (999999999 more characters)")  # room for any count, so that it is not cut again
        error = f"{error[:kept]}... ({len(error) - kept} more characters)"
    return {
        "path": None if record.path is None else storable(record.path),
        "width": record.width,
        "height": record.height,
        **{column: record.scores.get(column) for column in columns},
        "error": error,
    }


def number(cell: object) -> float | None:
    """Return the finite number in a cell, or None for a missing value. Raise ValueError for anything else."""
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
    if text.isascii() and "_" not in text:  # `float` also accepts "1_000" and digits of other scripts
        try:
            return float(text)
        except ValueError:
            pass
    if text.strip().casefold() in _MISSING:
        return math.nan
    raise ValueError(f"{shown(repr(text))} is not a number")


def shown(text: str, longest: int = 80) -> str:
    """Shorten a text for an error message."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _side(cell: object) -> int | None:
    """Parse a width or height, which pandas writes as `160.0` if others in the column are missing."""
    value = number(cell)
    if value is None:
        return None
    if value < 1 or not value.is_integer():
        raise ValueError(f"{value:g} is not a number of pixels")
    return int(value)


def _file_name(cell: object) -> str | None:
    path = _text(cell)
    if path is not None and not is_file_name(path):
        raise ValueError(f"{shown(repr(path))} is not a file name")
    return path


def _text(cell: object) -> str | None:
    if isinstance(cell, bytes):
        cell = os.fsdecode(cell)
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if not isinstance(cell, str):
        raise ValueError(f"{shown(repr(cell))} is not text")
    return cell
