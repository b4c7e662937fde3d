"""Bring images into 0..1 without cutting the gradient that leads back there, and tell when they are far outside."""

from __future__ import annotations

import math
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


# Overshoots of a restorer are narrower, or rarer.
_OVERSHOOT, _RARE, _HUGE = 0.1, 0.25, 10.0


@torch.no_grad()
def far_outside(x: Tensor) -> str | None:
    """Describe values that no image in 0..1 has, such as those of a forgotten division by 255; None if there are none.

    A few values a little outside are what a network returns. NaN does not count. Waits for the GPU.

    Example:
        >>> far_outside(torch.tensor([0.0, 128.0, 255.0]))
        'values from 0 to 255, which count as 0 or 1 if they are outside 0..1; divide by 255'
        >>> far_outside(torch.tensor([-0.05, 0.5, 1.05])) is None
        True
    """
    if x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    values = x.detach().nan_to_num(0.5, math.inf, -math.inf)
    share = ((values < -_OVERSHOOT) | (values > 1 + _OVERSHOOT)).float().mean()
    try:
        outside = share.item()
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return None  # torch.func.vmap hides values
    low, high = (bound.item() for bound in values.aminmax())
    if outside <= _RARE and max(-low, high) <= _HUGE:
        return None
    advice = "rescale the image to 0..1"
    if low >= 0 and 2 < high <= 255:
        advice = "divide by 255"
    elif -1 <= low < 0 and high <= 1:
        advice = "for images in -1..1 pass (x + 1) / 2"
    return f"values from {low:g} to {high:g}, which count as 0 or 1 if they are outside 0..1; {advice}"


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
