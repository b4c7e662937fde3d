"""What a loss looks at: an image at several scales, and random crops of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError
from ..images.convert import MIN_SIDE, check_size

MAX_SCALE = 4.0  # memory grows with its square

#: First rows and first columns of n crops of each image, (N, n) each, and the crops' height and width.
Boxes: TypeAlias = tuple[Tensor, Tensor, int, int]


def check_crops(crops: Sequence[int] | None) -> tuple[int, int] | None:
    """Return the number of crops and their side.

    Raises:
        SettingsError: not None or two integers, n at least 1 and size at least 32.
    """
    if crops is None:
        return None
    try:
        n, size = crops
        valid = all(isinstance(value, int) and not isinstance(value, bool) for value in (n, size))
    except (TypeError, ValueError):
        valid = False
    if not valid or n < 1 or size < MIN_SIDE:
        raise SettingsError(
            f"crops is {crops!r}; expected None or (n, size), n at least 1 and size at least {MIN_SIDE}"
        )
    return n, size


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the factors.

    Raises:
        SettingsError: not a sequence of numbers above 0 and at most `MAX_SCALE`.
    """
    several = tuple(scales) if isinstance(scales, Sequence) and not isinstance(scales, str) else ()
    valid = [isinstance(scale, int | float) and not isinstance(scale, bool) for scale in several]
    if not several or not all(valid) or not all(0 < scale <= MAX_SCALE for scale in several):
        raise SettingsError(
            f"scales is {scales!r}; expected numbers above 0 and at most {MAX_SCALE:g}, such as (1.0, 0.5)"
        )
    return tuple(float(scale) for scale in several)


def resized(x: Tensor, scale: float) -> Tensor:
    """Resize images (N, C, H, W) by a factor, antialiased.

    Raises:
        ImageError: the result is smaller than 32x32 pixels.
    """
    if scale == 1:
        return x
    height, width = round(x.shape[2] * scale), round(x.shape[3] * scale)
    check_size(height, width, f"image at scale {scale:g}")
    # Antialiasing has a kernel as wide as the factor, so overshoots nowhere.
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def crop_boxes(x: Tensor, n: int, size: int) -> Boxes:
    """Draw the positions of n crops for each of N images; of an image that is smaller than a crop, one: the whole."""
    height, width = min(size, x.shape[2]), min(size, x.shape[3])
    if height == x.shape[2] and width == x.shape[3]:
        n = 1
    tops = torch.randint(x.shape[2] - height + 1, (len(x), n), device=x.device)
    lefts = torch.randint(x.shape[3] - width + 1, (len(x), n), device=x.device)
    return tops, lefts, height, width


def cut(x: Tensor, boxes: Boxes) -> Tensor:
    """Cut crops out of images: (N, C, H, W) -> (N * n, C, h, w), the crops of an image in a row.

    By indices and not slices, which would make a compiled graph for every position, and whose gradients are as large as
    the whole image each.
    """
    tops, lefts, height, width = boxes
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    rows = tops[:, :, None, None] + torch.arange(height, device=x.device)[:, None]
    columns = lefts[:, :, None, None] + torch.arange(width, device=x.device)
    return x[image, :, rows, columns].flatten(0, 1).movedim(-1, 1)
