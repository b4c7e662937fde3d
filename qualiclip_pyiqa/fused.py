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


class _Packed:
    """A weight in oneDNN's order. It can be made again at any time: copies and pickles are empty."""

    def __init__(self) -> None:
        self.made: tuple[Tensor, tuple[int, int], torch.Size, Tensor | None] | None = None

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return type(self), ()

    def of(self, conv: nn.Conv2d, x: Tensor) -> Tensor | None:
        """The weight of `conv`, whatever happened to it since the last time, for inputs of the size of `x`.

        None if it holds what is no number, of which oneDNN's ReLU would make zeros.
        """
        weight = conv.weight
        assert conv.bias is not None  # of the folded BatchNorm
        version = (weight._version, conv.bias._version)
        made = self.made  # read once: several threads may score with one tower
        # Another size may have another order, without which its kernel is slower.
        if made is None or made[0] is not weight or made[1:3] != (version, x.shape):
            known = made is not None and made[0] is weight and made[1] == version
            fine = (
                made[3] is not None
                if made is not None and known
                else bool(weight.isfinite().all() and conv.bias.isfinite().all())
            )
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            packed = reorder(weight, *_geometry(conv), list(x.shape)) if fine else None
            made = self.made = (weight, version, x.shape, packed)
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
        return self._packed.made is not None and self._packed.made[3] is None

    def forward(self, x: Tensor, relu: bool = True) -> Tensor:
        """(N, C, H, W) -> the convolution's result, clipped at zero unless `relu` is false."""
        packed = self._packed.of(self.conv, x) if at_hand(x, self.conv.weight) else None
        if packed is None:
            x = self.conv(x)
            return x.relu_() if relu else x
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, packed, self.conv.bias, *_geometry(self.conv), after, [], "")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The convolution's result plus `other`, which may be overwritten, clipped at zero."""
        packed = self._packed.of(self.conv, x) if at_hand(x, self.conv.weight) else None
        if packed is None:
            return (self.conv(x) + other).relu_()
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, packed, self.conv.bias, *_geometry(self.conv), "add", None, "relu", [], None
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
        self.shortcut: FusedConv | None = None
        if block.downsample is not None:
            pool, conv, _ = block.downsample
            # A pool of one pixel would only copy.
            self.shortcut_pool = nn.Identity() if pool.kernel_size == 1 else pool
            self.shortcut = FusedConv(conv)

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'); with `overwrite` the result may stand where `x` stood."""
        y = self.avgpool(self.conv2(self.conv1(x)))
        if self.shortcut is not None:
            return self.conv3.add(y, self.shortcut(self.shortcut_pool(x), relu=False))
        return self.conv3.add(y, x if overwrite else x.clone())


class FusedLayer(nn.Sequential):
    """Bottlenecks, each of which writes over what the one before it made, unless a hook has seen that."""

    def forward(self, x: Tensor) -> Tensor:
        overwrite = False
        for block in self:
            x = block(x, overwrite)
            overwrite = not block._forward_hooks
        return x


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    assert not isinstance(conv.padding, str)
    return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups


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
