"""Figures of matplotlib (the extra `plots`), drawn alike and written whole or not at all.

pyplot is not used, so that the caller's figures and backend are unaffected. Text is drawn literally, not as mathtext or
TeX, and characters that no font has are written as `\\uXXXX`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SettingsError, escaped
from .files import replacing, writing
from .optional import require

# Common fonts with Chinese, Japanese and Korean characters.
CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Noto Sans KR",
    "Source Han Sans",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "IPAGothic",
    "NanumGothic",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
)


# Formats of figures, by suffix: matplotlib knows more, of which some need TeX and some have no header.
FORMATS = ("png", "svg", "pdf", "jpg", "webp")


def _matplotlib(module: str) -> Any:
    return require(f"matplotlib.{module}", "plots", "a plot")


def check_figure(path: Path) -> None:
    """Check that a plot can be written to a path, before there is anything to draw.

    Raises:
        SettingsError: matplotlib is not installed, or the suffix is none of FORMATS that it can write.
    """
    require("matplotlib", "plots", "a plot")
    able = _matplotlib("backend_bases").FigureCanvasBase.get_supported_filetypes()
    known = [f".{each}" for each in FORMATS if each in able]
    if path.suffix.lower() not in known:
        raise SettingsError(f"{path} cannot be written; expected a suffix of {', '.join(known)}")


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Create a figure without pyplot, and its axes (rows, columns)."""
    figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish_figure(figure: Any) -> Any:
    """Draw all text of a figure literally; returns the figure."""
    families = [family for family, _ in _fonts()]
    for text in figure.findobj(_matplotlib("text").Text):
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_fontfamily(families)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the path's suffix, whole or not at all.

    Raises:
        SettingsError: as `check_figure`.
        OSError: the file cannot be written.
    """
    check_figure(path)
    finish_figure(figure)
    with writing(path), replacing(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:].lower(), bbox_inches="tight")


def figure_pixels(figure: Any) -> NDArray[np.uint8]:
    """Draw a figure of `new_figure` -> (H, W, 3), RGB."""
    canvas = finish_figure(figure).canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def drawable(text: str) -> str:
    """Escape characters that no font has, which matplotlib would draw as boxes with a warning."""
    known = {ord("\n")}.union(*(points for _, points in _fonts()))
    return "".join(each if ord(each) in known else escaped(each) for each in text)


def new_rectangle(x: float, y: float, width: float, height: float, **style: Any) -> Any:
    """Create a rectangle for `Axes.add_patch`."""
    return _matplotlib("patches").Rectangle((x, y), width, height, **style)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Measure a line of drawable text in the fonts of figures, of a size in points, in inches."""
    families = [family for family, _ in _fonts()]
    font = _matplotlib("font_manager").FontProperties(family=families, size=size, weight="bold" if bold else "normal")
    if not text:
        return 0.0
    return float(_matplotlib("textpath").TextPath((0, 0), text, prop=font).get_extents().x1 / 72)


def fitted(text: str, size: float, inches: float, bold: bool = False) -> str:
    """Shorten a line of drawable text in its middle until it fits: the end, such as a file's suffix, stays.

    Args:
        text: the line.
        size: of its characters in points.
        inches: how wide it may be.
        bold: whether it is drawn bold.
    """
    if text_width(text, size, bold) <= inches:
        return text
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(_cut(text, middle), size, bold) <= inches else (low, middle - 1)
    return _cut(text, low)


def fitted_ends(left: str, right: str, size: float, inches: float) -> tuple[str, str]:
    """Shorten two texts at the ends of one line until they fit: the longer one gives way first."""
    gap = size / 72  # a character or two
    half = (inches - gap) / 2
    first, second = (text_width(each, size) for each in (left, right))
    room = inches - gap
    if first + second > room:
        left = fitted(left, size, max(half, room - second))
        right = fitted(right, size, max(half, room - first))
    return left, right


def _cut(text: str, kept: int) -> str:
    """Keep this many characters of a text, two thirds of them at its beginning."""
    end = kept // 3
    return f"{text[: kept - end]}...{text[len(text) - end :]}"


@cache
def _fonts() -> list[tuple[str, frozenset[int]]]:
    """Return the font families to draw with, in order of preference, and the code points that each has."""
    manager = _matplotlib("font_manager")
    there = set(manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in CJK_FONTS if name in there)]  # the first comes with matplotlib
    return [(family, frozenset(manager.get_font(manager.findfont(family)).get_charmap())) for family in families]
