"""TF32 is used only where it was asked for; PyTorch's switches stay as they were, whichever interface set them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qualiclip_pyiqa.scoring.precision import set_tf32, tf32
from qualiclip_pyiqa.scoring.scorer import Scorer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
NEW = hasattr(MATMUL, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="this PyTorch has no fp32_precision")


def read(name: str) -> Any:
    """A setting of PyTorch, or the fact that it cannot be read."""
    owner: Any = torch
    *path, last = name.split(".")
    try:
        for part in path:
            owner = getattr(owner, part)
        return getattr(owner, last)
    except RuntimeError:
        return "mixed"
    except AttributeError:
        return "absent"


def state() -> dict[str, Any]:
    """Everything that can be read of the switches, by both interfaces."""
    names = ["cuda.matmul.allow_tf32", "cudnn.allow_tf32"]
    names += [f"{part}fp32_precision" for part in ("", "cudnn.", "cuda.matmul.", "cudnn.conv.", "cudnn.rnn.")]
    found = {name: read(f"backends.{name}") for name in names}
    try:
        return found | {"matmul": torch.get_float32_matmul_precision()}
    except RuntimeError:
        return found | {"matmul": "mixed"}


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Puts PyTorch's switches back, through the interface that a fresh process has used: none."""
    before = state()
    yield
    if NEW:
        torch.backends.fp32_precision = CUDNN.fp32_precision = "none"
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    if NEW:
        MATMUL.fp32_precision = before["cuda.matmul.fp32_precision"]
        CUDNN.conv.fp32_precision = before["cudnn.conv.fp32_precision"]
        CUDNN.rnn.fp32_precision = before["cudnn.rnn.fp32_precision"]
    torch.set_float32_matmul_precision("highest")
    if NEW:
        MATMUL.fp32_precision = before["cuda.matmul.fp32_precision"]
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert state() == before


def _legacy(matmul: bool, convolution: bool) -> None:
    MATMUL.allow_tf32, CUDNN.allow_tf32 = matmul, convolution


def _new(**settings: str) -> None:
    owners = {"all": torch.backends, "matmul": MATMUL, "cudnn": CUDNN, "conv": getattr(CUDNN, "conv", None)}
    for name, precision in settings.items():
        owners[name].fp32_precision = precision


#: What users write before they score.
USERS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "legacy on": lambda: _legacy(True, True),
    "legacy off": lambda: _legacy(False, False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
USERS_OF_NEW: dict[str, Callable[[], None]] = {
    "matmul": lambda: _new(matmul="tf32"),
    "all tf32": lambda: _new(all="tf32"),
    "all ieee": lambda: _new(all="ieee"),
    "all and matmul": lambda: _new(all="tf32", matmul="ieee"),
    "conv": lambda: _new(conv="ieee"),
    "cudnn": lambda: _new(cudnn="tf32"),
}
ALL_USERS = [*USERS, *(pytest.param(name, marks=needs_new) for name in USERS_OF_NEW)]


def effective() -> tuple[bool, bool]:
    """Whether matrix products and convolutions may be TF32 now, by the interface that can be read."""
    if NEW:
        return MATMUL.fp32_precision == "tf32", CUDNN.conv.fp32_precision == "tf32"
    return MATMUL.allow_tf32, CUDNN.allow_tf32


@pytest.mark.parametrize("user", ALL_USERS)
@pytest.mark.parametrize("wanted", [(False, False), (True, True), (False, True)])
def test_switches_are_set_and_put_back(user: str, wanted: tuple[bool, bool]) -> None:
    (USERS | USERS_OF_NEW)[user]()
    before = state()
    restore = set_tf32(*wanted)
    assert effective() == wanted
    restore()
    assert state() == before


@pytest.mark.parametrize("user", USERS)
def test_the_old_interface_stays_readable_while_a_pass_runs(user: str) -> None:
    """pyiqa reads it when a metric runs, perhaps in another thread."""
    USERS[user]()
    restore = set_tf32(False, False)
    with torch.backends.cudnn.flags(enabled=True):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (False, True)
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (False, False)
    restore()


@pytest.mark.parametrize("user", ALL_USERS)
def test_scores_on_a_cpu_whatever_the_switches_are(user: str) -> None:
    (USERS | USERS_OF_NEW)[user]()
    before = state()
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (record,) = Scorer("qualiclip-mini", device="cpu", workers=0).score([image])
    assert record.error is None and state() == before


def test_nothing_is_touched_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qualiclip_pyiqa.scoring.precision.set_tf32", lambda *_: pytest.fail("the switches were set"))
    for name in ("cpu", "meta", "mps"):
        with tf32(torch.device(name), allowed=True):
            pass


class Removed:
    """A backend of a PyTorch without the old interface."""

    def __init__(self, **operations: Any) -> None:
        self.__dict__.update(operations)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.__dict__, f"{name} was written, which does not exist"
        self.__dict__[name] = value


@pytest.mark.parametrize("interface", ["old", "new", "mixed"])
def test_every_interface_that_pytorch_has_had(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(Removed):
        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("PyTorch is checking ... mix of the legacy and new APIs")

    if interface == "old":  # before 2.9
        matmul: Any = SimpleNamespace(allow_tf32=True)
        cudnn: Any = SimpleNamespace(allow_tf32=True)
    else:
        kind = Removed if interface == "new" else Mixed
        operations = {name: Removed(fp32_precision="tf32") for name in ("conv", "rnn")}
        matmul, cudnn = kind(fp32_precision="tf32"), kind(fp32_precision="none", **operations)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)

    def allowed() -> tuple[bool, bool]:
        if interface == "old":
            return matmul.allow_tf32, cudnn.allow_tf32
        assert cudnn.fp32_precision == "none" and cudnn.rnn.fp32_precision == cudnn.conv.fp32_precision
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"

    for wanted in ((False, False), (False, True)):
        restore = set_tf32(*wanted)
        assert allowed() == wanted
        restore()
        assert allowed() == (True, True)


def test_passes_that_want_the_same_share_the_setting() -> None:
    _legacy(False, True)
    before = state()
    both, first_is_done = threading.Barrier(2), threading.Event()
    seen = []

    def run(is_first: bool) -> None:
        with tf32(CUDA, allowed=False):
            both.wait(60)  # both passes are running
            if not is_first:
                assert first_is_done.wait(60)
            seen.append(effective())
        if is_first:
            first_is_done.set()

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(run, True), threads.submit(run, False)]:
            future.result(60)
    assert seen == [(False, False)] * 2
    assert state() == before


@pytest.mark.parametrize("other", [{"allowed": True}, {"allowed": False, "foreign": True}])
def test_a_pass_waits_for_those_that_want_another_setting(other: dict[str, bool]) -> None:
    _legacy(False, True)
    before, order = state(), []

    def fine() -> None:
        with tf32(CUDA, allowed=False):
            order.append(("fine", effective()))

    with ThreadPoolExecutor(1) as thread:
        with tf32(CUDA, **other):
            waiting = thread.submit(fine)
            with torch.backends.cudnn.flags(enabled=True):  # as pyiqa does
                order.append(("other", effective()))
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
        waiting.result(60)
    assert order == [("other", (other["allowed"], True)), ("fine", (False, False))]
    assert state() == before


def test_switches_are_put_back_after_an_error() -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), tf32(CUDA, allowed=True):
        1 / 0  # noqa: B018
    assert state() == before


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_scorer_asks_for_its_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def recorded(device: torch.device, allowed: bool, foreign: bool = False) -> Iterator[None]:
        asked.append((device, allowed, foreign))
        yield

    monkeypatch.setattr("qualiclip_pyiqa.scoring.network.tf32", recorded)
    list(Scorer(["qualiclip-mini", "piqe"], "cpu", workers=0, precision=precision).score([np.ones((40, 40, 3))]))
    assert asked == [(CPU, precision == "tf32", False), (CPU, precision == "tf32", True)]
