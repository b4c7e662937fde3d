"""Degraded crops with targets that need no opinion scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyiqa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ...degradations.bank import degrade
from ...degradations.banks import ALL_TYPES
from ...degradations.base import GROUP_ORDER, LEVELS
from ...screen import Screen
from ...towers.mobile import MobileTower
from ..photographs import random_crop, read_photograph
from ..stacks import laplacian_log_variance
from .frozen import Passed, pass_frozen

SIDE = 256  # pixels of a crop
# Sides of the regions that crops are scaled down from: photographs are viewed smaller than they were taken.
REGIONS = (256, 256, 320, 384, 480)
CANDIDATES = 3  # regions to take the sharpest of: flat and out-of-focus ones must not count as pristine
VERSIONS = 5  # degraded versions of each crop
COUNTS = (0.4, 0.3, 0.2, 0.1)  # frequencies of 1, 2, 3, 4 types at once
IN_ORDER = 0.7  # share of compositions applied in the order from the scene to the file; the others in any order
# Types that do not occur in photographs, or whose levels are not ordered, are left out.
LEFT_OUT = frozenset(
    {
        *("patch_displacement", "color_block", "color_shift", "color_diffusion", "quantization"),
        *("jitter", "pixelate", "linear_contrast", "mean_shift"),
    }
)
WEIGHTS = {"gaussian_blur": 2, "lens_blur": 2, "motion_blur": 2, "jpeg": 2, "darken": 2, "white_noise": 1.5}
REFERENCE_METRICS = ("gmsd", "nlpd", "psnr")  # the fastest of pyiqa's that need no download
# Where a pristine crop stands among degraded ones, which full-reference metrics rank from 0 to 1.
PRISTINE = 1.15


@dataclass(frozen=True)
class Crops:
    """Crops that have passed the frozen blocks: N photographs, each pristine and in `VERSIONS` degraded versions.

    Attributes:
        passed: the N * (1 + VERSIONS) crops, photograph after photograph, the pristine one first.
        targets: their quality, standardised.
    """

    passed: Passed
    targets: Tensor


def draw_crops(photograph: Tensor, rng: random.Random) -> Tensor:
    """Cut a crop of a photograph (3, H, W) in 0..1 and degrade it -> (1 + VERSIONS, 3, SIDE, SIDE) of 8 bits."""
    side = min(rng.choice(REGIONS), *photograph.shape[1:])
    regions = [random_crop(photograph, side, rng) for _ in range(CANDIDATES)]
    region = regions[int(laplacian_log_variance(torch.stack(regions)).argmax())][None]
    if rng.random() < 0.5:  # scaled down before the degradation, else after it
        region = _scaled(region)
    versions = [region, *(_degraded(region, rng) for _ in range(VERSIONS))]
    return (torch.cat([_scaled(version) for version in versions]) * 255).round() / 255


def _scaled(x: Tensor) -> Tensor:
    if x.shape[2:] == (SIDE, SIDE):
        return x
    return F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)


def _degraded(x: Tensor, rng: random.Random) -> Tensor:
    left = [name for name in ALL_TYPES if name not in LEFT_OUT]
    drawn: list[str] = []
    for _ in range(rng.choices(range(1, len(COUNTS) + 1), COUNTS)[0]):
        drawn += rng.choices(left, [WEIGHTS.get(name, 1) for name in left])
        left = [name for name in left if ALL_TYPES[name].group != ALL_TYPES[drawn[-1]].group]
    if rng.random() < IN_ORDER:
        drawn.sort(key=lambda name: GROUP_ORDER.index(ALL_TYPES[name].group))
    for name in drawn:
        x = degrade(x, name, rng.uniform(1, LEVELS), rng.getrandbits(48), ALL_TYPES)
    return x


@torch.no_grad()
def make_crops(tower: MobileTower, paths: Sequence[Path], judge: nn.Module, seed: int) -> Crops:
    """Draw crops of photographs and judge them.

    A crop's target is the standardised sum of three: twice its mean rank by full-reference metrics
    (`REFERENCE_METRICS`, against the pristine crop), its rank by `judge`, and the log of its mean Laplacian energy.

    Args:
        paths: photographs, at least SIDE pixels a side.
        judge: a blind metric without opinion scores, higher is better: (N, 3, H, W) -> (N, 1).
    """
    references = [pyiqa.create_metric(name, device="cpu") for name in REFERENCE_METRICS]
    passes, ranks, judged = [], [], []
    for path in tqdm(paths, desc="crops", unit="photograph", file=Screen()):
        crops = draw_crops(read_photograph(path).float() / 255, random.Random(f"{seed} {path.name}"))
        passes.append(pass_frozen(tower, crops))
        pristine = crops[:1].expand(VERSIONS, -1, -1, -1)
        found = [metric(crops[1:], pristine).flatten() * (-1 if metric.lower_better else 1) for metric in references]
        ranks.append(torch.stack(found, dim=1))
        judged.append(judge(crops).flatten())
    passed = Passed([each for one in passes for each in one.activations], torch.cat([one.early for one in passes]))
    by_reference = np.stack([_rank(values) for values in torch.cat(ranks).T.double().numpy()]).mean(0)
    by_reference = np.insert(by_reference.reshape(len(paths), VERSIONS), 0, PRISTINE, axis=1).ravel()
    total = 2 * _standard(by_reference)
    total += _standard(_rank(torch.cat(judged).double().numpy()))
    total += _standard(passed.early[:, 0].double().numpy())  # the first of `log_energies`
    return Crops(passed, torch.from_numpy(_standard(total)).float())


def _rank(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank values from near 0 (lowest) to 1; equal ones share their mean rank."""
    from scipy.stats import rankdata

    ranked: NDArray[np.float64] = rankdata(values) / len(values)
    return ranked


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean()) / values.std()
