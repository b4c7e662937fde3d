"""Large pictures in little memory: stacks of convolutions strip by strip, with the values of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pictures of more pixels go through a network in strips of about this many.
LARGE_PIXELS = 2**21
# On a CPU in strips of this many: 64 bytes a pixel, the most that a ResNet50 makes of one at once, are then less than
# the 32 MiB from which on glibc gives every block back to the system, whose fresh pages would take half of the time.
CPU_STRIP_PIXELS = 400_000


class Stack(NamedTuple):
    """A stack of convolutions.

    Args:
        run: (N, C, H, W) -> (N, C', about H / stride, about W / stride), with zero padding at the borders.
        stride: how many rows or columns of the input make one of the result.
        reach: how many rows or columns of the input beyond a strip its values depend on, at most; at least 1.
        density: how much memory a pixel of the input leads to, in what a pixel of the picture leads to at most.
    """

    run: Callable[[Tensor], Tensor]
    stride: int
    reach: int
    density: int = 1


def in_strips(x: Tensor, *stacks: Stack) -> Tensor:
    """The stacks one after the other, strip by strip where the picture is large: the same values in less memory.

    The longer side is cut. A strip is computed with the rows or columns around it that its values depend on, so that
    nothing but rounding differs. A stack begins as soon as those before it have made its next strip: of what is passed
    on, no more than that exists at a time. Where a gradient is wanted or a graph is compiled nothing is cut.
    """
    height, width = x.shape[2:]
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and x.requires_grad)
        or height * width * stacks[0].density <= LARGE_PIXELS
    ):
        for stack in stacks:
            x = stack.run(x)
        return x
    side, length, pixels = (2, height, height * width) if height >= width else (3, width, height * width)
    at_once = CPU_STRIP_PIXELS if x.device.type == "cpu" else LARGE_PIXELS
    parts = iter([x])
    for stack in stacks:
        reach = math.ceil(stack.reach / stack.stride) * stack.stride
        strips = math.ceil(pixels * stack.density / at_once)
        step = max(math.ceil(length / strips / stack.stride) * stack.stride, 2 * reach)
        parts = _through(parts, stack, side, step, reach)
        length, pixels = math.ceil(length / stack.stride), math.ceil(pixels / stack.stride**2)
    return _whole(parts, side, length)


def _through(parts: Iterator[Tensor], stack: Stack, side: int, step: int, reach: int) -> Iterator[Tensor]:
    """Consecutive parts of a stack's input -> consecutive parts of its result, each of `step` rows of the input."""
    held, begin = next(parts), 0  # the rows at hand, and the first one's number
    for first in itertools.count(0, step):
        start, stop = max(0, first - reach), first + step + reach
        held = _filled(held.narrow(side, start - begin, held.shape[side] - (start - begin)), parts, side, stop - start)
        begin, count = start, min(held.shape[side], stop - start)
        out = stack.run(held.narrow(side, 0, count))
        before = (first - start) // stack.stride
        if start + count <= first + step:  # nothing comes any more
            del held  # the next stack may be at work before this function goes on
            yield out.narrow(side, before, out.shape[side] - before)
            return
        yield out.narrow(side, before, step // stack.stride)


def _filled(held: Tensor, parts: Iterator[Tensor], side: int, rows: int) -> Tensor:
    """`held` and what follows it, until there are `rows` or nothing follows."""
    pieces = [held]
    while sum(piece.shape[side] for piece in pieces) < rows and (part := next(parts, None)) is not None:
        pieces.append(part)
    return held if len(pieces) == 1 else torch.cat(pieces, dim=side)


def _whole(parts: Iterator[Tensor], side: int, longest: int) -> Tensor:
    """All parts, put into their places as they come: a list of them would need their memory twice."""
    first, second = next(parts), next(parts, None)
    if second is None:
        return first
    shape = list(first.shape)
    shape[side] = longest
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    end = 0
    for part in itertools.chain((first, second), parts):
        out.narrow(side, end, part.shape[side]).copy_(part)
        end += part.shape[side]
    return out.narrow(side, 0, end)
