"""Messages between a process and its decoding workers: fixed headers and raw bytes, nothing that is executed.

A worker parses files that may be hostile, so its parent treats what it sends as data: a header of fixed size is checked
before anything is allocated, and then as many bytes are read as the header says. A worker that was taken over can send
wrong pixels or a wrong error, for its images from then on. It cannot run code in its parent, or make its parent keep
more than one image of the permitted size.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..errors import ImageError

# To a worker: number of the image, kind of source, length of what follows.
_REQUEST = struct.Struct("=QcQ")
# From a worker: number of the image, kind of answer, index of the dtype, height, width, channels (0: two-dimensional
# array), length of what follows.
_REPLY = struct.Struct("=QcBIIBQ")
_PATH, _BYTES, _PIXELS, _ERROR = b"p", b"b", b"a", b"e"

REPLY_SIZE = _REPLY.size
#: The number in the first message of a worker, which is ready or says why it is not.
READY = 2**64 - 1
#: What `read_pixels` returns.
DTYPES = tuple(map(np.dtype, ("uint8", "uint16", "float16", "float32", "float64")))
#: Bytes of an error message, of which one line is enough.
MAX_TEXT = 2**16


class BadReplyError(Exception):
    """A message that no worker in its right mind sends."""


@dataclass(frozen=True)
class Reply:
    """Header of a worker's message, checked.

    Attributes:
        shape: of the array that follows, (H, W) or (H, W, C); None: text follows, of an error unless it is empty.
        dtype: of the array.
        length: number of bytes that follow.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype
    length: int


def pack_request(number: int, source: str | bytes) -> list[bytes]:
    """What asks a worker for the pixels of a path or of encoded bytes, in pieces to be written one after another."""
    kind, data = (_PATH, os.fsencode(source)) if isinstance(source, str) else (_BYTES, source)
    return [_REQUEST.pack(number, kind, len(data)), data]


def read_request(stream: BinaryIO) -> tuple[int, str | bytes] | None:
    """Read what `pack_request` made: number and source; None at the end of the stream."""
    header = stream.read(_REQUEST.size)
    if len(header) < _REQUEST.size:
        return None
    number, kind, length = _REQUEST.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        return None
    return number, os.fsdecode(data) if kind == _PATH else data


def pack_reply(number: int, result: np.ndarray | ImageError | None) -> list[bytes | memoryview]:
    """A worker's answer, in pieces; None: it is ready."""
    if isinstance(result, np.ndarray):
        height, width, channels = (*result.shape, 0)[:3]
        data = np.ascontiguousarray(result).data.cast("B")
        return [_REPLY.pack(number, _PIXELS, DTYPES.index(result.dtype), height, width, channels, data.nbytes), data]
    text = b"" if result is None else str(result).encode(errors="backslashreplace")[:MAX_TEXT]
    return [_REPLY.pack(number, _ERROR, 0, 0, 0, 0, len(text)), text]


def parse_reply(header: bytes | bytearray, number: int, limit: int | None) -> Reply:
    """Check the header of a worker's message.

    Args:
        header: `REPLY_SIZE` bytes.
        number: of the image that it must be about.
        limit: pixels of the largest image that is accepted; None: any.

    Raises:
        BadReplyError: it is about another image, or announces what cannot be an image or is too large.
    """
    told, kind, index, height, width, channels, length = _REPLY.unpack(header)
    if told != number:
        raise BadReplyError
    if kind == _ERROR:
        if length > MAX_TEXT:
            raise BadReplyError
        return Reply(None, DTYPES[0], length)
    if kind != _PIXELS or index >= len(DTYPES) or channels not in (0, 1, 3, 4) or not height or not width:
        raise BadReplyError
    shape = (height, width, channels) if channels else (height, width)
    if (limit is not None and height * width > limit) or length != math.prod(shape) * DTYPES[index].itemsize:
        raise BadReplyError
    return Reply(shape, DTYPES[index], length)
