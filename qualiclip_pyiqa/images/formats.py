"""The image formats that are opened: one list for the whole package.

A file is identified by its content, never by its name. A format that is not listed here is not tried, whatever Pillow
knows of it: Pillow would start Ghostscript for an EPS, and hands WMF, BUFR, GRIB and HDF5 to handlers of others.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import BinaryIO

from PIL import Image, ImageFile

# Format as Pillow names it -> suffixes of its files. Most frequent first; TGA, which has no signature, last.
FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        "PNG": (".png", ".apng"),
        "WEBP": (".webp",),
        "AVIF": (".avif", ".avifs"),
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
        "HEIF": (".heic", ".heif", ".heics", ".heifs", ".hif"),
        "JXL": (".jxl",),
        "TGA": (".tga", ".icb", ".vda", ".vst"),
    }
)

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def open_image(file: BinaryIO) -> ImageFile.ImageFile | None:
    """Identify an image by its content and read its header.

    Args:
        file: opened for reading in binary mode, seekable. The image reads its pixels from it later.

    Returns:
        The image, not decoded yet; None if it is of none of the `FORMATS`.

    Raises:
        Exception: whatever Pillow's parser raises on a damaged header.
    """
    # Not Image.open: it compares the size with a limit of the whole process, and warns.
    Image.preinit()
    file.seek(0)
    prefix = file.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        opener, accept = Image.OPEN.get(name, (None, None))
        if opener is None:
            continue
        try:
            if accept is None or accept(prefix) is True:
                file.seek(0)
                return opener(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # Pillow's words for "not of this format"
            continue
    return None
