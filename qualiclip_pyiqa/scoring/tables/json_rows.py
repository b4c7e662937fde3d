"""Tables in JSON lines. File names that are not UTF-8 are stored with Python's surrogate escapes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from .cells import check_names, not_scores, shown

_BOM = b"\xef\xbb\xbf"


class JsonRows:
    """A file of JSON lines: one object per line; keys may differ between lines."""

    unread: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            first = file.readline().removeprefix(_BOM)
        self.names = check_names(path, list(self._row(1, first))) if first else ()

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if not line.isspace():
                    yield f"line {number}", self._row(number, line)

    def _row(self, number: int, line: bytes) -> dict[str, object]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise not_scores(self.path, f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise not_scores(self.path, f"line {number} is {shown(repr(row))}, not an object")
        if "path" not in row:
            raise not_scores(self.path, f"line {number} has no 'path'; its keys: {shown(', '.join(row) or 'none')}")
        return row


def json_line(cells: Mapping[str, object]) -> bytes:
    """Encode one row."""
    return json.dumps(cells).encode() + b"\n"
