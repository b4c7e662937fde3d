"""Match image names in a table to files."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ..errors import SettingsError
from ..files import encoding_hint
from ..images.convert import source_name
from ..images.formats import has_image_suffix
from ..images.paths import find_images


class FileNames:
    """Finds files by their names in a table.

    A name matches the file `folder / name`; else the only file with that path below the folder in another case or with
    the other path separator; else, if it has no suffix, the only image in the folder or its subfolders with that stem.
    Without a folder, a name matches the only path that ends with it.

    Args:
        folder: folder of the files. None: search all of `among`.
        among: paths to search, which need not exist. None: search the disk below `folder`.
    """

    def __init__(self, folder: Path | None, among: Sequence[str] | None = None) -> None:
        if folder is None and among is None:
            raise SettingsError("image names cannot be matched without a folder or paths; pass one of them")
        self.folder, self.among = folder, among

    def find(self, name: str, where: str) -> tuple[Path, bool]:
        """Find a file.

        Args:
            name: the name in the table.
            where: location of the name, for the error message.

        Returns:
            The path, and whether the name lacks its suffix.

        Raises:
            SettingsError: no such file, several, or a name that leads out of the folder.
        """
        if self.folder is not None and not self._is_below(name):
            raise SettingsError(
                f"{where}: {source_name(name)} lies outside {source_name(self.folder)}; expected an image {self._place}"
            )
        if self.among is None and self.folder is not None and os.path.isfile(self.folder / name):  # noqa: PTH113
            return self.folder / name, False
        parts = _parts(name)
        folded = [part.casefold() for part in parts]
        for by_stem, index in ((False, self._by_name), (True, self._by_stem)):
            below = self.folder is not None and not by_stem  # the name must be the whole path below the folder
            alike = [
                (path, whole)
                for path, whole in index.get(folded[-1] if folded else "", [])
                if [part.casefold() for part in whole[-len(parts) :]] == folded
                and (not below or len(whole) == len(parts))
            ]
            same_case = [each for each in alike if each[1][-len(parts) :] == parts]
            whole_path = [each for each in same_case if each[1] == parts]
            found = next((each for each in (whole_path, same_case, alike) if len(each) == 1), alike)
            if len(found) > 1:
                both = " and ".join(source_name(path) for path, _ in found[:2])
                raise SettingsError(f"{where}: {source_name(name)} may be {both}; add its folder and suffix")
            if found:
                return Path(found[0][0]), by_stem
        raise SettingsError(
            f"{where}: {source_name(name)} not found; expected an image {self._place}{encoding_hint(name)}"
        )

    def _is_below(self, name: str) -> bool:
        """Return whether a name, with `..` or an absolute path in it, stays in the folder as it is written."""
        folder = os.path.abspath(self.folder or "")  # noqa: PTH100 - links are the user's own
        path = os.path.abspath(os.path.join(folder, name.replace("\\", "/")))  # noqa: PTH100, PTH118
        return path.startswith(os.path.join(folder, ""))  # noqa: PTH118

    @property
    def _place(self) -> str:
        table = "" if self.among is None else "in the table of scores"
        folder = "" if self.folder is None else f"below {self.folder}"
        return " ".join(filter(None, (table, folder)))

    @cached_property
    def _files(self) -> list[tuple[str, list[str]]]:
        """The paths to search, and the parts of their names below the folder."""
        if self.folder is None:
            return [(path, _parts(path)) for path in dict.fromkeys(self.among or ())]
        paths = find_images([str(self.folder)]).paths if self.among is None else dict.fromkeys(self.among)
        root = _parts(os.path.abspath(self.folder))  # noqa: PTH100
        whole = [(path, _parts(os.path.abspath(path))) for path in paths]  # noqa: PTH100
        return [(path, parts[len(root) :]) for path, parts in whole if parts[: len(root)] == root]

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[str, list[str]]]]:
        index: dict[str, list[tuple[str, list[str]]]] = {}
        for path, parts in self._files:
            index.setdefault(parts[-1].casefold() if parts else "", []).append((path, parts))
        return index

    @cached_property
    def _by_stem(self) -> dict[str, list[tuple[str, list[str]]]]:
        index: dict[str, list[tuple[str, list[str]]]] = {}
        for path, parts in self._files:
            if parts and has_image_suffix(path):
                stem = os.path.splitext(parts[-1])[0]  # noqa: PTH122
                index.setdefault(stem.casefold(), []).append((path, [*parts[:-1], stem]))
        return index


def _parts(name: str) -> list[str]:
    """Split a name into folders and file name, by either separator."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
