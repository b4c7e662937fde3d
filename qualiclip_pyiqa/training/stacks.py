"""Draw stacks of degraded crops from photographs: the data of a training step."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..degradations.bank import jpeg
from ..degradations.banks import ALL_TYPES
from ..degradations.base import LEVELS, blur
from ..degradations.compose import degrade_all, draw_types
from ..towers.statistics import laplacian
from .config import Config
from .photographs import random_crop, read_photograph

# Groups of degradations that train each prompt pair of the mini tower, in the order of its blocks; None: all. The
# second block sees only log energies, too few values to rank both blur and noise, so it learns from blur alone.
PAIR_GROUPS: tuple[frozenset[str] | None, ...] = (None, frozenset({"blur"}), None, None, None, None, None)


def laplacian_log_variance(images: Tensor) -> Tensor:
    """Compute the classic sharpness measure, log variance of the Laplacian of luma: (N, 3, H, W) in 0..1 -> (N,)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype)
    luma = (images * weights[:, None, None]).sum(1)
    return (laplacian(luma).flatten(1).var(1) + 1e-8).log()


def _draw_region(rng: random.Random, photograph: Tensor, size: int, config: Config) -> Tensor:
    """Cut the sharpest of a few random regions at one random scale -> (1, 3, size, size) in 0..1, or smaller."""
    height, width = photograph.shape[1:]
    scale = 1.0 if rng.random() < config.native else rng.uniform(config.smallest_scale, 1.0)
    scale = max(scale, min(1.0, size / min(height, width)))
    h, w = min(height, round(size / scale)), min(width, round(size / scale))
    regions = []
    for _ in range(config.candidates):
        top, left = rng.randint(0, height - h), rng.randint(0, width - w)
        regions.append(photograph[:, top : top + h, left : left + w].float() / 255)
    best = regions[int(laplacian_log_variance(torch.stack(regions)).argmax())][None]
    if scale < 1:
        best = F.interpolate(best, size=(min(size, h), min(size, w)), mode="bicubic", antialias=True).clamp(0, 1)
    return best


def _bokeh(rng: random.Random, region: Tensor, size: int) -> Tensor:
    """Blur all but an ellipse in the middle, which both crops share: shallow depth of field, not a degradation.

    Otherwise a tower learns that little detail means low quality, and underrates photographs with a flat background.
    """
    h, w = region.shape[-2:]
    y = torch.arange(h)[:, None] - h / 2 - rng.uniform(-0.15, 0.15) * size
    x = torch.arange(w)[None, :] - w / 2 - rng.uniform(-0.15, 0.15) * size
    angle, stretch = rng.uniform(0, math.pi), 2 ** rng.uniform(0, 1)
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    radius, edge = rng.uniform(0.2, 0.6) * size, rng.uniform(0.0075, 0.05) * size
    sharp = torch.sigmoid((radius - torch.sqrt(along**2 * stretch + across**2 / stretch)) / edge)
    return torch.lerp(blur(region, 2 ** rng.uniform(1, 4.5)), region, sharp)


def _camera(rng: random.Random, region: Tensor, probability: float) -> Tensor:
    """Apply mild changes shared by all levels of a stack: good photographs differ by these, so scores must not."""
    if rng.random() < probability:
        region = region.clamp(0, 1) ** rng.uniform(0.9, 1.1)
    if rng.random() < probability:
        region = 0.5 + (region - 0.5) * rng.uniform(0.92, 1.08) + rng.uniform(-0.02, 0.02)
    if rng.random() < probability:
        grey = region.mean(1, keepdim=True)
        region = grey + (region - grey) * rng.uniform(0.75, 1.2)
    if rng.random() < probability / 2:
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        region = region + rng.uniform(0, 0.012) * torch.randn(region.shape, generator=generator)
    region = region.clamp(0, 1)
    if rng.random() < probability:
        region = jpeg(region, rng.uniform(75, 96), [])
    if rng.random() < probability / 2:
        region = region.flip(-1)
    return region


def _two_crops(rng: random.Random, region: Tensor, size: int) -> Tensor:
    """Cut two overlapping crops at random places of a region (1, 3, H, W) -> (2, 3, size, size)."""
    return torch.stack([random_crop(region[0], size, rng) for _ in range(2)])


@dataclass(frozen=True)
class Stack:
    """Two crops of one photograph and the degradations to apply to them.

    Attributes:
        crops: (2, 3, T, T) uint8.
        types: degradation types, applied in this order, all at the same level.
        levels: ascending; 0 is pristine.
        seeds: one per level. With a single number both crops share angle and positions, with a pair each has its own.
            Levels with equal seeds also share the noise.
        size: side S of the images. If T is larger, all levels are downscaled after the degradation: photographs are
            viewed smaller than they were taken, and scaling correlates noise.
        quality: JPEG quality of a final compression of all levels; None: no compression.
    """

    crops: Tensor
    types: tuple[str, ...]
    levels: tuple[int, ...]
    seeds: tuple[int | tuple[int, int], ...]
    size: int
    quality: int | None

    def pictures(self, device: torch.device | str = "cpu") -> Tensor:
        """Degrade the crops at every level -> (L, 2, 3, S, S) uint8."""
        crops = self.crops.to(device).float() / 255
        out = []
        for level, seeds in zip(self.levels, self.seeds, strict=True):
            # Rounded to 8 bits, like the pixels of a file.
            x = (degrade_all(crops, self.types, level, seeds, ALL_TYPES) * 255).round() / 255
            if x.shape[-1] > self.size:
                x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            if self.quality is not None:
                x = jpeg(x, self.quality, [])
            out.append((x * 255).round().to(torch.uint8))
        return torch.stack(out)

    def ordered(self) -> list[list[bool]]:
        """Return a matrix of whether level j is worse than level i for every type, at [i][j]."""
        return [[all(ALL_TYPES[t].ordered(i, j) for t in self.types) for j in self.levels] for i in self.levels]

    @property
    def monotone(self) -> bool:
        """Whether a higher level of these types is always worse."""
        return all(ALL_TYPES[name].monotone for name in self.types)

    def severity(self, config: Config) -> list[float]:
        """Return the margin multiplier per level, for each prompt pair; 0 for pairs not trained on these types."""
        groups = {ALL_TYPES[name].group for name in self.types}
        severity = max(config.severity.get(group, 1.0) for group in groups)
        if config.pairs == "mean":
            return [severity]
        return [severity * (config.backbone != "mini" or only is None or groups <= only) for only in PAIR_GROUPS]


def batch_of(stacks: Sequence[Stack], config: Config, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Degrade stacks on a device and collate them into a batch for `losses.alignment_losses`.

    Returns:
        `pictures` (B, L, 2, 3, S, S) uint8; `level` (B, L) float, ascending; `ordered` (B, L, L) bool, the pairs
        i < j of a stack that are known to be ordered; `monotone` (B,) bool; `severity` (B, P) float, see
        `Stack.severity`.
    """
    return {
        "pictures": torch.stack([stack.pictures(device) for stack in stacks]),
        "level": torch.tensor([stack.levels for stack in stacks], dtype=torch.float32, device=device),
        "ordered": torch.tensor([stack.ordered() for stack in stacks], device=device),
        "monotone": torch.tensor([stack.monotone for stack in stacks], device=device),
        "severity": torch.tensor([stack.severity(config) for stack in stacks], device=device),
    }


class Stacks(Dataset[list[Stack]]):
    """Batches of stacks. (seed, n) determines batch n, whatever the number of workers and processes, and on resuming.

    Args:
        paths: photographs with both sides of at least `config.smallest_photograph` pixels.
        crops: sizes to draw from instead of the configuration's.
    """

    def __init__(self, paths: Sequence[Path], config: Config, seed: int, crops: tuple[int, ...] = ()) -> None:
        self.paths, self.config, self.seed = paths, config, seed
        self.crops = crops or config.crops

    def __getitem__(self, number: int) -> list[Stack]:
        rng = random.Random(f"{self.seed} {number}")
        size = rng.choice(self.crops)
        chosen = rng.sample(range(len(self.paths)), self.config.stacks)
        return [self._draw(rng, read_photograph(self.paths[index]), size) for index in chosen]

    def _draw(self, rng: random.Random, photograph: Tensor, size: int) -> Stack:
        config = self.config
        taken = size
        if rng.random() < config.delivery:
            taken = min(round(size / rng.uniform(0.5, 0.9)), *photograph.shape[1:])
        quality = rng.randint(75, 95) if rng.random() < config.delivery else None
        region = _draw_region(rng, photograph, round(taken * (2 - config.overlap)), config)
        if rng.random() < config.bokeh:
            region = _bokeh(rng, region, taken)
        crops = _two_crops(rng, _camera(rng, region, config.camera), taken)
        types = draw_types(rng, config.types, config.type_weights, config.bank)
        levels = ([0] if config.pristine else []) + sorted(rng.sample(range(1, LEVELS + 1), config.levels))
        seeds: list[int | tuple[int, int]] = []
        for _ in levels:
            if seeds and config.share_levels:
                seeds.append(seeds[0])
            elif config.share_crops:
                seeds.append(rng.getrandbits(48))
            else:
                seeds.append((rng.getrandbits(48), rng.getrandbits(48)))
        return Stack((crops * 255).round().to(torch.uint8), types, tuple(levels), tuple(seeds), size, quality)


class Degraded(Dataset[dict[str, Tensor]]):
    """The batches of `Stacks`, degraded in the process that loads them."""

    def __init__(self, stacks: Stacks) -> None:
        self.stacks = stacks

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return batch_of(self.stacks[number], self.stacks.config)
