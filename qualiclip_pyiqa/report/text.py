"""Text and links that are safe in a page, whatever the names of files and the words of errors contain."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from ..errors import visible


def visible_values(value: object) -> object:
    """Apply `visible` to every text in JSON-ready values."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(key): visible_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [visible_values(each) for each in value]
    return value


def page_json(value: object) -> str:
    r"""Encode a value as JSON for a `<script type="application/json">` element: ASCII, and no `<`, `>` or `&`.

    Example:
        >>> page_json("</script>\udce9")
        '"\\u003c/script\\u003e\\udce9"'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def link(path: str, folder: Path) -> str:
    r"""Return the percent-encoded address of a file, relative to the folder of the page that links to it.

    Bytes that are not UTF-8 are encoded as they are. A name can neither be mistaken for a scheme nor for another host.

    Example:
        >>> link("photos/a b#1?.jpg", Path("."))
        './photos/a%20b%231%3F.jpg'
        >>> link("out/../javascript:alert(1)", Path("out"))
        '../javascript%3Aalert%281%29'
        >>> link("latin\udce9.png", Path("."))
        './latin%E9.png'
    """
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive of Windows
        return Path(path).absolute().as_uri()
    encoded = quote(os.fsencode(relative.replace(os.sep, "/")), safe="/")
    return encoded if encoded.startswith("../") else f"./{encoded}"
