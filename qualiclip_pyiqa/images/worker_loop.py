"""Decode images with errors as values; the loop of a decoding worker.

This is all that a worker imports of the package: no torch, and nothing that starts processes.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import TypeAlias, TypedDict

import numpy as np

from ..errors import ImageError
from .convert import PixelSource, ReadRules, one_line, read_pixels, source_name
from .pillow_setup import PillowSetup, apply_setup
from .wire import READY, pack_reply, read_request

Decoded: TypeAlias = np.ndarray | ImageError

# Seconds after its time limit that a worker ends by itself, in case its parent is gone and cannot end it.
GRACE = 30.0


class WorkerSettings(TypedDict):
    """What a worker is told when it starts, ready for JSON: `ReadRules`, the set-up of Pillow, seconds per image."""

    rules: dict[str, bool | int | None]
    pillow: PillowSetup
    timeout: float


def decode(source: PixelSource, rules: ReadRules | None = None) -> Decoded:
    """Call `read_pixels` and return the error instead of raising it, whatever a decoder made of the image."""
    try:
        return read_pixels(source, rules)
    except ImageError as error:
        return ImageError(one_line(str(error)))
    except MemoryError:
        return ImageError(f"{source_name(source)} cannot be decoded: out of memory")
    except Exception as error:  # noqa: BLE001 - a decoder's fault or ours; other images still count
        return ImageError(one_line(f"{source_name(source)} cannot be decoded ({type(error).__name__}: {error})"))


def work(settings: WorkerSettings) -> None:
    """Answer requests on standard input until it ends, on what was standard output; the first answer says: ready.

    Args:
        settings: made by the parent.
    """
    rules, limit = ReadRules(**settings["rules"]), settings["timeout"] + GRACE  # type: ignore[arg-type]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be among the answers
    has_alarm = hasattr(signal, "setitimer") and math.isfinite(limit)
    if has_alarm:  # ends the process, whatever it is doing
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    number: int = READY
    result: Decoded | None = _prepare(settings["pillow"])
    while True:
        try:
            answers.writelines(pack_reply(number, result))
            answers.flush()
            request = read_request(sys.stdin.buffer)
        except BrokenPipeError:
            request = None
        if request is None:  # the parent has ended
            return
        number, source = request
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, limit)
        result = decode(source, rules)
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _prepare(setup: PillowSetup) -> ImageError | None:
    try:
        apply_setup(setup)
    except Exception as error:  # noqa: BLE001 - whatever the import of a plug-in raises
        return ImageError(one_line(f"{type(error).__name__}: {error}"))
    return None
