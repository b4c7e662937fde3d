"""Decode images in worker processes that may crash, hang or lie: every image comes back, as pixels or as an error.

Each worker has its own pipes and decodes one image at a time, so a worker that dies in mid-message blocks no other, and
the image that killed it is known. Workers never import torch or the user's main module, and exit with their parent.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import ImageError, SettingsError
from .advice import DECODE_TIMEOUT
from .convert import PixelsOrError, ReadRules, read_or_error, source_name
from .pillow_setup import read_setup
from .wire import BadReplyError, pack_request
from .worker_loop import WorkerSettings
from .worker_process import GONE, TimedOutError, WorkerProcess

logger = logging.getLogger(__name__)

#: Attempts per image, and per worker start, before giving up. An image that times out is not tried again.
ATTEMPTS = 3
#: Seconds that a worker has to start, or the time per image if that is longer.
START_TIMEOUT = 60.0

_logged: dict[str, object] = {}  # reasons why no workers can be started, each logged once


@dataclass(frozen=True)
class DecodedImage:
    """The result for one image, as a `Decoder` puts it on its queue.

    Attributes:
        number: as passed to `Decoder.submit`.
        result: pixels as from `read_pixels`; an `ImageError` if the image cannot be decoded; or another exception, to
            be raised, for a failure that is not the image's fault.
    """

    number: int
    result: np.ndarray | Exception


class Results(Protocol):
    """Takes results from a decoder's threads, as a `queue.SimpleQueue` does."""

    def put(self, item: DecodedImage, /) -> None: ...


class Decoder:
    """Decodes images in worker processes and puts a `DecodedImage` for each on a queue, in any order.

    Workers repeat Pillow's setup in this process at the time the decoder is created.

    Args:
        workers: number of processes; 0: decode in this process, in `submit`, without a time limit. Where processes
            cannot be started, as in a frozen application, this becomes 0 and the reason is logged.
        ahead: maximum number of pending images.
        results: the queue. Its reader decrements `pending` for each result taken.
        rules: how files become pixels.
        timeout: seconds per image, transport included, after which the worker is replaced and the image becomes an
            error; `math.inf`: no limit.
    """

    def __init__(
        self,
        workers: int,
        ahead: int,
        results: Results,
        rules: ReadRules | None = None,
        timeout: float = 60.0,
    ) -> None:
        rules = rules or ReadRules()
        self.workers, self.ahead, self.results, self.timeout = usable_workers(workers), ahead, results, timeout
        self.rules = dataclasses.replace(rules, max_pixels=rules.limit())  # same limit in all workers
        self.pending = 0
        self._arguments: list[str] = []
        if self.workers:
            try:
                settings = WorkerSettings(
                    rules=dataclasses.asdict(self.rules), pillow=read_setup(), timeout=min(timeout, 1e9)
                )
                self._arguments = [json.dumps(sys.path), json.dumps(settings)]
            except LookupError as error:
                self.workers = _no_workers(f"a plug-in of Pillow, {error.args[0]}")
        self._tasks: queue.SimpleQueue[tuple[int, str | bytes] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: dict[int, WorkerProcess] = {}  # by thread
        self._closing = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether `submit` may be called."""
        return self.pending < self.ahead

    def submit(self, number: int, source: str | bytes) -> None:
        """Queue a path or encoded bytes; its `DecodedImage` has the same `number`."""
        self.pending += 1
        if not self.workers:
            self.results.put(DecodedImage(number, read_or_error(source, self.rules)))
            return
        self._tasks.put((number, source))
        if len(self._threads) < min(self.workers, self.pending):
            thread = threading.Thread(target=self._serve, args=(len(self._threads),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Kill all workers and wait for their threads."""
        self._closing.set()
        for _ in self._threads:
            self._tasks.put(None)
        for worker in list(self._running.values()):
            worker.process.kill()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self, thread: int) -> None:
        """Run one worker's thread: send it images, and restart it whenever it dies."""
        while (task := self._tasks.get()) is not None and not self._closing.is_set():
            number, source = task
            try:
                result: np.ndarray | Exception = self._decode(thread, number, source)
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                result = error
            self.results.put(DecodedImage(number, result))
        self._reap(thread)

    def _decode(self, thread: int, number: int, source: str | bytes) -> PixelsOrError:
        name, ends = source_name(source), ""
        try:
            request = pack_request(number, source)
        except UnicodeEncodeError:  # no file system has such a path: the result is an error
            return read_or_error(source, self.rules)
        for _ in range(ATTEMPTS):
            worker = self._running.get(thread) or self._start(thread)
            if worker is None:
                return read_or_error(source, self.rules)
            try:
                return worker.decode(number, request, self.rules.max_pixels, self.timeout)
            except TimedOutError:
                self._reap(thread)
                return ImageError(f"{name} was not decoded within {self.timeout:g} seconds{DECODE_TIMEOUT}")
            except MemoryError:
                self._reap(thread)
                return ImageError(f"{name} cannot be decoded: out of memory")
            except GONE as error:
                ends = self._reap(thread, error)
            if self._closing.is_set():
                break
        return ImageError(f"{name} cannot be decoded: the decoding process {ends}, {ATTEMPTS} times")

    def _start(self, thread: int) -> WorkerProcess | None:
        """Start a worker and wait until it is ready, so that a later death is an image's fault. None: decode here."""
        if not self.workers:
            return None
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                worker = self._running[thread] = WorkerProcess(self._arguments, self._closing)
            except OSError as error:
                self.workers = _no_workers(f"{error.strerror or error} ({sys.executable})")
                return None
            if self._closing.is_set():  # `close` may have missed this new worker
                worker.process.kill()
            try:
                problem = worker.greet(limit := max(START_TIMEOUT, self.timeout))
            except TimedOutError:
                self._reap(thread)
                failure = f"no answer within {limit:g} seconds"
                break
            except GONE:
                self._reap(thread)
                failure = f"exit status {worker.process.returncode}, {ATTEMPTS} times"
            else:
                if not problem:
                    return worker
                self._reap(thread)
                self.workers = _no_workers(f"a worker cannot import a Pillow plug-in: {problem}")
                return None
            if self._closing.is_set():
                break
        raise SettingsError(
            f"workers is {self.workers}, but decoding processes fail to start ({failure}); check their output on "
            "standard error, or set workers=0 (--workers 0)"
        )

    def _reap(self, thread: int, error: BaseException | None = None) -> str:
        """Kill a thread's worker, if it has one; return what happened to it, as a predicate for an error message."""
        worker = self._running.pop(thread, None)
        if worker is None:
            return ""
        status = worker.end(wait=isinstance(error, EOFError | OSError) and not self._closing.is_set())
        if isinstance(error, BadReplyError):
            return "sent a malformed answer"
        if status is not None and status < 0:
            return f"was killed by {_signal_name(-status)}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
        return "cannot be killed" if status is None else f"exited with status {status}"


def usable_workers(wanted: int) -> int:
    """Return `wanted`, or 0 if `sys.executable` cannot start workers; the reason is logged once."""
    if not wanted:
        return 0
    program = sys.executable
    if getattr(sys, "frozen", False):
        return _no_workers("this is a frozen application")
    if not program:
        return _no_workers("sys.executable is empty")
    if not any(name in os.path.basename(program).lower() for name in ("python", "pypy", "graalpy")):  # noqa: PTH119
        return _no_workers(f"{program} is not a Python interpreter")
    if not os.access(program, os.X_OK):
        return _no_workers(f"{program} does not exist or is not executable")
    return wanted


def _no_workers(why: str) -> int:
    this_call = object()
    if _logged.setdefault(why, this_call) is this_call:  # atomic: several threads find the same reason at once
        logger.warning("decoding in this process, without a time limit, because no workers can be started: %s", why)
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
