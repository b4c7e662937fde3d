"""Draw profiles: a row for each attribute, a panel for each image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import SettingsError, counted
from ..figures import drawable, finish_figure, fitted, fitted_ends, new_figure, new_rectangle
from ..images.convert import source_name
from ..images.tensors import Source, load_image
from .profile import Profile, Trait, percent

LONGEST = 600  # pixels, the longest side of an image in a figure
MOST = 24  # images in a figure
_ACROSS = 4  # images side by side
_WIDTH, _ROW, _HEAD = 3.5, 0.66, 3.1  # inches: a panel, an attribute's row, the image with its text
_TRACK, _USUAL, _MIDDLE = "#edf0f4", "#d2d9e3", "#a7b4c6"
_INK, _QUIET, _DOT, _LOW, _HIGH = "#1f2933", "#5b6472", "#1d4f91", "#b93a0a", "#0b6e66"
_FRAME = "#b8c0ca"
_THICK = 0.26  # of a row
_MARGIN = 0.2  # inches between the text of neighbouring panels
_MARK = "*"


def draw_profiles(
    profiles: Sequence[Profile],
    pictures: Sequence[Source | None],
    rules: Mapping[str, Any] | None = None,
) -> Any:
    """Draw profiles side by side.

    Args:
        profiles: of one `Profiler`, all without an error.
        pictures: their images, as for `load_image`; None: not shown.
        rules: keyword arguments of `load_image`, as the images were scored.

    Returns:
        A matplotlib Figure.

    Raises:
        SettingsError: matplotlib is not installed, no profile, or too many.
        ImageError: an image cannot be read.
    """
    if not 1 <= len(profiles) <= MOST:
        raise SettingsError(f"{counted(len(profiles), 'profile')} to draw; expected 1 to {MOST}")
    shown = [None if each is None else _thumbnail(each, rules or {}) for each in pictures]
    attributes = [trait.attribute for trait in profiles[0].traits]
    across = min(_ACROSS, len(profiles))
    blocks = -(-len(profiles) // across)
    tall = _ROW * len(attributes)
    head = _HEAD if any(each is not None for each in shown) else 0.8
    figure, axes = new_figure(
        2 * blocks,
        across,
        (_WIDTH * across, blocks * (head + tall) + 0.9),
        gridspec_kw={"height_ratios": [head, tall] * blocks},
    )
    pairs = axes.reshape(blocks, 2, across).swapaxes(1, 2).reshape(-1, 2)
    for (upper, lower), profile, picture in zip(pairs, profiles, shown, strict=False):
        _draw_head(upper, profile, picture)
        _draw_traits(lower, profile.traits)
    notes = list(dict.fromkeys(profile.note for profile in profiles if profile.note is not None))
    for axis in pairs[len(profiles) :].flat:
        axis.set_axis_off()
    figure.supxlabel("\n".join(_caption(profiles[0], notes, 52 * across)), fontsize=7.5, color=_QUIET)
    return finish_figure(figure)


def _caption(profile: Profile, notes: Sequence[str], wide: int) -> list[str]:
    """Explain the drawing, in lines of at most this many characters.

    Args:
        profile: one of those in the drawing.
        notes: of all of them.
        wide: characters of a line.
    """
    metrics = ", ".join(dict.fromkeys(trait.attribute.metric for trait in profile.traits))
    said = [f"{source_name(metrics)}. Dot: the score, on its whole range."]
    if profile.reference is not None:
        said.append(
            f"Shaded: the middle half and the middle 90 % of {source_name(profile.reference)}. "
            "Percent: how many of these have a lower score, equal ones counted half"
            + (
                "."
                if all(trait.attribute.pairs for trait in profile.traits)
                else ", or a worse one for metrics without prompts."
            )
        )
    said += [f"{_MARK} {note}" for note in notes]
    return [drawable(line) for each in said for line in textwrap.wrap(each, wide)]


def _thumbnail(picture: Source, rules: Mapping[str, Any]) -> NDArray[np.float32]:
    rgb = load_image(picture, **rules)
    shrink = max(1, -(-max(rgb.shape[1:]) // LONGEST))
    if shrink > 1 and min(rgb.shape[1:]) >= shrink:
        rgb = F.avg_pool2d(rgb, shrink)
    return np.asarray(rgb.movedim(0, -1).cpu())


def _draw_head(axis: Any, profile: Profile, picture: NDArray[np.float32] | None) -> None:
    """Show the image with its name and what is unusual about it."""
    axis.set_axis_off()
    if picture is not None:
        height, width = picture.shape[:2]
        axis.imshow(picture)
        # A white image would not be seen on the white page.
        frame = {"fill": False, "edgecolor": _FRAME, "linewidth": 0.7, "clip_on": False}
        axis.add_patch(new_rectangle(-0.5, -0.5, width, height, **frame))
    if profile.path is not None:
        name = fitted(drawable(source_name(Path(profile.path).name)), 10, _WIDTH - _MARGIN, bold=True)
        axis.set_title(name, fontsize=10, color=_INK, fontweight="bold")
    if profile.reference is None:
        return
    lines = textwrap.wrap(", ".join(profile.unusual) or "nothing unusual", 48)
    if len(lines) > 2:
        lines = [lines[0], f"{lines[1]} ..."]
    # Two lines always, so that the panels of all images are alike, and one more for what is explained below.
    lines = [*lines, ""][:2]
    if profile.note is not None:
        lines.append(f"{_MARK} {profile.note.partition(' (')[0]}")
    text = drawable("\n".join(lines))
    axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=8.5, color=_QUIET)


def _draw_traits(axis: Any, traits: Sequence[Trait]) -> None:
    """Draw each score as a dot on its range, over what is usual in the reference."""
    several = len({trait.attribute.metric for trait in traits}) > 1
    for row, trait in enumerate(traits):
        attribute = trait.attribute
        low, high = _span(trait)

        def place(score: float, low: float = low, high: float = high) -> float:
            return min(1.0, max(0.0, (score - low) / (high - low)))

        axis.barh(row, 1, height=_THICK, color=_TRACK)
        if attribute.reference is not None:
            for (start, end), colour in zip(_bands(attribute.reference.values), (_USUAL, _MIDDLE), strict=True):
                axis.barh(row, place(end) - place(start), left=place(start), height=_THICK, color=colour)
        dot = _DOT if trait.unusual is None else _LOW if (trait.percentile or 0) < 50 else _HIGH
        axis.scatter(place(trait.score), row, s=58, color=dot, zorder=3, edgecolors="white", linewidths=1.2)
        weight = "normal" if trait.unusual is None else "bold"
        colour = _INK if trait.unusual is None else dot
        name = f"{attribute.metric} {attribute.name}" if several else attribute.name
        room = 0.62 * (_WIDTH - _MARGIN)  # beside the score
        axis.text(0, row - 0.22, fitted(drawable(source_name(name)), 9, room), fontsize=9, color=_INK)
        said = (
            f"{trait.score:.3g}" if trait.percentile is None else f"{trait.score:.3g}  ·  {percent(trait.percentile)}"
        )
        axis.text(1, row - 0.22, said, ha="right", fontsize=9, color=colour, fontweight=weight)
        ends = [drawable(source_name(text)) for text in (attribute.low, attribute.high)]
        fitting = fitted_ends(ends[0], ends[1], 7, _WIDTH - _MARGIN)
        for x, side, text in zip((0, 1), ("left", "right"), fitting, strict=True):
            axis.text(x, row + 0.2, text, ha=side, va="top", fontsize=7, color=_QUIET)
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(len(traits) - 0.45, -0.6)
    axis.set_axis_off()


def _bands(reference: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    """Yield the middle 90 % and the middle half of the reference."""
    for outside in (5, 25):
        start, end = np.percentile(reference, [outside, 100 - outside])
        yield float(start), float(end)


def _span(trait: Trait) -> tuple[float, float]:
    """Return the scores at the ends of a row: the metric's range, wide enough for the score and the reference."""
    known = [trait.score, *(trait.attribute.score_range or ())]
    if trait.attribute.reference is not None:
        known += [float(trait.attribute.reference.values[end]) for end in (0, -1)]
    low, high = min(known), max(known)
    if math.isclose(low, high):
        low, high = low - 0.5, high + 0.5
    return low, high
