"""Exported files for tests: each metric is traced and converted once, as that takes seconds."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
import upstream
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric

# The smallest image, odd sizes, a strip, and several images: none is what a graph is traced with.
SHAPES = [(1, 32, 32), (3, 33, 47), (1, 129, 71), (2, 32, 200)]
CLOSE = 1e-4


class Regressed(BlindMetric):
    """Random regressions on a tower's statistics, which are standardised by some images', so that all of them count."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__("regressed", paper="none")
        self.tower = tower
        found = tower.statistics(upstream.pictures(8, 64, 80))
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("mean", found.mean(0), persistent=False)
        self.register_buffer("scale", found.std(0) + 0.1, persistent=False)
        self.register_buffer("weight", torch.randn(found.shape[1], 2, generator=draw) / 10, persistent=False)

    @property
    def attributes(self) -> tuple[str, ...]:
        return "first", "second"

    def encode(self, rgb: Tensor) -> Tensor:
        statistics: Tensor = self.tower.statistics(rgb)
        return statistics

    def rate(self, features: Tensor) -> Tensor:
        return torch.sigmoid(torch.tanh((features - self.mean) / self.scale) @ self.weight)


def images(count: int, height: int, width: int) -> Tensor:
    """Images whose pixels are of 8 bits, so that a uint8 graph sees the same."""
    return (upstream.pictures(count, height, width, seed=3) * 255).round() / 255


def farthest(metric: BlindMetric, exported: nn.Module) -> float:
    """The largest difference of scores over `SHAPES`."""
    with torch.no_grad():
        pairs = [(metric(x), exported(x)) for x in (images(*shape) for shape in SHAPES)]
    assert all(found.shape == expected.shape for expected, found in pairs)
    assert torch.cat([expected for expected, _ in pairs]).std(0).min() > 20 * CLOSE  # the scores do differ
    return max(float((expected - found).abs().max()) for expected, found in pairs)


def rewritten(path: Path, new: Path, change: object) -> Path:
    """Copy an ONNX file, changed by a function of its model."""
    model = onnx.load(str(path))
    change(model)  # type: ignore[operator]
    new.write_bytes(model.SerializeToString())
    return new
