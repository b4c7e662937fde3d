"""Find images: expand patterns, and turn files and folders into one list of paths without duplicates.

Links to folders are followed, but no folder is entered twice, so loops of links end. Hidden entries (`.name`, and
folders of the system such as `__MACOSX`) are found only if named explicitly.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ..errors import SettingsError
from .formats import has_image_suffix

_Seen: TypeAlias = set[tuple[int, int]]  # device and inode of folders

# Folders of thumbnails and deleted files from macOS archives, Synology, QNAP and Windows.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information"})
_WILDCARDS = ("*", "?", "[")


@dataclass
class FoundPaths:
    """The result of `find_images`.

    Attributes:
        paths: images, in the order of the arguments, and sorted by name within folders. Explicitly named files are
            always included; their faults are reported when they are opened.
        unreadable: folder that cannot be listed -> reason.
        others: number of files skipped in folders because their suffix is not an image's.
        hidden: number of hidden files and folders skipped in folders; a folder counts once.
        repeated: number of names left out since they were found or given before.
        folders: the arguments that are folders, in their order.
    """

    paths: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    others: int = 0
    hidden: int = 0
    repeated: int = 0
    folders: list[str] = field(default_factory=list)


def find_images(arguments: Iterable[str]) -> FoundPaths:
    """Find the images below folders, and keep files.

    Args:
        arguments: paths of files and folders, not patterns. Names may contain line breaks and undecodable bytes.

    Returns:
        The paths, without duplicates.
    """
    found = FoundPaths()
    seen: _Seen = set()
    paths: dict[str, None] = {}
    folders: dict[str, None] = {}
    for argument in arguments:
        if os.path.isdir(argument):
            found.repeated += argument in folders
            folders[argument] = None
            names = list(_walk(argument, found, seen))
        else:
            names = [argument]
        found.repeated += sum(name in paths for name in names)
        paths.update(dict.fromkeys(names))
    found.paths, found.folders = list(paths), list(folders)
    return found


def list_images(folder: Path) -> list[Path]:
    """List all images below a folder, sorted by name.

    Raises:
        SettingsError: not a folder, or it or a subfolder cannot be listed.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; expected one with images")
    found = find_images([str(folder)])
    for path, why in found.unreadable.items():
        raise SettingsError(f"{path} cannot be listed ({why}); expected a folder that can be read")
    return [Path(path) for path in found.paths]


def images_by_stem(folder: str) -> dict[str, list[str]]:
    """List the images in a folder, without those below it, by their names without suffix.

    Returns:
        Names by stem, sorted; empty if there is no such folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    found: dict[str, list[str]] = {}
    try:
        entries = _list(folder, set())
    except (FileNotFoundError, NotADirectoryError):
        return found
    for entry in entries:
        if has_image_suffix(entry.name) and not is_hidden(entry.name) and not _is_folder(entry):
            found.setdefault(Path(entry.name).stem, []).append(entry.name)
    return found


def matches(pattern: str) -> list[str]:
    """Expand a pattern of `*`, `?`, `[...]` and `**` to the names it matches.

    An existing name is not expanded, whatever it looks like. A pattern without matches is returned unchanged, for the
    error message. As with `glob`, a wildcard at the beginning of a name does not match hidden names.
    """
    if not is_pattern(pattern):
        return [pattern]
    return sorted(set(_expand(pattern.replace(os.sep, "/")))) or [pattern]


def is_pattern(argument: str) -> bool:
    """Return whether an argument is a pattern; an existing name is none, whatever it looks like."""
    return glob.has_magic(argument) and not os.path.lexists(argument)


def fixed_part(pattern: str) -> str:
    """Return the folder in which a pattern begins to search.

    Example:
        >>> fixed_part("photos/2024/**/*.png"), fixed_part("*.png")
        ('photos/2024', '')
    """
    parts = pattern.replace(os.sep, "/").split("/")
    return "/".join(parts[: next(number for number, part in enumerate([*parts, "*"]) if glob.has_magic(part))])


def is_hidden(name: str) -> bool:
    """Return whether a search of a folder skips files and folders of this name."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _expand(pattern: str) -> Iterator[str]:
    """Expand a pattern like `glob.glob(pattern, recursive=True)`, which takes too long on a loop of links."""
    if f"/{pattern}".endswith("/**"):
        pattern += "/*"
    end = f"/{pattern}".find("/**/")
    if end < 0:
        yield from (name for name in glob.iglob(pattern) if not _hidden_match(pattern, name))
        return
    head, tail = pattern[:end], pattern[end + len("**/") :]
    for start in _expand(head) if head else [""]:
        seen: _Seen = set()
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                entries = _list(folder, seen)
            except OSError:  # nothing to match there
                continue
            below = [f"{folder}{each.name}/" for each in entries if not is_hidden(each.name) and _is_folder(each)]
            folders += reversed(below)
            if entries:
                yield from _expand(glob.escape(folder) + tail)


def _hidden_match(pattern: str, name: str) -> bool:
    """Return whether a leading wildcard in a part of the pattern matched a hidden name."""
    parts, names = (path.replace(os.sep, "/").replace("//", "/").split("/") for path in (pattern, name))
    return any(part[:1] in _WILDCARDS and is_hidden(match) for part, match in zip(parts, names, strict=False))


def _walk(folder: str, found: FoundPaths, seen: _Seen) -> Iterator[str]:
    """Yield the images below a folder; record in `found` what is skipped."""
    todo = [(folder, True)]  # a stack of paths and whether each is a folder
    while todo:
        path, is_folder = todo.pop()
        if is_folder:
            try:
                entries = _list(path, seen)
            except OSError as error:
                found.unreadable[path] = error.strerror or str(error)
                continue
            shown = [entry for entry in entries if not is_hidden(entry.name)]
            found.hidden += len(entries) - len(shown)
            todo += [(entry.path, _is_folder(entry)) for entry in reversed(shown)]
        elif has_image_suffix(path):
            yield path
        else:
            found.others += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link to itself
        return False


def _list(folder: str, seen: _Seen) -> list[os.DirEntry[str]]:
    """List a folder sorted by name, or return nothing if it was seen before."""
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
        return []
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder or ".") as listing:
        return sorted(listing, key=lambda entry: entry.name)
