"""Resize images as Pillow does, on tensors of any device.

Pillow resamples one axis after the other, with weights of 22 fractional bits, and rounds to 8 bits after each of the
two (Pillow, src/libImaging/Resample.c). A network whose training images went through Pillow sees a difference.

For halving there is `halving`, whose time grows with the image alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import without_autocast

FILTERS = {"bilinear": 1.0, "bicubic": 2.0}  # name -> support in pixels of the coarser of the two images
LEVELS = 255
BITS = 2**22
_GRID = 2.0**-10  # largest distance of a level from a whole number; that of float32 is below 2 ** -16


def resize_like_pillow(rgb: Tensor, height: int, width: int, filter: str = "bilinear") -> Tensor:
    """Resize images as `PIL.Image.resize` does, antialiased.

    An image whose values are all levels of 8 bits (k / 255) becomes that of Pillow 13, bit for bit; the gradient is
    that of the filter, without the rounding. (Earlier versions always resample columns first; where the order differs,
    some results differ by one level.) Other images, which Pillow cannot resize, are rounded nowhere.

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
    # Sums of 8-bit levels times weights of 22 bits are exact in float64, which Apple's GPUs lack.
    precise = torch.float32 if rgb.device.type == "mps" else torch.float64
    with without_autocast(rgb):
        levels = rgb.to(precise) * LEVELS
        whole = levels.detach().round()
        of_8_bits = ((whole - levels.detach()).abs() <= _GRID).flatten(1).all(dim=1)[:, None, None, None]
        out = torch.where(of_8_bits, _with_gradient_of(levels, whole), levels)
        if rows_first(rgb.shape[2], rgb.shape[3], height, width):
            out = _along_columns(out, height, filter, of_8_bits)
            out = _along_rows(out, width, filter, of_8_bits)
        else:
            out = _along_rows(out, width, filter, of_8_bits)
            out = _along_columns(out, height, filter, of_8_bits)
        return (out / LEVELS).to(rgb.dtype)


def rows_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow 13 resamples rows before columns. The rule is from its results, on 600 random sizes."""
    return height > new_height and 2 * (width - new_width) < height - new_height


def _along_columns(levels: Tensor, height: int, filter: str, of_8_bits: Tensor) -> Tensor:
    return _along_rows(levels.transpose(2, 3), height, filter, of_8_bits).transpose(2, 3)


def _along_rows(levels: Tensor, width: int, filter: str, of_8_bits: Tensor) -> Tensor:
    """Resample the last axis: (N, C, H, W) levels in 0..255 -> (N, C, H, width), rounded where `of_8_bits`."""
    weights = _weights(levels, width, filter) * BITS
    sums = levels @ (weights + 0.5 * weights.sign()).trunc() / BITS
    rounded = _with_gradient_of(sums, (sums.detach() + 0.5).floor())
    return torch.where(of_8_bits, rounded, sums).clamp(0, LEVELS)


def _with_gradient_of(x: Tensor, values: Tensor) -> Tensor:
    """Return `values` with the gradient of `x`."""
    return values + (x - x.detach())


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
