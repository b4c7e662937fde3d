"""Precisions of a pass, and TF32, the coarser float32 products of NVIDIA GPUs, which are used only on request.

PyTorch allows TF32 for convolutions by default, and its switches are global. So a pass sets them, and the last of
several concurrent passes restores what the first one found. Passes on other devices leave them alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Precision -> dtype of weights and images.
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def warn_of_slow_bf16() -> None:
    """Log a warning if this CPU has no instructions for bfloat16. PyTorch has no public function that tells."""
    known = [getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("avx512_bf16", "amx_tile")]
    if any(known) and not any(supported() for supported in known if supported is not None):
        logger.warning("this CPU has no instructions for bfloat16, so bf16 is slower than fp32 here")


def set_tf32(matmul: bool, convolution: bool) -> Callable[[], None]:
    """Set both switches; return a function that restores them.

    PyTorch has two interfaces: `allow_tf32` and, since 2.9, `fp32_precision`. Once a program has used the second, the
    first raises when read, so it is not used then. Otherwise `allow_tf32` is set, which keeps both readable for other
    threads: pyiqa reads it whenever a metric runs.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    restore_convolution = _set(cudnn, [getattr(cudnn, name, None) for name in ("conv", "rnn")], convolution)
    restore_matmul = _set(cuda, [cuda], matmul)

    def restore() -> None:
        restore_matmul()
        restore_convolution()

    return restore


def _set(legacy: Any, operations: list[Any], allowed: bool) -> Callable[[], None]:
    """Set one switch, by `legacy.allow_tf32`, or by each operation's `fp32_precision` if the former is unreadable."""
    before = [(each, each.fp32_precision) for each in operations if hasattr(each, "fp32_precision")]
    try:
        was_allowed = legacy.allow_tf32
        # `allow_tf32` does not distinguish "medium" from "high".
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
    """Running passes on this process's NVIDIA GPUs: those with the same setting run together, others wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = 0
        self.setting = False, False
        self.restore: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self, device: torch.device, allowed: bool, foreign: bool = False) -> Iterator[None]:
        """Set TF32 during a pass.

        Args:
            device: of the pass; nothing is done unless it is a CUDA device.
            allowed: whether products may use TF32.
            foreign: always allow TF32 for convolutions. For other packages' metrics: pyiqa allows it while they run,
                which is not thread-safe unless it is allowed already.
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


#: The process's only instance, used as `with tf32(device, allowed): ...`
tf32 = _Passes()
