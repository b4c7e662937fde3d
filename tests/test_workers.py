"""Decoding workers that crash, hang, lie or cannot start: every image comes back, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import FORMAT, accept_fault, fault, register_faults, workers_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.images import worker_process, workers
from qualiclip_pyiqa.images.convert import ReadRules
from qualiclip_pyiqa.images.wire import (
    DTYPES,
    MAX_TEXT,
    REPLY_SIZE,
    BadReplyError,
    pack_reply,
    pack_request,
    parse_reply,
    read_request,
)
from qualiclip_pyiqa.images.worker_process import WorkerProcess
from qualiclip_pyiqa.images.workers import DecodedImage, Decoder, usable_workers
from qualiclip_pyiqa.scoring.scorer import Scorer

GREY = np.full((40, 48, 3), (128, 127, 99), np.uint8)


@pytest.fixture(autouse=True)
def pillow_as_it_was() -> Iterator[None]:
    """With an opener for faults, until the test ends."""
    Image.init()
    openers, names = dict(Image.OPEN), list(Image.ID)
    register_faults()
    workers._logged.clear()
    yield
    Image.ID[:] = names
    Image.OPEN.clear()
    Image.OPEN.update(openers)


def decoded(
    sources: list[str | bytes], workers: int = 2, rules: ReadRules | None = None, timeout: float = 60.0
) -> list[np.ndarray | str]:
    """Pixels, or the text of the error, of each source; other exceptions are raised."""
    results: queue.SimpleQueue[DecodedImage] = queue.SimpleQueue()
    decoder = Decoder(workers, len(sources), results, rules, timeout)
    try:
        for number, source in enumerate(sources):
            decoder.submit(number, source)
        found = {}
        for _ in sources:
            event = results.get(timeout=120)
            assert event.number not in found
            found[event.number] = event.result
    finally:
        decoder.close()
    assert not workers_of(os.getpid())
    for result in found.values():
        if not isinstance(result, np.ndarray | ImageError):
            raise result
    return [str(each) if isinstance(each, ImageError) else each for _, each in sorted(found.items())]


def is_grey(result: np.ndarray | str) -> bool:
    return isinstance(result, np.ndarray) and np.array_equal(result, GREY)


@pytest.mark.parametrize("shape", [(40, 33), (32, 40, 1), (33, 32, 3), (32, 32, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_arrive_as_they_are(shape: tuple[int, ...], dtype: np.dtype) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    header, data = pack_reply(5, array)
    reply = parse_reply(bytes(header), 5, array.shape[0] * array.shape[1])
    assert (reply.shape, reply.dtype, reply.length) == (array.shape, array.dtype, array.nbytes)
    assert np.array_equal(np.frombuffer(data, reply.dtype).reshape(shape), array)
    with pytest.raises(BadReplyError):
        parse_reply(bytes(header), 5, array.shape[0] * array.shape[1] - 1)
    with pytest.raises(BadReplyError):
        parse_reply(bytes(header), 4, None)


@pytest.mark.parametrize("source", ["", "a.png", "line\nbreak \udcff.png", b"", b"\0" * 99, os.fsencode("ü.png")])
def test_sources_arrive_as_they_are(source: str | bytes) -> None:
    message = b"".join(pack_request(7, source))
    assert read_request(io.BytesIO(message + b"next")) == (7, source)
    assert read_request(io.BytesIO(message[:-1])) is None and read_request(io.BytesIO()) is None


@given(
    st.binary(min_size=REPLY_SIZE, max_size=REPLY_SIZE) | st.binary(min_size=REPLY_SIZE - 9, max_size=REPLY_SIZE - 9)
)
def test_a_header_is_refused_or_bounded(header: bytes) -> None:
    if len(header) < REPLY_SIZE:  # with the right number and kind, which chance does not find
        header = struct.pack("=Q", 1) + b"a" + header
    with contextlib.suppress(BadReplyError):
        reply = parse_reply(header, 1, 1000)
        assert reply.length <= max(MAX_TEXT, 1000 * 4 * 8)
        assert reply.shape is None or math.prod(reply.shape) * reply.dtype.itemsize == reply.length


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def header(number: int, kind: bytes, dtype: int, height: int, width: int, channels: int, length: int) -> bytes:
    return struct.pack("=QcBIIBQ", number, kind, dtype, height, width, channels, length)


def test_a_worker_that_was_taken_over_can_only_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes what it likes in place of an answer to its image."""
    mark = tmp_path / "ran"
    answers: dict[str, Callable[[int], bytes]] = {
        "pickle": lambda n: pickle.dumps(Evil(mark)),
        "image beyond the limit": lambda n: header(n, b"a", 0, 20_000, 20_000, 3, 1_200_000_000),
        "huge image": lambda n: header(n, b"a", 4, 2**32 - 1, 2**32 - 1, 4, 2**64 - 1),
        "another length than the shape's": lambda n: header(n, b"a", 0, 40, 48, 3, 2**40),
        "no such dtype": lambda n: header(n, b"a", 200, 40, 48, 3, 5760),
        "no such shape": lambda n: header(n, b"a", 0, 40, 48, 2, 3840),
        "another image": lambda n: header(n - 1, b"a", 0, 40, 48, 3, 5760) + bytes(5760),
        "endless error": lambda n: header(n, b"e", 0, 0, 0, 0, 2**62) + bytes(1000),
        "no such kind": lambda n: header(n, b"x", 0, 0, 0, 0, 4) + b"text",
        "nothing": lambda n: b"",
    }
    sources: list[str | bytes] = [fault("grey")]
    for answer in answers.values():
        sources += [fault("send", data=answer(len(sources)).hex()), fault("grey")]
    tracemalloc.start()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "ATTEMPTS", 1)
        results = decoded(sources, workers=1)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert all(map(is_grey, results[::2]))
    for what, bad in zip(answers, results[1::2], strict=True):
        end = "exited with status 0" if what == "nothing" else "sent a malformed answer"
        assert bad == f"bytes cannot be decoded: the decoding process {end}, 1 times", what
    assert not mark.exists()
    # What is short of its own length is a death; what tries to look like several lines is one.
    lines = header(1, b"e", 0, 0, 0, 0, 9) + b"a\nb\x1b[2J\xffc"
    assert decoded([fault("grey"), fault("send", data=lines.hex())], workers=1)[1] == "a b [2J\ufffdc"
    short = header(1, b"a", 0, 40, 48, 3, 5760) + bytes(99)
    assert "exited with status 0, 3 times" in str(decoded([fault("grey"), fault("send", data=short.hex())], 1)[1])


@pytest.mark.parametrize(
    ("what", "end"),
    [("kill", r"was killed by SIGKILL \(out of memory\?\), 3 times"), ("exit", "exited with status 0, 3 times")],
)
def test_an_image_that_ends_its_worker_is_an_error_and_its_neighbours_are_not(
    what: str, end: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    sources = [fault("grey")] * 5
    sources[2] = fault(what, log=str(log))
    results = decoded(sources)
    assert [is_grey(result) for result in results] == [True, True, False, True, True]
    assert str(results[2]).endswith(end.replace("\\", "")) and log.stat().st_size == 3
    log.unlink()
    assert all(map(is_grey, decoded([fault("grey"), fault(what, log=str(log), times=2)])))


def hurry(number: int, patch: pytest.MonkeyPatch) -> None:
    """Wait for an image a tenth of the time only; the others need all of it on a busy machine."""
    decode = WorkerProcess.decode

    def hurried(
        worker: WorkerProcess, n: int, request: list[bytes], limit: int | None, timeout: float
    ) -> np.ndarray | ImageError:
        return decode(worker, n, request, limit, timeout / 10 if n == number else timeout)

    patch.setattr(WorkerProcess, "decode", hurried)


@pytest.mark.parametrize("can_poll", [True, False])
@pytest.mark.parametrize("what", ["sleep", "stop", "spin"])
def test_an_image_whose_worker_does_not_come_back_is_an_error(
    what: str, can_poll: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_CAN_POLL", can_poll)  # False: as on Windows
    log = tmp_path / "log"
    sources = [fault("grey")] * 5
    sources[2] = fault(what, log=str(log)) + b" " * 2**22  # more than a pipe holds
    hurry(2, monkeypatch)
    begin = time.monotonic()
    results = decoded(sources, timeout=10)
    assert time.monotonic() - begin < 60
    assert [is_grey(result) for result in results] == [True, True, False, True, True]
    assert results[2] == (
        "bytes was not decoded within 10 seconds; if it needs longer, raise decode_timeout (--decode-timeout)"
    )
    assert log.stat().st_size == 1  # one attempt


@pytest.mark.parametrize("can_poll", [True, False])
def test_a_stopped_worker_that_does_not_even_read_is_replaced(can_poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_CAN_POLL", can_poll)
    results: queue.SimpleQueue[DecodedImage] = queue.SimpleQueue()
    hurry(1, monkeypatch)
    decoder = Decoder(1, 4, results, timeout=10)
    decoder.submit(0, fault("grey"))
    assert is_grey(results.get(timeout=60).result)  # type: ignore[arg-type]
    (stopped,) = workers_of(os.getpid())
    os.kill(stopped, signal.SIGSTOP)
    decoder.submit(1, fault("grey") + b" " * 2**24)
    decoder.submit(2, fault("grey"))
    assert "was not decoded within 10 seconds" in str(results.get(timeout=60).result)
    assert is_grey(results.get(timeout=60).result)  # type: ignore[arg-type]
    assert not Path(f"/proc/{stopped}").exists()
    decoder.close()


def test_closing_does_not_wait_for_a_worker_that_hangs() -> None:
    decoder = Decoder(2, 4, queue.SimpleQueue(), timeout=math.inf)
    for number in range(4):
        decoder.submit(number, fault("sleep"))
    deadline = time.monotonic() + 60
    while len(workers_of(os.getpid())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begin = time.monotonic()
    decoder.close()
    assert time.monotonic() - begin < 10 and not workers_of(os.getpid())


def test_a_computer_that_slept_has_not_used_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a year later."""
    years = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(years) * 3e7)
    (result,) = decoded([fault("grey")], timeout=30)
    monkeypatch.undo()
    assert is_grey(result)


def test_a_worker_without_a_parent_ends_its_decoder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ATTEMPTS", 1)
    decoder = Decoder(1, 1, queue.SimpleQueue(), timeout=-29.0)  # and 30 seconds of grace
    decoder.timeout = 60
    decoder.submit(0, fault("spin"))
    (result,) = [decoder.results.get(timeout=100).result]
    decoder.close()
    assert "the decoding process was killed by SIGALRM, 1 times" in str(result)


def test_workers_that_do_not_start_are_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_COMMAND", "raise SystemExit(3)")
    with pytest.raises(SettingsError, match=r"^workers is 2, .* fail to start \(exit status 3, 3 times\).* workers=0"):
        decoded([fault("grey")] * 4)


@pytest.mark.parametrize("can_poll", [True, False])
def test_workers_that_hang_at_their_start_are_no_images_fault(can_poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_CAN_POLL", can_poll)
    monkeypatch.setattr(workers, "START_TIMEOUT", 0.5)
    monkeypatch.setattr(worker_process, "_COMMAND", "import time; time.sleep(600)")
    with pytest.raises(SettingsError, match=r"fail to start \(no answer within 0\.5 seconds\); .* workers=0"):
        decoded([fault("grey")] * 2, timeout=0.5)


def test_an_exception_of_a_decoder_is_the_images_error_in_either_process() -> None:
    register = Image.OPEN[FORMAT]
    here = decoded([fault("raise"), fault("grey")], workers=0)
    there = decoded([fault("raise"), fault("grey")], workers=1)
    assert Image.OPEN[FORMAT] is register
    assert here[0] == there[0] and "ZeroDivisionError: by the fault" in str(here[0]) and "\n" not in str(here[0])
    assert is_grey(here[1]) and is_grey(there[1])


def test_a_failure_that_is_no_images_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "pack_request", lambda number, source: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoded([fault("grey")], workers=1)


def test_a_path_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    paths: list[str | bytes] = ["\ud800.png", "nul\0.png", str(tmp_path)]
    here, there = decoded(paths, workers=0), decoded(paths, workers=1)
    assert here == there and all(isinstance(each, str) for each in here)


def test_nothing_is_imported_from_the_folder_the_user_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "numpy", "PIL", "qualiclip_pyiqa"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w'); raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert is_grey(decoded([fault("grey")], workers=1)[0])
    assert not (tmp_path / "ran").exists()


def test_what_is_set_up_in_pillow_holds_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import GifImagePlugin, PngImagePlugin

    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 12_345)
    monkeypatch.setattr(GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 77_777)
    monkeypatch.setattr("faults.SETTING", 42)  # a plug-in's own
    expected = f"12345 {int(GifImagePlugin.LoadingStrategy.RGB_ALWAYS)} 77777 42"
    (there,) = decoded([fault("settings")], workers=1)
    assert f"{expected} False False" in str(there)  # no torch, no mark for what a worker starts
    large = io.BytesIO()
    Image.new("L", (400, 200)).save(large, "PNG")
    here, there = (decoded([large.getvalue()], workers=number)[0] for number in (0, 1))
    assert here == there and "80000" not in str(here) and "limit 77777 pixels" in str(here)
    assert isinstance(decoded([large.getvalue()], 1, ReadRules(max_pixels=80_000))[0], np.ndarray)


@pytest.mark.parametrize("name", [FORMAT, "JXL", "FLI"])  # unknown to Pillow, known without an opener, Pillow's own
def test_a_plug_in_has_the_same_pixels_in_every_process(name: str, caplog: pytest.LogCaptureFixture) -> None:
    del Image.OPEN[FORMAT]
    register_faults(name)
    sources = [fault("grey", value=value) for value in (0, 99, 255)]
    here, there = decoded(list(sources), workers=0), decoded(list(sources), workers=2)
    assert np.array_equal(here, there) and np.ptp(here) == 255
    assert not caplog.records


def test_a_plug_in_that_workers_cannot_import_is_used_here(caplog: pytest.LogCaptureFixture) -> None:
    """A class of a notebook or a test."""

    def opener(file: Any, name: str) -> Image.Image:
        return Image.new("RGB", (48, 40), (128, 127, 99))

    Image.register_open(FORMAT, opener, accept_fault)
    assert all(map(is_grey, decoded([fault("kill")] * 3)))
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "decoding in this process" in caplog.text and "opener cannot be imported by another process" in caplog.text


def test_a_plug_in_whose_import_fails_there_is_used_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shy.py").write_text(
        textwrap.dedent("""
        import os
        from PIL import Image
        if "SHY" in os.environ:
            raise RuntimeError("not here")
        def opener(file, name):
            return Image.new("RGB", (48, 40), (128, 127, 99))
        """)
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import shy

    monkeypatch.setenv("SHY", "1")
    Image.register_open(FORMAT, shy.opener, accept_fault)
    assert all(map(is_grey, decoded([fault("kill")] * 3)))
    assert len(caplog.records) == 1 and ": RuntimeError: not here" in caplog.text


def test_a_reason_is_logged_once_though_several_threads_find_it_at_once(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            time.sleep(0.2)
            return True

    slow = Slow()
    workers.logger.addFilter(slow)
    try:
        threads = [threading.Thread(target=workers._no_workers, args=("a reason",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        workers.logger.removeFilter(slow)
    assert len(caplog.records) == 1 and "a reason" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("frozen", True, "this is a frozen application"),
        ("frozen", "macosx_app", "this is a frozen application"),
        ("executable", "", "sys.executable is empty"),
        ("executable", None, "sys.executable is empty"),
        ("executable", "/bin/sh", "/bin/sh is not a Python interpreter"),
        ("executable", "/nowhere/python3", "does not exist or is not executable"),
    ],
)
def test_where_no_process_can_be_started_images_are_decoded_here(
    name: str, value: object, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert usable_workers(0) == 0 and not caplog.records
    for _ in range(2):
        assert all(map(is_grey, decoded([fault("grey")] * 3)))
    assert len(caplog.records) == 1 and why in caplog.text


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), BlockingIOError(11, "Try again")])
def test_where_a_process_is_refused_images_are_decoded_here(
    error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert all(map(is_grey, decoded([fault("grey")] * 6)))
    assert len(caplog.records) == 1 and f"{error.strerror} ({sys.executable})" in caplog.text


def test_a_program_that_is_its_own_interpreter_does_not_multiply(tmp_path: Path) -> None:
    """An embedded Python whose `sys.executable` is the program, under a name that looks like Python's."""
    program = tmp_path / "pythonic"
    program.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import os, sys
        with open({str(tmp_path / "log")!r}, "a") as log:
            log.write(".")
        sys.executable = {str(program)!r}
        sys.path[:] = {sys.path!r}
        from qualiclip_pyiqa.images.workers import Decoder
        import queue
        results = queue.SimpleQueue()
        decoder = Decoder(2, 4, results)
        decoder.submit(0, "x.png")
        print(results.get().result)
        decoder.close()
        """)
    )
    program.chmod(0o755)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("workers is 2, but decoding processes fail to start (exit status 3, 3 times)")
    assert run.stderr.count("was started instead of a decoding process; exiting") == 3
    assert (tmp_path / "log").read_text() == "...."  # itself and three attempts


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / f"{number:02}.png" for number in range(13)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return paths


def test_a_killed_worker_costs_no_image(photos: list[Path]) -> None:
    killed = []

    def meanwhile() -> Iterator[Path]:
        for number, path in enumerate(photos * 3):
            if number in (7, 20):
                for worker in workers_of(os.getpid()):
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)
            yield path

    expected = [record.scores for record in Scorer("qualiclip-mini", device="cpu", workers=0).score(photos * 3)]
    records = list(Scorer("qualiclip-mini", device="cpu", batch_size=2, workers=2).score(meanwhile()))
    assert len(killed) >= 2
    assert [record.path for record in records] == [str(path) for path in photos * 3]
    for record, scores in zip(records, expected, strict=True):
        assert record.scores == pytest.approx(scores, abs=2e-6)


def test_workers_killed_at_any_moment_hang_nothing() -> None:
    """Also in the middle of a message: large images, and a killer that waits for some results and no moment else."""
    rng = np.random.default_rng(0)
    large = np.repeat(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8), 4, axis=0)
    buffer = io.BytesIO()
    Image.fromarray(large).save(buffer, "PNG", compress_level=0)
    events: queue.SimpleQueue[DecodedImage] = queue.SimpleQueue()
    decoder = Decoder(2, 4, events)
    stop = threading.Event()
    done: dict[int, Any] = {}

    def kill() -> None:
        seen = 0
        while not stop.wait(float(rng.uniform(0.05, 0.5))):
            if len(done) < seen + 5:  # a busy machine needs its time to start workers
                continue
            seen = len(done)
            for worker in workers_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    numbers = iter(range(150))
    while len(done) < 150:
        while decoder.ready and (number := next(numbers, None)) is not None:
            decoder.submit(number, buffer.getvalue())
        event = events.get(timeout=60)
        decoder.pending -= 1
        assert event.number not in done
        done[event.number] = event.result
    stop.set()
    killer.join()
    decoder.close()
    assert all(np.array_equal(result, large) for result in done.values() if isinstance(result, np.ndarray))
    # An image that cost three workers in a row is given up; that is rare, since they live for many images.
    assert sum(isinstance(result, np.ndarray) for result in done.values()) > 100
