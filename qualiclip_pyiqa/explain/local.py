"""Local scores: the metric's own head on each place's feature, or on the statistics of the pixels around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.base import BlindMetric
from ..metrics.fitted import FittedIQA
from ..metrics.prompt_iqa import PromptIQA
from ..towers.base import Tower
from ..towers.mobile import MobileTower
from ..towers.windows import SIDE, WINDOW
from .found import Found, no_such_map, refuse_tile


@torch.no_grad()
def local_scores(metric: BlindMetric, rgb: Tensor, columns: Sequence[int]) -> Found:
    """Score every place of images (N, 3, H, W)."""
    refuse_tile("local", metric)
    if isinstance(metric.tower, MobileTower) and isinstance(metric, PromptIQA | FittedIQA):
        return _by_windows(metric, metric.tower, rgb, list(columns))
    if isinstance(metric.tower, Tower) and isinstance(metric, PromptIQA):
        return _by_features(metric, metric.tower, rgb, list(columns))
    raise no_such_map("local", f"{metric.model_type} on {type(metric.tower).__name__}", metric)


def _by_windows(metric: PromptIQA | FittedIQA, tower: MobileTower, rgb: Tensor, columns: list[int]) -> Found:
    def rate(statistics: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        return metric.rate(statistics if isinstance(metric, FittedIQA) else head(statistics))[:, columns]

    cells = tower.cells(rgb)
    height, width = cells.grid
    size = min(WINDOW, height), min(WINDOW, width)
    rows = [
        rate(row.flatten(0, 1), tower.forward_window).unflatten(0, row.shape[:2])  # each (N, windows, A)
        for row in cells.rows(size)
    ]
    values = spread(torch.stack(rows, dim=1).movedim(-1, 1), size)
    pixels = f"{size[1] * SIDE}x{size[0] * SIDE}"
    own = tuple(not isinstance(metric, FittedIQA) and _has_window_head(metric, tower, column) for column in columns)

    def relation(_n: int, a: int) -> str:
        if own[a]:
            return (
                "windows have a head of their own, fitted to degraded regions: its values compare places with each "
                "other, and are not on the scale of the image's score"
            )
        return "one window as large as the image would have the image's score; the mean of small ones differs"

    return Found(
        values,
        rate(cells.whole(), tower.forward_head),
        (SIDE, SIDE),
        f"mean score of the windows of {pixels} pixels that contain a place",
        relation,
        own,
    )


def _has_window_head(metric: PromptIQA, tower: MobileTower, column: int) -> bool:
    """Return whether a score depends on pairs of the tower that have a window head."""
    if tower.window_bias is None:
        return False
    pairs = metric.prompt_features.unflatten(0, (-1, 2))[metric.membership[:, column] > 0]
    return bool(pairs[..., -2 * len(tower.window_bias) :].any())


def spread(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Average over the windows that contain a cell: (N, A, h, w) windows -> (N, A, h + size - 1, w + size - 1)."""
    kernel = torch.ones(1, 1, *size, dtype=windows.dtype, device=windows.device)
    both = torch.cat([windows.flatten(0, 1)[:, None], torch.ones_like(windows[:1, :1])])
    sums = F.conv_transpose2d(both, kernel)
    return (sums[:-1, 0] / sums[-1:, 0]).unflatten(0, windows.shape[:2])


def _by_features(metric: PromptIQA, tower: Tower, rgb: Tensor, columns: list[int]) -> Found:
    found = tower.place_features(rgb)
    if found is None:
        what = f"{metric.model_type}, whose tower pools places in a way that gives none of them a feature of its own"
        raise no_such_map("local", what, metric)
    values = metric.rate(found.places.flatten(0, 1))[:, columns].unflatten(0, found.places.shape[:2])  # (N, L, A)
    values = values.transpose(1, 2).unflatten(2, found.grid)
    means = values.mean(dim=(2, 3))
    return Found(
        values,
        metric.rate(found.image)[:, columns],
        found.step,
        "score of each place's own projected feature, by the same prompts",
        lambda n, a: f"the mean over places is {means[n, a]:.4f}; the score is that of all places' feature together",
    )
