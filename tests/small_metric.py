"""A metric that takes a fraction of a millisecond, for tests of what is around a metric."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric
from qualiclip_pyiqa.towers.base import freeze


class SmallMetric(BlindMetric):
    """Scores in 0..1 that depend on what is between neighbouring pixels."""

    def __init__(self, lower_better: bool = False, tile: int | None = None) -> None:
        super().__init__("small", paper="none", lower_better=lower_better, tile=tile)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh()]
            self.tower = freeze(nn.Sequential(*layers).float())

    def encode(self, rgb: Tensor) -> Tensor:
        maps: Tensor = self.tower(rgb)
        return maps.square().mean(dim=(2, 3))

    def rate(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            precise = features.to(torch.promote_types(features.dtype, torch.float32))
            return (20 * precise.mean(dim=1, keepdim=True) - 4).sigmoid()


class SmallLook(SmallMetric):
    """Three attributes."""

    @property
    def attributes(self) -> tuple[str, ...]:
        return "quality", "sharpness", "contrast"

    def rate(self, features: Tensor) -> Tensor:
        return super().rate(features) * torch.tensor([1.0, 0.5, 0.25], device=features.device)
