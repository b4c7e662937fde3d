"""CSV tables. File names that are not UTF-8 are stored as their own bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...errors import counted
from ...files import best_delimiter, text_codec
from .cells import check_names, not_scores
from .record import storable


class CsvRows:
    """A CSV file with commas, semicolons or tabs, in UTF-8, or in UTF-16 with a byte order mark.

    Attributes:
        delimiter, encoding: as detected.
    """

    unread: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.encoding, self._errors = text_codec(file.read(2))
        self.delimiter = best_delimiter(self._header, ["path"])
        self.names = check_names(path, [name.strip() for name in self._header(self.delimiter)])

    def _header(self, delimiter: str) -> list[str]:
        _, names = next(self._lines(delimiter), (0, []))
        return names

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        lines = self._lines(self.delimiter)
        next(lines)
        for number, cells in lines:
            if len(cells) != len(self.names):
                raise not_scores(
                    self.path,
                    f"line {number} has {counted(len(cells), 'cell')} for {counted(len(self.names), 'column')}; "
                    "if a run was stopped there, continue it with --resume",
                )
            yield f"line {number}", dict(zip(self.names, cells, strict=True))

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and cells of the lines that are not empty."""
        with self.path.open(encoding=self.encoding, errors=self._errors, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                for cells in reader:
                    if cells:
                        yield reader.line_num, cells
            except csv.Error as error:
                raise not_scores(self.path, f"line {reader.line_num}: {error}") from error
            except UnicodeError as error:
                raise not_scores(self.path, f"after line {reader.line_num}: {error}") from error


def csv_line(cells: Iterable[object], delimiter: str = ",") -> bytes:
    """Encode one row."""
    text = io.StringIO()
    # Python 3.11 quotes only the characters of the line terminator: "\r\n" protects a carriage return in a name.
    csv.writer(text, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return storable(text.getvalue().removesuffix("\r\n")).encode("utf-8", "surrogateescape") + b"\n"
