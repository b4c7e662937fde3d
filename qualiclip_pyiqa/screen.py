"""Standard error, for messages and progress bars that no result may depend on."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Screen:
    """Standard error for messages and progress bars; what it does not take is dropped, and no result depends on it."""

    def write(self, text: str) -> int:
        if sys.stderr is not None:
            try:
                return sys.stderr.write(text)
            except OSError:
                drop_output(sys.stderr)
        return len(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            try:
                sys.stderr.flush()
            except OSError:
                drop_output(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def drop_output(stream: TextIO) -> None:
    """Send what a stream does not take nowhere; Python would try, and complain, once more when it exits."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
