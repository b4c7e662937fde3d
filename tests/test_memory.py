"""Memory that a process keeps: in every thread, and only where it was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not glibc")

# Blocks larger and smaller than what glibc's other arenas can hold, allocated, filled and freed again and again.
CODE = """
import ctypes, resource, sys, threading
from qualiclip_pyiqa.scoring.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def use():
    for size in (100 * 2**20, 40 * 2**20):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)

def fresh_pages():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        use()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
taken = keep_freed_memory() if sys.argv[1] == "kept" else True
fresh_pages()
thread = threading.Thread(target=fresh_pages)
thread.start()
thread.join()
print(int(taken), *found)
"""


def fresh_pages(how: str) -> list[int]:
    result = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    taken, *found = map(int, result.stdout.split())
    if not taken:
        pytest.skip("not glibc")
    return found


def test_what_is_freed_is_kept_in_every_thread() -> None:
    # 107,520 pages of 4 KiB are used; a few hundred are the interpreter's and the threads' own.
    assert all(count < 2000 for count in fresh_pages("kept"))


def test_otherwise_it_is_not() -> None:
    assert all(count > 50_000 for count in fresh_pages("not kept"))
