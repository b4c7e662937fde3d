"""`maps.csv`: which drawing of a folder is of which image."""

from __future__ import annotations

from pathlib import Path

from ..errors import SettingsError
from ..files import replacing, writing
from ..scoring.tables.csv_rows import CsvRows, csv_line
from ..scoring.tables.record import storable

HEADER = csv_line(("path", "map"))


class MapIndex:
    """Rows of an image's path, as a table of scores has it, and the name of its drawing, appended one by one.

    Args:
        path: of the file, which is made with its first row. One that exists is continued.

    Raises:
        SettingsError: the file is something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: set[tuple[object, object]] = set()
        data = path.read_bytes() if path.exists() else b""
        if not data:
            return
        if not data.startswith(HEADER):
            raise SettingsError(f"{path} is not an index of maps (path,map); choose another folder for the maps")
        whole = _whole_rows(data)
        if whole != data:
            with writing(path), replacing(path) as part:
                part.write_bytes(whole)
        try:
            self._rows = {(cells["path"], cells["map"]) for _, cells in CsvRows(path).rows()}
        except SettingsError as error:
            raise SettingsError(f"{error}; remove the file, and `qualiclip score --resume` writes it again") from error

    def add(self, name: str, drawing: Path) -> None:
        """Append a row, unless there is one.

        Raises:
            OSError: the file cannot be written.
        """
        row = storable(name), drawing.name
        if row in self._rows:
            return
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write((b"" if file.tell() else HEADER) + csv_line(row))
        self._rows.add(row)


def _whole_rows(data: bytes) -> bytes:
    """Cut the half row that a killed process left: an end of line within quotes does not end a row."""
    end = data.rfind(b"\n") + 1
    while data.count(b'"', 0, end) % 2:
        end = data.rfind(b"\n", 0, end - 1) + 1
    return data[:end]
