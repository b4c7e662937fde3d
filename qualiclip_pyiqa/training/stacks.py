"""Photographs in, stacks of degraded crops out: what one training step looks at."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from ..errors import ImageError, SettingsError
from .config import Config
from .degradations import DEGRADATIONS, LEVELS, degrade

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# Order of a composition: what happens before the lens comes first, what the file does to the picture last.
GROUP_ORDER = (
    "brightness change",
    "color distortion",
    "sharpness and contrast",
    "blur",
    "noise",
    "spatial distortion",
    "compression",
)

# The groups whose degradations train a prompt pair of the set `qualiclip`, in its order; None: all. "Sharp image." sees
# only log energies and learns only from blur: asked to rank noise too, so few numbers say nothing of either.
PAIR_GROUPS: tuple[frozenset[str] | None, ...] = (None, frozenset({"blur"}), None, None, None, None, None)


def list_photographs(folder: Path, exclude: Path | None = None) -> list[Path]:
    """The pictures under a folder in a fixed order, less those not to be trained on.

    Args:
        folder: searched recursively. If it holds a `manifest.csv` with columns `file` and `held_out`, rows whose
            `held_out` is 1 are left out.
        exclude: a text file with one path, relative to the folder, per line to be left out too.

    Raises:
        SettingsError: no such folder, an unreadable list, or too few pictures left.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder} is no folder; expected one with photographs to train on")
    left_out: set[str] = set()
    try:
        if (folder / "manifest.csv").is_file():
            with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
                left_out |= {row["file"] for row in csv.DictReader(file) if row.get("held_out") == "1"}
        if exclude is not None:
            left_out |= {line.strip() for line in exclude.read_text(encoding="utf-8").splitlines()}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise SettingsError(f"the list of photographs not to train on cannot be read: {error!r}") from None
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    paths = [p for p in paths if p.relative_to(folder).as_posix() not in left_out]
    if not paths:
        raise SettingsError(f"{folder} holds no photographs to train on; expected {', '.join(sorted(SUFFIXES))}")
    return paths


def read_photograph(path: Path) -> Tensor:
    """Decode one file to (3, H, W) uint8 RGB."""
    try:
        with Image.open(path) as picture:
            return pil_to_tensor(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} cannot be decoded ({error}); remove it or list it under --exclude") from None


def laplacian_log_variance(pictures: Tensor) -> Tensor:
    """Log variance of the Laplacian of luma, (N, 3, H, W) in 0..1 -> (N,): the classic sharpness measure."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pictures.dtype)
    luma = (pictures * weights[:, None, None]).sum(1)
    centre = 4 * luma[:, 1:-1, 1:-1]
    laplacian = centre - luma[:, :-2, 1:-1] - luma[:, 2:, 1:-1] - luma[:, 1:-1, :-2] - luma[:, 1:-1, 2:]
    return (laplacian.flatten(1).var(1) + 1e-8).log()


@dataclass(frozen=True)
class Recipe:
    """What is done to a stack: one or two types, at the same level, one after the other."""

    types: tuple[str, ...]
    seed: int

    @property
    def monotone(self) -> bool:
        return all(DEGRADATIONS[name].monotone for name in self.types)

    @property
    def about(self) -> list[bool]:
        """For each prompt pair whether it has an opinion on these types."""
        groups = {DEGRADATIONS[name].group for name in self.types}
        return [only is None or groups <= only for only in PAIR_GROUPS]

    def apply(self, pictures: Tensor, level: int) -> Tensor:
        """(N, 3, H, W) in 0..1 -> degraded, rounded to 8 bits as every file is."""
        for position, name in enumerate(self.types if level else ()):
            pictures = degrade(pictures, name, level, self.seed + position)
        return (pictures * 255).round() / 255


def draw_recipe(rng: random.Random, config: Config) -> Recipe:
    names = list(DEGRADATIONS)
    weights = [config.type_weights.get(name, 1.0) for name in names]
    first = rng.choices(names, weights)[0]
    types = [first]
    if rng.random() < config.composition:
        second = rng.choices(names, weights)[0]
        if DEGRADATIONS[second].group != DEGRADATIONS[first].group:
            types.append(second)
    types.sort(key=lambda name: GROUP_ORDER.index(DEGRADATIONS[name].group))
    return Recipe(tuple(types), rng.getrandbits(48))


def draw_region(rng: random.Random, photograph: Tensor, size: int, config: Config) -> Tensor:
    """The sharpest of a few random regions at one random scale -> (1, 3, size, size) in 0..1, or smaller."""
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


def camera(rng: random.Random, region: Tensor, probability: float) -> Tensor:
    """Mild changes that all levels of a stack share: what good photographs differ by, and must not be judged by."""
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
        quality = rng.uniform(75, 96)
        region = DEGRADATIONS["jpeg"].apply(region, quality, torch.Generator())
    if rng.random() < probability / 2:
        region = region.flip(-1)
    return region


def deliver(pictures: Tensor, size: int, quality: int | None) -> Tensor:
    """What happens to all levels alike after the degradation: scaled down to `size`, saved as JPEG.

    Photographs reach a viewer smaller than they were taken; noise that was scaled down is correlated.
    """
    if pictures.shape[-1] > size:
        pictures = F.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    if quality is not None:
        pictures = DEGRADATIONS["jpeg"].apply(pictures, quality, torch.Generator())
    return pictures


def two_crops(rng: random.Random, region: Tensor, size: int) -> Tensor:
    """Two overlapping crops at random places of a region (1, 3, H, W) -> (2, 3, size, size)."""
    height, width = region.shape[-2:]
    crops = []
    for _ in range(2):
        top, left = rng.randint(0, height - size), rng.randint(0, width - size)
        crops.append(region[0, :, top : top + size, left : left + size])
    return torch.stack(crops)


class Stacks(Dataset[dict[str, Tensor]]):
    """Item t is everything step t looks at, decided by (seed, t) alone, so that workers change nothing.

    Photographs (3, H, W) uint8, both sides at least the largest crop.

    Items: `pictures` (B, L, 2, 3, S, S) uint8, level 0 (pristine) first; `level` (B, L) ascending; `ordered`
    (B, L, L) bool, which pairs i < j of a stack are truly ordered; `about` (B, P) bool, which prompt
    pairs learn from it.
    """

    def __init__(
        self, photographs: Sequence[Tensor], config: Config, seed: int, steps: int, crops: tuple[int, ...] | None = None
    ) -> None:
        self.photographs, self.config, self.seed, self.steps = photographs, config, seed, steps
        self.crops = config.crops if crops is None else crops

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if step >= self.steps:
            raise IndexError(step)
        config, rng = self.config, random.Random(f"{self.seed} {step}")
        size = rng.choice(self.crops)
        chosen = rng.sample(range(len(self.photographs)), min(config.stacks, len(self.photographs)))
        pictures, levels, ordered, about = [], [], [], []
        for number in chosen:
            photograph = self.photographs[number]
            taken = size
            if rng.random() < config.delivery:
                taken = min(round(size / rng.uniform(0.5, 0.9)), *photograph.shape[1:])
            quality = rng.randint(75, 95) if rng.random() < config.delivery else None
            region = draw_region(rng, photograph, round(taken * (2 - config.overlap)), config)
            crops = two_crops(rng, camera(rng, region, config.camera), taken)
            recipe = draw_recipe(rng, config)
            stack_levels = [0, *sorted(rng.sample(range(1, LEVELS + 1), config.levels))]
            stack = [deliver(recipe.apply(crops, level), size, quality) for level in stack_levels]
            pictures.append((torch.stack(stack) * 255).round().to(torch.uint8))
            about.append(recipe.about)
            level = torch.tensor(stack_levels, dtype=torch.float32)
            levels.append(level)
            pairs = level[:, None] < level[None, :]
            ordered.append(pairs if recipe.monotone else pairs & (level[:, None] == 0))
        return {
            "pictures": torch.stack(pictures),
            "level": torch.stack(levels),
            "ordered": torch.stack(ordered),
            "about": torch.tensor(about),
        }
