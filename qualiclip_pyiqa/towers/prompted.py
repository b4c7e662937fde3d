"""Run a transformer's blocks with prompts of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_with_prompts(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    prompts: Sequence[Tensor],
    start: int,
    recompute: bool = False,
    **options: Any,
) -> Tensor:
    """Run blocks; before each but the first, the tokens from `start` on are replaced by the block's prompts.

    Args:
        blocks: each maps tokens (N, L, C) to (N, L, C).
        tokens: input of the first block, with its prompts in their places.
        prompts: of each block, (n, C).
        start: index of the first prompt; negative ones count from the end.
        recompute: compute the activations of blocks again for the gradient instead of storing them.
        **options: further arguments of the blocks.
    """
    first = start if start >= 0 else tokens.shape[1] + start
    for number, (block, own) in enumerate(zip(blocks, prompts, strict=True)):
        if number:
            own = own.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :first], own, tokens[:, first + own.shape[1] :]], dim=1)
        if recompute and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False, **options)
        else:
            tokens = block(tokens, **options)
    return tokens
