"""Keep half precision out of where it would change a score's digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on the device of `x` keep the dtype of their inputs.

    It is empty while a graph is exported, which has no autocast: each context would become a graph of its own there.
    """
    if torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@contextmanager
def kept_precise(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Return a context around a module's `_apply` in which its own tensors are never cast to half precision.

    `.to()` and the like all go through `_apply`.

    Args:
        module: to which the tensors belong.
        names: of parameters and buffers; None is passed over.
    """
    # Detached, as a parameter itself is changed in place.
    precise = {name: getattr(module, name).detach() for name in names if getattr(module, name) is not None}
    yield
    for name, before in precise.items():
        after = getattr(module, name)
        if torch.promote_types(after.dtype, torch.float32) != after.dtype:
            kept = before.to(after.device)
            setattr(module, name, nn.Parameter(kept, after.requires_grad) if name in module._parameters else kept)
