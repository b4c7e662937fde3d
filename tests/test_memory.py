"""Memory that a process keeps: in every thread, only where it was asked for, and what is said about it is true."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qualiclip_pyiqa.scoring import allocator
from qualiclip_pyiqa.scoring.allocator import keep_freed_memory

# Blocks larger and smaller than what glibc's other arenas can hold, allocated, filled and freed again and again.
CODE = """
import ctypes, resource, sys, threading
from qualiclip_pyiqa.scoring.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def use(size):
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)

def fresh_pages():
    for size in (24 * 2**20, 100 * 2**20):
        use(size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            use(size)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
kept = keep_freed_memory() if sys.argv[1] == "kept" else 0
fresh_pages()
thread = threading.Thread(target=fresh_pages)
thread.start()
thread.join()
print(kept, *found)
"""
ON_GLIBC = platform.libc_ver()[0] == "glibc"
NEW_GLIBC = ON_GLIBC and tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 35)


def fresh_pages(how: str) -> tuple[int, list[int]]:
    """What was returned, and how many new pages blocks of 24 and of 100 MiB needed in the main and another thread."""
    result = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    kept, *found = map(int, result.stdout.split())
    return kept, found


def test_what_is_freed_is_kept_in_every_thread() -> None:
    kept, found = fresh_pages("kept")
    if not ON_GLIBC:
        assert kept == 0
        return
    assert kept == (2**31 - 1 if NEW_GLIBC else 2**25)
    # 18,432 and 76,800 pages of 4 KiB are used; a few hundred are the interpreter's and the threads' own.
    assert [count < 2000 for count in found] == [True, kept >= 100 * 2**20] * 2


@pytest.mark.skipif(not ON_GLIBC, reason="other C libraries keep what they like")
def test_otherwise_it_is_not() -> None:
    kept, (_, large, _, large_in_thread) = fresh_pages("not kept")
    assert kept == 0 and min(large, large_in_thread) > 50_000


class FakeLibrary:
    """A C library that takes thresholds up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return int(parameter != -3 or value <= self.limit)


@pytest.mark.parametrize(
    ("limit", "kept", "parameters"),
    [(2**31, 2**31 - 1, [-3, -1, -8]), (2**25, 2**25, [-3, -3, -1, -8]), (0, 0, [-3, -3])],
)
def test_older_libraries_take_smaller_thresholds(
    limit: int, kept: int, parameters: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary(limit)
    monkeypatch.setattr(allocator, "_glibc", lambda: library)
    assert keep_freed_memory() == kept
    assert [parameter for parameter, _ in library.calls] == parameters  # refused: nothing else is changed either


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs a C compiler")
def test_another_librarys_memory_is_left_alone(tmp_path: Path) -> None:
    """Such as jemalloc's or tcmalloc's, preloaded; the latter has a mallopt that does nothing and says that it did."""
    (tmp_path / "other.c").write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\nint mallopt(int p, int v) { return 1; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], check=True)
    code = "from qualiclip_pyiqa.scoring.allocator import keep_freed_memory; print(keep_freed_memory())"
    result = subprocess.run(
        ["env", f"LD_PRELOAD={tmp_path / 'other.so'}", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "0"


def test_nothing_is_done_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() == 0
