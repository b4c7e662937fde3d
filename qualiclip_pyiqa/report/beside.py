"""The folder of previews beside a page: written aside, put in place with the page, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import SettingsError
from ..files import writing
from .previews import preview_suffix
from .text import link

#: File that marks a folder as one that a report made, and may replace.
MARKER = "made-by-qualiclip-report.txt"

_FOLDER_SIZE = 1000  # previews in a subfolder


def files_folder(output: Path) -> Path:
    """Return the folder of the previews beside a page.

    Example:
        >>> files_folder(Path("out/report.html")).as_posix()
        'out/report_files'
    """
    return output.with_name(f"{output.stem}_files")


def check_folder(folder: Path, force: bool) -> None:
    """Raise SettingsError if a folder cannot be made here, or only by replacing something.

    Args:
        folder: the folder of a page.
        force: whether the folder of an earlier report may be replaced.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not (folder / MARKER).is_file():
        raise SettingsError(f"{folder} is not the folder of an earlier report; move it, or choose another name")
    if not force:
        raise SettingsError(f"{folder} exists already; pass --force to replace it, or choose another name")


class PreviewFolder:
    """A context in which previews are written, and whose folder is in place from `commit` on.

    If the block raises, an earlier folder is as it was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = secrets.token_hex(6)
        self._part, self._old = (folder.with_name(f"{folder.name}.{token}.{what}") for what in ("part", "old"))
        self._committed = False

    def __enter__(self) -> PreviewFolder:
        with writing(self.folder):
            self._part.mkdir()
            (self._part / MARKER).write_text("Pictures of the page beside this folder. It is lost without them.\n")
        return self

    def write(self, row: int, data: bytes) -> None:
        """Write the preview of a row."""
        file = self._part / _place(row)
        with writing(self.folder):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)

    def address(self, row: int) -> str:
        """Return the address of a row's preview, from the page."""
        return link(f"{self.folder.name}/{_place(row)}", Path())

    def commit(self) -> None:
        """Put the folder in place of an earlier one, which is removed when the block has succeeded."""
        with writing(self.folder):
            if self.folder.exists():
                self.folder.rename(self._old)
            self._part.rename(self.folder)
        self._committed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with suppress(OSError):
                if self._committed:
                    shutil.rmtree(self.folder)
                if self._old.exists():
                    self._old.rename(self.folder)
        shutil.rmtree(self._part, ignore_errors=True)
        shutil.rmtree(self._old, ignore_errors=True)


def _place(row: int) -> str:
    return f"{row // _FOLDER_SIZE:03d}/{row:06d}.{preview_suffix()}"
