"""Self-attention whose graph has no batch size in it, in place of `nn.MultiheadAttention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Computes what an `nn.MultiheadAttention` computes on one input, equal but for rounding.

    PyTorch's own arranges its projections in an order that depends on whether there is one image or several.

    Args:
        attention: batch first, with one matrix for queries, keys and values; see `replaceable`.

    Shape:
        x: (N, L, C) -> (N, L, C).
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.weight, self.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend, with the arguments of `nn.MultiheadAttention`, of which `query` and the mask are used."""
        projected = F.linear(query, self.weight, self.bias).chunk(3, dim=-1)
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in projected)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def replaceable(module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module is a transformer block's self-attention, whose three inputs are one tensor."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module.batch_first
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and not hasattr(parent, "ln_1_kv")  # open_clip's cross-attention
        and not hasattr(parent, "query")  # open_clip's attention pool
    )


def replace_attention(network: nn.Module) -> None:
    """Replace every self-attention of a network, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if replaceable(child, parent):
                setattr(parent, name, SelfAttention(child))  # type: ignore[arg-type]
