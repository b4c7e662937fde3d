"""Plot results of evaluations to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike

from ..figures import drawable, new_figure, save_figure
from ..images.convert import ReadRules, source_name
from ..images.tensors import load_image
from .agreement import fitted_logistic

LONGEST = 1000  # pixels, the longest side of an image in a figure


def scatter(path: Path, scores: Mapping[str, ArrayLike], opinions: Sequence[float], notes: Mapping[str, str]) -> None:
    """Draw opinion score against score, one panel per metric, with the fitted logistic.

    Args:
        path: file to write, whole or not at all.
        scores: by metric; NaN if an image was not scored.
        opinions: of the same images.
        notes: text below the metric's name, by metric.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = new_figure(rows, columns, (4.6 * columns, 4.2 * rows))
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, scores.items(), strict=False):
        x, y = np.asarray(values, float), np.asarray(opinions, float)
        x, y = x[np.isfinite(x)], y[np.isfinite(x)]
        axis.scatter(x, y, s=10, alpha=0.5, linewidths=0)
        mapping = fitted_logistic(x, y) if len(x) >= 5 else None
        if mapping is not None:
            along = np.linspace(x.min(), x.max(), 200)
            axis.plot(along, mapping(along), color="tab:red", linewidth=1.5)
        axis.set_title(drawable(f"{source_name(name)}\n{notes[name]}"), fontsize=10)
        axis.set_xlabel("score")
        axis.set_ylabel("opinion score")
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def levels(
    path: Path, means: Mapping[str, Mapping[str, Sequence[float]]], falls: Mapping[str, Mapping[str, bool]]
) -> None:
    """Draw mean score against distortion level, one panel per type, one line per metric.

    Args:
        path: file to write, whole or not at all.
        means: by metric and type, from level 0 (pristine).
        falls: by metric and type; lines are solid if true, else dotted.

    Raises:
        OSError: the file cannot be written.
    """
    types = list(next(iter(means.values())))
    columns = 6
    rows = -(-len(types) // columns)
    # Several metrics may have different scales.
    figure, axes = new_figure(rows, columns, (2.5 * columns, 2.2 * rows), sharex=True, sharey=len(means) == 1)
    for number, (metric, by_type) in enumerate(means.items()):
        for axis, name in zip(axes.flat, types, strict=False):
            style = "-" if falls[metric][name] else ":"
            axis.plot(range(len(by_type[name])), by_type[name], style, marker="o", ms=3, color=f"C{number}")
    for axis, name in zip(axes.flat, types, strict=False):
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(types) :]:
        axis.set_axis_off()
    # Older versions of matplotlib drop labels that begin with "_", so the names are set afterwards.
    lines, numbers = axes.flat[0].get_lines(), [str(number) for number in range(len(means))]
    legend = figure.legend(lines, numbers, loc="outside upper center", ncols=3, frameon=False)
    for text, metric in zip(legend.get_texts(), means, strict=True):
        text.set_text(drawable(source_name(metric)))
    figure.supxlabel("distortion level (0: pristine); dotted: does not fall from level to level", fontsize=10)
    figure.supylabel("mean score", fontsize=10)
    save_figure(figure, path)


@dataclass(frozen=True)
class Pair:
    """Two images side by side.

    Attributes:
        left, right: files.
        title: text above the left one.
        note: text above the right one.
    """

    left: Path
    right: Path
    title: str
    note: str


def duels(path: Path, pairs: Sequence[Pair], rules: ReadRules | None = None) -> None:
    """Draw pairs of images.

    Args:
        path: file to write, whole or not at all.
        pairs: from top to bottom.
        rules: the reading rules used for scoring.

    Raises:
        OSError: the file cannot be written.
        ImageError: an image can no longer be read.
    """
    rules = rules or ReadRules()
    figure, axes = new_figure(len(pairs), 2, (8, 3.4 * len(pairs)))
    for row, pair in zip(axes, pairs, strict=True):
        for axis, file, side in zip(row, (pair.left, pair.right), ("better", "worse"), strict=True):
            rgb = load_image(file, **asdict(rules))
            shrink = max(1, -(-max(rgb.shape[1:]) // LONGEST))
            shown = F.avg_pool2d(rgb, shrink) if shrink > 1 else rgb
            axis.imshow(shown.movedim(0, -1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(drawable(f"attacker: {side}\n{source_name(file.name)}"), fontsize=8)
        row[0].set_title(drawable(pair.title), fontsize=9, loc="left")
        row[1].set_title(drawable(pair.note), fontsize=9, loc="left")
    save_figure(figure, path)
