"""The main loop of a decoding worker. It imports neither torch nor anything that starts processes."""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import TypedDict

from ..errors import ImageError, one_line
from .convert import PixelsOrError, ReadRules, read_or_error
from .pillow_setup import PillowSetup, apply_setup
from .wire import READY, pack_reply, read_request

# Seconds past its time limit after which a worker kills itself, in case its parent died and cannot.
GRACE = 30.0


class WorkerSettings(TypedDict):
    """Settings sent to a worker at start, JSON-ready: `ReadRules`, Pillow's setup, seconds per image."""

    rules: dict[str, bool | int | None]
    pillow: PillowSetup
    timeout: float


def work(settings: WorkerSettings) -> None:
    """Send a ready message, then answer requests from standard input on the original standard output until EOF."""
    rules, limit = ReadRules(**settings["rules"]), settings["timeout"] + GRACE  # type: ignore[arg-type]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep a decoder's prints out of the answers
    has_alarm = hasattr(signal, "setitimer") and math.isfinite(limit)
    if has_alarm:  # the default action ends the process, even inside a decoder's C code
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    number: int = READY
    result: PixelsOrError | None = _prepare(settings["pillow"])
    while True:
        try:
            answers.writelines(pack_reply(number, result))
            answers.flush()
            request = read_request(sys.stdin.buffer)
        except BrokenPipeError:
            request = None
        if request is None:  # the parent is gone
            return
        number, source = request
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, limit)
        result = read_or_error(source, rules)
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(setup: PillowSetup) -> ImageError | None:
    try:
        apply_setup(setup)
    except Exception as error:  # noqa: BLE001 - importing a plug-in may raise anything
        return ImageError(one_line(f"{type(error).__name__}: {error}"))
    return None
