"""Faults on purpose. Small enough to be imported by a decoding process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

#: A format that nobody knows before `register_faults`.
FORMAT = "FAULT"
_PREFIX = b"FAULT"


def fault(what: str, **details: object) -> bytes:
    """An encoded image with which something happens to whoever decodes it, as soon as `register_faults` was called.

    Args:
        what: "grey" (48x40 pixels of `value`), "raise", "kill", "exit", "sleep", "stop", "spin", "settings" (an error
            that tells them), or "send" (`data`, in hexadecimal, as an answer of the worker, and no other one).
        details: `times`, and `log`: a file that gets a byte each time; after so many times the image is grey.
    """
    return _PREFIX + json.dumps({"what": what, **details}).encode()


def register_faults(name: str = FORMAT) -> None:
    Image.register_open(name, open_fault, accept_fault)


def accept_fault(prefix: bytes) -> bool:
    return prefix.startswith(_PREFIX)


def open_fault(file: BinaryIO, name: str) -> Image.Image:
    details = json.loads(file.read().removeprefix(_PREFIX))
    what = details["what"]
    if "log" in details:
        with Path(details["log"]).open("ab") as log:
            if log.tell() >= details.get("times", 1e9):
                what = "grey"
            else:
                log.write(b".")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(0)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "sleep":
        time.sleep(600)
    elif what == "spin":
        while True:
            pass
    elif what == "raise":
        raise ZeroDivisionError("by the\nfault")
    elif what == "settings":
        from PIL import GifImagePlugin, PngImagePlugin

        raise OSError(
            f"{PngImagePlugin.MAX_TEXT_CHUNK} {int(GifImagePlugin.LOADING_STRATEGY)} {Image.MAX_IMAGE_PIXELS} "
            f"{SETTING} {'torch' in sys.modules} {'QUALICLIP_PYIQA_WORKER' in os.environ}"
        )
    elif what == "send":
        os.write(_answers(), bytes.fromhex(details["data"]))
        os._exit(0)
    value = details.get("value", 128)
    return Image.new("RGB", (48, 40), (value, 255 - value, 99))


#: What a user of the faults' format may set.
SETTING = 1


def _answers() -> int:
    """The pipe through which a worker answers: the only one beyond the standard streams that can be written to."""
    for fd in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY:
                return fd
        except OSError:
            continue
    raise LookupError("this is not a worker")


def workers_of(pid: int) -> list[int]:
    """Process ids of the decoding workers of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # threads and processes come and go meanwhile
            for child in map(int, (task / "children").read_text().split()):
                with contextlib.suppress(OSError):
                    if b"qualiclip_pyiqa.images.worker_loop" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(child)
    return found


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
