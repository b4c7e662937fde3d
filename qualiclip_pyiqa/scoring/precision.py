"""Precisions of a pass, and TF32: coarser float32 products of NVIDIA GPUs, used only where they were asked for.

PyTorch allows TF32 for convolutions by default, and its switches belong to the whole process. So a pass sets them, and
the last of several passes puts back what the first one found. Nothing is read or set for a pass on another device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Names of precisions, with the dtype of a network's weights and images.
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_tf32(matmul: bool, convolution: bool) -> Callable[[], None]:
    """Set both switches, and return a function that sets them to what they were.

    PyTorch has two interfaces for them: `allow_tf32` and, since 2.9, `fp32_precision`. Whoever has used the second one
    cannot read the first one any more, so it is left alone then. Otherwise `allow_tf32` is set, which keeps both
    readable for other threads: pyiqa reads it whenever a metric runs.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    restore_convolution = _set(cudnn, [getattr(cudnn, name, None) for name in ("conv", "rnn")], convolution)
    restore_matmul = _set(cuda, [cuda], matmul)

    def restore() -> None:
        restore_matmul()
        restore_convolution()

    return restore


def _set(legacy: Any, operations: list[Any], allowed: bool) -> Callable[[], None]:
    """Set one switch: `legacy.allow_tf32`, or `fp32_precision` of each operation if that cannot be read."""
    before = [(each, each.fp32_precision) for each in operations if hasattr(each, "fp32_precision")]
    try:
        was_allowed = legacy.allow_tf32
        # "medium" and "high" are the same to `allow_tf32`.
        medium = torch.get_float32_matmul_precision() == "medium"
    except (RuntimeError, AttributeError):
        was_allowed, medium = None, False
    if was_allowed is not None:
        legacy.allow_tf32 = allowed
    else:
        for operation, _ in before:
            operation.fp32_precision = "tf32" if allowed else "ieee"

    def restore() -> None:
        if was_allowed is not None:
            legacy.allow_tf32 = was_allowed
        if medium:
            torch.set_float32_matmul_precision("medium")
        for operation, precision in before:
            operation.fp32_precision = precision

    return restore


class _Passes:
    """The passes that are running on NVIDIA GPUs in this process.

    Passes that want the same setting share it. One that wants another setting waits until no pass is left.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = 0
        self.setting = False, False
        self.restore: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self, device: torch.device, allowed: bool, foreign: bool = False) -> Iterator[None]:
        """Set TF32 for a pass.

        Args:
            device: of the pass; on any but CUDA nothing is done.
            allowed: whether products may be TF32.
            foreign: for other packages' metrics: convolutions may be TF32 in any case, because pyiqa allows it while
                its metrics run, in a way that is not safe for threads unless it is allowed already.
        """
        if device.type != "cuda":
            yield
            return
        setting = allowed, allowed or foreign
        with self.changed:
            self.changed.wait_for(lambda: not self.running or self.setting == setting)
            if not self.running:
                self.restore = set_tf32(*setting)
                self.setting = setting
            self.running += 1
        try:
            yield
        finally:
            with self.changed:
                self.running -= 1
                if not self.running:
                    self.restore()
                    self.changed.notify_all()


#: The one lock of the process: `with tf32(device, allowed): ...`
tf32 = _Passes()
