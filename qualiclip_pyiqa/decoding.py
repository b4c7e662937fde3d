"""Decoding in worker processes that may be killed: every picture comes back, as pixels or as an error.

The processes are loky's: they need no guard in the user's main module, know nothing of its threads or its CUDA context,
and a killed one is noticed. They never import torch.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from PIL import Image

from .errors import ImageError
from .pixels import PixelSource, read_pixels, source_name

# A picture in whose company a worker died is decoded alone; how often, before it is what is wrong.
ATTEMPTS_ALONE = 2

Decoded = np.ndarray | ImageError


class Decoder:
    """Decodes pictures in `workers` processes (0: in this one) and puts (number, pixels or error) on `results`.

    Args:
        workers: number of processes.
        ahead: how many pictures may be on their way at a time.
        results: where `("decoded", number, Decoded)` goes, in whatever order.
        max_pixels: pictures of more pixels are refused before they are decoded; None: Pillow's limit.
    """

    def __init__(self, workers: int, ahead: int, results: queue.SimpleQueue[Any], max_pixels: int | None) -> None:
        self.workers, self.ahead = workers, ahead
        self.results = results
        self.max_pixels = max_pixels
        self.pending: dict[int, PixelSource] = {}
        self._suspects: deque[tuple[int, PixelSource, int]] = deque()
        self._alone: int | None = None  # the suspect that is being decoded
        self._attempts = 0
        self._pool: Any = None

    @property
    def ready(self) -> bool:
        """Whether `submit` may be called: not too many are pending, and none is tried alone."""
        return not self._suspects and self._alone is None and len(self.pending) < self.ahead

    def submit(self, number: int, source: PixelSource) -> None:
        self.pending[number] = source
        if not self.workers:
            self.results.put(("decoded", number, decode(source, self.max_pixels)))
            return
        if self._pool is None:
            from loky.process_executor import ProcessPoolExecutor

            self._pool = ProcessPoolExecutor(
                self.workers, initializer=_start_worker, initargs=(os.getpid(), self.max_pixels)
            )
        try:
            future = self._pool.submit(decode, source)
        except BrokenProcessPool as error:  # a worker was killed since the last result
            self.results.put(("decoded", number, error))
            return
        future.add_done_callback(lambda done: self._put(number, done))

    def _put(self, number: int, done: Future[Decoded]) -> None:
        if not done.cancelled():
            error = done.exception()
            self.results.put(("decoded", number, done.result() if error is None else error))

    def receive(self, number: int, outcome: Decoded | Exception) -> Decoded | None:
        """What became of a picture, to be called with everything from `results`; None: it is tried once more.

        Raises:
            Exception: what went wrong in a worker and is not the picture's fault.
        """
        source = self.pending.pop(number)
        alone, attempts = self._alone is not None, self._attempts
        self._alone = None
        result: Decoded | None = None
        if isinstance(outcome, np.ndarray | ImageError):
            result = outcome
        elif not isinstance(outcome, BrokenProcessPool):
            raise outcome
        elif alone and attempts == ATTEMPTS_ALONE:
            result = ImageError(
                f"{source_name(source)} cannot be decoded: the process that tried it was killed, "
                f"{attempts} times with nothing else to do (out of memory?)"
            )
        else:
            self._suspects.append((number, source, attempts if alone else 0))
        if not self.pending:  # all that was in a broken pool has come back
            if isinstance(outcome, BrokenProcessPool):
                self.close()
            if self._suspects:
                self._alone, source, attempts = self._suspects.popleft()
                self._attempts = attempts + 1
                self.submit(self._alone, source)
        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=True)
            self._pool = None


def decode(source: PixelSource, max_pixels: int | None = None) -> Decoded:
    """`read_pixels` whose error is returned, not raised: with `Pillow`'s limit set to `max_pixels` unless None."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = max_pixels
        return read_pixels(source)
    except ImageError as error:
        return ImageError(str(error))  # without its cause, which may not survive the way between processes
    except MemoryError:
        return ImageError(f"{source_name(source)} cannot be decoded: out of memory")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _start_worker(parent: int, max_pixels: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us, in order
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
