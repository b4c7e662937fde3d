"""Whether two paths name the same image, or two files hold the same bytes."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ..errors import ImageError
from .convert import source_name


def image_key(path: str) -> str:
    """Return a key that is equal for all spellings of an image's path: its folder with links resolved, and its name.

    `in/a.png`, `./in/a.png` and `/home/me/in/../in/a.png` are one image; two links to one file are two images. Relative
    paths start at the working directory; URLs are unchanged.

    Example:
        >>> image_key("in/a.png") == image_key("./in//a.png") == image_key("in/new/../a.png")
        True
    """
    if "://" in path:
        return path
    here = "" if os.path.isabs(path) else _working_directory()
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return _resolved(os.path.join(here, path))
    return os.path.normcase(os.path.join(_resolved(os.path.join(here, folder)), name))


def hash_file(path: Path) -> str:
    """Return the sha256 of an image file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{source_name(path)} cannot be read ({error.strerror or error})") from error


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


@lru_cache(maxsize=1024)  # images come folder by folder
def _resolved(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):
        return os.path.normpath(folder)
