"""One pass of a scorer over its inputs.

Path of an image: source -> `Decoder` -> its reference's way through the `Decoder`, if a metric compares the two ->
queue of its size -> `Network` on a device -> record. Nothing is padded or resized, so a score does not depend on the
batch. The number of images in flight and the memory of their pixels are bounded, whatever the number of inputs.
"""

from __future__ import annotations

import os
import queue
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from ..errors import ImageError
from ..images.convert import PixelsOrError, read_or_error, source_name
from ..images.tensors import Source, load_image
from ..images.workers import DecodedImage, Decoder
from .network import Reference, Scored
from .tables import Record

if TYPE_CHECKING:
    from .scorer import Scorer

# Bytes of decoded images waiting to be scored, at most.
DECODED_BYTES = 2**30

ShapeAndDtype: TypeAlias = tuple[tuple[int, ...], np.dtype]


@dataclass(frozen=True)
class DecodedInput:
    """An image that is ready to be scored.

    Attributes:
        number: of the input.
        pixels: of the image.
        reference: its pixels, or why there are none; None if no metric needs one.
    """

    number: int
    pixels: np.ndarray
    reference: Reference

    @property
    def nbytes(self) -> int:
        """Size of the pixels in bytes."""
        return self.pixels.nbytes + (self.reference.nbytes if isinstance(self.reference, np.ndarray) else 0)


@dataclass(frozen=True)
class ScoredBatch:
    """A finished batch, as a device's thread puts it on the queue.

    Attributes:
        device: index of the device.
        images: the batch; all are of one size.
        scored: the scores, or the exception.
    """

    device: int
    images: Sequence[DecodedInput]
    scored: Future[list[Scored]]


class Run:
    """One pass over the inputs. Everything except decoding and networks runs in the caller's thread.

    Args:
        scorer: the networks and settings.
        images: each with its reference, or with None if no metric needs one.
        events: takes what the decoder and the threads have finished.
        decoder: puts decoded images on `events`.
        threads: one for each network.
    """

    def __init__(
        self,
        scorer: Scorer,
        images: Iterator[tuple[Source | ImageError, Source | ImageError | None]],
        events: queue.SimpleQueue[Any],
        decoder: Decoder,
        threads: Sequence[ThreadPoolExecutor],
    ) -> None:
        self.scorer, self.images, self.events, self.decoder, self.threads = scorer, images, events, decoder, threads
        self.window = 8 * scorer.batch_size + 2 * scorer.workers
        self.busy = [0] * len(threads)  # batches running or queued, by device
        self.paths: dict[int, str | None] = {}
        self.references: dict[int, Source | ImageError] = {}  # not decoded yet
        self.unpaired: dict[int, np.ndarray] = {}  # images whose references are being decoded
        self.waiting: OrderedDict[ShapeAndDtype, deque[DecodedInput]] = OrderedDict()
        self.decoded_bytes = 0  # of images not scored yet, and their references
        self.last_bytes = 0  # of the last decoded image, as an estimate for the pending ones
        self.done: dict[int, Record] = {}
        self.read = 0  # number of images read from the input
        self.exhausted = False

    def __iter__(self) -> Iterator[Record]:
        number = 0
        while True:
            while number in self.done:
                yield self.done.pop(number)
                number += 1
            while self._may_read(number):
                self._read_one()
            self._dispatch()
            if self.exhausted and number == self.read:
                return
            if number not in self.done:
                event: DecodedImage | ScoredBatch = self.events.get()
                if isinstance(event, DecodedImage):
                    self._take_decoded(event)
                else:
                    self._take_scored(event)

    def _may_read(self, number: int) -> bool:
        pending = self.decoder.pending + len(self.references) - len(self.unpaired)
        weight = self.decoded_bytes + pending * self.last_bytes
        full = weight >= DECODED_BYTES or self.read - number >= self.window
        return not self.exhausted and not full and self.decoder.ready

    def _read_one(self) -> None:
        try:
            source, reference = next(self.images)
        except StopIteration:
            self.exhausted = True
            return
        number, self.read = self.read, self.read + 1
        self.paths[number] = os.fsdecode(source) if isinstance(source, str | os.PathLike) else None
        if reference is not None:
            self.references[number] = reference
        self._decode(number, source)

    def _decode(self, number: int, source: Source | ImageError) -> None:
        """Decode an image or a reference, here or in the decoder's processes."""
        if isinstance(source, os.PathLike):  # a worker may lack its class
            source = os.fsdecode(source)
        if isinstance(source, str | bytes):
            self.decoder.submit(number, source)
        elif isinstance(source, ImageError):  # the caller could not get the image
            self._add(number, source)
        elif isinstance(source, Tensor):
            try:
                self._add(number, np.asarray(load_image(source).detach().cpu().movedim(0, -1)))
            except ImageError as error:
                self._add(number, error)
        else:
            self._add(number, read_or_error(source, self.scorer.rules))

    def _add(self, number: int, result: PixelsOrError) -> None:
        """Take the pixels of an image, or after them those of its reference."""
        if isinstance(result, np.ndarray):
            self.last_bytes = result.nbytes
            self.decoded_bytes += result.nbytes
        if number in self.unpaired:
            self._queue(number, self.unpaired.pop(number), result)
        elif isinstance(result, ImageError):
            self.references.pop(number, None)
            self.done[number] = Record(self.paths.pop(number), error=str(result))
        elif number in self.references:
            self.unpaired[number] = result
            self._decode(number, self.references[number])
        else:
            self._queue(number, result, None)

    def _queue(self, number: int, pixels: np.ndarray, reference: Reference) -> None:
        """Queue an image by its size; a reference of another size becomes an error, and its memory is free."""
        source = self.references.pop(number, None)
        if isinstance(reference, np.ndarray) and reference.shape[:2] != pixels.shape[:2]:
            self.decoded_bytes -= reference.nbytes
            (height, width), (rows, columns) = pixels.shape[:2], reference.shape[:2]
            reference = ImageError(
                f"{source_name(source)} is {columns}x{rows} pixels, the image {width}x{height}; expected equal sizes"
            )
        self.waiting.setdefault((pixels.shape, pixels.dtype), deque()).append(DecodedInput(number, pixels, reference))

    def _dispatch(self) -> None:
        """Give work to every device: a full batch in advance, a smaller one only if the device is idle."""
        for device, thread in enumerate(self.threads):
            while self.waiting and self.busy[device] < 2:
                size = self.scorer.batch_size
                key = next((key for key, images in self.waiting.items() if len(images) >= size), None)
                if key is None:
                    if self.busy[device]:
                        break
                    key = min(self.waiting, key=lambda key: self.waiting[key][0].number)  # with the oldest image
                images = self.waiting[key]
                batch = [images.popleft() for _ in range(min(size, len(images)))]
                if not images:
                    del self.waiting[key]
                self.busy[device] += 1
                future = thread.submit(
                    self.scorer.networks[device], [each.pixels for each in batch], [each.reference for each in batch]
                )
                future.add_done_callback(partial(self._put, partial(ScoredBatch, device, batch)))

    def _put(self, finished: partial[ScoredBatch], scored: Future[list[Scored]]) -> None:
        self.events.put(finished(scored))

    def _take_decoded(self, event: DecodedImage) -> None:
        self.decoder.pending -= 1
        if not isinstance(event.result, np.ndarray | ImageError):
            raise event.result
        self._add(event.number, event.result)

    def _take_scored(self, batch: ScoredBatch) -> None:
        self.busy[batch.device] -= 1
        for image, scored in zip(batch.images, batch.scored.result(), strict=True):
            self.decoded_bytes -= image.nbytes
            height, width = image.pixels.shape[:2]
            path = self.paths.pop(image.number)
            self.done[image.number] = Record(path, width, height, scored.scores, scored.error)
