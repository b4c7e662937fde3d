"""Read PNG files whose metadata Pillow refuses."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of texts that may contain the orientation, and the size up to which they are kept.
_KEPT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_KEPT_BYTES = 2**20
_PROFILE_BYTES = 2**25


def without_metadata(file: IO[bytes]) -> tuple[io.BytesIO, bytes | None]:
    """Copy a PNG without its texts and its ICC profile; return the copy and the profile.

    Pillow refuses texts and profiles of more than a mebibyte, as possible decompression bombs. Here the limit for
    profiles is 32 MiB; a larger one is dropped.
    """
    copy, profile = io.BytesIO(), None
    copy.write(SIGNATURE)
    for header, data, checksum in _chunks(file):
        kind = header[4:]
        if kind == b"iCCP":
            profile = _inflated(data.partition(b"\0")[2][1:])
        elif kind not in _TEXT or (data.startswith(_KEPT) and _is_small(kind, data)):
            copy.write(header + data + checksum)
    copy.seek(0)
    return copy, profile


def has_late_metadata(file: IO[bytes]) -> bool:
    """Return whether EXIF or texts, which may contain the orientation, follow the pixels. Keeps the file position."""
    position = file.tell()
    try:
        seen_pixels = False
        for header, _, _ in _chunks(file, skip=True):
            kind = header[4:]
            seen_pixels = seen_pixels or kind == b"IDAT"
            if seen_pixels and kind in (*_TEXT, b"eXIf"):
                return True
        return False
    finally:
        file.seek(position)


def _chunks(file: IO[bytes], skip: bool = False) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield header (length and kind), data and checksum of each chunk; with `skip`, data and checksum are b""."""
    file.seek(len(SIGNATURE))
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[:4], "big")
        if skip:
            file.seek(length + 4, io.SEEK_CUR)
            yield header, b"", b""
        else:
            yield header, file.read(length), file.read(4)


def _is_small(kind: bytes, data: bytes) -> bool:
    if kind == b"tEXt":
        return len(data) <= _KEPT_BYTES
    _, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        if rest[:1] == b"\0":
            return len(data) <= _KEPT_BYTES
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        rest = rest[1:]
    return _inflated(rest, _KEPT_BYTES) is not None


def _inflated(data: bytes, limit: int = _PROFILE_BYTES) -> bytes | None:
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(data, limit)
    except zlib.error:
        return None
    return None if inflater.unconsumed_tail else whole
