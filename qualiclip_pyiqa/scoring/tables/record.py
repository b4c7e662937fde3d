"""One row of a table of scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# NUL, and halves of surrogate pairs other than Python's escapes of bytes: no file name has them.
_NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


@dataclass(frozen=True)
class Record:
    """The scores of one image, or the reason why there are none.

    Attributes:
        path: as passed in; None for an image that was not a path.
        width, height: pixels, as scored; None if the image could not be decoded.
        scores: score by column, without the columns of metrics that failed.
        error: one line; None if every metric scored the image.

    Example:
        >>> Record("a.png", 640, 480, {"qualiclip-mini": 0.75}).scores["qualiclip-mini"]
        0.75
    """

    path: str | None
    width: int | None = None
    height: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


def utf8(path: str) -> str:
    r"""Replace undecodable bytes of a path by backslash escapes, since Parquet requires valid UTF-8.

    Example:
        >>> utf8("latin\udce9.png")
        'latin\\udce9.png'
    """
    return path.encode("utf-8", "backslashreplace").decode()


def is_file_name(path: str) -> bool:
    r"""Return whether an image file may have this path.

    Example:
        >>> is_file_name("latin\udce9.png"), is_file_name("a\0b.png"), is_file_name("\ud83d.png")
        (True, False, False)
    """
    return not _NO_NAME.search(path)


def storable(text: str) -> str:
    r"""Replace by backslash escapes what no file name has and no encoding of a table can store.

    Example:
        >>> storable("\ud83d.png")
        '\\ud83d.png'
    """
    return _NO_NAME.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
