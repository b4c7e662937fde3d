"""Interpret a TIFF's samples where Pillow's mode is ambiguous."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, TiffImagePlugin

from .formats import RefusedError

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_PLANAR, _SAMPLE_FORMAT, _SUBSAMPLING, _SUB_IFDS, _DNG_VERSION = 284, 339, 530, 330, 50706
_SIGNED = 2


@dataclass(frozen=True)
class Samples:
    """How sample values become grey.

    Attributes:
        white: the value of white in a 16-bit mode; None: 65535.
        inverted: whether white is stored as 0 and Pillow does not invert it.
    """

    white: int | None = None
    inverted: bool = False


def stored_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    """Return width and height before orientation, which Pillow applies to the size of a TIFF."""
    return image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]


def samples(image: Image.Image) -> Samples:
    """Return how to interpret an image's samples; the defaults if it is not a TIFF file.

    Raises:
        RefusedError: Pillow would decode wrong pixels.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return Samples()
    tags = image.tag_v2
    bits, formats = _tuple(tags.get(_BITS, 1)), _tuple(tags.get(_SAMPLE_FORMAT, 1))
    raw, separate = tags.get(_COMPRESSION, 1) == 1, tags.get(_PLANAR, 1) == 2
    if _DNG_VERSION in tags or (tags.get(_SUBFILE, 0) & 1 and _SUB_IFDS in tags):
        raise RefusedError("is a camera raw file, of which only a preview would be read; develop it first")
    if _SIGNED in formats:
        raise RefusedError(f"is a TIFF of signed {bits[0]}-bit integers, whose white is undefined; store unsigned ones")
    if image.mode == "I":
        raise RefusedError(f"is a TIFF of {bits[0]}-bit integers, whose white is undefined; store 8 or 16 bits")
    if raw and separate and len(bits) > 1 and set(bits) != {8}:
        raise RefusedError(f"is a TIFF of {bits[0]}-bit channels in separate planes; interleave or compress it")
    photometric = tags.get(_PHOTOMETRIC)
    if photometric == 6 and raw and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise RefusedError("is an uncompressed TIFF of subsampled YCbCr; store it as RGB")
    if photometric is None and len(bits) == 1:
        raise RefusedError("is a TIFF without PhotometricInterpretation, so 0 may be black or white; add the tag")
    if image.mode == "F" and not raw and tags.prefix == b"MM":
        raise RefusedError("is a compressed big-endian TIFF of floats, which Pillow misreads; store it little-endian")
    deep = image.mode == "F" or image.mode.startswith("I;16")
    return Samples(4095 if bits == (12,) else None, deep and photometric == 0)


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
