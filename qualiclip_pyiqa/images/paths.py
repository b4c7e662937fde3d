"""Which pictures are meant: patterns become names, and files, folders and lists one list of paths, each once.

Links to folders are followed, but no folder is entered twice, so that a loop ends.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from .formats import SUFFIXES

_Seen: TypeAlias = set[tuple[int, int]]  # device and inode of folders


@dataclass
class FoundPaths:
    """What was found.

    Attributes:
        paths: pictures in the order of the arguments, folders in the order of their names. A path that was named
            itself is among them whatever it is, so that what is wrong with it is said.
        unreadable: folders that could not be listed, and why.
        others: how many files in folders were passed over, since their suffix is no picture's.
    """

    paths: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    others: int = 0


def find_pictures(arguments: Iterable[str]) -> FoundPaths:
    """Files as they are, and folders with everything below them.

    Names may hold line breaks and undecodable bytes. What was named twice is there once.
    """
    found = FoundPaths()
    seen: _Seen = set()
    paths: dict[str, None] = {}
    for argument in arguments:
        if os.path.isdir(argument):
            paths.update(dict.fromkeys(_walk(argument, found, seen)))
        else:
            paths[argument] = None
    found.paths = list(paths)
    return found


def matches(pattern: str) -> list[str]:
    """The names that a pattern (`*`, `?`, `[...]`, `**`) matches; a name that is there, or no other is, is itself."""
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    return sorted(set(_expand(pattern.replace(os.sep, "/")))) or [pattern]


def _expand(pattern: str) -> Iterator[str]:
    """As `glob.glob(pattern, recursive=True)`, which a loop of links may keep busy for ever."""
    if f"/{pattern}".endswith("/**"):
        pattern += "/*"
    end = f"/{pattern}".find("/**/")
    if end < 0:
        yield from glob.iglob(pattern)
        return
    head, tail = pattern[:end], pattern[end + len("**/") :]
    for start in glob.iglob(head) if head else [""]:
        seen: _Seen = set()
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                entries = _list(folder, seen)
            except OSError:  # a pattern matches what can be seen
                continue
            below = [f"{folder}{each.name}/" for each in entries if each.name[0] != "." and os.path.isdir(each.path)]
            folders += reversed(below)
            if entries:
                yield from _expand(glob.escape(folder) + tail)


def _walk(folder: str, found: FoundPaths, seen: _Seen) -> Iterator[str]:
    paths = [folder]  # to come, the next one last
    while paths:
        path = paths.pop()
        if os.path.isdir(path):
            try:
                paths += [entry.path for entry in reversed(_list(path, seen))]
            except OSError as error:
                found.unreadable[path] = error.strerror or str(error)
        elif is_picture(path):
            yield path
        else:
            found.others += 1


def _list(folder: str, seen: _Seen) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing if it was seen before."""
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
        return []
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder or ".") as listing:
        return sorted(listing, key=lambda entry: entry.name)


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its suffix."""
    return os.path.splitext(name)[1].lower() in SUFFIXES
