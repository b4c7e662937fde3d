"""Decode images in worker processes that may crash, hang or lie: every image comes back, as pixels or as an error.

Each worker has pipes of its own and one image at a time. So its death ends only its own messages (where workers share a
pipe, a death in mid-message leaves the reader waiting for ever), and it is known which image it died of. Workers never
import torch or the user's main module, and end with their parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError, SettingsError
from .convert import ReadRules, one_line, source_name
from .decoding import Decoded, WorkerSettings, decode
from .pillow_setup import read_setup
from .wire import READY, REPLY_SIZE, BadReplyError, pack_request, parse_reply

logger = logging.getLogger(__name__)

#: Attempts per image, and per start of a worker, before giving up. An image that takes too long has one.
ATTEMPTS = 3
#: Seconds that a worker may take to start, at least.
START_TIMEOUT = 60.0

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
_GONE = (EOFError, OSError, BadReplyError)


class _TimedOutError(Exception):
    """A worker did not answer in time."""


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
    """Decodes images in worker processes and puts a `DecodedImage` for each on a queue, in whatever order.

    What is set up in Pillow when the decoder is made holds in its workers too.

    Args:
        workers: number of processes; 0: decode in this process, in `submit`, where no time limit can be kept. Where no
            process can be started, such as in a frozen application, it is 0 whatever was asked for; the log says why.
        ahead: how many images may be on their way at a time.
        results: the queue; whoever takes a result off it subtracts it from `pending`.
        rules: how files become pixels.
        timeout: seconds that a worker may take for an image, transport included, before it is killed and replaced and
            the image is an error; `math.inf`: no limit.
    """

    def __init__(
        self,
        workers: int,
        ahead: int,
        results: queue.SimpleQueue[DecodedImage],
        rules: ReadRules | None = None,
        timeout: float = 60.0,
    ) -> None:
        rules = rules or ReadRules()
        self.workers, self.ahead, self.results, self.timeout = usable_workers(workers), ahead, results, timeout
        self.rules = dataclasses.replace(rules, max_pixels=rules.limit())  # the same limit here and in all workers
        self.pending = 0
        self._arguments: list[str] = []
        if self.workers:
            try:
                settings = WorkerSettings(
                    rules=dataclasses.asdict(self.rules), pillow=read_setup(), timeout=min(timeout, 1e9)
                )
                self._arguments = [json.dumps(sys.path), json.dumps(settings)]
            except LookupError as error:
                self.workers = _none(f"a plug-in of Pillow, {error.args[0]}")
        self._tasks: queue.SimpleQueue[tuple[int, str | bytes] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: dict[int, _Worker] = {}  # by thread
        self._closing = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether `submit` may be called."""
        return self.pending < self.ahead

    def submit(self, number: int, source: str | bytes) -> None:
        """Ask for the pixels of a path or of encoded bytes; `number` comes back with them."""
        self.pending += 1
        if not self.workers:
            self.results.put(DecodedImage(number, decode(source, self.rules)))
            return
        self._tasks.put((number, source))
        if len(self._threads) < min(self.workers, self.pending):
            thread = threading.Thread(target=self._serve, args=(len(self._threads),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        self._closing.set()
        for _ in self._threads:
            self._tasks.put(None)
        for worker in list(self._running.values()):
            worker.process.kill()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self, thread: int) -> None:
        """Serve one worker: start the process, talk to it, start another one when it is gone."""
        while (task := self._tasks.get()) is not None and not self._closing.is_set():
            number, source = task
            try:
                result: np.ndarray | Exception = self._decode(thread, number, source)
            except Exception as error:  # noqa: BLE001 - the caller's thread must hear of it
                result = error
            self.results.put(DecodedImage(number, result))
        self._reap(thread)

    def _decode(self, thread: int, number: int, source: str | bytes) -> Decoded:
        name, ends = source_name(source), ""
        try:
            request = pack_request(number, source)
        except UnicodeEncodeError:  # a path that no file system can have: the error is all there is
            return decode(source, self.rules)
        for _ in range(ATTEMPTS):
            worker = self._running.get(thread) or self._start(thread)
            if worker is None:
                return decode(source, self.rules)
            try:
                return worker.decode(number, request, self.rules.max_pixels, self.timeout)
            except _TimedOutError:
                self._reap(thread)
                return ImageError(
                    f"{name} was not decoded within {self.timeout:g} seconds; if it needs more, raise decode_timeout "
                    "(--decode-timeout)"
                )
            except MemoryError:
                self._reap(thread)
                return ImageError(f"{name} cannot be decoded: out of memory")
            except _GONE as error:
                ends = self._reap(thread, error)
            if self._closing.is_set():
                break
        return ImageError(f"{name} cannot be decoded: the process that tried it {ends}, {ATTEMPTS} times")

    def _start(self, thread: int) -> _Worker | None:
        """Start a worker and wait until it is ready: what it dies of from now on is an image. None: decode here."""
        if not self.workers:
            return None
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                worker = self._running[thread] = _Worker(self._arguments, self._closing)
            except OSError as error:
                self.workers = _none(f"{error.strerror or error} ({sys.executable})")
                return None
            if self._closing.is_set():  # `close` may have looked before this worker was there
                worker.process.kill()
            try:
                problem = worker.greet(limit := max(START_TIMEOUT, self.timeout))
            except _TimedOutError:
                self._reap(thread)
                failure = f"nothing heard within {limit:g} seconds"
                break
            except _GONE:
                self._reap(thread)
                failure = f"exit status {worker.process.returncode}, {ATTEMPTS} times"
            else:
                if not problem:
                    return worker
                self._reap(thread)
                self.workers = _none(f"a plug-in of Pillow cannot be imported there ({problem})")
                return None
            if self._closing.is_set():
                break
        raise SettingsError(
            f"workers is {self.workers}, but a decoding process does not start ({failure}); see what it wrote to "
            "standard error, or set workers=0 (--workers 0)"
        )

    def _reap(self, thread: int, error: BaseException | None = None) -> str:
        """End a thread's worker if it has one; return what became of it, as the end of a sentence."""
        worker = self._running.pop(thread, None)
        if worker is None:
            return ""
        status = worker.end(wait=isinstance(error, EOFError | OSError) and not self._closing.is_set())
        if isinstance(error, BadReplyError):
            return "sent a malformed answer"
        if status is not None and status < 0:
            return f"was ended by {_signal_name(-status)}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
        return "cannot be ended" if status is None else f"ended with exit status {status}"


class _Worker:
    """A decoding process and the pipes to it, whose other end is never waited for without a limit."""

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
        """Limit how long `_read` and `_write` wait, all together; beyond it they raise `_TimedOutError`."""
        self.left = seconds
        if _CAN_POLL or not math.isfinite(seconds):
            yield
            return
        expired = threading.Event()
        timer = threading.Timer(seconds, self._expire, (expired,))
        timer.start()
        try:
            yield
        except _GONE:
            if expired.is_set():
                raise _TimedOutError from None
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
                raise _TimedOutError


def usable_workers(wanted: int) -> int:
    """Return `wanted`, or 0 in a process that cannot start workers through `sys.executable`; the log says why, once."""
    if not wanted:
        return 0
    program = sys.executable
    if getattr(sys, "frozen", False):
        return _none("it is a frozen application")
    if not program:
        return _none("it does not know its interpreter (sys.executable is empty)")
    if not any(name in os.path.basename(program).lower() for name in ("python", "pypy", "graalpy")):  # noqa: PTH119
        return _none(f"{program} is not a Python interpreter")
    if not os.access(program, os.X_OK):
        return _none(f"{program} may not be executed, or does not exist")
    return wanted


@functools.cache  # once
def _none(why: str) -> int:
    logger.warning("images are decoded in this process, without a time limit: no workers can be started (%s)", why)
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
