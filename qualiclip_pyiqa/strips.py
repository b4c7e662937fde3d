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

    A strip is computed with the rows around it that its values depend on, so that nothing but rounding differs. Where a
    gradient is wanted or a graph is compiled it is `run(x)` and nothing else.

    Args:
        run: (N, C, H, W) -> (N, C', about H / stride, about W / stride), with zero padding at the borders.
        stride: how many rows of `x` make a row of the result.
        reach: how many rows of `x` above or below a strip its values depend on, at most.
        density: how much memory a pixel of `x` leads to, in pixels of the picture.
    """
    count, _, height, width = x.shape
    strips = math.ceil(height * width * density / STRIP_PIXELS)
    reach = math.ceil(reach / stride) * stride
    rows = max(math.ceil(height / strips / stride) * stride, 2 * reach)
    if rows >= height or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    out: Tensor | None = None
    end = 0
    for top in range(0, height, rows):
        start, last = max(0, top - reach), top + rows >= height
        part = run(x[:, :, start : top + rows + reach])
        part = part[:, :, (top - start) // stride : None if last else (top + rows - start) // stride]
        if out is None:
            shape = (count, part.shape[1], height // stride + 1, part.shape[3])
            out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        out[:, :, end : end + part.shape[2]] = part
        end += part.shape[2]
    assert out is not None
    return out[:, :, :end]
