"""Pictures as arrays: a path, bytes, a PIL image or a NumPy array becomes checked pixels, or one clear error.

Without torch, so that a process that only decodes starts in a moment and stays small.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..errors import ImageError
from .formats import open_image

MIN_SIDE = 32  # pixels; CLIP's ResNets halve a picture five times
PixelSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class ReadRules:
    """How image files and PIL images become pixels.

    Attributes:
        ignore_orientation: take the pixels as they are stored, not as EXIF orientation says that they are shown.
        allow_truncated: accept image data that ends early; the missing part has the value that the decoder gives it.
        max_pixels: images of more pixels are refused before they are decoded. None: `PIL.Image.MAX_IMAGE_PIXELS` at
            the time of reading, which is 89,478,485 unless somebody changed it; None there means no limit.
    """

    ignore_orientation: bool = False
    allow_truncated: bool = False
    max_pixels: int | None = None

    def limit(self) -> int | None:
        """The largest number of pixels that is accepted now; None if there is no limit."""
        return Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels


def read_size(source: str | os.PathLike[str] | bytes, rules: ReadRules | None = None) -> tuple[int, int]:
    """Read width and height of an image as it would be scored, from its header alone.

    Raises:
        ImageError: as `read_pixels`, except for what is only found while decoding.
    """
    with _opened(source) as (file, name):
        image = _identify(file, name)
        _check_pixels(image, name, rules or ReadRules())
        width, height = image.size
        if not (rules or ReadRules()).ignore_orientation and image.getexif().get(0x0112, 1) in range(5, 9):
            width, height = height, width
        return width, height


def read_pixels(source: PixelSource, rules: ReadRules | None = None) -> np.ndarray:
    """The pixels of one picture, converted as `qualiclip_pyiqa.images` says but not yet scaled to 0..1.

    Args:
        source: path; encoded bytes; PIL image; array (H, W) or (H, W, C) with C = 1, 3 or 4.

    Returns:
        (H, W) or (H, W, C), uint8, uint16 or floating point, in the machine's byte order; H and W at least 32. Never
        memory of the source's.

    Raises:
        ImageError: no such file, no regular file, not a picture, damaged, too large or small, wrong shape or dtype,
            NaN, out of range.
    """
    rules = rules or ReadRules()
    if isinstance(source, np.ndarray):
        return _checked(source, source_name(source))
    if isinstance(source, Image.Image):
        return _from_pil(source, source_name(source), rules)
    with _opened(source) as (file, name):
        return _from_pil(_identify(file, name), name, rules)


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[BinaryIO, str]]:
    """Open a path or encoded bytes; the name is for error messages."""
    name = source_name(source)
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), name
        return
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"picture is a {type(source).__name__}; expected a path, bytes, a PIL image, a NumPy array or a tensor"
        )
    path = Path(os.fsdecode(source))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder; expected a picture file")
        if not stat.S_ISREG(mode):  # to open a pipe may wait for ever, and a device may never end
            raise ImageError(f"{name} is a pipe, socket or device; expected a picture file")
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; expected a picture file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); expected a picture file") from error
    with file:
        yield file, name


def source_name(source: object) -> str:
    """What an error calls a source: a file by its path, in quotes and escaped if that is not one printable line."""
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        return text if text.isprintable() else repr(text)
    if isinstance(source, Image.Image):
        return source_name(getattr(source, "filename", "") or "PIL image")
    return {"ndarray": "array", "Tensor": "tensor"}.get(type(source).__name__, type(source).__name__)


def _identify(file: BinaryIO, name: str) -> Image.Image:
    try:
        image = open_image(file)
    except Exception as error:  # Pillow's parsers raise SyntaxError, struct.error, ValueError, ... on damaged headers
        raise _undecodable(name, error) from error
    if image is None:
        if not file.seek(0, os.SEEK_END):
            raise ImageError(f"{name} is empty (0 bytes); expected a picture")
        raise ImageError(f"{name} is no picture, or of a format that Pillow cannot read")
    return image


def _undecodable(name: str, error: Exception) -> ImageError:
    if isinstance(error, OSError) and error.strerror:  # the file system's; Pillow's own have none
        return ImageError(f"{name} cannot be read ({error.strerror}); expected a picture file")
    return ImageError(f"{name} is damaged ({type(error).__name__}: {error}); expected a whole picture")


def _too_large(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} is too large, which may be a decompression bomb ({what}); "
        "if it is to be read, raise PIL.Image.MAX_IMAGE_PIXELS (on the command line --max-pixels)"
    )


def _check_pixels(image: Image.Image, name: str, rules: ReadRules) -> None:
    """Refuse what is too large or too small, before the work of decoding."""
    limit = rules.limit()
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name, f"{image.width}x{image.height}, limit {limit} pixels")
    check_size(image.height, image.width, name)


def _from_pil(image: Image.Image, name: str, rules: ReadRules) -> np.ndarray:
    _check_pixels(image, name, rules)
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = (
        ImageFile.LOAD_TRUNCATED_IMAGES,
        False,
    )  # pyiqa's AVA data set turns it on
    try:
        if not rules.ignore_orientation:
            image = ImageOps.exif_transpose(image)
        # Pillow cannot convert 16 and 32 bits a channel without loss: they go on as they are.
        if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        array = np.asarray(image)
    except Exception as error:  # as above; the pixels are decoded only here
        raise _undecodable(name, error) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    if image.mode == "I":  # Pillow's mode for 16 bits in some formats, and for 32 bits
        if array.min() < 0 or array.max() > 65535:
            raise ImageError(f"{name} has 32-bit values from {array.min()} to {array.max()}; expected 0..65535")
        array = array.astype(np.uint16)
    return _checked(array, name)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} has shape {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.name not in ("uint8", "uint16") and array.dtype.kind != "f":
        raise ImageError(f"{name} has dtype {array.dtype}; expected uint8, uint16, or floating point in 0..1")
    check_size(array.shape[0], array.shape[1], name)
    if array.dtype.kind == "f":
        check_range(float(array.min()), float(array.max()), name)
    # A copy in the machine's byte order, which torch needs; shared memory could be read-only, or change later.
    dtype = np.float64 if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
    return np.array(array, dtype=dtype, order="C")


def check_size(height: int, width: int, name: str) -> None:
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels; the smallest that can be scored is {MIN_SIDE}x{MIN_SIDE}")


def check_range(low: float, high: float, name: str) -> None:
    """Smallest and largest floating-point value; NaN, which both are as soon as one value is, is an error too."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{name} has NaN or infinite values; expected floating point in 0..1")
    if low < 0 or high > 1:
        advice = "divide by 255, or pass uint8" if 2 < high <= 255 and low >= 0 else "clamp or rescale it"
        raise ImageError(f"{name} has values from {low:g} to {high:g}; expected 0..1: {advice}")
