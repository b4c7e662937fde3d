"""A picture that kills the process that decodes it; in a module of its own, so that a worker can import it."""

from __future__ import annotations

import os
import signal


class Killer(os.PathLike[str]):
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
