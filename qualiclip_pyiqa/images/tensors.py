"""Load a path, bytes, a PIL image, a NumPy array or a tensor as an RGB tensor in 0..1.

`qualiclip_pyiqa.images` describes the conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, kind_of
from .convert import PixelSource, ReadRules, check_range, check_size, read_pixels

Source: TypeAlias = PixelSource | Tensor

_SCALE = {"uint8": 255.0, "uint16": 65535.0}


def load_image(
    source: Source,
    *,
    ignore_orientation: bool = False,
    allow_truncated: bool = False,
    max_pixels: int | None = None,
    ignore_profile: bool = False,
) -> Tensor:
    """Load one image as an RGB tensor.

    8-bit RGB gives exactly the pixels that pyiqa reads. EXIF orientation and ICC profiles are applied, so that an image
    is scored as viewers show it; alpha is composited over white. `qualiclip_pyiqa.images` describes the conversion.

    Args:
        source: path; encoded bytes; PIL image; array (H, W) or (H, W, C); tensor (H, W) or (C, H, W). C is 1 (grey),
            3 (RGB) or 4 (RGB and alpha); values are uint8 in 0..255, uint16 in 0..65535, or floating point in 0..1.
        ignore_orientation: keep the stored orientation, as published figures did.
        allow_truncated: accept truncated data; the decoder fills the rest.
        max_pixels: refuse larger images before decoding. Default: `PIL.Image.MAX_IMAGE_PIXELS`, 89,478,485.
        ignore_profile: do not convert from an embedded ICC profile to sRGB, as published figures did not.

    Returns:
        (3, H, W) float32 in 0..1, H and W at least 32. A tensor keeps its device and its gradient.

    Raises:
        ImageError: no such file, not an image, damaged, too large or small, NaN, out of range, wrong shape or dtype.

    Example:
        >>> load_image("examples/photos/hats.jpg").shape
        torch.Size([3, 512, 768])
        >>> load_image(torch.full((32, 32), 255, dtype=torch.uint8)).mean()
        tensor(1.)
    """
    if isinstance(source, Tensor):
        if source.dim() not in (2, 3):
            raise ImageError(f"tensor has shape {tuple(source.shape)}; expected (C, H, W) or (H, W)")
        return _from_tensor(source if source.dim() == 3 else source.unsqueeze(0))
    rules = ReadRules(ignore_orientation, allow_truncated, max_pixels, ignore_profile)
    return from_pixels([read_pixels(source, rules)])[0].contiguous()


def from_pixels(arrays: Sequence[np.ndarray], device: torch.device | str | None = None) -> Tensor:
    """Stack arrays of one shape and dtype, as from `read_pixels`, into a batch.

    The memory stays channels last, which is fastest for the towers.

    Returns:
        (N, 3, H, W) float32 in 0..1 on `device`.
    """
    tensors = [torch.from_numpy(array) for array in arrays]
    pixels = (torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)).to(device)
    return _rgb(pixels.movedim(-1, 1) if pixels.dim() == 4 else pixels.unsqueeze(1), "array")


def as_batch(
    source: Source,
    *,
    ignore_orientation: bool = False,
    allow_truncated: bool = False,
    max_pixels: int | None = None,
    ignore_profile: bool = False,
) -> Tensor:
    """Load one image, or a tensor of several, as a batch.

    Args:
        source: as for `load_image`, or a tensor (N, C, H, W), N at least 1.
        ignore_orientation, allow_truncated, max_pixels, ignore_profile: see `load_image`.

    Returns:
        (N, 3, H, W) float32 in 0..1; N is 1 for a single image.

    Raises:
        ImageError: as `load_image`.

    Example:
        >>> as_batch("examples/photos/hats.jpg").shape
        torch.Size([1, 3, 512, 768])
    """
    if isinstance(source, Tensor) and source.dim() == 4:
        if not len(source):
            raise ImageError("tensor has shape (0, ...); expected at least one image")
        return _from_tensor(source)
    loaded = load_image(
        source,
        ignore_orientation=ignore_orientation,
        allow_truncated=allow_truncated,
        max_pixels=max_pixels,
        ignore_profile=ignore_profile,
    )
    return loaded.unsqueeze(0)


def from_nhwc(images: Tensor) -> Tensor:
    """Convert tensors whose channels are last, such as ComfyUI's IMAGE, to a batch.

    Args:
        images: (N, H, W, C) or (H, W, C); C is 1 (grey), 3 (RGB) or 4 (RGB and alpha, which is composited over white);
            uint8 in 0..255, uint16 in 0..65535, or floating point in 0..1.

    Returns:
        (N, 3, H, W) float32 in 0..1, on the same device and with the same gradient.

    Raises:
        ImageError: wrong shape or dtype, out of range, NaN, or smaller than 32x32 pixels.

    Example:
        >>> from_nhwc(torch.rand(2, 48, 64, 3)).shape
        torch.Size([2, 3, 48, 64])
    """
    if not isinstance(images, Tensor):
        raise ImageError(f"images is {kind_of(images)}; expected a tensor (N, H, W, C)")
    if images.dim() not in (3, 4) or images.shape[-1] not in (1, 3, 4):
        first = images.dim() in (3, 4) and images.shape[-3] in (1, 3, 4)
        order = "; this looks like (N, C, H, W), which as_batch takes" if first else ""
        raise ImageError(f"tensor has shape {tuple(images.shape)}; expected (N, H, W, C), C being 1, 3 or 4{order}")
    return as_batch(images.movedim(-1, -3))


def from_bgr(image: np.ndarray) -> Tensor:
    """Convert an array whose channels are blue, green, red, as OpenCV reads and returns it, to a batch of one.

    Args:
        image: (H, W, 3) BGR, (H, W, 4) BGR and alpha, which is composited over white, or (H, W) or (H, W, 1) grey;
            uint8 in 0..255, uint16 in 0..65535, or floating point in 0..1.

    Returns:
        (1, 3, H, W) float32, RGB in 0..1.

    Raises:
        ImageError: not an array (`cv2.imread` returns None for a file that it cannot read), wrong shape or dtype, out
            of range, NaN, or smaller than 32x32 pixels.

    Example:
        >>> from_bgr(np.full((48, 64, 3), (255, 0, 0), np.uint8))[0, :, 0, 0]  # blue
        tensor([0., 0., 1.])
    """
    if not isinstance(image, np.ndarray):
        raise ImageError(f"image is {kind_of(image)}; expected an array (H, W, 3) as of cv2.imread")
    colours = {3: [2, 1, 0], 4: [2, 1, 0, 3]}.get(image.shape[2] if image.ndim == 3 else 0)
    return as_batch(image if colours is None else image[:, :, colours])


def _rgb(pixels: Tensor, name: str) -> Tensor:
    """Convert (..., C, H, W) of any accepted dtype to (..., 3, H, W) float32."""
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
