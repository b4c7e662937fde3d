"""The moving average of a tower's weights (EMA), which is what a training run keeps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..towers.mini import Standardise


@torch.no_grad()
def update_ema(ema: nn.Module, tower: nn.Module, decay: float) -> None:
    """Move every floating-point tensor of `ema`, buffers too, towards `tower`: ema = decay * ema + (1 - decay) * tower.

    `torch.optim.swa_utils.AveragedModel` does not fit: it averages BatchNorm's counters, which are whole numbers, or
    leaves all buffers out, and it takes the first step's weights as they are, where `warmed_decay` keeps a share of
    the initial ones.
    """
    for old, new in zip(ema.state_dict().values(), tower.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)


def warmed_decay(decay: float, step: int) -> float:
    """Decay of a step, counted from 1: smaller at first, so that early weights are soon forgotten."""
    return min(decay, step / (step + 10))


@torch.no_grad()
def recalibrate(tower: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> None:
    """Set all normalisation statistics to their means over batches, and leave the tower in eval mode.

    An average of weights has no statistics of its own: those of the trained weights belong to other activations.

    Args:
        batches: as `stacks.batch_of` makes them.
    """
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    heads = [module for module in tower.modules() if isinstance(module, Standardise)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    tower.train()
    for count, batch in enumerate(batches, 1):
        for head in heads:
            head.momentum = 1 / count
        tower(batch["pictures"].flatten(0, 2).to(device).float().div(255))
    tower.eval()
