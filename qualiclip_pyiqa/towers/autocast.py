"""Switch autocast off where half precision would change a score's digits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on the device of `x` keep the dtype of their inputs.

    It is empty while a graph is exported, which has no autocast: each context would become a graph of its own there.
    """
    if torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
