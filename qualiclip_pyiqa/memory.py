"""Freed memory that is kept: on a CPU up to 1.8 times the speed for large pictures, for a setting of the process."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h> of glibc: mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next use.

    A network's features of a large picture are blocks of many megabytes. glibc gives such a block back to the system as
    soon as it is freed, and the next one's pages are filled with zeros again, which takes up to half of the time of a
    forward pass on a CPU. Afterwards the process stays as large as it ever was; scores do not change. The `qualiclip`
    command does this to its own process. A program of one's own may call it once, before it scores, or be started with
    MALLOC_MMAP_THRESHOLD_=2147483647 MALLOC_TRIM_THRESHOLD_=2147483647.

    Returns:
        Whether the C library took the setting: glibc does, others are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # such as musl
        return False
    return all([mallopt(_M_MMAP_THRESHOLD, _LARGEST), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
