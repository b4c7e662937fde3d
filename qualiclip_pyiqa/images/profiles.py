"""Convert an image from its embedded ICC profile to sRGB."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageCms

# A profile that changes no colour by more levels than this is sRGB, rounded differently.
_SAME = 2
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC


@dataclass(frozen=True)
class Conversion:
    """Conversion from a profile to sRGB.

    Attributes:
        mode: PIL mode that the profile describes: RGB, L, CMYK or LAB.
        transform: from `mode` to 8-bit RGB; None if it would change nothing.
        grey: (256,) sRGB level for each grey level; None for CMYK and LAB.
    """

    mode: str
    transform: ImageCms.ImageCmsTransform | None
    grey: np.ndarray | None


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an 8-bit image to sRGB; return it unchanged if it has no profile, or one for other channels.

    Args:
        image: mode RGB, RGBA, L, LA, CMYK or LAB; alpha is kept.
    """
    colours, alpha = image.mode.removesuffix("A"), image.mode.endswith("A")
    conversion = embedded(image)
    if colours == "LAB":
        conversion = lab()
    if conversion is None or conversion.transform is None:
        return image
    if colours == "L" and conversion.grey is not None:
        converted = image.getchannel("L").point(np.rint(conversion.grey).astype(np.uint8).tolist())
    elif colours == conversion.mode:
        converted = conversion.transform.apply(image.convert(colours) if alpha else image)
    else:
        return image
    if alpha:
        converted.putalpha(image.getchannel("A"))
    return converted


def grey_curve(image: Image.Image) -> np.ndarray | None:
    """Return the sRGB level, 0..255, of each of an image's 256 grey levels, or None if its profile changes nothing."""
    conversion = embedded(image)
    return None if conversion is None or conversion.transform is None else conversion.grey


def embedded(image: Image.Image) -> Conversion | None:
    """Return the conversion of an image's profile; None if it has none, or a damaged one."""
    profile = image.info.get("icc_profile")
    return _conversion(profile) if isinstance(profile, bytes) and profile else None


@cache
def lab() -> Conversion:
    """Return the conversion of Lab as stored in TIFF and PSD."""
    return _build(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


@lru_cache(maxsize=16)
def _conversion(profile: bytes) -> Conversion | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(opened.profile.xcolor_space.strip())
        return None if mode is None else _build(opened, mode)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):  # damaged, or a device link
        return None


def _build(profile: ImageCms.ImageCmsProfile, mode: str) -> Conversion:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB", _INTENT, flags=_FLAGS)
    if mode in ("CMYK", "LAB"):
        return Conversion(mode, transform, None)
    ramp = np.arange(256, dtype=np.uint8)
    levels = ramp[None] if mode == "L" else np.repeat(ramp[None, :, None], 3, axis=2)
    grey = np.asarray(transform.apply(Image.fromarray(levels)))[0, :, 1].astype(np.float64)
    change = np.abs(grey - ramp).max() if mode == "L" else _largest_change(transform)
    return Conversion(mode, None if change <= _SAME else transform, grey)


def _largest_change(transform: ImageCms.ImageCmsTransform) -> int:
    """Return the largest change in levels over 17 x 17 x 17 colours and 256 greys."""
    steps = np.arange(0, 256, 15.9375).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    colours = np.concatenate([colours, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)])[None]
    converted = np.asarray(transform.apply(Image.fromarray(colours)))
    return int(np.abs(converted.astype(np.int16) - colours).max())
