"""Pictures in: a path, bytes, a PIL image, a NumPy array or a tensor becomes an RGB tensor in 0..1, or one clear error.

The conversion, which decides scores and is the same for every source:

- 8-bit RGB is divided by 255 and nothing else: the pixels of pyiqa's `imread2tensor`.
- EXIF orientation is applied, so that a photograph is scored as it is seen (pyiqa ignores it).
- Grey becomes three equal channels; palettes are looked up; of several frames or pages the current (first) one counts.
- Alpha, a palette's or a PNG's transparent colour included, is laid over white, in floating point.
- 16-bit grey is divided by 65535. Pillow reads 16-bit colour files as 8 bits; pass such pixels as a uint16 array.
- CMYK, YCbCr and what else Pillow knows go through Pillow's `convert("RGB")`. Colour profiles are ignored.

Nothing is resized. A file or PIL image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million unless changed) is
refused before it is decoded: raise that number for such pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError
from .convert import PixelSource, ReadRules, check_range, check_size, read_pixels

Source: TypeAlias = PixelSource | Tensor

_SCALE = {"uint8": 255.0, "uint16": 65535.0}


def load_image(
    source: Source, *, ignore_orientation: bool = False, allow_truncated: bool = False, max_pixels: int | None = None
) -> Tensor:
    """One picture as an RGB tensor.

    Args:
        source: path; encoded bytes; PIL image; array (H, W) or (H, W, C); tensor (H, W) or (C, H, W). C is 1 (grey),
            3 (RGB) or 4 (RGB and alpha); values are uint8, uint16, or floating point in 0..1.

    Returns:
        (3, H, W) float32 in 0..1, H and W at least 32. A tensor keeps its device and its gradient.

    Raises:
        ImageError: no such file, not a picture, damaged, too large or small, NaN, out of range, wrong shape or dtype.
    """
    if isinstance(source, Tensor):
        if source.dim() not in (2, 3):
            raise ImageError(f"tensor has shape {tuple(source.shape)}; expected (C, H, W) or (H, W)")
        return _from_tensor(source if source.dim() == 3 else source.unsqueeze(0))
    rules = ReadRules(ignore_orientation, allow_truncated, max_pixels)
    return from_pixels([read_pixels(source, rules)])[0].contiguous()


def from_pixels(arrays: Sequence[np.ndarray], device: torch.device | str | None = None) -> Tensor:
    """N arrays of one shape and dtype, as `read_pixels` gives them -> (N, 3, H, W) float32 in 0..1 on `device`.

    The memory stays in the arrays' order (channels last), which the towers want anyway.
    """
    tensors = [torch.from_numpy(array) for array in arrays]
    pixels = (torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)).to(device)
    return _rgb(pixels.movedim(-1, 1) if pixels.dim() == 4 else pixels.unsqueeze(1), "array")


def as_batch(
    source: Source, *, ignore_orientation: bool = False, allow_truncated: bool = False, max_pixels: int | None = None
) -> Tensor:
    """`load_image`, and tensors (N, C, H, W): always (N, 3, H, W) float32 in 0..1, N at least 1."""
    if isinstance(source, Tensor) and source.dim() == 4:
        if not len(source):
            raise ImageError("tensor has shape (0, ...); expected at least one picture")
        return _from_tensor(source)
    loaded = load_image(
        source, ignore_orientation=ignore_orientation, allow_truncated=allow_truncated, max_pixels=max_pixels
    )
    return loaded.unsqueeze(0)


def _rgb(pixels: Tensor, name: str) -> Tensor:
    """(..., C, H, W) of any accepted dtype -> (..., 3, H, W) float32."""
    channels, height, width = pixels.shape[-3:]
    if channels not in (1, 3, 4):
        order = "; this looks like (..., H, W, C), use movedim(-1, -3)" if width in (1, 3, 4) else ""
        raise ImageError(f"{name} has shape {tuple(pixels.shape)}; expected 1, 3 or 4 channels before H and W{order}")
    check_size(height, width, name)
    scale = _SCALE.get(str(pixels.dtype).removeprefix("torch."))
    if scale is None and not pixels.is_floating_point():
        raise ImageError(f"{name} has dtype {pixels.dtype}; expected uint8, uint16, or floating point in 0..1")
    pixels = pixels.float() if scale is None else pixels.float().div_(scale)
    if channels == 4:
        alpha = pixels[..., 3:, :, :]
        pixels = pixels[..., :3, :, :] * alpha + (1 - alpha)
    elif channels == 1:
        pixels = pixels.expand(*pixels.shape[:-3], 3, height, width)
    return pixels


def _from_tensor(tensor: Tensor) -> Tensor:
    rgb = _rgb(tensor, "tensor")
    if tensor.is_floating_point():
        check_range(tensor.min().item(), tensor.max().item(), "tensor")
    return rgb.contiguous()
