"""IR-50 and its like, the residual networks of face recognition (AdaFace, QGFace), built from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .base import load_into

SIDE = 112  # of an aligned face, in pixels


class FaceTower(nn.Module):
    """Embeds aligned faces.

    Args:
        widths: channels before the first unit and after each.
        starts: units at which a stage starts, with stride 2.
        dim: D, length of an embedding.

    Shape:
        rgb: (N, 3, 112, 112), RGB in 0..1 -> (N, D), not normalised.
    """

    def __init__(self, widths: list[int], starts: set[int], dim: int) -> None:
        super().__init__()
        first = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.input_layer = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0]))
        self.body = nn.Sequential(
            *(
                Unit(before, after, 2 if index in starts else 1)
                for index, (before, after) in enumerate(pairwise(widths))
            )
        )
        side = SIDE // 2 ** len(starts)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(widths[-1] * side * side, dim),
            nn.BatchNorm1d(dim, affine=False),
        )

    def forward(self, rgb: Tensor) -> Tensor:
        bgr = rgb.flip(1)
        embedding: Tensor = self.output_layer(self.body(self.input_layer(bgr * 2 - 1)))
        return embedding


class Unit(nn.Module):
    """A residual unit with a norm before its first convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if before != after:
            projection = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(projection, nn.BatchNorm2d(after))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.PReLU(after),
            nn.Conv2d(after, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


def face_tower(state: Mapping[str, Tensor], what: str) -> FaceTower:
    """Build the network of a state dict; units and widths are read from its shapes.

    A stage starts at the first unit and wherever the width changes.

    Raises:
        WeightsError: the tensors are of another network.
    """
    found = (re.fullmatch(r"body\.(\d+)\.res_layer\.1\.weight", key) for key in state)
    units = sorted(int(match[1]) for match in found if match)
    last = state.get("output_layer.3.weight")
    if not units or units != list(range(len(units))) or last is None or last.dim() != 2:
        raise WeightsError(f"{what} holds no network of face recognition with the layout of IR-50")
    shapes = [state[f"body.{unit}.res_layer.1.weight"].shape for unit in units]
    starts = {0} | {unit for unit in units if f"body.{unit}.shortcut_layer.0.weight" in state}
    with torch.device("meta"):
        tower = FaceTower([shapes[0][1], *(shape[0] for shape in shapes)], starts, len(last))
    load_into(tower, state, what)
    return tower
