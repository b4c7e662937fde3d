"""Read a path, encoded bytes, a PIL image or a NumPy array as checked pixels, or raise one clear error.

Imports no torch, so that decoding processes start fast and stay small. `qualiclip_pyiqa.images` describes the
conversion.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from ..errors import ImageError, SettingsError, kind_of, one_line, visible
from ..files import is_utf8
from . import advice, decode, jxl, png
from .formats import RefusedError, check_opened, open_image, plugin_format

MIN_SIDE = 32  # pixels; CLIP's ResNets halve an image five times
EncodedSource: TypeAlias = str | os.PathLike[str] | bytes
PixelSource: TypeAlias = EncodedSource | Image.Image | np.ndarray
PixelsOrError: TypeAlias = np.ndarray | ImageError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ReadRules:
    """How image files and PIL images become pixels.

    Attributes:
        ignore_orientation: keep the stored orientation instead of applying EXIF orientation.
        allow_truncated: accept truncated data, and score what can be decoded.
        max_pixels: refuse larger images before decoding. None: `PIL.Image.MAX_IMAGE_PIXELS` at the time of reading,
            by default 89,478,485; if that is None, any size is accepted.
        ignore_profile: keep the stored colours instead of applying an embedded ICC profile.
    """

    ignore_orientation: bool = False
    allow_truncated: bool = False
    max_pixels: int | None = None
    ignore_profile: bool = False

    def __post_init__(self) -> None:
        if self.max_pixels is not None and self.max_pixels < 1:
            raise SettingsError(f"max_pixels is {self.max_pixels}; expected at least 1")

    def limit(self) -> int | None:
        """Return the largest number of pixels accepted now; None if there is no limit."""
        return Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels


_DEFAULT = ReadRules()


def read_pixels(source: PixelSource, rules: ReadRules | None = None) -> np.ndarray:
    """Read the pixels of one image, not yet scaled to 0..1.

    Args:
        source: path; encoded bytes; PIL image; array (H, W) or (H, W, C) with C = 1, 3 or 4.
        rules: how files and PIL images are read. Default: `ReadRules()`.

    Returns:
        (H, W) or (H, W, C): uint8 in 0..255, uint16 in 0..65535, or floating point in 0..1, in native byte order; H and
        W at least 32. Never shares memory with the source.

    Raises:
        ImageError: no such file, not a regular file, not an image, damaged, too large or small, wrong shape or dtype,
            NaN, out of range.

    Example:
        >>> read_pixels("examples/photos/hats.jpg").shape
        (512, 768, 3)
    """
    rules, name = rules or _DEFAULT, source_name(source)
    if isinstance(source, np.ndarray):
        return _checked(source, name)

    def decoded(image: Image.Image) -> np.ndarray:
        _check_pixels(decode.stored_size(image), name, rules)
        array = decode.to_array(image, rules.ignore_orientation, rules.allow_truncated, rules.ignore_profile)
        return _checked(array, name, of_file=image is not source)

    if isinstance(source, Image.Image):
        with _one_line(name), decode.strictly():
            check_opened(source)
            return decoded(source)
    with _opened(source, name) as file, _one_line(name), decode.strictly():
        return _read(file, name, rules, decoded)


def read_or_error(source: PixelSource, rules: ReadRules | None = None) -> PixelsOrError:
    """Call `read_pixels`, and return any exception as an `ImageError` of one line."""
    try:
        return read_pixels(source, rules)
    except ImageError as error:
        return ImageError(one_line(error))
    except MemoryError:
        return ImageError(f"{source_name(source)} cannot be decoded: out of memory")
    except Exception as error:  # noqa: BLE001 - a decoder's fault or ours; other images still count
        return ImageError(one_line(f"{source_name(source)} cannot be decoded ({type(error).__name__}: {error})"))


def read_size(source: EncodedSource, rules: ReadRules | None = None) -> tuple[int, int]:
    """Read the width and height at which an image would be scored, from its header.

    Raises:
        ImageError: as `read_pixels`, except for images that are too small and for faults found only by decoding.

    Example:
        >>> read_size("examples/photos/hats.jpg")
        (768, 512)
    """
    rules, name = rules or _DEFAULT, source_name(source)

    def size(image: Image.Image) -> tuple[int, int]:
        _check_limit(decode.stored_size(image), name, rules)
        return decode.shown_size(image, rules.ignore_orientation)

    with _opened(source, name) as file, _one_line(name), decode.strictly():
        return _read(file, name, rules, size)


def source_name(source: object) -> str:
    """Return the name of a source as it is shown: a path by `visible`, else what kind of object it is."""
    if isinstance(source, str | os.PathLike):
        return visible(os.fsdecode(source))
    if isinstance(source, Image.Image):
        return source_name(getattr(source, "filename", "") or "PIL image")
    return {"ndarray": "array", "Tensor": "tensor"}.get(type(source).__name__, type(source).__name__)


def check_size(height: int, width: int, name: str, least: int = MIN_SIDE) -> None:
    """Raise `ImageError` if an image is too small."""
    if min(height, width) < least:
        raise ImageError(f"{name} is {width}x{height} pixels; the smallest that can be scored is {least}x{least}")


def check_range(low: float, high: float, name: str, of_file: bool = False) -> None:
    """Raise `ImageError` unless floating-point values are in 0..1.

    Args:
        low: smallest value; NaN if any value is.
        high: largest value; NaN if any value is.
        name: of the image, for the error.
        of_file: whether the values are those of a file, which the caller cannot convert first.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{name} has NaN or infinite values; expected floating point in 0..1")
    if low < 0 or high > 1:
        remedy = "divide by 255, or pass uint8" if 2 < high <= 255 and low >= 0 else "clamp or rescale it"
        if of_file:
            remedy = "store the file with values in 0..1, or with 8 or 16 bits"
        raise ImageError(f"{name} has values from {low:g} to {high:g}; expected 0..1: {remedy}")


@contextmanager
def _opened(source: EncodedSource, name: str) -> Iterator[BinaryIO]:
    """Open a path or encoded bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | os.PathLike):
        several = "; for several images use Scorer" if isinstance(source, list | tuple) else ""
        raise ImageError(
            f"image is {kind_of(source)}; expected a path, bytes, a PIL image, a NumPy array or a tensor{several}"
        )
    if not os.fspath(source):  # pathlib would take it for the working directory
        raise ImageError("image path is empty; expected an image file")
    path = Path(os.fsdecode(source))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder; expected an image file")
        if not stat.S_ISREG(mode):  # opening a pipe may block, and a device may never end
            raise ImageError(f"{name} is a pipe, socket or device; expected an image file")
        file = path.open("rb")
    except FileNotFoundError:
        hint = "" if is_utf8(str(path)) else "; its name is not UTF-8: if a list or table names it, save that as UTF-8"
        raise ImageError(f"{name} does not exist; expected an image file{hint}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); expected an image file") from error
    with file:
        yield file


def _read(file: BinaryIO, name: str, rules: ReadRules, use: Callable[[Image.Image], _Result]) -> _Result:
    """Open the image in a file and apply `use` to it, without the metadata of a PNG if Pillow refuses them."""
    start = file.read(64)
    if plugin_format(start) == "JXL" and (size := jxl.read_size(file)) is not None:
        _check_limit(size, name, rules)  # opening decodes it
    try:
        return use(open_image(file))
    except ImageError:
        raise
    except ValueError:
        if not start.startswith(png.SIGNATURE):
            raise
    copy, profile = png.without_metadata(file)
    image = open_image(copy)
    if profile is not None:
        image.info["icc_profile"] = profile
    return use(image)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn any exception of the block into an `ImageError` that names the image."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except RefusedError as error:
        raise ImageError(f"{name} {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large for Pillow itself ({error}){advice.PILLOW}") from error
    except Exception as error:  # Pillow's parsers raise SyntaxError, struct.error, ValueError, ... on damaged files
        if isinstance(error, OSError) and error.strerror:  # from the file system, not Pillow
            raise ImageError(f"{name} cannot be read ({error.strerror}); expected an image file") from error
        if "truncated" in str(error).lower():  # Pillow's word for every format
            raise ImageError(
                f"{name} is damaged (truncated: its image data end too early); expected a whole image{advice.TRUNCATED}"
            ) from error
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ImageError(f"{name} is damaged ({reason}); expected a whole image") from error


def _check_pixels(size: tuple[int, int], name: str, rules: ReadRules) -> None:
    """Refuse an image that is too large or too small, before decoding."""
    _check_limit(size, name, rules)
    check_size(size[1], size[0], name)


def _check_limit(size: tuple[int, int], name: str, rules: ReadRules) -> None:
    width, height = size
    limit = rules.limit()
    if limit is not None and width * height > limit:
        raise ImageError(
            f"{name} is too large and may be a decompression bomb ({width}x{height}, limit {limit} pixels)"
            f"{advice.MAX_PIXELS}"
        )


def _checked(array: np.ndarray, name: str, of_file: bool = False) -> np.ndarray:
    """Return a checked copy of an array."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} has shape {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.name not in ("uint8", "uint16") and array.dtype.kind != "f":
        raise ImageError(f"{name} has dtype {array.dtype}; expected uint8, uint16, or floating point in 0..1")
    check_size(array.shape[0], array.shape[1], name)
    if array.dtype.kind == "f":
        check_range(float(array.min()), float(array.max()), name, of_file)
    # torch needs native byte order; shared memory could be read-only, or change later.
    dtype = np.float64 if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
    return np.array(array, dtype=dtype, order="C")
