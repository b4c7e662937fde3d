"""Detect forward hooks. PyTorch has no public API for it, so its private names are confined to this module."""

from __future__ import annotations

import torch
from torch import nn

_OF_MODULE = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks of its own."""
    return any(getattr(module, name, None) for name in _OF_MODULE)


def has_global_hooks() -> bool:
    """Whether global forward hooks are registered (`torch.nn.modules.module.register_module_forward_hook`)."""
    return any(getattr(torch.nn.modules.module, name, None) for name in _GLOBAL)
