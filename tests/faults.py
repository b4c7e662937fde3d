"""Faults on purpose. Small enough to be imported by a decoding process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


class Killer(os.PathLike[str]):
    """A path that kills the process that decodes it, so many times; every death is a byte in `log`."""

    def __init__(self, path: str, times: int, log: str) -> None:
        self.path, self.times, self.log, self.home = path, times, log, os.getpid()

    def __fspath__(self) -> str:
        if os.getpid() != self.home:
            with open(self.log, "ab+") as log:  # noqa: PTH123
                log.write(b".")
                log.flush()
                deaths = log.tell()
            if deaths <= self.times:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.path


def as_nobody(call: Callable[[], str]) -> str:
    """What `call` returns in a child process without root's rights, which read every file and list every folder."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            os.write(send, call().encode())
        finally:
            os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as pipe:
        return pipe.read().decode()


def heed_ctrl_c() -> None:
    """For a child: Python ignores SIGINT if whoever started it did, as a shell does for what runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
