"""Figures of an evaluation. Needs matplotlib (the extra `plots`); everything is drawn to a file, never to a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SettingsError


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SettingsError('plots need matplotlib: pip install "qualiclip-pyiqa[plots]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check(path: Path) -> None:
    """What can be known before there is anything to draw.

    Raises:
        SettingsError: matplotlib is missing, or cannot write files of that suffix.
    """
    known = _pyplot().figure().canvas.get_supported_filetypes()
    _pyplot().close()
    if path.suffix[1:].lower() not in known:
        raise SettingsError(f"{path} cannot be written; expected a suffix of {', '.join(sorted(known))}")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        _pyplot().close(figure)


def scatter(
    path: Path, scores: Mapping[str, Sequence[float]], opinions: Sequence[float], notes: Mapping[str, str]
) -> None:
    """Opinion score against score, one panel per metric, with the fitted logistic."""
    import numpy as np

    from .agreement import fitted_logistic

    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure, axes = _pyplot().subplots(rows, columns, figsize=(4.6 * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, scores.items(), strict=False):
        axis.scatter(values, opinions, s=10, alpha=0.5, linewidths=0)
        mapping = fitted_logistic(values, opinions)
        if mapping is not None:
            along = np.linspace(min(values), max(values), 200)
            axis.plot(along, mapping(along), color="tab:red", linewidth=1.5)
        axis.set_title(f"{name}\n{notes[name]}", fontsize=10)
        axis.set_xlabel("score")
        axis.set_ylabel("opinion score")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def levels(
    path: Path, means: Mapping[str, Mapping[str, Sequence[float]]], falls: Mapping[str, Mapping[str, bool]]
) -> None:
    """Mean score against distortion level 0 (pristine) to 5, one panel per type, one line per metric."""
    types = list(next(iter(means.values())))
    columns = 6
    rows = -(-len(types) // columns)
    figure, axes = _pyplot().subplots(
        rows,
        columns,
        figsize=(2.5 * columns, 2.2 * rows),
        sharex=True,
        sharey=len(means) == 1,  # several metrics have scales of their own
        squeeze=False,
    )
    for number, (metric, by_type) in enumerate(means.items()):
        for axis, name in zip(axes.flat, types, strict=False):
            style = "-" if falls[metric][name] else ":"
            axis.plot(
                range(len(by_type[name])), by_type[name], style, marker="o", ms=3, color=f"C{number}", label=metric
            )
    for axis, name in zip(axes.flat, types, strict=False):
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(types) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("distortion level (0: pristine); dotted: does not fall from level to level", fontsize=10)
    figure.supylabel("mean score", fontsize=10)
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.97))
    _save(figure, path)


def duels(path: Path, rows: Sequence[tuple[str, Path, Path, str]]) -> None:
    """Pairs of pictures side by side: (title, left, right, what stands below)."""
    from ..images.tensors import load_image

    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(8, 3.4 * len(rows)), squeeze=False)
    for (left_axis, right_axis), (title, left, right, below) in zip(axes, rows, strict=True):
        for axis, file, side in ((left_axis, left, "attacker: better"), (right_axis, right, "attacker: worse")):
            axis.imshow(load_image(file).movedim(0, -1).numpy())  # as it was scored
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{side}\n{file.name}", fontsize=8)
        left_axis.set_title(title, fontsize=9, loc="left")
        right_axis.set_title(below, fontsize=9, loc="left")
    figure.tight_layout()
    _save(figure, path)
