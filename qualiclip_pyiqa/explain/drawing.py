"""Draw an image and its quality maps, each with its scale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import SettingsError
from ..figures import drawable, finish_figure, new_figure
from ..images.convert import source_name
from ..images.tensors import Source
from .quality_map import QualityMap, explanations, one_image

LONGEST = 1000  # pixels, the longest side of an image in a figure
COLUMNS = 4  # panels beside each other, at most
WIDTH = 4.2  # inches of a panel
LINE = 58  # characters of the text below a panel that fit into its width
# Perceptually uniform, and from dark to light in the direction of better; diverging maps are neutral at zero.
COLOURS, DIVERGING = "viridis", "PuOr"
OPACITY = 0.62  # of a map over the image, which is drawn in grey below it
BAR_PLACE: dict[str, Any] = {"location": "bottom", "fraction": 0.05, "pad": 0.02, "aspect": 32}
CAPTION = 7.5  # points of the text below the figure
BARS = {
    "local": "score of the surroundings",
    "contributions": "share of the logit",
    "gradcam": "Grad-CAM",
    "occlusion": "fall of the score if hidden",
}
OWN_SCALE = "windows' own score, not the image's scale"


def draw_maps(picture: Source, maps: Sequence[QualityMap], title: str = "") -> Any:
    """Draw an image, and beside it each of its maps over the image in grey, with score, colour bar and meaning.

    Below all of them are `explanations`: how the maps relate to the scores, and what makes them mislead.

    Args:
        picture: the image, as for `quality_map`.
        maps: of this image.
        title: of the image's panel.

    Returns:
        A matplotlib Figure, made without pyplot.

    Raises:
        SettingsError: matplotlib is not installed, no map, or a map of an image of another size.
        ImageError: the image cannot be read.
    """
    if not maps:
        raise SettingsError("there is no map to draw; expected at least one")
    rgb = one_image(picture)[0]
    size = rgb.shape[1], rgb.shape[2]
    for each in maps:
        if each.size != size:
            raise SettingsError(
                f"the map is of an image of {each.size[1]}x{each.size[0]} pixels, but this one has {size[1]}x{size[0]}"
            )
    shrink = min(1.0, LONGEST / max(size))
    small = tuple(max(1, round(length * shrink)) for length in size)
    shown = rgb[None] if shrink == 1 else F.interpolate(rgb[None], size=small, mode="area")
    pixels = shown[0].movedim(0, -1).cpu().numpy()
    columns = min(COLUMNS, 1 + len(maps))
    rows = -(-(1 + len(maps)) // columns)
    tall = min(1.8, max(0.45, size[0] / size[1]))
    across = int(LINE * columns * 8.5 / CAPTION)
    caption = [_lines(line, across) for line in explanations(maps)]
    figure, axes = new_figure(rows, columns, (WIDTH * columns, (WIDTH * tall + 1.6) * rows + 0.13 * len(caption)))
    figure.get_layout_engine().set(h_pad=0.1)  # inches: the layout reserves too little for labels of two lines
    panels = list(axes.flat)
    panels[0].imshow(pixels)
    name = title or (source_name(picture) if isinstance(picture, str) else "image")
    panels[0].set_title(_shortened(name), fontsize=11)
    panels[0].set_xlabel(f"{size[1]} x {size[0]} pixels\n", fontsize=8.5, color="0.35")
    _reserve_bar(figure, panels[0])
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    for axis, each in zip(panels[1:], maps, strict=False):
        _draw_map(figure, axis, grey, each)
    for axis in panels:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in panels[1 + len(maps) :]:
        axis.set_axis_off()
    figure.supxlabel("\n".join(caption), fontsize=CAPTION, color="0.35")
    return finish_figure(figure)


def _reserve_bar(figure: Any, axis: Any) -> None:
    """Leave the space of a colour bar, so that the image is as large as its maps."""
    bar = figure.colorbar(axis.images[0], ax=axis, **BAR_PLACE)
    bar.set_label(" ", fontsize=8.5)
    bar.ax.tick_params(labelsize=8, colors="none", length=0)
    bar.outline.set_visible(False)
    bar.solids.set_visible(False)


def _draw_map(figure: Any, axis: Any, grey: NDArray[np.float32], found: QualityMap) -> None:
    height, width = grey.shape
    axis.imshow(0.25 + 0.6 * grey, cmap="gray", vmin=0, vmax=1)
    values = found.enlarged()
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * full / n).astype(int), full - 1)
        for n, full in ((height, found.size[0]), (width, found.size[1]))
    )
    drawn = axis.imshow(
        values[np.ix_(rows, columns)],
        cmap=DIVERGING if found.diverging else COLOURS,
        vmin=found.low,
        vmax=found.high,
        alpha=OPACITY,
    )
    axis.set_title(_shortened(f"{found.attribute}: {found.score:.3f} (whole image)"), fontsize=11)
    axis.set_xlabel(_lines(f"{found.metric}. {found.meaning}"), fontsize=8.5, color="0.35")
    # Arrows at the ends of a scale that does not hold all values.
    below, above = bool(found.values.min() < found.low), bool(found.values.max() > found.high)
    extend = ("both" if above else "min") if below else ("max" if above else "neither")
    bar = figure.colorbar(drawn, ax=axis, extend=extend, **BAR_PLACE)
    more, less = ("raises", "lowers") if found.diverging else found.comparatives
    bar.set_label(_bar_label(less, OWN_SCALE if found.own_scale else BARS[found.kind], more), fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.4)


def _shortened(text: str, most: int = 46) -> str:
    text = drawable(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-most // 2 + 2 :]}"


def _lines(text: str, most: int = LINE) -> str:
    return "\n".join(textwrap.wrap(drawable(text), most))


def _bar_label(less: str, values: str, more: str) -> str:
    """Join what the values are and what their ends mean: in one line if it fits below a panel, else in two or more."""
    left, right = drawable(f"\N{LEFTWARDS ARROW} {less}"), drawable(f"{more} \N{RIGHTWARDS ARROW}")
    if len(line := f"{left}   {values}   {right}") <= LINE:
        return line
    if len(line := f"{left}   {right}") <= LINE:
        return f"{values}\n{line}"
    return "\n".join(map(_lines, (left, values, right)))
