"""Decoding in worker processes that may be killed: every picture comes back, as pixels or as an error.

Each worker has pipes of its own and one picture at a time. So its death ends only its own messages (where workers share
a pipe, a death in mid-message leaves the reader waiting for ever), and it is known which picture it died of. Workers
never import torch or the user's main module, and end with their parent.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from typing import Any

import numpy as np
from PIL import Image

from .errors import ImageError
from .pixels import PixelSource, read_pixels, source_name

# How many workers a picture may cost before it is what is wrong.
ATTEMPTS = 3

Decoded = np.ndarray | ImageError
_COMMAND = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from qualiclip_pyiqa.decoding import work; work()"


class Decoder:
    """Decodes pictures in `workers` processes (0: in this one) and puts ("decoded", number, result) on `results`.

    The result is `Decoded`, or another exception, which is not the picture's fault.

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
            self.results.put(("decoded", number, decode(source, self.max_pixels)))
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
            self.results.put(("decoded", number, result))
        process = self._processes.pop(worker, None)
        if process is not None:
            process.kill()
            _bury(process)

    def _decode(self, worker: int, source: str | bytes) -> Any:
        message = pickle.dumps(source)
        for _ in range(ATTEMPTS):
            process = self._processes.get(worker)
            if process is None:
                process = self._processes[worker] = self._start()
            if self._closing:  # `close` may have looked before this process was there
                process.kill()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError):  # the process is gone, perhaps in mid-sentence
                process.kill()
                _bury(process)
                del self._processes[worker]
                if self._closing:
                    break
        return ImageError(
            f"{source_name(source)} cannot be decoded: the process that tried it was killed, "
            f"{ATTEMPTS} times (out of memory?)"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        limit = Image.MAX_IMAGE_PIXELS if self.max_pixels is None else self.max_pixels
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(sys.path), json.dumps(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the parent, which stops its workers in order
        )


def _bury(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # what was not written yet has no reader
            pass
    process.wait()


def decode(source: PixelSource, max_pixels: int | None = None) -> Decoded:
    """`read_pixels` whose error is returned, not raised; Pillow's limit is `max_pixels` unless that is None."""
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


def work() -> None:
    """A worker: pickled sources on standard input, pickled results on what was its standard output."""
    Image.MAX_IMAGE_PIXELS = json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be in between
    while True:
        try:
            source = pickle.load(sys.stdin.buffer)
        except EOFError:  # the parent has ended
            return
        try:
            result: Any = decode(source)
        except Exception as error:
            result = RuntimeError(f"{source_name(source)}: {type(error).__name__}: {error}")
        try:
            pickle.dump(result, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            return
