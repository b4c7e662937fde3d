"""One decoding process and its pipes. Every read and write has a time limit."""

from __future__ import annotations

import contextlib
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np

from ..errors import ImageError, one_line
from .convert import PixelsOrError
from .wire import READY, REPLY_SIZE, BadReplyError, parse_reply

_SLICE = 0.5  # seconds between checks for `closing`
_CAN_POLL = hasattr(select, "poll")  # not on Windows

# Environment variable of a worker, which removes it before importing anything.
_MARK = "QUALICLIP_PYIQA_WORKER"
_COMMAND = (
    f"import json, os, sys; os.environ.pop({_MARK!r}); sys.path[:] = json.loads(sys.argv[1]); "
    "from qualiclip_pyiqa.images.worker_loop import work; work(json.loads(sys.argv[2]))"
)
if _MARK in os.environ:  # `sys.executable` is this program, not Python: it would start itself forever
    print("qualiclip_pyiqa: this program was started instead of a decoding process; exiting", file=sys.stderr)
    sys.stderr.flush()
    os._exit(3)

# Makes a worker's glibc reuse blocks of up to 32 MiB (10 megapixels) instead of returning them to the system after each
# image, which saves a third of the time for an image that decodes quickly. Other C libraries ignore it.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}

#: Raised when a worker has died or sent a malformed message.
GONE = (EOFError, OSError, BadReplyError)


class TimedOutError(Exception):
    """A worker did not answer in time."""


class WorkerProcess:
    """A running decoding process.

    Args:
        arguments: of `_COMMAND`: `sys.path` and `WorkerSettings`, both as JSON.
        closing: once set, every wait ends with `EOFError`.
    """

    def __init__(self, arguments: list[str], closing: threading.Event) -> None:
        self.closing = closing
        self.process = subprocess.Popen(
            # -P keeps the working directory, which may hold anything, out of `sys.path`.
            [sys.executable, "-P", "-c", _COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**_ALLOCATOR, **os.environ, _MARK: "1"},
            process_group=0,  # Ctrl-C reaches only the parent, which then stops its workers
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.left = math.inf  # seconds left for the current exchange
        if _CAN_POLL:
            os.set_blocking(self.stdin.fileno(), False)
            self.writable, self.readable = select.poll(), select.poll()
            self.writable.register(self.stdin, select.POLLOUT)
            self.readable.register(self.stdout, select.POLLIN)

    def greet(self, timeout: float) -> str:
        """Wait until the worker is ready; return the problem it reports, or ""."""
        with self._limit(timeout):
            answer = self._answer(READY, 0)
        return "" if isinstance(answer, np.ndarray) else str(answer)

    def decode(self, number: int, request: list[bytes], limit: int | None, timeout: float) -> PixelsOrError:
        """Send a request and wait up to `timeout` seconds for the answer; `limit`: see `parse_reply`."""
        with self._limit(timeout):
            for piece in request:
                self._write(piece)
            return self._answer(number, limit)

    def end(self, wait: bool) -> int | None:
        """Kill the process, after letting it exit if `wait`, and close its pipes; return its exit status, if known."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if wait:  # pipes close before the exit status is known
                self.process.wait(timeout=1)
        self.process.kill()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for example on a lost disk
            self.process.wait(timeout=1)
        return self.process.returncode

    def _answer(self, number: int, limit: int | None) -> PixelsOrError:
        header = bytearray(REPLY_SIZE)
        self._read(memoryview(header))
        reply = parse_reply(header, number, limit)
        if reply.shape is None:
            text = bytearray(reply.length)
            self._read(memoryview(text))
            return ImageError(one_line(text.decode(errors="replace")))
        try:
            array = np.empty(reply.shape, reply.dtype)
        except ValueError:  # larger than any address space
            raise MemoryError from None
        self._read(array.data.cast("B"))
        return array

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._wait("writable")
            view = view[self.stdin.write(view) or 0 :]

    def _read(self, view: memoryview) -> None:
        while view:
            self._wait("readable")
            count = self.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """Limit the total time that `_read` and `_write` wait; beyond it they raise `TimedOutError`."""
        self.left = seconds
        if _CAN_POLL or not math.isfinite(seconds):
            yield
            return
        expired = threading.Event()
        timer = threading.Timer(seconds, self._expire, (expired,))
        timer.start()
        try:
            yield
        except GONE:
            if expired.is_set():
                raise TimedOutError from None
            raise
        finally:
            timer.cancel()

    def _expire(self, expired: threading.Event) -> None:
        expired.set()
        self.process.kill()

    def _wait(self, what: str) -> None:
        """Wait until a pipe is ready, counting only the time spent in `poll`: a suspended computer uses up none."""
        while _CAN_POLL:
            if self.closing.is_set():
                raise EOFError
            turn = max(0.0, min(self.left, _SLICE))
            begin = time.monotonic()
            done = getattr(self, what).poll(math.ceil(turn * 1000))
            self.left -= min(turn, time.monotonic() - begin)
            if done:
                return
            if self.left <= 0:
                raise TimedOutError
