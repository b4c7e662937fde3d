"""Write tables of scores. Rows are in the file when `ScoreTable.write` returns, so a killed run can be resumed.

CSV and JSON lines grow in place; an incomplete last row is removed when the table is resumed. Parquet files cannot
grow: rows are stored as JSON lines in `NAME.parquet.part` until the table is closed. The description
(`NAME.meta.json`) is written before the first row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ...errors import SettingsError
from ...files import replacing, writing
from ...images.identity import image_key
from .cells import FIXED, find_scores, not_scores, read_record, write_cells
from .csv_rows import CsvRows, csv_line
from .json_rows import json_line
from .meta import UNKNOWN, continue_meta, meta_path, read_meta, write_meta
from .parquet_rows import require_pyarrow, write_parquet
from .read import PART, check_suffix, open_rows
from .record import Record, utf8

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class ScoreTable:
    """A table being written; a context manager that completes it, or after an error leaves it to be resumed.

    Args:
        path: `*.csv`, `*.jsonl` or `*.parquet`.
        columns: names of the scores.
        resume: continue an existing table; without it, an existing table with content is an error. New rows follow the
            order of the file's columns, and leave columns added by the user empty.
        meta: the description of the scorer, from `Scorer.describe`. A resumed table must have been started with the
            same, except for settings that change no score.

    Raises:
        SettingsError: another suffix; a table that exists already, has other columns, was started with other settings,
            is being written by another process, or cannot be read.
        OSError: the table cannot be written; `write` and leaving the context raise it too. Earlier rows are kept.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str],
        resume: bool = False,
        meta: Mapping[str, object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        self.meta = None if meta is None else dict(meta)
        check_suffix(self.path)
        self._parquet = self.path.suffix == ".parquet"
        if self._parquet:
            require_pyarrow()  # fail before hours of scoring
        self._growing = self.path.with_name(self.path.name + PART) if self._parquet else self.path
        left = [file for file in (self.path, self._growing) if _has_content(file)]
        if left and not resume:
            raise SettingsError(f"{left[0]} exists already; pass --resume to continue it, or choose another name")
        self._names: tuple[str, ...] = (*FIXED[:3], *self.columns, *FIXED[3:])
        self._delimiter = ","
        self._described = False  # whether there is a description of this run alone
        with writing(self.path):
            self._file, created = _open_to_append(self._growing)
            try:
                self._lock()
                self._begin()
            except BaseException:
                empty = os.fstat(self._file.fileno()).st_size == 0
                self._file.close()
                if created and empty:
                    self._growing.unlink(missing_ok=True)
                if empty and self._described:
                    meta_path(self.path).unlink(missing_ok=True)
                raise

    def rows(self) -> Iterator[Record]:
        """Read the rows written so far."""
        return self._read(self._growing) if _has_content(self._growing) else iter(())

    def key(self, path: str | None) -> str | None:
        """Return the `image_key` of a path as stored in this table."""
        return None if path is None else image_key(utf8(path) if self._parquet else path)

    def write(self, records: Iterable[Record]) -> None:
        """Append rows to the file."""
        data = b"".join(map(self._line, records))
        with writing(self.path):
            self._append(data)

    def __enter__(self) -> ScoreTable:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with writing(self.path), self._file:  # keeps the lock until the table is complete
            if self._parquet and kind is None:
                with replacing(self.path) as part, part.open("xb") as file:
                    write_parquet(file, self.columns, self.rows(), self.meta)
                if fcntl is None:  # Windows cannot remove an open file
                    self._file.close()
                self._growing.unlink()

    def _begin(self) -> None:
        """Check an existing table before changing it, then prepare it for new rows."""
        if _has_content(self._growing):
            if not self._first_line_is_torn():
                self._check_names(self._growing)
            _cut_torn_end(self._growing)
        copied = _has_content(self._growing) and self._check_table(self._growing)
        finished = self._parquet and _has_content(self.path) and self._check_table(self.path)
        self._describe(rows=max(copied, finished))
        # Rows are only added to the copy, so with fewer rows than the table it is an unfinished copy.
        if copied < finished:
            self._file.truncate(0)
            self._append(b"".join(map(self._line, self._read(self.path))))
        if self.path.suffix == ".csv" and not _has_content(self._growing):
            self._append(csv_line(self._names))

    def _check_names(self, file: Path) -> None:
        rows = open_rows(file)
        missing = [name for name in self.columns if name not in rows.names]
        if missing:
            found = [name for name in rows.names if name not in FIXED]
            raise self._other_scores(file, found)
        if isinstance(rows, CsvRows):
            if rows.encoding == "utf-16":
                raise SettingsError(f"{file} is in UTF-16; convert it to UTF-8 to resume it")
            absent = next((name for name in FIXED if name not in rows.names), None)
            if absent is not None:
                raise SettingsError(f"{file} has no column {absent!r} for new rows; add it, or choose another name")
            self._names, self._delimiter = rows.names, rows.delimiter

    def _check_table(self, file: Path) -> int:
        """Check the columns of a table in all rows; return the number of rows."""
        self._check_names(file)
        rows = open_rows(file)
        found, others, count = find_scores(rows)
        broken = next((name for name in self.columns if name in others), None)
        if broken is not None:
            raise not_scores(file, f"column {broken!r}, {others[broken]}")
        meta = read_meta(self.path)
        theirs = found if meta is None else tuple(meta["columns"])
        if set(theirs) != set(self.columns):
            raise self._other_scores(file, theirs)
        lost = [name for name in {*found, *others} - set(self.columns) if others.get(name) != "an index"]
        if lost and file.suffix == ".parquet":
            raise SettingsError(
                f"{file} has additional columns ({', '.join(sorted(lost))}), which a resumed Parquet table would lose; "
                "remove them, or choose another name"
            )
        return count

    def _other_scores(self, file: Path, found: Sequence[str]) -> SettingsError:
        return SettingsError(
            f"{file} has the scores {', '.join(found) or '(none)'}, not {', '.join(self.columns)}; "
            "resume with the same metrics, or choose another name"
        )

    def _describe(self, rows: int) -> None:
        """Write the description; with rows in the table, check that it continues the one before."""
        before = read_meta(self.path) if rows else None
        if rows and self.meta is not None:
            if before is None:
                logger.warning(
                    "%s has %d rows but no %s, so they may have been scored with other settings",
                    self.path,
                    rows,
                    meta_path(self.path).name,
                )
                self.meta[UNKNOWN] = rows
            else:
                self.meta, allowed = continue_meta(self.path, before, self.meta)
                if allowed:
                    logger.warning("%s continues with other settings: %s", self.path, "; ".join(allowed))
        elif rows:
            self.meta = before
        if self.meta != before or not rows:
            write_meta(self.path, self.meta)
            self._described = not rows

    def _line(self, record: Record) -> bytes:
        cells = write_cells(record, self.columns)
        if self.path.suffix == ".csv":
            return csv_line(map(cells.get, self._names), self._delimiter)
        return json_line(cells)

    def _first_line_is_torn(self) -> bool:
        """Return whether the file contains only the beginning of this table's first line."""
        start = csv_line(self._names) if self.path.suffix == ".csv" else b'{"path": '
        with self._growing.open("rb") as file:
            first = file.readline()
        return not first.endswith(b"\n") and first[: len(start)] == start[: len(first)]

    def _read(self, file: Path) -> Iterator[Record]:
        for where, cells in open_rows(file).rows():
            yield read_record(file, where, cells, self.columns)

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):  # else the incomplete row is removed when the run is resumed
                self._file.truncate(before)
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), self._growing.stat()):
                raise FileNotFoundError  # another run has just removed it, or a third one has recreated it
        except (BlockingIOError, FileNotFoundError):
            raise SettingsError(
                f"another process is writing {self.path}; wait for it, or choose another name"
            ) from None
        except OSError as error:  # the file system has no locks
            logger.warning(
                "%s cannot be locked (%s): do not let another run write it at the same time",
                self.path,
                error.strerror or error,
            )


class CsvStream:
    """A CSV table on standard output."""

    def __init__(self, file: BinaryIO, columns: Sequence[str]) -> None:
        self._file, self.columns = file, tuple(columns)
        self._write(csv_line((*FIXED[:3], *self.columns, *FIXED[3:])))

    def rows(self) -> Iterator[Record]:
        return iter(())

    def key(self, path: str | None) -> str | None:
        return None if path is None else image_key(path)

    def write(self, records: Iterable[Record]) -> None:
        self._write(b"".join(csv_line(write_cells(record, self.columns).values()) for record in records))

    def _write(self, data: bytes) -> None:
        with writing("standard output"):
            self._file.write(data)
            self._file.flush()

    def __enter__(self) -> CsvStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def write_table(
    path: str | Path,
    columns: Sequence[str],
    records: Iterable[Record],
    meta: Mapping[str, object] | None = None,
) -> None:
    """Write a whole table and its description `meta`; an existing table is replaced only at the end."""
    path = Path(path)
    check_suffix(path)
    with writing(path), replacing(path) as part:
        with part.open("xb") as file:
            if path.suffix == ".parquet":
                write_parquet(file, columns, records, meta)
            elif path.suffix == ".csv":
                file.write(csv_line((*FIXED[:3], *columns, *FIXED[3:])))
                file.writelines(csv_line(write_cells(record, columns).values()) for record in records)
            else:
                file.writelines(json_line(write_cells(record, columns)) for record in records)
        write_meta(path, meta)


def _open_to_append(path: Path) -> tuple[BinaryIO, bool]:
    """Open a file unbuffered; return it, and whether it is new."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.fdopen(os.open(path, flags | os.O_EXCL, 0o666), "ab", buffering=0), True
    except FileExistsError:
        return path.open("ab", buffering=0), False


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _cut_torn_end(path: Path) -> None:
    """Remove what follows the last complete row; in CSV, a quoted line break does not end one."""
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
