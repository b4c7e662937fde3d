"""Encoded images and ICC profiles made byte by byte, for what Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

# Columns of red, green and blue in XYZ, adapted to D50.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: Iterable[bytes], *before: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + png_chunk(b"IEND", b"")


def with_chunks(content: bytes, *chunks: bytes, late: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or after them."""
    position = content.rindex(b"IEND") - 4 if late else content.index(b"IDAT") - 4
    return content[:position] + b"".join(chunks) + content[position:]


def tiff(width: int, height: int, data: bytes, tags: dict[int, int | tuple[int, ...]], order: str = "<") -> bytes:
    """A TIFF of one strip. Tags are numbers of 16 bits, or several of them."""
    found: dict[int, int | tuple[int, ...]] = {256: width, 257: height, 259: 1, 277: 1, 278: height, **tags}
    entries, extra = b"", b""
    start = 8 + 2 + 12 * (len(found) + 2) + 4
    found |= {273: 0, 279: 0}
    room = sum(2 * len(value) for value in found.values() if isinstance(value, tuple) and len(value) > 2)
    for tag in sorted(found):
        value = found[tag]
        if tag in (273, 279):
            entries += struct.pack(order + "HHLL", tag, 4, 1, start + room if tag == 273 else len(data))
        elif isinstance(value, int):
            entries += struct.pack(order + "HHLHH", tag, 3, 1, value, 0)
        elif len(value) == 2:
            entries += struct.pack(order + "HHLHH", tag, 3, 2, *value)
        else:
            entries += struct.pack(order + "HHLL", tag, 3, len(value), start + len(extra))
            extra += struct.pack(f"{order}{len(value)}H", *value)
    head = struct.pack(order + "2sHLH", b"II" if order == "<" else b"MM", 42, 8, len(found))
    return head + entries + struct.pack(order + "L", 0) + extra + data


def packed_12_bits(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(np.uint16)
    first, second = pairs[:, 0], pairs[:, 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def srgb_curve() -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(columns: tuple[tuple[float, ...], ...], curve: bytes) -> bytes:
    xyz = [b"XYZ \0\0\0\0" + _fixed(*column) for column in columns]
    colours = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True))
    return _profile(b"RGB ", colours | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey_profile(curve: bytes) -> bytes:
    return _profile(b"GRAY", {b"kTRC": curve})


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2.4 display profile with XYZ as its connection space (ICC.1:2001-04)."""
    name = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    white = b"XYZ \0\0\0\0" + _fixed(0.9642, 1, 0.8249)
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0x\0", b"wtpt": white, **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        padded = value + b"\0" * (-len(value) % 4)
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += padded
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
