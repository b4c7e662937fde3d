"""Tables of scores: CSV, JSON lines or Parquet with the columns `path,width,height,<metric>...,error`.

Rows are written as they come and are in the file when `ScoreTable.write` returns, so that a run that is killed can go
on: a torn row at the end is cut off, and what stands before it is kept. CSV and JSON lines grow under their own name.
Parquet cannot grow: its rows wait as JSON lines in `NAME.parquet.part` until the table is closed.

A file name that is not UTF-8 stands in CSV with its own bytes, in JSON with Python's surrogate escapes, and in Parquet,
whose text must be UTF-8, with backslash escapes.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import SettingsError
from ..files import replacing

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

SUFFIXES = (".csv", ".jsonl", ".parquet")
_BEFORE, _AFTER = ["path", "width", "height"], ["error"]
_PARQUET_ROWS = 10_000  # rows that are converted at a time


@dataclass(frozen=True)
class Record:
    """What became of one picture.

    Attributes:
        path: as it was given; None for a picture that was no path.
        width, height: pixels, after EXIF rotation; None if it could not be decoded.
        scores: score by column; a column whose metric failed is missing.
        error: one line, or None if every metric scored the picture.
    """

    path: str | None
    width: int | None = None
    height: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


class ScoreTable:
    """A table that is being written; a context manager that completes it, or leaves it to be resumed after an error.

    Args:
        path: `*.csv`, `*.jsonl` or `*.parquet`.
        columns: names of the scores.
        resume: go on with the table that is there, if any; otherwise one that has content is an error.

    Raises:
        SettingsError: another suffix, a table that is there already, that has other columns, that another process is
            writing, or that cannot be read. OSError where it cannot be written, from `write` and the end too; what was
            written before is kept.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], resume: bool = False) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        check_suffix(self.path)
        self._parquet = self.path.suffix == ".parquet"
        self._growing = self.path.with_name(self.path.name + ".part") if self._parquet else self.path
        left = [file for file in (self.path, self._growing) if _has_content(file)]
        if left and not resume:
            raise SettingsError(f"{left[0]} is there already; pass --resume to go on with it, or choose another name")
        with writing(self.path):
            self._file = self._growing.open("ab", buffering=0)
            try:
                self._lock()
                self._begin()
            except BaseException:
                self._file.close()
                raise

    def rows(self) -> Iterator[Record]:
        """The rows that are there now."""
        return self._checked(self._growing) if _has_content(self._growing) else iter(())

    def key(self, path: str | None) -> str | None:
        """What a path is known by here, as it was given and as it is read again."""
        return utf8(path) if self._parquet and path else path

    def write(self, records: Iterable[Record]) -> None:
        line = _csv_row if self.path.suffix == ".csv" else _json_line
        data = b"".join(line(record, self.columns) for record in records)
        with writing(self.path):
            self._append(data)

    def __enter__(self) -> ScoreTable:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with writing(self.path), self._file:  # and its lock, until the table is complete
            if self._parquet and kind is None:
                _write_parquet(self.path, self.columns, self.rows())
                if fcntl is None:  # Windows removes no file that is open
                    self._file.close()
                self._growing.unlink()

    def _begin(self) -> None:
        if _has_content(self._growing):
            if not self._first_line_is_torn():
                self.rows()  # checks the columns before anything is cut
            _cut_torn_end(self._growing)
        if self._parquet and _has_content(self.path):
            # With fewer rows than the table it is a copy of it that was not finished, since rows are only added to it.
            with self._growing.open("rb") as file:
                copied = sum(1 for _ in file)
            if copied < sum(1 for _ in self._checked(self.path)):
                self._file.truncate(0)
                self._append(b"".join(_json_line(record, self.columns) for record in self._checked(self.path)))
        self.rows()  # checks the columns
        if self.path.suffix == ".csv" and not _has_content(self._growing):
            self._append(_csv_line(_names(self.columns)))

    def _first_line_is_torn(self) -> bool:
        """Whether nothing is there but the beginning of this table's first line."""
        start = _csv_line(_names(self.columns)) if self.path.suffix == ".csv" else b'{"path": '
        with self._growing.open("rb") as file:
            first = file.readline()
        return not first.endswith(b"\n") and first[: len(start)] == start[: len(first)]

    def _checked(self, file: Path) -> Iterator[Record]:
        columns, records = read_table(file)
        if columns is not None and columns != self.columns:
            raise SettingsError(
                f"{self.path} has the scores {', '.join(columns)}, not {', '.join(self.columns)}; "
                "resume with the same metrics, or choose another name"
            )
        return records

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):  # a torn row is cut off here or when the run is resumed
                self._file.truncate(before)
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), self._growing.stat()):
                raise FileNotFoundError  # it has finished in this moment, and another has begun
        except (BlockingIOError, FileNotFoundError):
            raise SettingsError(
                f"another process is writing {self.path}; wait for it, or choose another name"
            ) from None


class CsvStream:
    """A CSV table for a reader that is there now, on standard output."""

    def __init__(self, file: BinaryIO, columns: Sequence[str]) -> None:
        self._file, self.columns = file, tuple(columns)
        self._write(_csv_line(_names(columns)))

    def rows(self) -> Iterator[Record]:
        return iter(())

    def key(self, path: str | None) -> str | None:
        return path

    def write(self, records: Iterable[Record]) -> None:
        self._write(b"".join(_csv_row(record, self.columns) for record in records))

    def _write(self, data: bytes) -> None:
        with writing("standard output"):
            self._file.write(data)
            self._file.flush()

    def __enter__(self) -> CsvStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def writing(name: object) -> Iterator[None]:
    """An OSError of this block says in one line what cannot be written; a reader that has gone is as it was."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{name} cannot be written ({error.strerror or error})") from error


def utf8(path: str) -> str:
    """A path as Parquet can hold it: undecodable bytes as backslash escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"{path} is no table that can be written or read; expected a name in {', '.join(SUFFIXES)}")


def read_table(path: str | Path) -> tuple[tuple[str, ...] | None, Iterator[Record]]:
    """The names of a table's scores and its rows, read as they are asked for.

    Args:
        path: what `ScoreTable` wrote; `NAME.parquet.part` too.

    Returns:
        The columns; None where a table of JSON lines is empty and so names none.

    Raises:
        SettingsError: no such table, or not one of scores.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix != ".part":
            check_suffix(path)
        return _read_json_lines(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); expected a table of scores") from error


def write_table(path: str | Path, columns: Sequence[str], records: Iterable[Record]) -> None:
    """Write a whole table under a temporary name and give it its own at the end; an old one is replaced."""
    path = Path(path)
    check_suffix(path)
    if path.suffix == ".parquet":
        _write_parquet(path, columns, records)
        return
    with _replacing(path) as file:
        if path.suffix == ".csv":
            file.write(_csv_line(_names(columns)))
        line = _csv_row if path.suffix == ".csv" else _json_line
        file.writelines(line(record, columns) for record in records)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    with writing(path), replacing(path) as part, part.open("xb") as file:
        yield file


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _no_scores(path: Path, why: object) -> SettingsError:
    return SettingsError(f"{path} is no table of scores ({why}); expected one that `qualiclip score` wrote")


def _columns(path: Path, names: Sequence[str] | None) -> tuple[str, ...]:
    names = list(names or [])
    if names[:3] != _BEFORE or names[-1:] != _AFTER or len(names) < 5:
        raise _no_scores(path, f"columns {', '.join(names) or 'none'}")
    return tuple(names[3:-1])


def _csv_line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    # Python 3.11 puts in quotes what the row's end is made of: a carriage return in a name must not end the row either.
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"


def _names(columns: Sequence[str]) -> list[str]:
    return [*_BEFORE, *columns, *_AFTER]


def _cells(record: Record, columns: Sequence[str]) -> list[Any]:
    return [record.path, record.width, record.height, *map(record.scores.get, columns), record.error]


def _csv_row(record: Record, columns: Sequence[str]) -> bytes:
    return _csv_line(_cells(record, columns))


def _read_csv(path: Path) -> tuple[tuple[str, ...], Iterator[Record]]:
    def rows() -> Iterator[Record]:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                try:
                    scores = {name: float(row[name]) for name in columns if row[name]}
                    width, height = (int(row[name]) if row[name] else None for name in ("width", "height"))
                except (TypeError, ValueError) as error:
                    raise _no_scores(path, f"line {reader.line_num}: {error}") from error
                yield Record(row["path"] or None, width, height, scores, row["error"] or None)

    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            names = next(csv.reader(file), None)
        except csv.Error as error:
            raise _no_scores(path, error) from error
        columns = _columns(path, names)
    return columns, rows()


def _json_line(record: Record, columns: Sequence[str]) -> bytes:
    return json.dumps(dict(zip(_names(columns), _cells(record, columns), strict=True))).encode() + b"\n"


def _read_json_lines(path: Path) -> tuple[tuple[str, ...] | None, Iterator[Record]]:
    def parsed(line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _no_scores(path, error) from error
        _columns(path, list(row) if isinstance(row, dict) else None)
        return row

    def rows() -> Iterator[Record]:
        with path.open("rb") as file:
            for line in file:
                yield _record(parsed(line))

    with path.open("rb") as file:
        first = file.readline()
    return (_columns(path, list(parsed(first))) if first else None), rows()


def _record(row: dict[str, Any]) -> Record:
    fixed = {name: row.pop(name) for name in [*_BEFORE, *_AFTER]}
    return Record(scores={name: score for name, score in row.items() if score is not None}, **fixed)


def _parquet() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SettingsError("Parquet needs pyarrow: pip install pyarrow, or write .csv or .jsonl") from None
    return pyarrow


def _read_parquet(path: Path) -> tuple[tuple[str, ...], Iterator[Record]]:
    pyarrow = _parquet()
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise _no_scores(path, error) from error
    columns = _columns(path, file.schema_arrow.names)
    return columns, (_record(row) for batch in file.iter_batches(_PARQUET_ROWS) for row in batch.to_pylist())


def _write_parquet(path: Path, columns: Sequence[str], records: Iterable[Record]) -> None:
    pyarrow = _parquet()
    text, number, score = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    schema = pyarrow.schema(
        [("path", text), ("width", number), ("height", number), *((c, score) for c in columns), ("error", text)]
    )
    with _replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        rows = iter(records)
        while batch := list(islice(rows, _PARQUET_ROWS)):
            cells = [[row.path and utf8(row.path), *_cells(row, columns)[1:]] for row in batch]
            table = dict(zip(_names(columns), map(list, zip(*cells, strict=True)), strict=True))
            writer.write_table(pyarrow.Table.from_pydict(table, schema=schema))


def _cut_torn_end(path: Path) -> None:
    """Cut what follows the last whole row: a line break inside quotes (CSV) ends none."""
    end = position = quotes = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            quotes += line.count(b'"')
            # JSON lines have an even number of unescaped quotes and no line break inside a string.
            if line.endswith(b"\n") and (path.suffix != ".csv" or quotes % 2 == 0):
                end = position
    if end < position:
        with path.open("r+b") as file:
            file.truncate(end)
