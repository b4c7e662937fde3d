"""Large pictures in little memory: a network over strips of rows, with the values of the whole.

Its steps take a picture's rows from top to bottom, a strip at a time, give those rows of their result that nothing
below can change, and keep what the next ones depend on. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pictures of more pixels go through a network in strips of about this many.
LARGE_PIXELS = 2**21
# On a CPU in strips of this many, unless they are wider than 12,500: 64 bytes a pixel, the most that a ResNet50 makes
# of one at once, are then less than the 32 MiB from which on glibc gives every block back to the system, whose fresh
# pages would take half of the time.
CPU_STRIP_PIXELS = 400_000
# A strip has a multiple of these rows, so that after five halvings all but the first and the last are still of one
# size: oneDNN orders weights for a size.
MULTIPLE = 32

# The next rows (N, C, h, W), None if there are none yet, and whether they are the last ones -> rows of the result, or
# None. What goes in from the first call to the last is the whole, and so is what comes out. No tensor has zero rows.
Step: TypeAlias = Callable[[Tensor | None, bool], Tensor | None]


def rows_at_once(network: nn.Module, x: Tensor) -> int | None:
    """Rows of the strips in which pictures (N, 3, H, W) are to go through `network`; None: they go in one piece.

    That is so for small pictures, and where a gradient in `x` is wanted, a graph is compiled or a part of the network
    has a hook. Memory grows with the width: a strip has at least MULTIPLE rows.
    """
    height, width = x.shape[2:]
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and x.requires_grad)
        or height * width <= LARGE_PIXELS
        or any(watched(module) for module in network.modules() if module is not network)
    ):
        return None
    at_once = CPU_STRIP_PIXELS if x.device.type == "cpu" else LARGE_PIXELS
    return max(MULTIPLE, at_once // width // MULTIPLE * MULTIPLE)


def through(steps: Sequence[Step], picture: Tensor, rows: int) -> Iterator[Tensor]:
    """What comes out of the last one of `steps` for a picture (1, 3, H, W) that goes in by strips of `rows` rows."""
    height = picture.shape[2]
    for start in range(0, height, rows):
        x: Tensor | None = picture[:, :, start : start + rows]
        for step in steps:
            x = step(x, start + rows >= height)
        if x is not None:
            yield x


def in_strips(steps: Callable[[], Sequence[Step]], x: Tensor, rows: int, stride: int) -> Tensor:
    """A network's result, strip by strip: the values of the whole but for rounding.

    Args:
        steps: makes the steps, anew for each picture.
        x: (N, 3, H, W).
        rows: see `rows_at_once`.
        stride: by how much the result is smaller: it has at most ceil(H / stride) rows.
    """
    out, end = None, 0
    for n, picture in enumerate(x.split(1)):  # of several, rows are no block of memory
        end = 0
        for part in through(steps(), picture, rows):
            if out is None:
                shape = (len(x), part.shape[1], -(-x.shape[2] // stride), part.shape[3])
                out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
            out[n : n + 1, :, end : end + part.shape[2]] = part
            end += part.shape[2]
    assert out is not None  # a picture has at least `stride` rows
    return out[:, :, :end]


def watched(module: nn.Module) -> bool:
    """Whether the module has a hook of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Window:
    """A step of what looks at some rows around each, such as a convolution.

    Args:
        run: (N, C, h, W) -> (N, C', h', W') with no padding above and below: h' is (h - kernel) // stride + 1, or that
            divided by `group` if rows of the result are pooled.
        kernel: rows that one of the result depends on; kernel // 2 are padded above and below.
        group: `run` is to make a multiple of these rows. What is over at the end is left out,
        ceil: unless this is true: as in a pool's `ceil_mode`.
        replicate: padding repeats the outermost row and is not zero.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        kernel: int,
        stride: int = 1,
        group: int = 1,
        ceil: bool = False,
        replicate: bool = False,
    ) -> None:
        self.run, self.kernel, self.stride, self.group = run, kernel, stride, group
        self.ceil, self.replicate = ceil, replicate
        self.kept: Tensor | None = None

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        pieces = [piece for piece in (self.kept, rows) if piece is not None]
        if not pieces:
            return None
        above = [] if self.kept is not None else self._padding(pieces[0][:, :, :1])
        below = self._padding(pieces[-1][:, :, -1:]) if last else []
        held = joined(*above, *pieces, *below)
        assert held is not None
        count = max(0, (held.shape[2] - self.kernel) // self.stride + 1)
        if not (last and self.ceil):
            count -= count % self.group
        self.kept = rest(held, count * self.stride)
        return self.run(held[:, :, : (count - 1) * self.stride + self.kernel]) if count else None

    def _padding(self, row: Tensor) -> list[Tensor]:
        return [row if self.replicate else torch.zeros_like(row)] * (self.kernel // 2)


def valid(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution with no padding above and below."""
    assert not isinstance(conv.padding, str)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, conv.padding[1]), conv.dilation, conv.groups)


def joined(*pieces: Tensor | None) -> Tensor | None:
    """The rows of what there is of them."""
    given = [piece for piece in pieces if piece is not None]
    return torch.cat(given, dim=2) if len(given) > 1 else given[0] if given else None


def rest(x: Tensor, start: int) -> Tensor | None:
    """Rows from `start` on, if there are any, in memory of their own, so that the others may go."""
    return x[:, :, start:].clone() if start < x.shape[2] else None
