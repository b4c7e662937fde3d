"""Compute networks on large images in little memory: strip by strip of rows, equal to the whole image but for rounding.

Each step of a network takes an image's rows from top to bottom, returns the output rows that are complete, and stores
the rows that later output depends on. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torch_hooks import has_global_hooks, has_hooks

# Larger images are computed in strips of about this many pixels.
LARGE_PIXELS = 2**21
# Pixels of a strip on a CPU, for images up to 12,500 pixels wide. A ResNet50's largest activation takes 64 bytes per
# pixel, so stays below 32 MiB: glibc returns larger blocks to the system at every free, and faulting in their fresh
# pages would take half of the time.
CPU_STRIP_PIXELS = 400_000
# Strips have a multiple of this many rows, so that after five halvings all but the first and last have equal size:
# oneDNN packs weights for an input size.
MULTIPLE = 32

# A step maps the next rows (N, C, h, W), or None if there are none, to the output rows that are now complete, or None
# if none are. The flag marks the final call. Concatenating all inputs, or all outputs, gives the whole. No tensor has
# zero rows.
Step: TypeAlias = Callable[[Tensor | None, bool], Tensor | None]


def rows_at_once(network: nn.Module, x: Tensor) -> int | None:
    """Choose the rows of a strip for images (N, 3, H, W); None to compute them whole.

    Images are computed whole if they are small, if a gradient in `x` is needed, under compilation or tracing, and if a
    part of the network has a hook. Memory grows with the width, as a strip has at least MULTIPLE rows.
    """
    height, width = x.shape[2:]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or (torch.is_grad_enabled() and x.requires_grad)
        or height * width <= LARGE_PIXELS
        or has_global_hooks()
        or any(has_hooks(module) for module in network.modules() if module is not network)
    ):
        return None
    at_once = CPU_STRIP_PIXELS if x.device.type == "cpu" else LARGE_PIXELS
    return max(MULTIPLE, at_once // width // MULTIPLE * MULTIPLE)


def stream(steps: Sequence[Step], image: Tensor, rows: int) -> Iterator[Tensor]:
    """Run steps over strips of `rows` rows of an image (1, 3, H, W), and yield the output rows of the last step."""
    height = image.shape[2]
    for start in range(0, height, rows):
        x: Tensor | None = image[:, :, start : start + rows]
        for step in steps:
            x = step(x, start + rows >= height)
        if x is not None:
            yield x


def in_strips(steps: Callable[[], Sequence[Step]], x: Tensor, rows: int, stride: int) -> Tensor:
    """Compute a network strip by strip.

    Args:
        steps: returns new steps for an image.
        x: (N, 3, H, W).
        rows: see `rows_at_once`.
        stride: downsampling factor; the result has at most ceil(H / stride) rows.
    """
    out, end = None, 0
    for n, image in enumerate(x.split(1)):  # rows of several images are not contiguous
        end = 0
        for part in stream(steps(), image, rows):
            if out is None:
                shape = (len(x), part.shape[1], -(-x.shape[2] // stride), part.shape[3])
                out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
            out[n : n + 1, :, end : end + part.shape[2]] = part
            end += part.shape[2]
    assert out is not None  # an image has at least `stride` rows
    return out[:, :, :end]


class Window:
    """A step in which each output row depends on some rows around it, such as a convolution.

    Args:
        run: (N, C, h, W) -> (N, C', h', W') without padding above and below: h' is (h - kernel) // stride + 1, divided
            by `group` if `run` pools its output rows.
        kernel: input rows that an output row depends on; kernel // 2 rows of padding are added below.
        group: emit output rows in multiples of this.
        ceil: also emit a partial final group (a pool's `ceil_mode`).
        replicate: pad with copies of the outermost row instead of zeros.
        above: rows of padding added above; None: kernel // 2.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        kernel: int,
        stride: int = 1,
        group: int = 1,
        ceil: bool = False,
        replicate: bool = False,
        above: int | None = None,
    ) -> None:
        self.run, self.kernel, self.stride, self.group = run, kernel, stride, group
        self.ceil, self.replicate = ceil, replicate
        self.below = kernel // 2
        self.above = self.below if above is None else above
        self.pending: Tensor | None = None  # input rows that later output depends on

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        pieces = [piece for piece in (self.pending, rows) if piece is not None]
        if not pieces:
            return None
        above = [] if self.pending is not None else self._padding(pieces[0][:, :, :1], self.above)
        below = self._padding(pieces[-1][:, :, -1:], self.below) if last else []
        x = joined(*above, *pieces, *below)
        assert x is not None
        count = max(0, (x.shape[2] - self.kernel) // self.stride + 1)
        if not (last and self.ceil):
            count -= count % self.group
        self.pending = tail(x, count * self.stride)
        return self.run(x[:, :, : (count - 1) * self.stride + self.kernel]) if count else None

    def _padding(self, row: Tensor, count: int) -> list[Tensor]:
        return [row if self.replicate else torch.zeros_like(row)] * count


def valid(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve without padding above and below."""
    assert not isinstance(conv.padding, str)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, conv.padding[1]), conv.dilation, conv.groups)


def joined(*pieces: Tensor | None) -> Tensor | None:
    """Concatenate the rows of all pieces that are not None; None if all are."""
    given = [piece for piece in pieces if piece is not None]
    return torch.cat(given, dim=2) if len(given) > 1 else given[0] if given else None


def tail(x: Tensor, start: int) -> Tensor | None:
    """Copy the rows from `start` on, so that `x` can be freed; None if there are none."""
    return x[:, :, start:].clone() if start < x.shape[2] else None
