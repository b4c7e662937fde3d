"""Large pictures in little memory: a stack of convolutions strip by strip, with the values of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Pictures of more pixels go through a network in strips of about this many.
STRIP_PIXELS = 2**21


def in_strips(run: Callable[[Tensor], Tensor], x: Tensor, stride: int, reach: int, density: int = 1) -> Tensor:
    """`run(x)` for a stack of convolutions, strip by strip where `x` is large: the same values in less memory.

    The longer side is cut. A strip is computed with the rows or columns around it that its values depend on, so that
    nothing but rounding differs. Where a gradient is wanted or a graph is compiled it is `run(x)` and nothing else.

    Args:
        run: (N, C, H, W) -> (N, C', about H / stride, about W / stride), with zero padding at the borders.
        stride: how many rows or columns of `x` make one of the result.
        reach: how many rows or columns of `x` beyond a strip its values depend on, at most.
        density: how much memory a pixel of `x` leads to, in pixels of the picture.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    height, width = x.shape[2:]
    side, length = (2, height) if height >= width else (3, width)
    strips = math.ceil(height * width * density / STRIP_PIXELS)
    reach = math.ceil(reach / stride) * stride
    step = max(math.ceil(length / strips / stride) * stride, 2 * reach)
    if step >= length:
        return run(x)
    out: Tensor | None = None
    end = 0
    for first in range(0, length, step):
        start, stop = max(0, first - reach), min(length, first + step + reach)
        part = run(x.narrow(side, start, stop - start))
        before = (first - start) // stride
        count = part.shape[side] - before if first + step >= length else step // stride
        if out is None:
            shape = list(part.shape)
            shape[side] = length // stride + 1
            out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        out.narrow(side, end, count).copy_(part.narrow(side, before, count))
        end += count
    assert out is not None
    return out.narrow(side, 0, end)
