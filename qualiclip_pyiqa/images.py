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

import io
import os
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ImageError

MIN_SIDE = 32  # pixels; CLIP's ResNets halve a picture five times
Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

_SCALE = {"uint8": 255.0, "uint16": 65535.0}


def load_image(source: Source) -> Tensor:
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
        return _rgb(source if source.dim() == 3 else source.unsqueeze(0), "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if isinstance(source, Image.Image):
        return _from_pil(source, getattr(source, "filename", "") or "PIL image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), "bytes")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"picture is a {type(source).__name__}; expected a path, bytes, a PIL image, a NumPy array or a tensor"
        )
    path = Path(source)
    try:
        file = path.open("rb")
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; expected a picture file") from None
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; expected a picture file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read ({error}); expected a picture file") from error
    with file:
        return _decode(file, str(path))


def as_batch(source: Source) -> Tensor:
    """`load_image`, and tensors (N, C, H, W): always (N, 3, H, W) float32 in 0..1, N at least 1."""
    if isinstance(source, Tensor) and source.dim() == 4:
        if not len(source):
            raise ImageError("tensor has shape (0, ...); expected at least one picture")
        return _rgb(source, "tensor")
    return load_image(source).unsqueeze(0)


def _decode(file: BinaryIO, name: str) -> Tensor:
    if not file.read(1):
        raise ImageError(f"{name} is empty (0 bytes); expected a picture")
    try:
        file.seek(0)
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is no picture, or of a format that Pillow cannot read") from None
    except Exception as error:  # Pillow's parsers raise SyntaxError, struct.error, ValueError, ... on damaged headers
        raise ImageError(f"{name} is damaged ({type(error).__name__}: {error}); expected a whole picture") from error
    return _from_pil(image, name)


def _too_large(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} is too large, which may be a decompression bomb ({what}); "
        "raise PIL.Image.MAX_IMAGE_PIXELS if it is to be read"
    )


def _from_pil(image: Image.Image, name: str) -> Tensor:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name, f"{image.width}x{image.height}, limit {limit} pixels")
    _check_size(image.height, image.width, name)  # before the work of decoding
    try:
        image = ImageOps.exif_transpose(image)
        # Pillow cannot convert 16 and 32 bits a channel without loss: they go on as they are.
        if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        array = np.asarray(image)
    except Exception as error:  # as above; the pixels are decoded only here
        raise ImageError(f"{name} is damaged ({type(error).__name__}: {error}); expected a whole picture") from error
    if image.mode == "I":  # Pillow's mode for 16 bits in some formats, and for 32 bits
        if array.min() < 0 or array.max() > 65535:
            raise ImageError(f"{name} has 32-bit values from {array.min()} to {array.max()}; expected 0..65535")
        array = array.astype(np.uint16)
    return _from_array(array, name)


def _from_array(array: np.ndarray, name: str) -> Tensor:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} has shape {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.name not in _SCALE and array.dtype.kind != "f":
        raise ImageError(f"{name} has dtype {array.dtype}; expected uint8, uint16, or floating point in 0..1")
    # A copy in the machine's byte order, which torch needs; shared memory could be read-only, or change later.
    dtype = np.float64 if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
    pixels = torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    return _rgb(pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels.unsqueeze(0), name)


def _rgb(pixels: Tensor, name: str) -> Tensor:
    """(..., C, H, W) of any accepted dtype -> (..., 3, H, W) float32."""
    channels, height, width = pixels.shape[-3:]
    if channels not in (1, 3, 4):
        order = "; this looks like (..., H, W, C), use movedim(-1, -3)" if width in (1, 3, 4) else ""
        raise ImageError(f"{name} has shape {tuple(pixels.shape)}; expected 1, 3 or 4 channels before H and W{order}")
    _check_size(height, width, name)
    scale = _SCALE.get(str(pixels.dtype).removeprefix("torch."))
    if scale is None and not pixels.is_floating_point():
        raise ImageError(f"{name} has dtype {pixels.dtype}; expected uint8, uint16, or floating point in 0..1")
    pixels = pixels.float() if scale is None else pixels.float() / scale
    if scale is None:
        _check_range(pixels.detach(), name)
    if channels == 4:
        alpha = pixels[..., 3:, :, :]
        pixels = pixels[..., :3, :, :] * alpha + (1 - alpha)
    elif channels == 1:
        pixels = pixels.expand(*pixels.shape[:-3], 3, height, width)
    return pixels.contiguous()


def _check_size(height: int, width: int, name: str) -> None:
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels; the smallest that can be scored is {MIN_SIDE}x{MIN_SIDE}")


def _check_range(pixels: Tensor, name: str) -> None:
    if not torch.isfinite(pixels).all():
        raise ImageError(f"{name} has NaN or infinite values; expected floating point in 0..1")
    low, high = pixels.min().item(), pixels.max().item()
    if low < 0 or high > 1:
        advice = "divide by 255, or pass uint8" if 2 < high <= 255 and low >= 0 else "clamp or rescale it"
        raise ImageError(f"{name} has values from {low:g} to {high:g}; expected 0..1: {advice}")
