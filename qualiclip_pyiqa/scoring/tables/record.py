"""One row of a table of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
