"""The exponential moving average (EMA) of a tower's weights, which becomes the model of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..towers.mini import Standardise


@torch.no_grad()
def update_ema(ema: nn.Module, tower: nn.Module, decay: float) -> None:
    """Move every floating-point tensor of `ema`, buffers too, towards `tower`: ema = decay * ema + (1 - decay) * tower.

    `torch.optim.swa_utils.AveragedModel` does not fit: it averages either BatchNorm's integer counters too or no
    buffers at all, and it starts from the first step's weights, not from the initial ones.
    """
    for old, new in zip(ema.state_dict().values(), tower.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)


def warmed_decay(decay: float, step: int) -> float:
    """Return the decay for a step, counted from 1: smaller at first, so that early weights are soon forgotten."""
    return min(decay, step / (step + 10))


@torch.no_grad()
def recalibrate(tower: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> None:
    """Recompute all normalisation statistics as means over batches, and leave the tower in eval mode.

    Averaged weights need it: the statistics of the trained weights belong to other activations.

    Args:
        batches: from `stacks.batch_of`.
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
