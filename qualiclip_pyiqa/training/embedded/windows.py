"""Add heads for small windows to embedded models: those of their local quality maps.

    python -m qualiclip_pyiqa.training.embedded.windows MODEL.safetensors... --pristine DIR --out DIR
        [--photographs N] [--seed N]

A head fitted to whole images takes a window of even sky for a blurred photograph. These are fitted to windows of
photographs in which regions were degraded: a window that lies in a blurred region by half is to fall by half of what
the attribute falls by for the blur's severity, compared with the other windows of the same photograph. They read the
statistics that training does not change, so models of one trunk get the same heads. All other tensors are written as
they were read. The same command writes the same bytes, on one kind of machine and version of torch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...degradations.bank import degrade
from ...degradations.base import LEVELS
from ...degradations.severity import severity
from ...errors import ImageError, SettingsError, WeightsError
from ...pretrained.layouts import tower_metadata
from ...pretrained.read import ReadWeights, read
from ...pretrained.write import write_safetensors
from ...screen import Screen
from ...towers.base import load_into
from ...towers.mobile import MobileTower, limited
from ...towers.windows import SIDE as CELL
from ...towers.windows import WINDOW
from ..photographs import list_photographs, random_crop, read_photograph, shorter_side
from .attributes import ATTRIBUTES, change
from .frozen import EARLY, FROZEN
from .heads import Floats, Head, standardisation

SIDE = 512  # pixels of a crop
VERSIONS = 3  # of a crop, each with a region in every quarter: two for each attribute
LOWEST = 2.0  # level of a degradation, at least; level 1 of some types cannot be seen
SHARES = (1 / 3, 7 / 8)  # side of a region over the quarter's, from and to
STRENGTH = 0.01  # of the ridge regression, for each window
# Types that count as an attribute's own in windows, beside those of `ATTRIBUTES`.
ALSO_OWN = {"sharpness": ("pixelate",)}


@dataclass(frozen=True)
class Region:
    """A degraded region of a crop; `box` is its top, left, height and width in pixels."""

    box: tuple[int, int, int, int]
    name: str
    level: float

    def shares(self, side: int) -> Tensor:
        """Return which share of each window lies in the region, (windows,) row by row."""
        inside = torch.zeros(1, 1, side, side)
        top, left, height, width = self.box
        inside[..., top : top + height, left : left + width] = 1
        return F.avg_pool2d(inside, WINDOW * CELL, CELL).flatten()


@dataclass(frozen=True)
class Version:
    """A crop with degraded regions; `statistics` of its windows are (windows, EARLY)."""

    regions: Sequence[Region]
    statistics: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.training.embedded.windows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", type=Path, help="embedded models of one trunk")
    parser.add_argument("--pristine", type=Path, required=True, help="photographs; those held out are not used")
    parser.add_argument("--out", type=Path, required=True, help="folder to write models of the same names to")
    parser.add_argument("--photographs", type=int, default=120, help="to draw crops of, at most (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        add_window_heads(options.models, options.pristine, options.out, options.photographs, options.seed)
    except (ImageError, SettingsError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_window_heads(models: Sequence[Path], pristine: Path, out: Path, photographs: int, seed: int) -> None:
    """Fit window heads and write them into copies of models.

    Raises:
        SettingsError: no embedded models, models of different trunks, or no photograph that is large enough.
        WeightsError: a model that cannot be read.
    """
    if photographs < 1:
        raise SettingsError(f"--photographs is {photographs}; expected an integer of at least 1")
    if len({model.name for model in models}) < len(models):
        raise SettingsError(f"two of the models are named alike; expected different names in {out}")
    found = [read(model, layout="qualiclip-pyiqa") for model in models]
    for model, each in zip(models, found, strict=True):
        if each.metadata["backbone"] != "mobile" or tower_metadata(model, each.metadata)["pairs"] <= len(ATTRIBUTES):
            raise SettingsError(f"{model} is not an embedded model; expected one of `training.embedded`")
        if not _same_trunk(each, found[0]):
            raise SettingsError(f"{model} has another trunk than {models[0]}; expected models of one trunk")
    paths = [path for path in list_photographs(pristine) if shorter_side(path) >= SIDE]
    if not paths:
        raise SettingsError(f"{pristine} has no photographs of at least {SIDE} pixels a side; expected some")
    random.Random(f"windows {seed}").shuffle(paths)
    versions = measure_windows(_tower(found[0], models[0]), sorted(paths[:photographs]), seed)
    heads = fit_window_heads(versions)
    stored = {
        "visual.window_heads": torch.stack(
            [torch.stack([getattr(head, part) for head in heads.values()]) for part in ("mean", "std", "weight")]
        ),
        "visual.window_bias": torch.tensor([head.bias for head in heads.values()]),
    }
    out.mkdir(parents=True, exist_ok=True)
    for model, each in zip(models, found, strict=True):
        pairs = tower_metadata(model, each.metadata)["pairs"]
        training = json.loads(each.metadata.get("training", "{}"))
        metadata = each.metadata | {
            "tower": json.dumps({"pairs": pairs, "window_heads": [len(heads), EARLY]}),
            "training": json.dumps(training | {"windows": {"seed": seed, "photographs": len(paths[:photographs])}}),
        }
        write_safetensors(out / model.name, each.tensors | stored, metadata)


def _same_trunk(one: ReadWeights, other: ReadWeights) -> bool:
    """Return whether all that window heads read is the same in two models."""
    names = ("visual.trunk.stem.", *(f"visual.trunk.block{number}." for number in range(FROZEN)))
    return all(
        torch.equal(value, other.tensors[name]) if name in other.tensors else False
        for name, value in one.tensors.items()
        if name.startswith(names)
    )


def _tower(model: ReadWeights, path: Path) -> MobileTower:
    tower = MobileTower(**tower_metadata(path, model.metadata))
    state = {name.removeprefix("visual."): value for name, value in model.tensors.items()}
    load_into(tower, state, str(path))
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def measure_windows(tower: MobileTower, paths: Sequence[Path], seed: int) -> list[Version]:
    """Degrade regions of a crop of each photograph, and compute the statistics of all windows."""
    versions = []
    for path in tqdm(paths, desc="windows", unit="photograph", file=Screen()):
        rng = random.Random(f"windows {seed} {path.name}")
        crop = random_crop(read_photograph(path).float() / 255, SIDE, rng)
        drawn = draw_regions(rng)
        images = torch.stack([_with_regions(crop, regions, rng) for regions in drawn])
        rows = list(tower.cells(images, FROZEN).rows((WINDOW, WINDOW)))
        statistics = torch.stack(rows, dim=1).flatten(1, 2)
        versions += [Version(*each) for each in zip(drawn, statistics, strict=True)]
    return versions


def draw_regions(rng: random.Random) -> list[list[Region]]:
    """Draw the regions of each version: in every quarter one, of a type of one attribute's own."""
    half = SIDE // 2
    types = [rng.choice(own_types(name)) for name in ATTRIBUTES for _ in range(VERSIONS * 4 // len(ATTRIBUTES))]
    rng.shuffle(types)
    versions: list[list[Region]] = []
    for _ in range(VERSIONS):
        versions.append([])
        for corner in ((0, 0), (0, half), (half, 0), (half, half)):
            height, width = (round(half * rng.uniform(*SHARES)) for _ in range(2))
            top, left = corner[0] + rng.randint(0, half - height), corner[1] + rng.randint(0, half - width)
            versions[-1].append(Region((top, left, height, width), types.pop(), rng.uniform(LOWEST, LEVELS)))
    return versions


def _with_regions(crop: Tensor, regions: Sequence[Region], rng: random.Random) -> Tensor:
    """Degrade regions of a crop (3, H, W), rounded to 8 bits."""
    x = crop.clone()
    for region in regions:
        top, left, height, width = region.box
        part = (slice(None), slice(top, top + height), slice(left, left + width))
        x[part] = degrade(crop[part][None], region.name, region.level, rng.getrandbits(48))[0]
    return (x * 255).round() / 255


def own_types(attribute: str) -> list[str]:
    """Return the types that an attribute's window head is to find."""
    return [*ATTRIBUTES[attribute].own, *ALSO_OWN.get(attribute, ())]


def target(attribute: str, region: Region) -> float | None:
    """Return by how much an attribute's logit is to change in a region; None: left open."""
    fitted = ATTRIBUTES[attribute]
    if region.name in ALSO_OWN.get(attribute, ()):
        return -fitted.slope * severity(region.name, region.level)
    return None if region.name in fitted.open else change(fitted, region.name, region.level)


def fit_window_heads(versions: Sequence[Version]) -> Mapping[str, Head]:
    """Fit the head of each attribute to the differences between windows of one image by ridge regression."""
    mean, std = standardisation(torch.cat([version.statistics for version in versions]))
    size = len(mean)
    grams, products = ({name: np.zeros(shape) for name in ATTRIBUTES} for shape in ((size, size), size))
    weights = dict.fromkeys(ATTRIBUTES, 0.0)
    untouched, count = np.zeros(size), 0
    for version in versions:
        x: Floats = limited((version.statistics - mean) / std).double().numpy()
        shares = [region.shares(SIDE).double().numpy() for region in version.regions]
        covered = np.sum(shares, axis=0)
        outside = covered == covered.min()  # 0, unless a crop is small
        untouched, count = untouched + x[outside].sum(0), count + int(outside.sum())
        whole = x - x.mean(0)
        shared = whole.T @ whole  # of attributes with no region left open
        for name in ATTRIBUTES:
            kept, wanted = np.ones(len(x), dtype=bool), np.zeros(len(x))
            for region, share in zip(version.regions, shares, strict=True):
                changed = target(name, region)
                if changed is None:
                    kept &= share == 0
                else:
                    wanted += changed * share
            own = whole if kept.all() else x[kept] - x[kept].mean(0)
            grams[name] += shared if kept.all() else own.T @ own
            products[name] += own.T @ (wanted[kept] - wanted[kept].mean())
            weights[name] += kept.sum()
    heads = {}
    for name, attribute in ATTRIBUTES.items():
        weight = np.linalg.solve(grams[name] + STRENGTH * weights[name] * np.eye(size), products[name])
        bias = attribute.pristine - float(untouched @ weight) / count
        heads[name] = Head(mean, std, torch.from_numpy(weight).float(), bias)
    return heads


if __name__ == "__main__":
    sys.exit(main())
