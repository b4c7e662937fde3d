"""Resize images as Pillow does, on tensors of any device.

Pillow resamples one axis after the other, with weights of 22 fractional bits, and rounds to 8 bits after each of the
two (Pillow, src/libImaging/Resample.c). A network whose training images went through Pillow sees a difference.

For halving there is `halving`, whose time grows with the image alone, and which is exact with a gradient too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import without_autocast

FILTERS = {"bilinear": 1.0, "bicubic": 2.0}  # name -> support in pixels of the coarser of the two images
LEVELS = 255
BITS = 2**22


def resize_like_pillow(rgb: Tensor, height: int, width: int, filter: str = "bilinear") -> Tensor:
    """Resize images as `PIL.Image.resize` does, antialiased.

    Without a gradient in `rgb`, the result equals that of Pillow 13 for images of 8 bits, bit for bit. (Earlier
    versions always resample columns first; where the order differs, some results differ by one level.) With a gradient,
    levels are rounded nowhere, so that the gradient is exact; the result then differs from Pillow's by up to a level.

    Args:
        rgb: images in 0..1.
        height, width: of the result.
        filter: "bilinear", or "bicubic" with Pillow's coefficient -1/2.

    Shape:
        (N, C, H, W) -> (N, C, height, width), of the same dtype.

    Example:
        >>> resize_like_pillow(torch.tensor([[[[0, 51, 102, 255]]]]) / 255, 1, 2).mul(255).round().flatten().tolist()
        [36.0, 160.0]
    """
    exact = not (torch.is_grad_enabled() and rgb.requires_grad)
    # Sums of 8-bit levels times weights of 22 bits are exact in float64, which Apple's GPUs lack.
    precise = torch.float32 if rgb.device.type == "mps" else torch.float64
    with without_autocast(rgb):
        out = rgb.to(precise) * LEVELS
        out = out.round() if exact else out
        if rows_first(rgb.shape[2], rgb.shape[3], height, width):
            out = _along_columns(out, height, filter, exact)
            out = _along_rows(out, width, filter, exact)
        else:
            out = _along_rows(out, width, filter, exact)
            out = _along_columns(out, height, filter, exact)
        return (out / LEVELS).to(rgb.dtype)


def rows_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow 13 resamples rows before columns. The rule is from its results, on 600 random sizes."""
    return height > new_height and 2 * (width - new_width) < height - new_height


def _along_columns(levels: Tensor, height: int, filter: str, exact: bool) -> Tensor:
    return _along_rows(levels.transpose(2, 3), height, filter, exact).transpose(2, 3)


def _along_rows(levels: Tensor, width: int, filter: str, exact: bool) -> Tensor:
    """Resample the last axis: (..., W) levels in 0..255 -> (..., width)."""
    weights = _weights(levels, width, filter)
    if not exact:
        return (levels @ weights).clamp(0, LEVELS)
    whole = (weights * BITS + 0.5 * weights.sign()).trunc()
    return ((levels @ whole + BITS / 2) / BITS).floor().clamp(0, LEVELS)


def _weights(levels: Tensor, width: int, filter: str) -> Tensor:
    """Compute the share of each input column in each output column: (W, width), each output's sum being 1."""
    scale = levels.shape[-1] / width
    stretch = max(scale, 1.0)
    centres = (torch.arange(width, device=levels.device).to(levels.dtype) + 0.5) * scale
    places = torch.arange(levels.shape[-1], device=levels.device).to(levels.dtype) + 0.5
    distances = (places[:, None] - centres).abs() / stretch
    weights = (1 - distances).clamp(min=0) if filter == "bilinear" else bicubic(distances)
    return weights / weights.sum(dim=0)


def bicubic(distances: Tensor) -> Tensor:
    """Evaluate the bicubic kernel with a = -0.5 (Keys, 1981) at distances of at least 0."""
    near = (1.5 * distances - 2.5) * distances * distances + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, torch.where(distances < 2, far, torch.zeros_like(far)))
