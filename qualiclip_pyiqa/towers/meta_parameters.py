"""Modules built without memory for their parameters, but with real buffers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


class _Building(threading.local):
    """Whether this thread builds such modules now."""

    active = False


_building = _Building()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move parameters of modules that this thread builds to the meta device as they are registered.

    Buffers keep their values, in contrast to `with torch.device("meta")`. Other threads are not affected.
    """
    _install()
    was_active, _building.active = _building.active, True
    try:
        yield
    finally:
        _building.active = was_active


@functools.cache
def _install() -> None:
    """Add the hook once, and never remove it: another thread may be iterating over the process's hooks."""
    register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]  # torch's types are too narrow


def _move_to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not _building.active or parameter.device.type == "meta":
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
