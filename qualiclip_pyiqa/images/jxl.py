"""Read the size of a JPEG XL image from its header; Pillow's plug-in would decode the whole image first."""

from __future__ import annotations

from typing import BinaryIO

_CODESTREAM = b"\xff\x0a"
# ISO/IEC 18181-1, D.2: width as a multiple of the height.
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def read_size(file: BinaryIO) -> tuple[int, int] | None:
    """Read the stored width and height from a codestream, bare or in a container; None if there is none."""
    start = _codestream(file)
    if not start.startswith(_CODESTREAM):
        return None
    bits = _Bits(int.from_bytes(start[2:16], "little"))
    small = bits.take(1)
    height = bits.side(small)
    ratio = bits.take(3)
    if ratio:
        numerator, denominator = _RATIOS[ratio]
        return height * numerator // denominator, height
    return bits.side(small), height


def _codestream(file: BinaryIO) -> bytes:
    """Return the first 16 bytes of the codestream."""
    file.seek(0)
    start = file.read(16)
    position = 0
    while len(start) >= 8 and not start.startswith(_CODESTREAM):
        length, kind, header = int.from_bytes(start[:4], "big"), start[4:8], 8
        if length == 1:
            length, header = int.from_bytes(start[8:16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            file.seek(position + header + (4 if kind == b"jxlp" else 0))
            return file.read(16)
        if length < header:  # damaged, or 0 for the last box
            return b""
        position += length
        file.seek(position)
        start = file.read(16)
    return start


class _Bits:
    """Reads bit fields from a number, lowest bit first."""

    def __init__(self, value: int) -> None:
        self.value = value

    def take(self, count: int) -> int:
        taken = self.value & ((1 << count) - 1)
        self.value >>= count
        return taken

    def side(self, small: int) -> int:
        return 8 * (self.take(5) + 1) if small else self.take((9, 13, 18, 30)[self.take(2)]) + 1
