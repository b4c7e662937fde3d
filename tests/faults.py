"""Faults on purpose. Small enough to be imported by a decoding process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


class Killer(str):
    """A path that kills the decoding process that receives it, so many times; every death is a byte in `log`."""

    def __new__(cls, path: str, times: int, log: str) -> Killer:
        killer = super().__new__(cls, path)
        killer.received = _received, (path, times, log)
        return killer

    def __reduce__(self) -> tuple[Callable[..., str], tuple[str, int, str]]:
        return self.received


def _received(path: str, times: int, log: str) -> str:
    with open(log, "ab+") as deaths:  # noqa: PTH123
        if deaths.tell() < times:
            deaths.write(b".")
            deaths.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return path


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
