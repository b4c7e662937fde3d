"""CSV. A file name that is not UTF-8 stands in it with its own bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .cells import check_names, not_scores

_DELIMITERS = (",", ";", "\t")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class CsvRows:
    """A CSV file with commas, semicolons or tabs, in UTF-8 or, with a byte order mark, in UTF-16.

    Attributes:
        delimiter, encoding: as found.
    """

    unread: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.encoding = "utf-16" if file.read(2) in _UTF16 else "utf-8-sig"
        names: list[str] = []
        for delimiter in _DELIMITERS:
            self.delimiter = delimiter
            _, first = next(self._lines(), (0, []))
            found = [name.strip() for name in first]
            names = names or found
            if "path" in found:
                names = found
                break
        self.names = check_names(path, names)

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        lines = self._lines()
        next(lines)
        for number, cells in lines:
            if len(cells) != len(self.names):
                raise not_scores(
                    self.path,
                    f"line {number} has {len(cells)} cells for {len(self.names)} columns; "
                    "if a run was stopped there, go on with it by --resume",
                )
            yield f"line {number}", dict(zip(self.names, cells, strict=True))

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        # With UTF-8, undecodable bytes pass through to the file name.
        errors = "strict" if self.encoding == "utf-16" else "surrogateescape"
        with self.path.open(encoding=self.encoding, errors=errors, newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter)
            try:
                for cells in reader:
                    if cells:  # not an empty line
                        yield reader.line_num, cells
            except csv.Error as error:
                raise not_scores(self.path, f"line {reader.line_num}: {error}") from error
            except UnicodeError as error:
                raise not_scores(self.path, f"after line {reader.line_num}: {error}") from error


def csv_line(cells: Iterable[object], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    # Python 3.11 quotes the characters of the line terminator: with "\r\n", a carriage return in a name ends no row.
    csv.writer(text, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"
