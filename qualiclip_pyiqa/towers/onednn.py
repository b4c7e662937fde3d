"""Run frozen convolutions with oneDNN's fused operators on a CPU: fewer passes over memory, equal but for rounding.

oneDNN can fuse a convolution with an addition and a ReLU, and reads weights fastest in its own packed layout. PyTorch
exposes both as private operators, for `torch.compile`. They do not support gradients, functional transforms or
changing weights, so only a `Scorer` uses them, on its own copies of metrics; a metric that is called directly does not.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import FoldedConv

# Largest accepted difference from PyTorch's public functions in the trial, on values of about one.
_TOLERANCE = 1e-5


def use_onednn(tower: nn.Module) -> bool:
    """Switch the convolutions of a frozen tower to oneDNN's operators, if possible.

    The tower must belong to the caller: its weights must not change afterwards, and it must run without gradients.

    Returns:
        Whether they were switched. They are not if the tower has no folded convolutions, is not in float32 on the CPU
        or has NaN or infinite weights (the fused ReLU turns NaN into zero), or if PyTorch lacks the operators.
    """
    convs = [module for module in tower.modules() if isinstance(module, FoldedConv)]
    tensors = [tensor for conv in convs for tensor in (conv.conv.weight, conv.conv.bias) if tensor is not None]
    if not convs or any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return False
    if not all(bool(tensor.isfinite().all()) for tensor in tensors) or not onednn_usable():
        return False
    for conv in convs:
        conv.kernel = OneDnnKernel()
    return True


class OneDnnKernel:
    """Computes one `FoldedConv`. Copies and pickles are empty, as the packed weight can be recomputed at any time."""

    def __init__(self) -> None:
        self.packed: tuple[Any, Tensor] | None = None  # input shape and padding, and the weight packed for them

    def __reduce__(self) -> tuple[type[OneDnnKernel], tuple[()]]:
        return type(self), ()

    def convolve(self, conv: nn.Conv2d, x: Tensor, relu: bool, inner: bool) -> Tensor:
        """Convolve, with a ReLU if `relu`, and without padding above and below if `inner`."""
        padding = _padding(conv, inner)
        attr = "relu" if relu else "none"
        weight = self._weight(conv, x, padding)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, conv.bias, padding, *_geometry(conv), attr, [], ""
        )
        return y

    def add(self, conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
        """Convolve, add `other` and apply a ReLU; the result is written to the memory of `other`."""
        padding = _padding(conv)
        weight = self._weight(conv, x, padding)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            other, x, weight, conv.bias, padding, *_geometry(conv), "add", None, "relu", [], None
        )
        return y

    def _weight(self, conv: nn.Conv2d, x: Tensor, padding: list[int]) -> Tensor:
        """Return the weight packed for inputs of this shape."""
        size = (x.shape, padding)
        packed = self.packed  # read once, as another thread may replace it
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
    """Whether oneDNN is enabled and this build of PyTorch has the operators, with the results of the public ones."""
    return bool(torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()) and _operators_agree()


@functools.cache
def _operators_agree() -> bool:
    """Compare the private operators with the public functions, once per process."""
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
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or another signature
        return False
