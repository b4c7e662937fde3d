"""Occlusion: how much the score falls when a place is hidden, by captum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.base import BlindMetric
from ..optional import require
from .found import Found

# Places along the image's longer side; a square of 2x2 places is hidden at a time.
PLACES = 16
# Side of the blur that hides a place, in pixels: the mean colour of its surroundings, without their detail.
BLUR = 32
SMALLEST = 16  # pixels of a place


@torch.no_grad()
def occlusion(
    metric: nn.Module, rgb: Tensor, columns: Sequence[int], tick: Callable[[], object] = lambda: None
) -> Found:
    """Map by how much each score falls when a place is hidden, image by image.

    captum hides parts of a mask of places, which blends the image with its blurred self: memory does not grow with the
    number of passes (`count_passes`), after each of which `tick` is called.
    """
    captum = require("captum.attr", "explain", "an occlusion map")
    height, width = rgb.shape[2:]
    step, grid = _places(height, width)
    window = tuple(min(2, length) for length in grid)
    maps, scores = [], []
    for image in rgb.split(1):
        blurred = _blurred(image)

        def rate(mask: Tensor, image: Tensor = image, blurred: Tensor = blurred) -> Tensor:
            size = grid[0] * step, grid[1] * step
            wide = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)[..., :height, :width]
            found = _scores(metric, torch.lerp(blurred, image, wide.to(image.dtype)))[:, list(columns)]
            tick()
            return found

        mask = torch.ones(1, 1, *grid, dtype=torch.float32, device=rgb.device)
        scores.append(rate(mask))
        found = captum.Occlusion(lambda mask, rate=rate: rate(mask)[0]).attribute(mask, (1, *window), strides=1)
        maps.append(found.reshape(1, len(columns), *grid))
    return Found(
        torch.cat(maps),
        torch.cat(scores),
        (step, step),
        "fall of the score when a place is blurred away",
        lambda _n, _a: "above zero: the place raises the score; the values do not add up to it",
    )


def count_passes(height: int, width: int) -> int:
    """Count the passes for an image: of itself, once by captum, and with each place hidden."""
    rows, columns = _places(height, width)[1]
    return 2 + max(1, rows - 1) * max(1, columns - 1)


def _places(height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Return the side of a place in pixels, and the image's height and width in places."""
    step = max(SMALLEST, -(-max(height, width) // PLACES))
    return step, (-(-height // step), -(-width // step))


def _blurred(image: Tensor) -> Tensor:
    """Return the image without detail: means of BLUR pixels, interpolated."""
    coarse = F.avg_pool2d(image, BLUR, ceil_mode=True)
    return F.interpolate(coarse, size=image.shape[2:], mode="bilinear", align_corners=False)


def _scores(metric: nn.Module, rgb: Tensor) -> Tensor:
    """Score images by a metric of this package or another one: (N, A)."""
    scores: Tensor = metric(rgb if isinstance(metric, BlindMetric) else rgb.float())
    return scores.float().reshape(len(rgb), -1)
