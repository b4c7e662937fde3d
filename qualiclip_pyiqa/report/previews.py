"""A small copy of each image for a page, and its perceptual hash: one decoding per image, in worker processes."""

from __future__ import annotations

import io
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from ..errors import ImageError
from ..images.convert import ReadRules
from ..images.workers import DecodedImage, Decoder
from ..optional import require

#: Longest side of a preview in pixels, by the largest number of images for which it is used.
SIDES = ((60, 960), (200, 640), (1200, 400))
#: Longest side for more images than that.
SMALL_SIDE = 256
#: Bytes of all previews inside a page, before they become text, which is a third longer. Only a page of more images
#: than INSIDE_MOST can exceed this, since no preview gets less than 8 kB.
INSIDE_BYTES = 40_000_000

_QUALITIES = (82, 70, 55, 40, 25)
_FLAT = 2.0  # standard deviation of 8-bit luminance below which a hash would be of noise alone


@dataclass(frozen=True)
class Preview:
    """What a page keeps of an image's pixels.

    Attributes:
        data: encoded small copy, without metadata.
        width, height: of the small copy.
        hash: perceptual hash of 64 bits; None for a flat image.
    """

    data: bytes
    width: int
    height: int
    hash: int | None


def side_for(count: int) -> int:
    """Return the longest side of a preview for a page with this many images.

    Example:
        >>> side_for(7), side_for(1000), side_for(5000)
        (960, 400, 256)
    """
    return next((side for most, side in SIDES if count <= most), SMALL_SIDE)


def preview_suffix() -> str:
    """Return the suffix of previews: WebP where Pillow has it, else JPEG."""
    return "webp" if features.check("webp") else "jpg"


def make_preview(pixels: np.ndarray, side: int, most_bytes: int) -> Preview:
    """Shrink decoded pixels, encode them and hash them.

    Args:
        pixels: as from `read_pixels`: (H, W), (H, W, 3) or (H, W, 4); uint8, uint16 or floating point in 0..1.
        side: longest side of the preview in pixels.
        most_bytes: encode coarser, and smaller at last, until the preview fits.

    Raises:
        SettingsError: ImageHash is not installed.
    """
    image = _displayed(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    while True:
        for quality in _QUALITIES:
            data = _encode(image, quality)
            if len(data) <= most_bytes:
                return Preview(data, image.width, image.height, _hash(image))
        if max(image.size) <= 32:
            return Preview(data, image.width, image.height, _hash(image))
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)


def decode_each(
    paths: Sequence[str], rules: ReadRules, use: Callable[[int, np.ndarray], None], timeout: float = 60.0
) -> Iterator[tuple[int, ImageError | None]]:
    """Decode images in worker processes, in any order, and call `use` with each one's number and pixels.

    Yields:
        The number of each image when it is done, and the reason if it could not be decoded.
    """
    results: queue.SimpleQueue[DecodedImage] = queue.SimpleQueue()
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if len(paths) > 1 else 0
    decoder = Decoder(workers, 2 * workers or 1, results, rules, timeout)
    numbers = iter(range(len(paths)))
    try:
        for _ in paths:
            while decoder.ready and (number := next(numbers, None)) is not None:
                decoder.submit(number, paths[number])
            event = results.get()
            decoder.pending -= 1
            if isinstance(event.result, np.ndarray):
                use(event.number, event.result)
                yield event.number, None
            elif isinstance(event.result, ImageError):
                yield event.number, event.result
            else:
                raise event.result
    finally:
        decoder.close()


def _displayed(pixels: np.ndarray) -> Image.Image:
    """Return an RGB image of 8 bits, alpha composited over white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float32) * 255).round().astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    if preview_suffix() == "webp":
        image.save(file, "WEBP", quality=quality, method=4)
    else:
        image.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _hash(image: Image.Image) -> int | None:
    """Return the DCT hash of ImageHash's `phash`."""
    imagehash = require("imagehash", "report", "A report")
    if np.asarray(image.convert("L"), np.float32).std() < _FLAT:
        return None
    return int(str(imagehash.phash(image)), 16)
