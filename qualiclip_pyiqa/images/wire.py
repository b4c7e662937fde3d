"""Messages between a process and its decoding workers: fixed headers and raw bytes, nothing executable.

A worker parses files that may be hostile, so the parent treats its messages as untrusted data: it checks a header of
fixed size before allocating anything, then reads as many bytes as the header announces. A compromised worker can send
wrong pixels or errors for its own images; it cannot run code in the parent, or make it hold more than one image of the
permitted size.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..errors import ImageError

# To a worker: number of the image, kind of source, length of the payload.
_REQUEST = struct.Struct("=QcQ")
# From a worker: number of the image, kind of answer, index of the dtype, height, width, channels (0: an array (H, W)),
# length of the payload.
_REPLY = struct.Struct("=QcBIIBQ")
_PATH, _BYTES, _PIXELS, _ERROR = b"p", b"b", b"a", b"e"

REPLY_SIZE = _REPLY.size
#: The image number in a worker's first message, which reports that it is ready, or a problem.
READY = 2**64 - 1
#: The dtypes that `read_pixels` returns.
DTYPES = tuple(map(np.dtype, ("uint8", "uint16", "float16", "float32", "float64")))
#: Bytes of an error message, at most.
MAX_TEXT = 2**16


class BadReplyError(Exception):
    """A malformed message from a worker."""


@dataclass(frozen=True)
class Reply:
    """The checked header of a worker's message.

    Attributes:
        shape: (H, W) or (H, W, C) of the array in the payload; None: the payload is an error message, or empty.
        dtype: of the array.
        length: bytes of the payload.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype
    length: int


def pack_request(number: int, source: str | bytes) -> list[bytes]:
    """Encode a request for the pixels of a path or of encoded bytes, as pieces to write in order."""
    kind, data = (_PATH, os.fsencode(source)) if isinstance(source, str) else (_BYTES, source)
    return [_REQUEST.pack(number, kind, len(data)), data]


def read_request(stream: BinaryIO) -> tuple[int, str | bytes] | None:
    """Read the number and source of a request; None at the end of the stream."""
    header = stream.read(_REQUEST.size)
    if len(header) < _REQUEST.size:
        return None
    number, kind, length = _REQUEST.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        return None
    return number, os.fsdecode(data) if kind == _PATH else data


def pack_reply(number: int, result: np.ndarray | ImageError | None) -> list[bytes | memoryview]:
    """Encode a worker's answer, as pieces to write in order. `result` is None in the ready message."""
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
        number: the expected image number.
        limit: the largest accepted number of pixels; None: any.

    Raises:
        BadReplyError: the message is for another image, or announces an impossible or too large payload.
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
