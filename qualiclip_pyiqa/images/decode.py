"""Decode a PIL image to an array: truncation, orientation, transparency and colour."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from . import png, profiles, tiff
from .formats import RefusedError

_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSES = {**_TRANSPOSES, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_END_OF_JPEG = b"\xff\xd9"

_lock = threading.Lock()
_readers = 0  # images being read now
_was_lenient = False  # whether to turn LOAD_TRUNCATED_IMAGES on again afterwards


@contextmanager
def strictly() -> Iterator[None]:
    """Turn `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` off until the last thread leaves this context.

    pyiqa's AVA data set turns it on; Pillow then fills missing pixels with grey and accepts wrong checksums.
    """
    global _readers, _was_lenient
    with _lock:
        _readers += 1
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _was_lenient, ImageFile.LOAD_TRUNCATED_IMAGES = True, False
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers and _was_lenient:
                _was_lenient, ImageFile.LOAD_TRUNCATED_IMAGES = False, True


def _after_fork() -> None:
    """Reset the state in a forked child, which has none of the reading threads."""
    global _lock, _readers, _was_lenient
    _lock, _readers = threading.Lock(), 0
    if _was_lenient:
        _was_lenient, ImageFile.LOAD_TRUNCATED_IMAGES = False, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def shown_size(image: Image.Image, ignore_orientation: bool) -> tuple[int, int]:
    """Return width and height as scored, without decoding the pixels if possible."""
    width, height = stored_size(image)
    if not ignore_orientation and _header_orientation(image) in (5, 6, 7, 8):
        return height, width
    return width, height


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height before orientation."""
    if image.format == "TIFF" and getattr(image, "tile", None):
        return tiff.stored_size(image)  # type: ignore[arg-type]
    return image.size


def to_array(image: Image.Image, ignore_orientation: bool, allow_truncated: bool, ignore_profile: bool) -> np.ndarray:
    """Decode an image.

    Returns:
        (H, W, 3) uint8 RGB; (H, W, 4) uint8 RGB and alpha; (H, W) uint16, float32 or int32 grey.

    Raises:
        RefusedError: Pillow would decode wrong pixels.
        Exception: whatever Pillow's decoder raises.
    """
    samples, key, of_file = tiff.samples(image), _transparent_colour(image), image.format is not None
    # Pillow applies a TIFF's orientation while decoding, and then drops the tag.
    turned = _orientation(image) if image.format == "TIFF" and getattr(image, "tile", None) else 1
    _load(image, allow_truncated)
    method = _INVERSES.get(turned) if ignore_orientation else None
    if not ignore_orientation and turned == 1:
        method = _TRANSPOSES.get(_orientation(image))
    if method is not None:
        image = image.transpose(method)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        if image.mode == "I":
            _check_integers(image, of_file)
        return _deep_grey(image, samples, key, None if ignore_profile else profiles.grey_curve(image))
    return _colour(image, key, ignore_profile)


def _load(image: Image.Image, allow_truncated: bool) -> None:
    """Decode the pixels. With `allow_truncated`, keep what was decoded before an error or the end of the data."""
    if not allow_truncated or not isinstance(image, ImageFile.ImageFile) or not image.tile:
        image.load()
        return
    ended = False
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        read: Callable[[int], bytes] = image.load_read

        def read_to_end(count: int) -> bytes:
            nonlocal ended
            data = read(count)
            if not data and not ended:
                ended = True
                return _END_OF_JPEG
            return data

        image.load_read = read_to_end  # type: ignore[assignment, method-assign]
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        if getattr(error, "errno", None) is not None:  # a read error, not a decoding error
            raise
        ended = True
        image.tile = []
        image.load()
    if ended and all(low == high for low, high in _extrema(image)):
        raise RefusedError("is truncated before its first row; expected a whole image")


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    found: Any = image.getextrema()
    return list(found) if isinstance(found[0], tuple) else [found]


def _header_orientation(image: Image.Image) -> int:
    """Return `_orientation` from the header alone, unless a PNG has metadata after its pixels."""
    waiting = isinstance(image, PngImagePlugin.PngImageFile) and image.tile and image.fp is not None
    if waiting and not png.has_late_metadata(image.fp):  # type: ignore[attr-defined]
        return _orientation(image, Image.Image.getexif)
    if waiting:  # so that damaged pixels are not mistaken for damaged EXIF
        image.load()
    return _orientation(image)


def _orientation(image: Image.Image, getexif: Callable[[Any], Image.Exif] | None = None) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or EXIF is damaged."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):  # already applied by the decoder
        return 1
    try:
        value = (getexif or type(image).getexif)(image).get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - the pixels may be intact
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSES else 1


def _transparent_colour(image: Image.Image) -> int | tuple[int, int, int] | None:
    """Return the grey level or colour that a PNG or GIF declares transparent, in units of the decoded pixels."""
    key: Any = image.info.get("transparency")
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile and key is not None:
        rawmode = image.tile[0][3]
        if image.mode == "L" and isinstance(key, int):  # Pillow scales the pixels to 8 bits, not the key
            return key * {"L;2": 85, "L;4": 17}.get(str(rawmode), 1)
        if image.mode == "RGB" and rawmode == "RGB;16B":
            raise RefusedError(
                "is a PNG of 16-bit colour with a transparent colour, which Pillow decodes wrongly; store it as RGBA"
            )
    return key if isinstance(key, int | tuple) else None


def _check_integers(image: Image.Image, of_file: bool) -> None:
    """Refuse 32-bit values in mode I, which Pillow uses for 16 bits in some formats."""
    low, high = (int(value) for value in _extrema(image)[0])
    if low < 0 or high > 65535 or (high < 256 and not of_file):
        raise RefusedError(f"has 32-bit integers from {low} to {high}; expected 16 bits (0..65535) or an 8-bit image")


def _deep_grey(
    image: Image.Image, samples: tiff.Samples, key: int | tuple[int, int, int] | None, curve: np.ndarray | None
) -> np.ndarray:
    array = np.asarray(image)
    transparent = array == key if isinstance(key, int) else None
    if image.mode == "I":
        array = array.astype(np.uint16)
    white: float = 1 if array.dtype.kind == "f" else samples.white or 65535
    if samples.inverted:
        array = (white - array).astype(array.dtype)
    if white not in (1, 65535):
        array = array.astype(np.float32) / np.float32(white)
        white = 1
    if curve is not None:
        array = np.interp(array, np.linspace(0, white, 256), curve * (white / 255)).astype(array.dtype)
    if transparent is not None and transparent.any():
        array = np.where(transparent, array.dtype.type(white), array)
    return array


def _colour(image: Image.Image, key: int | tuple[int, int, int] | None, ignore_profile: bool) -> np.ndarray:
    mode = image.mode
    transparent: Any = None
    if mode == "RGB" and ignore_profile and key is None:
        return np.asarray(image)
    if mode in ("P", "PA"):  # the palette includes transparency
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif key is not None and mode in ("1", "L", "RGB"):
        transparent = np.atleast_3d(np.asarray(image.convert("L") if mode == "1" else image) == key).all(axis=-1)
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        image = image.convert("RGB")
    if not ignore_profile or image.mode == "LAB":
        image = profiles.to_srgb(image)
    if image.mode not in ("RGB", "RGBA"):
        image = image.convert("RGBA" if image.mode == "LA" else "RGB")
    array = np.asarray(image)
    if transparent is not None and transparent.any():
        array = np.where(transparent[..., None], np.uint8(255), array)
    return array
