"""The standard streams: which may be closed, and of which standard error's failures must not affect results."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from .errors import visible


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


@contextmanager
def loading(what: str, after: float = 1.0) -> Iterator[Callable[[], None]]:
    """Say on standard error, in one line, what is being loaded, if it takes a while and a person is watching.

    Args:
        what: is loaded, such as a metric's name.
        after: seconds until the line is printed.

    Yields:
        Ends the waiting before the block does: call it when something else is shown.
    """
    screen = Screen()
    watched = sys.stderr is not None and sys.stderr.isatty()
    timer = threading.Timer(after, lambda: screen.write(f"qualiclip: loading {visible(what)} ...\n"))
    timer.daemon = True
    if watched:
        timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


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
