"""Activation checkpointing: activations are recomputed for the gradient instead of stored, to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import SettingsError
from ..towers.mini import MiniTower
from ..towers.recompute import recompute_activations as recompute_blocks
from ..towers.timm_tower import TimmTower
from ..towers.vit import ViTTower
from .config import Config


class Recomputed(nn.Sequential):
    """Layers in a row whose activations are recomputed for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        passes = (nullcontext(), self._frozen_statistics())  # contexts of the first pass and of the second
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=lambda: passes)

    @contextmanager
    def _frozen_statistics(self) -> Iterator[None]:
        """Keep BatchNorm's running statistics as they are: the first pass has counted this batch."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def recompute_activations(tower: nn.Module, config: Config) -> None:
    """Make a tower recompute the activations of its stages or blocks; its state dict is unchanged.

    Raises:
        SettingsError: the tower's normalisation statistics would count every batch twice.
    """
    if isinstance(tower, ViTTower | TimmTower):
        if (
            isinstance(tower, TimmTower)
            and config.statistics
            and any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
        ):
            raise SettingsError(
                f"recompute would let {config.backbone}'s normalisation count every batch twice; "
                "expected statistics = false"
            )
        recompute_blocks(tower)
    elif isinstance(tower, MiniTower):
        tower.stages = nn.ModuleList(Recomputed(*stage) for stage in tower.stages)  # type: ignore[misc]
    else:
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(tower, name, Recomputed(*tower.get_submodule(name)))  # type: ignore[misc]
