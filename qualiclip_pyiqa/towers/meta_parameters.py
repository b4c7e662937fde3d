"""Build modules with parameters on the meta device but real buffers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


class _Building(threading.local):
    """Whether this thread is inside `parameters_on_meta`."""

    active = False


_building = _Building()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules built by this thread on the meta device.

    Unlike in `with torch.device("meta")`, buffers keep their values. Other threads are not affected.
    """
    _install()
    was_active, _building.active = _building.active, True
    try:
        yield
    finally:
        _building.active = was_active


@functools.cache
def _install() -> None:
    """Register the hook once; it is never removed, as another thread may be iterating over the global hooks."""
    register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]  # torch's types are too narrow


def _move_to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not _building.active or parameter.device.type == "meta":
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
