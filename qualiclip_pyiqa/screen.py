"""Standard error for messages and progress bars, whose failures must not affect results."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Screen:
    """A standard error that drops output instead of raising, when it is closed or broken."""

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
    """Discard a broken stream's output; otherwise Python retries at exit, and reports the failure."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
