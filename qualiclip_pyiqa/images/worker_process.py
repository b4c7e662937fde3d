"""One decoding process and the pipes to it, whose other end is never waited for without a limit."""

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

from ..errors import ImageError
from .convert import one_line
from .decoding import Decoded
from .wire import READY, REPLY_SIZE, BadReplyError, parse_reply

_SLICE = 0.5  # seconds between looks at whether the decoder is being closed
_CAN_POLL = hasattr(select, "poll")  # not on Windows

# In the environment of a process that is started as a worker. A worker removes it before it imports anything.
_MARK = "QUALICLIP_PYIQA_WORKER"
_COMMAND = (
    f"import json, os, sys; os.environ.pop({_MARK!r}); sys.path[:] = json.loads(sys.argv[1]); "
    "from qualiclip_pyiqa.images.decoding import work; work(json.loads(sys.argv[2]))"
)
if _MARK in os.environ:  # `sys.executable` was not Python but this program, which would start itself without end
    print("qualiclip_pyiqa: this program was started in place of a decoding process, and exits", file=sys.stderr)
    sys.stderr.flush()
    os._exit(3)

# For glibc in a worker; others ignore it. Blocks of up to 32 MiB, such as the pixels of 10 megapixels, are used again
# instead of being given back after each image: a third less work for an image that decodes quickly.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}

# What talking to a process raises that is gone, or that sends what no worker sends.
GONE = (EOFError, OSError, BadReplyError)


class TimedOutError(Exception):
    """A worker did not answer in time."""


class WorkerProcess:
    """A decoding process, running from the start on.

    Args:
        arguments: of `_COMMAND`: the path of imports and `WorkerSettings`, both as JSON.
        closing: as soon as it is set nothing is waited for.
    """

    def __init__(self, arguments: list[str], closing: threading.Event) -> None:
        self.closing = closing
        self.process = subprocess.Popen(
            # -P: the folder that the user is in, which may hold anything, is not on the path of imports.
            [sys.executable, "-P", "-c", _COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**_ALLOCATOR, **os.environ, _MARK: "1"},
            process_group=0,  # Ctrl-C is for the parent, which stops its workers in order
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.left = math.inf  # seconds
        if _CAN_POLL:
            os.set_blocking(self.stdin.fileno(), False)
            self.writable, self.readable = select.poll(), select.poll()
            self.writable.register(self.stdin, select.POLLOUT)
            self.readable.register(self.stdout, select.POLLIN)

    def greet(self, timeout: float) -> str:
        """Wait until the worker is ready; return what it says is wrong, or ""."""
        with self._limit(timeout):
            answer = self._answer(READY, 0)
        return "" if isinstance(answer, np.ndarray) else str(answer)

    def decode(self, number: int, request: list[bytes], limit: int | None, timeout: float) -> Decoded:
        """Ask for pixels and wait for them, `timeout` seconds at most; `limit` is that of `parse_reply`."""
        with self._limit(timeout):
            for piece in request:
                self._write(piece)
            return self._answer(number, limit)

    def end(self, wait: bool) -> int | None:
        """Kill the process and close its pipes; `wait`: it is ending, let it. Returns its exit status if it has one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if wait:  # its pipes close before its exit status is there
                self.process.wait(timeout=1)
        self.process.kill()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the kernel holds, for a disk that is gone, say
            self.process.wait(timeout=1)
        return self.process.returncode

    def _answer(self, number: int, limit: int | None) -> Decoded:
        header = bytearray(REPLY_SIZE)
        self._read(memoryview(header))
        reply = parse_reply(header, number, limit)
        if reply.shape is None:
            text = bytearray(reply.length)
            self._read(memoryview(text))
            return ImageError(one_line(text.decode(errors="replace")))
        try:
            array = np.empty(reply.shape, reply.dtype)
        except ValueError:  # NumPy's word for more than any machine has
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
        """Limit how long `_read` and `_write` wait, all together; beyond it they raise `TimedOutError`."""
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
        """Wait until a pipe can be used. Only waiting counts: a computer that slept has not used up the time."""
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
