"""The supported image formats: one list for the whole package.

Files are identified by their content, never by their name. Pillow's other formats are not tried: Pillow starts
Ghostscript for EPS, calls other packages' handlers for WMF, BUFR, GRIB and HDF5, and opens any format inside IPTC.
"""

from __future__ import annotations

import os.path
import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, BinaryIO

from PIL import Image, ImageFile, features

# Pillow's name of a format -> suffixes. Most frequent first; TGA, which has no signature, last.
FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        "PNG": (".png", ".apng"),
        "WEBP": (".webp",),
        "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
        "AVIF": (".avif", ".avifs"),
        "JXL": (".jxl",),
        "TIFF": (".tif", ".tiff"),
        "BMP": (".bmp",),
        "DIB": (".dib",),
        "GIF": (".gif",),
        "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
        "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
        "QOI": (".qoi",),
        "PSD": (".psd",),
        "DDS": (".dds",),
        "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
        "SUN": (".ras",),
        "PCX": (".pcx",),
        "DCX": (".dcx",),
        "ICO": (".ico",),
        "CUR": (".cur",),
        "ICNS": (".icns",),
        "XBM": (".xbm",),
        "XPM": (".xpm",),
        "MSP": (".msp",),
        "FLI": (".fli", ".flc"),
        "BLP": (".blp",),
        "FTEX": (".ftc", ".ftu"),
        "GBR": (".gbr",),
        "PIXAR": (".pxr",),
        "PCD": (".pcd",),
        "TGA": (".tga", ".icb", ".vda", ".vst"),
    }
)

#: Suffixes, in lower case, of the image files that a search of a folder finds.
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

#: Formats that need a plug-in: what to call such an image, and what to install.
PLUGINS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "HEIF": ("a HEIC image", 'pillow-heif: pip install "qualiclip-pyiqa[formats]"'),
        "AVIF": ("an AVIF image", "Pillow 11.3 or later, or pillow-avif-plugin: pip install pillow-avif-plugin"),
        "JXL": ("a JPEG XL image", "pillow-jxl-plugin: pip install pillow-jxl-plugin"),
    }
)

UNKNOWN_FORMAT = "is not an image of a supported format"  # continues a file's name

# Brands of an ISO media file (ISO/IEC 23008-12, AVIF 1.1) that identify the codec, unlike `mif1` and `msf1`.
_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"

# Raised by Pillow's parsers for a file of another format.
_OTHER_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)


class RefusedError(Exception):
    """An image of an unknown format, or one that would be decoded wrongly. The message continues the file's name."""


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Identify an image by its content and read its header.

    Unlike `PIL.Image.open`, try `opened_formats` only, and leave the limit on the size to the caller, since Pillow's is
    global. Plug-ins for HEIC, AVIF and JPEG XL are imported when such a file is opened.

    Args:
        file: binary and seekable. The image reads its pixels from it later.

    Raises:
        RefusedError: not an image, or a plug-in is missing.
        Exception: whatever Pillow's parser raises for a damaged header.
    """
    file.seek(0)
    prefix = file.read(64)
    name = plugin_format(prefix)
    if name is not None:
        opener = _plugin_opener(name)
        if opener is None:
            what, package = PLUGINS[name]
            raise RefusedError(f"is {what}, which needs {package}")
        file.seek(0)
        return opener(file, "")
    if (image := _try_all(file, prefix)) is not None:
        return image
    if not prefix:
        raise RefusedError("is empty (0 bytes); expected an image")
    if prefix.startswith(_LFS_SIGNATURE):
        raise RefusedError("is a Git LFS pointer; fetch the image itself with: git lfs pull")
    raise RefusedError(UNKNOWN_FORMAT)


def check_opened(image: Image.Image) -> None:
    """Refuse to load an image that Pillow itself opened in a format that `open_image` does not try.

    Images that are already loaded, that were never in a file, or that another package's plug-in opened, pass.

    Raises:
        RefusedError: loading it would run code that no listed format runs, such as Ghostscript for EPS.
    """
    waiting = isinstance(image, ImageFile.StubImageFile) or (isinstance(image, ImageFile.ImageFile) and image.tile)
    # An MPO file is a JPEG file that is followed by others.
    if waiting and is_pillows(type(image)) and image.format not in (*FORMATS, "MPO"):
        raise RefusedError(
            f"is not an image of a supported format ({image.format}); call its load() first if you trust it"
        )


def plugin_format(prefix: bytes) -> str | None:
    """Return which of `PLUGINS` a file is, judging by its first 64 bytes; None if it is none of them.

    Example:
        >>> plugin_format(b"\\x00\\x00\\x00\\x18ftypheic\\x00\\x00\\x00\\x00mif1heic")
        'HEIF'
    """
    if prefix.startswith(_JXL_SIGNATURES):
        return "JXL"
    if prefix[4:8] != b"ftyp":
        return None
    box = prefix[: int.from_bytes(prefix[:4], "big")]
    brands = {box[8:12], *(box[i : i + 4] for i in range(16, len(box), 4))}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEVC_BRANDS else None


def _try_all(file: BinaryIO, prefix: bytes) -> ImageFile.ImageFile | None:
    """Open a file by the first format that accepts it. Raise the error of a format whose signature it has."""
    Image.preinit()
    refusal: Exception | None = None
    for name in _in_order():
        opener, accept = Image.OPEN.get(name, (None, None))
        try:
            if opener is not None and (accept is None or accept(prefix[:16]) is True):
                file.seek(0)
                return opener(file, "")
        except _OTHER_FORMAT as error:
            if name == "TIFF" and "pixel mode" in str(error):
                refusal = RefusedError("is a TIFF whose samples Pillow cannot read; use unsigned 8 or 16 bits")
            elif name in ("JPEG", "PNG", "WEBP", "TIFF"):  # formats with unambiguous signatures
                # Pillow's words for a header without a size or a kind of pixels.
                why = "no size in its header" if str(error) == "not identified by this driver" else error
                refusal = refusal or RefusedError(f"is damaged ({name}: {why}); expected a whole image")
    if refusal is not None:
        raise refusal
    return None


def _in_order() -> Iterator[str]:
    """Yield `opened_formats`, importing Pillow's rarer plug-ins only if none of the frequent formats fits."""
    for name in FORMATS:
        if name not in Image.OPEN and name not in PLUGINS:
            Image.init()
        yield name
    yield from opened_formats()[len(FORMATS) :]


def opened_formats() -> tuple[str, ...]:
    """Return the names of all formats that are opened: `FORMATS`, and those of Pillow plug-ins."""
    Image.init()
    return (*FORMATS, *(name for name in Image.OPEN if name not in FORMATS and not is_pillows(Image.OPEN[name][0])))


def usable_formats() -> tuple[str, ...]:
    """Return `FORMATS` without those whose plug-in is not installed."""
    return tuple(name for name in FORMATS if name not in PLUGINS or _plugin_opener(name) is not None)


def has_image_suffix(path: str) -> bool:
    """Return whether folders are searched for files of this suffix: `SUFFIXES`, and those of Pillow plug-ins.

    Example:
        >>> has_image_suffix("a/b.JPG"), has_image_suffix("a/b.eps")
        (True, False)
    """
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - millions of paths
    if suffix in SUFFIXES:
        return True
    name = Image.EXTENSION.get(suffix)
    return name in Image.OPEN and not is_pillows(Image.OPEN[name][0])


def is_pillows(opener: Any) -> bool:
    """Return whether an opener or decoder belongs to Pillow itself rather than to another package."""
    return (getattr(opener, "__module__", None) or "").partition(".")[0] == "PIL"


def _plugin_opener(name: str) -> Any:
    """Return the opener of a format of `PLUGINS`: one registered in Pillow, else one installed, else None."""
    Image.init()
    if name in Image.OPEN:
        opener = Image.OPEN[name][0]
        if not is_pillows(opener) or features.check(name.lower()):
            return opener
    # Unlike the other two, pillow_heif does not register itself in Pillow when imported.
    for package in {"HEIF": ("pillow_heif", "pi_heif"), "AVIF": ("pillow_avif",), "JXL": ("pillow_jxl",)}[name]:
        try:
            module = import_module(package)
        except ImportError:
            continue
        return module.HeifImageFile if name == "HEIF" else Image.OPEN[name][0]
    return None
