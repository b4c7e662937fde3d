"""Frozen convolutions by oneDNN's own operators on a CPU: fewer passes over memory, the same values but for rounding.

oneDNN can add to a convolution's result, and clip it at zero, before it leaves the cache, and it reads weights fastest
in an order of its own. PyTorch has operators for both, which `torch.compile` uses. They know nothing of gradients,
functional transforms or weights that change. So only a `Scorer` uses them, on copies of metrics that are its own: their
weights never change, and their inputs are pixels. A metric that is called directly never does.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import FoldedConv

# How far the operators may be from PyTorch's public functions in the trial, whose values are about one.
_TOLERANCE = 1e-5


def use_onednn(tower: nn.Module) -> bool:
    """Let the convolutions of a frozen tower on a CPU use oneDNN's operators from now on, if it has any that can.

    The tower must be the caller's alone: its weights must not change afterwards, and it must run without gradients.

    Returns:
        Whether it does. It does not if this build of PyTorch lacks the operators, in another dtype than float32, or if
        a weight is not finite, because the operators' ReLU turns NaN into zero.
    """
    convs = [module for module in tower.modules() if isinstance(module, FoldedConv)]
    tensors = [tensor for conv in convs for tensor in (conv.conv.weight, conv.conv.bias) if tensor is not None]
    if not convs or any(each.device.type != "cpu" or each.dtype != torch.float32 for each in tensors):
        return False
    if has_nonfinite_weight(tensors) or not onednn_usable():
        return False
    for conv in convs:
        conv.kernel = OneDnnKernel()
    return True


def has_nonfinite_weight(tensors: list[Tensor]) -> bool:
    """Whether any value is NaN or infinite."""
    return not all(bool(tensor.isfinite().all()) for tensor in tensors)


class OneDnnKernel:
    """Computes one `FoldedConv`. Copies and pickles are empty: the packed weight can be made again at any time."""

    def __init__(self) -> None:
        self.packed: tuple[Any, Tensor] | None = None  # the size that the weight was packed for, and the weight

    def __reduce__(self) -> tuple[type[OneDnnKernel], tuple[()]]:
        return type(self), ()

    def convolve(self, conv: nn.Conv2d, x: Tensor, relu: bool, inner: bool) -> Tensor:
        """The convolution's result, clipped at zero if `relu`; with `inner`, without padding above and below."""
        padding = _padding(conv, inner)
        attr = "relu" if relu else "none"
        weight = self._weight(conv, x, padding)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, conv.bias, padding, *_geometry(conv), attr, [], ""
        )
        return y

    def add(self, conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
        """The convolution's result plus `other`, clipped at zero; it is written to the memory of `other`."""
        padding = _padding(conv)
        weight = self._weight(conv, x, padding)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, weight, conv.bias, padding, *_geometry(conv), "add", None, "relu", [], None
        )
        return y

    def _weight(self, conv: nn.Conv2d, x: Tensor, padding: list[int]) -> Tensor:
        """The weight in the order that is fastest for images of this size."""
        size = (x.shape, padding)
        packed = self.packed  # read once: another thread may replace it
        if packed is None or packed[0] != size:
            weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, padding, *_geometry(conv), list(x.shape))
            packed = self.packed = (size, weight)
        return packed[1]


def _padding(conv: nn.Conv2d, inner: bool = False) -> list[int]:
    assert not isinstance(conv.padding, str)
    return [0 if inner else conv.padding[0], conv.padding[1]]


def _geometry(conv: nn.Conv2d) -> tuple[list[int], list[int], int]:
    return list(conv.stride), list(conv.dilation), conv.groups


def onednn_usable() -> bool:
    """Whether oneDNN is switched on and this build of PyTorch has the operators, with the values of the public ones."""
    return bool(torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()) and _operators_agree()


@functools.cache
def _operators_agree() -> bool:
    """Try the private operators beside the public functions, once per process."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    try:
        with torch.inference_mode(False), torch.no_grad():
            conv = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.float32, device="cpu")
            conv.weight.copy_(drawn(16, 16, 3, 3) / 12)
            conv.bias.copy_(drawn(16))  # type: ignore[union-attr]
            x, other = (drawn(2, 16, 9, 11).contiguous(memory_format=torch.channels_last) for _ in range(2))
            expected = conv(x)
            kernel = OneDnnKernel()
            pairs = [
                (kernel.convolve(conv, x, relu=False, inner=False), expected),
                (kernel.convolve(conv, x, relu=True, inner=True), F.relu(expected[:, :, 1:-1])),
                (kernel.add(conv, x, copy.deepcopy(other)), F.relu(expected + other)),
            ]
            return all(bool((found - public).abs().max() < _TOLERANCE) for found, public in pairs)
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or one with other arguments
        return False
