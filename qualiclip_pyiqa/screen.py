"""The standard streams: which may be closed, and of which standard error's failures must not affect results."""

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


def replace_closed_streams() -> None:
    """Replace standard streams that are closed, for which Python has None, an AttributeError at every use.

    Reading or writing the new ones raises OSError, as on a closed descriptor; what goes to standard error is dropped.
    The null device takes the descriptor, or a file that is opened later would, and receive what libraries print.
    """
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_WRONLY))  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.open(os.devnull, os.O_WRONLY), "w")  # noqa: PTH123, SIM115
