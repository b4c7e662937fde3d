"""Halve images as Pillow's `Image.resize((width // 2, height // 2))` does, on tensors of any device, differentiably.

Pillow's default filter is the bicubic one (Keys, 1981, a = -0.5), stretched by the factor of reduction against
aliasing. It filters rows, then columns, and rounds after each to a level in 0..255. Its weights are whole multiples of
2 ** -22. (Pillow 13 filters columns first in images more than twice as tall as wide. Here they are halved as by the
versions before, with which CONTRIQUE was trained; in photographs some pixels differ by a level, in noise by a few.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import without_autocast
from .resampling import BITS, LEVELS, bicubic

_SPLIT = 2**11
# Pixels that an output pixel depends on, at most: 8 for an even side, 9 for an odd one of at least 32 pixels.
_TAPS = 9
# Levels of 8 bits are recognised if all are this close to a whole number. Those of float32 are within 2 ** -16.
_GRID = 2.0**-10


def halved(rgb: Tensor) -> Tensor:
    """Halve images as Pillow does.

    Images whose values are all levels of 8 bits (k / 255) become exactly those that Pillow makes of them; the gradient
    is that of the filter, without the rounding to levels. Pillow cannot halve others, such as a network's output or a
    16-bit image: they are filtered with the same weights and not rounded, so that they differ from what Pillow makes of
    the nearest 8-bit image by about a level.

    Shape:
        rgb: (N, 3, H, W) in 0..1, H and W at least 32 -> (N, 3, H // 2, W // 2), in its dtype.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> pixels = np.random.default_rng(0).integers(0, 256, (45, 64, 3), np.uint8)
        >>> half = halved(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255)
        >>> by_pillow = np.asarray(Image.fromarray(pixels).resize((32, 22)))
        >>> np.array_equal((half[0] * 255).round().byte().movedim(0, -1).numpy(), by_pillow)
        True
    """
    with without_autocast(rgb):
        channels = rgb.split(1, dim=1)  # one by one, which takes a third of the memory
        on_grid = torch.stack([_is_on_grid(channel) for channel in channels]).all(dim=0)[:, None, None, None]
        return torch.cat([_halved(channel, on_grid) for channel in channels], dim=1)


def _levels(channel: Tensor) -> Tensor:
    """Return levels 0..255 in float32 or wider."""
    return channel.to(torch.promote_types(channel.dtype, torch.float32)).contiguous() * LEVELS


@torch.no_grad()
def _is_on_grid(channel: Tensor) -> Tensor:
    """Return whether all levels of each image are whole: (N, 1, H, W) -> (N,)."""
    levels = _levels(channel)
    return ((levels.round() - levels).abs() <= _GRID).flatten(1).all(dim=1)


def _halved(channel: Tensor, on_grid: Tensor) -> Tensor:
    """Halve a channel (N, 1, H, W), to whole levels for the images that `on_grid` (N, 1, 1, 1) marks."""
    levels = _levels(channel)
    levels = torch.where(on_grid, _with_gradient_of(levels, levels.detach().round()), levels)
    rows = _filtered(levels, on_grid)
    columns = _filtered(rows.transpose(2, 3), on_grid).transpose(2, 3)
    return (columns / LEVELS).to(channel.dtype)


def _filtered(levels: Tensor, on_grid: Tensor) -> Tensor:
    """Halve the width of images (N, C, H, W) -> (N, C, H, W // 2), rounding those that `on_grid` (N, 1, 1, 1) marks."""
    places, weights = _taps(levels.shape[3], levels)
    # Of two parts, so that all sums of whole levels are exact in float32.
    high = (weights / _SPLIT).round()
    low = weights - high * _SPLIT
    highs, lows = (torch.zeros_like(levels[..., : levels.shape[3] // 2]) for _ in range(2))
    for tap in range(_TAPS):
        pixels = levels.index_select(3, places[:, tap])
        highs = highs + pixels * high[:, tap]
        lows = lows + pixels * low[:, tap]
    exact = highs / _SPLIT + lows / BITS
    with torch.no_grad():
        rounded = ((highs + ((lows + BITS / 2) / _SPLIT).floor()) / _SPLIT).floor()
    return torch.where(on_grid, _with_gradient_of(exact, rounded), exact).clamp(0, LEVELS)


def _with_gradient_of(exact: Tensor, values: Tensor) -> Tensor:
    """Return `values`, exactly, with the gradient of `exact`."""
    return exact - exact.detach() + values


def _taps(side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixels that each of side // 2 output pixels depends on, and their weights in units of 2 ** -22.

    Returns:
        Indices and whole numbers, both (side // 2, _TAPS), on the device of `like`.
    """
    half = side // 2
    scale = side / half
    centre = (torch.arange(half, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centre - 2 * scale + 0.5).trunc().clamp(min=0)
    end = (centre + 2 * scale + 0.5).trunc().clamp(max=side)
    places = first[:, None] + torch.arange(_TAPS, dtype=torch.float64, device="cpu")
    weights = torch.where(places < end[:, None], bicubic((places - centre[:, None] + 0.5).abs() / scale), 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    whole = (weights * BITS + 0.5 * weights.sign()).trunc()  # halves away from zero
    return places.clamp(max=side - 1).long().to(like.device), whole.to(like)
