"""Activation checkpointing of frozen towers: activations are recomputed for the gradient instead of stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import SettingsError
from .mini import MiniTower
from .mobile import MobileTower
from .resnet import ResNetTower
from .timm_tower import TimmTower
from .vit import ViTTower


class Recomputed(nn.Module):
    """A block whose activations are recomputed for the gradient. Its attributes are those of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.block(*args, **kwargs)
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def recompute_activations(network: nn.Module) -> None:
    """Make a metric's frozen tower, or a frozen tower, recompute the activations of its blocks, in place.

    Raises:
        SettingsError: not one of this package's towers.
    """
    tower = getattr(network, "tower", network)
    if isinstance(tower, ViTTower):
        tower.transformer.grad_checkpointing = True  # type: ignore[assignment]
    elif isinstance(tower, TimmTower):
        tower.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
    elif isinstance(tower, ResNetTower):
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            _wrap_children(layer)
    elif isinstance(tower, MiniTower):
        for stage in tower.stages:
            _wrap_children(stage)
    elif isinstance(tower, MobileTower):
        for number, block in enumerate(tower.trunk.blocks):
            setattr(tower.trunk, f"block{number}", Recomputed(block))
    else:
        raise SettingsError(
            f"{type(tower).__name__} cannot recompute its activations; expected a metric of this package, or "
            "checkpointing=False"
        )


def _wrap_children(layer: nn.Module) -> None:
    for name, block in layer.named_children():
        setattr(layer, name, Recomputed(block))
