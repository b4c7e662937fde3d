"""Decode images in worker processes that may crash, hang or lie: every image comes back, as pixels or as an error.

Each worker has pipes of its own and one image at a time. So its death ends only its own messages (where workers share a
pipe, a death in mid-message leaves the reader waiting for ever), and it is known which image it died of. Workers never
import torch or the user's main module, and end with their parent.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError, SettingsError
from .convert import ReadRules, source_name
from .decoding import Decoded, WorkerSettings, decode
from .pillow_setup import read_setup
from .process import GONE, TimedOutError, WorkerProcess
from .wire import BadReplyError, pack_request

logger = logging.getLogger(__name__)

#: Attempts per image, and per start of a worker, before giving up. An image that takes too long has one.
ATTEMPTS = 3
#: Seconds that a worker may take to start, at least.
START_TIMEOUT = 60.0


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
        self._running: dict[int, WorkerProcess] = {}  # by thread
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
            except TimedOutError:
                self._reap(thread)
                return ImageError(
                    f"{name} was not decoded within {self.timeout:g} seconds; if it needs more, raise decode_timeout "
                    "(--decode-timeout)"
                )
            except MemoryError:
                self._reap(thread)
                return ImageError(f"{name} cannot be decoded: out of memory")
            except GONE as error:
                ends = self._reap(thread, error)
            if self._closing.is_set():
                break
        return ImageError(f"{name} cannot be decoded: the process that tried it {ends}, {ATTEMPTS} times")

    def _start(self, thread: int) -> WorkerProcess | None:
        """Start a worker and wait until it is ready: what it dies of from now on is an image. None: decode here."""
        if not self.workers:
            return None
        failure = ""
        for _ in range(ATTEMPTS):
            try:
                worker = self._running[thread] = WorkerProcess(self._arguments, self._closing)
            except OSError as error:
                self.workers = _none(f"{error.strerror or error} ({sys.executable})")
                return None
            if self._closing.is_set():  # `close` may have looked before this worker was there
                worker.process.kill()
            try:
                problem = worker.greet(limit := max(START_TIMEOUT, self.timeout))
            except TimedOutError:
                self._reap(thread)
                failure = f"nothing heard within {limit:g} seconds"
                break
            except GONE:
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
