"""Decoding in worker processes that may be killed: every picture comes back, as pixels or as an error.

Each worker has pipes of its own and one picture at a time. So its death ends only its own messages (where workers share
a pipe, a death in mid-message leaves the reader waiting for ever), and it is known which picture it died of. Workers
never import torch or the user's main module, and end with their parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ImageError, SettingsError
from .convert import PixelSource, ReadRules, read_pixels, source_name

# How many workers a picture may cost, or a start, before it is what is wrong.
ATTEMPTS = 3

# What reading from a process raises that is gone, perhaps in mid-sentence.
_GONE = (EOFError, OSError, pickle.UnpicklingError)

Decoded = np.ndarray | ImageError
_COMMAND = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from qualiclip_pyiqa.images.workers import work; work()"
)


@dataclass(frozen=True)
class DecodedImage:
    """What a `Decoder` puts on its queue for one image.

    Attributes:
        number: what `Decoder.submit` was called with.
        result: pixels as `read_pixels` returns them; `ImageError`: the image cannot be decoded; another exception: a
            failure that is not the image's fault, to be raised.
    """

    number: int
    result: np.ndarray | Exception


class Decoder:
    """Decodes images in `workers` processes (0: in this one) and puts a `DecodedImage` for each on `results`.

    Args:
        workers: number of processes.
        ahead: how many pictures may be on their way at a time.
        results: where results go, in whatever order; whoever takes one off it subtracts it from `pending`.
        max_pixels: pictures of more pixels are refused before they are decoded; None: Pillow's limit.
    """

    def __init__(self, workers: int, ahead: int, results: queue.SimpleQueue[Any], max_pixels: int | None) -> None:
        self.workers, self.ahead = workers, ahead
        self.results = results
        self.max_pixels = max_pixels
        self.pending = 0
        self._tasks: queue.SimpleQueue[tuple[int, str | bytes] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._closing = False

    @property
    def ready(self) -> bool:
        """Whether `submit` may be called."""
        return self.pending < self.ahead

    def submit(self, number: int, source: str | bytes) -> None:
        self.pending += 1
        if not self.workers:
            self.results.put(DecodedImage(number, decode(source, self.max_pixels)))
            return
        self._tasks.put((number, source))
        if len(self._threads) < min(self.workers, self.pending):
            thread = threading.Thread(target=self._serve, args=(len(self._threads),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        self._closing = True
        for _ in self._threads:
            self._tasks.put(None)
        for process in list(self._processes.values()):
            process.kill()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self, worker: int) -> None:
        """One worker's thread: it starts the process, talks to it, and starts another one if it dies."""
        while (task := self._tasks.get()) is not None and not self._closing:
            number, source = task
            try:
                result: Any = self._decode(worker, source)
            except Exception as error:  # whatever it is, the caller's thread must hear of it
                result = error
            self.results.put(DecodedImage(number, result))
        self._bury(worker)

    def _decode(self, worker: int, source: str | bytes) -> Any:
        message = pickle.dumps(source)
        for _ in range(ATTEMPTS):
            process = self._processes.get(worker) or self._start(worker)
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except _GONE:
                self._bury(worker)
                if self._closing:
                    break
        return ImageError(
            f"{source_name(source)} cannot be decoded: the process that tried it was killed, "
            f"{ATTEMPTS} times (out of memory?)"
        )

    def _start(self, worker: int) -> subprocess.Popen[bytes]:
        """A process that has said that it is ready: what it dies of from now on is a picture."""
        limit = Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels
        for _ in range(ATTEMPTS):
            process = self._processes[worker] = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, json.dumps(sys.path), json.dumps(limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the parent, which stops its workers in order
            )
            if self._closing:  # `close` may have looked before this process was there
                process.kill()
            assert process.stdout is not None
            try:
                pickle.load(process.stdout)
                return process
            except _GONE:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)  # its pipe closes before its exit status is there
                self._bury(worker)
                if self._closing:
                    break
        raise SettingsError(
            f"workers is {self.workers}, but a decoding process does not start (exit status {process.returncode}, "
            f"{ATTEMPTS} times); see what it wrote to standard error, or set workers=0 (--workers 0)"
        )

    def _bury(self, worker: int) -> None:
        process = self._processes.pop(worker, None)
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                if pipe is not None:
                    pipe.close()
        process.wait()


def decode(source: PixelSource, max_pixels: int | None = None) -> Decoded:
    """`read_pixels` whose error is returned, not raised; Pillow's limit is `max_pixels` unless that is None."""
    try:
        return read_pixels(source, ReadRules(max_pixels=max_pixels))
    except ImageError as error:
        return ImageError(str(error))  # without its cause, which may not survive the way between processes
    except MemoryError:
        return ImageError(f"{source_name(source)} cannot be decoded: out of memory")


def work() -> None:
    """A worker: pickled sources on standard input, pickled results, after a first one, on what was standard output."""
    Image.MAX_IMAGE_PIXELS = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be in between
    result: Any = None  # the first answer, which says that this process is ready
    while True:
        try:
            pickle.dump(result, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
            source = pickle.load(sys.stdin.buffer)
        except (BrokenPipeError, EOFError):  # the parent has ended
            return
        try:
            result = decode(source)
        except Exception as error:
            result = RuntimeError(f"{source_name(source)}: {type(error).__name__}: {error}")
