"""Which pictures are meant: files, folders, globs and lists become one list of paths, each once."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from PIL import Image


@dataclass
class Found:
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


def find_pictures(arguments: Iterable[str]) -> Found:
    """Files as they are, folders with everything below them, and patterns (`*`, `?`, `[...]`, `**`).

    Links to folders are followed, but no folder is entered twice, so that a loop ends. Names may hold line breaks and
    undecodable bytes. What was named twice is there once.
    """
    found = Found()
    seen_folders: set[tuple[int, int]] = set()
    paths: dict[str, None] = {}
    for argument in arguments:
        if os.path.isdir(argument):
            paths.update(dict.fromkeys(_walk(argument, found, seen_folders)))
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True)) or [argument]
            for match in matches:
                if os.path.isdir(match):
                    paths.update(dict.fromkeys(_walk(match, found, seen_folders)))
                else:
                    paths[match] = None
        else:
            paths[argument] = None
    found.paths = list(paths)
    return found


def _walk(folder: str, found: Found, seen: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        found.unreadable[folder] = error.strerror or str(error)
        return
    for entry in entries:
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, found, seen)
        elif is_picture(entry.name):
            yield entry.path
        else:
            found.others += 1


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its suffix."""
    return os.path.splitext(name)[1].lower() in _suffixes()


@cache
def _suffixes() -> frozenset[str]:
    """Of the suffixes that Pillow can open, those of pictures."""
    Image.init()
    documents = {"PDF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "WMF", "EPS"}
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in documents
    )
