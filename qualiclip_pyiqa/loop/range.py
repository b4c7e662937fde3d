"""Bring images into 0..1 without cutting the gradient that leads back there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clamp_keeping_gradient(x: Tensor) -> Tensor:
    """Clamp values to 0..1; their gradient is cut only where a step against it would lead farther out.

    `Tensor.clamp` has no gradient outside 0..1, so that a pixel outside is stuck there. A straight-through clamp keeps
    all of it, so that a pixel whose value no longer matters drifts away without limit. This is the gradient of a
    projected descent: outside, only the part that leads back.

    Example:
        >>> x = torch.tensor([-0.5, -0.5, 0.5, 1.5, 1.5], requires_grad=True)
        >>> y = clamp_keeping_gradient(x)
        >>> y.tolist()
        [0.0, 0.0, 0.5, 1.0, 1.0]
        >>> torch.autograd.grad(y, x, torch.tensor([2.0, -2.0, 2.0, 2.0, -2.0]))[0].tolist()
        [0.0, -2.0, 2.0, 2.0, 0.0]
    """
    clamped: Tensor = _Clamp.apply(x)
    return clamped


class _Clamp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        leads_out = ((x < 0) & (gradient > 0)) | ((x > 1) & (gradient < 0))
        return gradient.masked_fill(leads_out, 0)
