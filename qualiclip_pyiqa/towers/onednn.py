"""Frozen convolutions with the addition and the ReLU that follow them: the same values in fewer passes over memory.

On a CPU oneDNN can add to what it convolves, and clip it at zero, before it leaves the cache, and reads weights fastest
in an order of its own. PyTorch has operators for it, which torch.compile makes use of. Where they are not at hand, or a
gradient is wanted, PyTorch's public functions compute the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .streaming import Window, joined, rest, valid, watched


class _Packed:
    """A weight in oneDNN's order. It can be made again at any time: copies and pickles are empty."""

    def __init__(self) -> None:
        self.made: tuple[Any, ...] | None = None
        self.finite = True  # as the weight was last seen

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return type(self), ()

    def of(self, conv: nn.Conv2d, x: Tensor, padding: list[int]) -> Tensor:
        """The weight of `conv`, whatever happened to it since the last time, for inputs of the size of `x`."""
        weight, bias = conv.weight, conv.bias
        assert bias is not None  # of the folded BatchNorm
        content = (weight._version, bias._version)
        # Another size may have another order, without which its kernel is slower.
        size = (x.shape, padding)
        made = self.made  # read once: several threads may score with one tower
        if made is None or made[0] is not weight or made[1:3] != (content, size):
            if made is None or made[0] is not weight or made[1] != content:
                self.finite = bool(weight.isfinite().all() and bias.isfinite().all())
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, *_geometry(conv), list(x.shape))
            made = self.made = (weight, content, size, packed)
        return made[3]


class FusedConv(nn.Module):
    """A convolution and what follows it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._packed = _Packed()

    @property
    def broken(self) -> bool:
        """Whether the weight was last seen to hold what is no number."""
        return not self._packed.finite

    def forward(self, x: Tensor, relu: bool = True, inner: bool = False) -> Tensor:
        """(N, C, H, W) -> the convolution's result, clipped at zero unless `relu` is false.

        With `inner` only those of its rows that depend on no padding above and below.
        """
        conv = self.conv
        if not at_hand(x, conv.weight):
            x = valid(conv, x) if inner else conv(x)
            return x.relu_() if relu else x
        padding = _padding(conv, inner)
        packed = self._packed.of(conv, x, padding)
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, padding, *_geometry(conv), after, [], "")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution's result plus `other`, clipped at zero; unless a gradient is wanted it overwrites `other`."""
        conv = self.conv
        if not at_hand(x, conv.weight):
            x = conv(x)
            wanted = torch.is_grad_enabled() and x.requires_grad
            return (other + x if wanted else other.add_(x)).relu_()
        padding = _padding(conv)
        packed = self._packed.of(conv, x, padding)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, packed, conv.bias, padding, *_geometry(conv), "add", None, "relu", [], None
        )


class FusedBottleneck(nn.Module):
    """A bottleneck of OpenAI's ModifiedResNet whose BatchNorms are folded.

    Args:
        block: open_clip's; its convolutions become this one's.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = map(FusedConv, (block.conv1, block.conv2, block.conv3))
        self.avgpool = block.avgpool
        self.stride = 1
        self.shortcut: FusedConv | None = None
        if block.downsample is not None:
            pool, conv, _ = block.downsample
            self.stride = pool.kernel_size
            # A pool of one pixel would only copy.
            self.shortcut_pool = nn.Identity() if self.stride == 1 else pool
            self.shortcut = FusedConv(conv)

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'); with `overwrite` the result may stand where `x` stood."""
        y = self.avgpool(self.conv2(self.conv1(x)))
        if self.shortcut is not None:
            return self.conv3.add(y, self.widened(x))
        return self.conv3.add(y, x if overwrite else x.clone())

    def widened(self, x: Tensor) -> Tensor:
        """What a layer's first block adds to: the shortcut's result."""
        assert self.shortcut is not None
        return self.shortcut(self.shortcut_pool(x), relu=False)

    def window(self) -> Window:
        """What lies between the 1x1 convolutions, over strips."""
        return Window(lambda x: self.avgpool(self.conv2(x, inner=True)), kernel=3, group=self.stride)


class FusedLayer(nn.Sequential):
    """Bottlenecks, each of which writes over what the one before it made, unless a hook may have seen that."""

    def forward(self, x: Tensor) -> Tensor:
        seen = True
        for block in self:
            seen = seen or any(map(watched, block.modules()))
            x = block(x, overwrite=not seen)
            seen = bool(block._forward_hooks)
        return x


class LayerInStrips:
    """A `FusedLayer` as a step over one picture's strips.

    What all blocks add to is one block of memory, each of them as far down as it has got: a row less than the one
    before it.
    """

    def __init__(self, layer: FusedLayer) -> None:
        self.blocks: list[Any] = list(layer)
        first = self.blocks[0]
        self.widened = Window(first.widened, kernel=1, group=first.stride)
        self.windows = [block.window() for block in self.blocks]
        self.sums: Tensor | None = None
        self.done = [0] * len(self.blocks)  # rows of `sums` that each block has added to

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        sums = joined(self.sums, self.widened(rows, last))
        for k, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            y = window(None if rows is None else block.conv1(rows), last)
            rows = None
            if y is not None and sums is not None:
                rows = sums[:, :, self.done[k] : self.done[k] + y.shape[2]]
                block.conv3.add(y, rows)
                self.done[k] += y.shape[2]
        through = self.done[-1]
        if sums is None or not through:
            self.sums = sums
            return None
        self.sums = rest(sums, through)
        self.done = [done - through for done in self.done]
        return sums[:, :, :through]


def _padding(conv: nn.Conv2d, inner: bool = False) -> list[int]:
    assert not isinstance(conv.padding, str)
    return [0 if inner else conv.padding[0], conv.padding[1]]


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int], int]:
    return list(conv.stride), list(conv.dilation), conv.groups


def at_hand(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators compute this: no gradient, no graph, nobody who watches the public ones.

    Their ReLU makes zeros of what is not a number: the caller sees to it that it is known.
    """
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _get_current_dispatch_mode() is None  # such as what counts multiply-adds
        and _known()
    )


@functools.cache
def _known() -> bool:
    """Whether this build of PyTorch has the operators, with the arguments that they are given here."""
    if not torch.backends.mkldnn.is_available():
        return False
    names = {
        "_convolution_pointwise": "X W B padding stride dilation groups attr scalars algorithm",
        "_convolution_pointwise_": "other X W B padding stride dilation groups binary_attr alpha unary_attr "
        "unary_scalars unary_algorithm",
        "_reorder_convolution_weight": "self padding stride dilation groups input_size",
    }
    for name, arguments in names.items():
        operator = getattr(torch.ops.mkldnn, name, None)
        overload = getattr(operator, "binary" if name.endswith("_") else "default", None)
        if overload is None or [a.name for a in overload._schema.arguments] != arguments.split():
            return False
    return True
