"""Heads of look attributes: linear in the statistics of the frozen blocks, fitted to degradation ladders."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...degradations.bank import DEGRADATIONS, degrade, strength
from ...degradations.base import LEVELS
from ...degradations.severity import severity
from ...screen import Screen
from ...towers.mobile import MobileTower, limited
from ..photographs import random_crop, read_photograph
from .frozen import pass_frozen
from .heads import Head, ridge, standardisation

SIDE = 256  # pixels of a crop
DRAWN = 2  # levels of each type for a photograph
TONE = 0.4  # probability of each change of tone that all of a photograph's ladders share: photographs differ by these
OWN_WEIGHT, OTHER_WEIGHT, PRISTINE_WEIGHT = 1.0, 0.5, 0.3
STRENGTH = 3.0  # of the ridge regression
FAULTLESS, NEUTRAL = 1.5, 0.0  # logit of the mean pristine photograph: for faults, and for what is no quality


@dataclass(frozen=True)
class Attribute:
    """What one attribute is fitted to.

    Attributes:
        own: types that change it, with the sign of the change; 0: the sign of the type's strength.
        slope: change of the logit at severity 1 (`degradations.severity`).
        open: types whose effect is left open: they are not its own, but do change it.
        pristine: logit of the mean pristine photograph.
    """

    own: Mapping[str, int]
    slope: float
    open: frozenset[str] = field(default_factory=frozenset)
    pristine: float = FAULTLESS


# Names are those of `metrics.prompts.LOOK`.
ATTRIBUTES: dict[str, Attribute] = {
    "brightness": Attribute(
        {"darken": -1, "brighten": 1, "mean_shift": 0}, 6, frozenset({"color_block"}), pristine=NEUTRAL
    ),
    "sharpness": Attribute(
        {"gaussian_blur": -1, "lens_blur": -1, "motion_blur": -1},
        4,
        frozenset({"color_diffusion", "jitter", "pixelate", "high_sharpen"}),
    ),
    "noisiness": Attribute(
        {"white_noise": -1, "white_noise_color": -1, "impulse_noise": -1, "multiplicative_noise": -1},
        4,
        frozenset({"jitter", "quantization", "high_sharpen"}),
    ),
    "colorfulness": Attribute(
        {"color_saturation_1": -1, "color_saturation_2": 1},
        8,
        frozenset({"color_diffusion", "color_shift", "color_block", "white_noise_color"}),
        pristine=NEUTRAL,
    ),
    "contrast": Attribute(
        {"nonlinear_contrast": -1, "linear_contrast": 0},
        5,
        frozenset({"mean_shift", "high_sharpen", "color_block"}),
        pristine=NEUTRAL,
    ),
    "compression": Attribute(
        {"jpeg": -1, "jpeg2000": -1},
        4,
        frozenset({"pixelate", "color_block", "quantization", "patch_displacement", "jitter"}),
    ),
}
# The last level of this type overshoots to the complementary hue, which is colourful again.
LAST_LEVEL = {"color_saturation_1": 4}


@dataclass(frozen=True)
class Ladder:
    """One photograph by type and level: statistics of the frozen blocks, (S,) pristine and (L, S) degraded."""

    pristine: Tensor
    degraded: Mapping[str, tuple[Sequence[int], Tensor]]


def change(attribute: Attribute, name: str, level: float) -> float:
    """Return by how much the logit of an attribute is to change at a level of a type; 0 for others' types."""
    sign = attribute.own.get(name)
    if sign is None:
        return 0.0
    if sign == 0:
        sign = int(np.sign(strength(name, level)))
    return sign * attribute.slope * severity(name, min(level, LAST_LEVEL.get(name, LEVELS)))


def measure_ladders(tower: MobileTower, paths: Sequence[Path], seed: int) -> list[Ladder]:
    """Degrade a crop of each photograph by every type of the bank at a few levels."""
    ladders = []
    for path in tqdm(paths, desc="ladders", unit="photograph", file=Screen()):
        rng = random.Random(f"ladder {seed} {path.name}")
        crop = random_crop(read_photograph(path).float() / 255, SIDE, rng)[None]
        if rng.random() < TONE:
            crop = (0.5 + (crop - 0.5) * rng.uniform(0.7, 1.1)).clamp(0, 1)
        if rng.random() < TONE:
            crop = crop ** rng.uniform(0.7, 1.5)
        degraded: dict[str, tuple[Sequence[int], Tensor]] = {}
        for name in DEGRADATIONS:
            levels = sorted(rng.sample(range(1, LEVELS + 1), DRAWN))
            same = rng.getrandbits(48)
            images = torch.cat([degrade(crop, name, level, same) for level in levels])
            degraded[name] = (levels, pass_frozen(tower, (images * 255).round() / 255).early)
        ladders.append(Ladder(pass_frozen(tower, crop).early[0], degraded))
    return ladders


def fit_attributes(ladders: Sequence[Ladder]) -> dict[str, Head]:
    """Fit all attributes' heads.

    The differences between degraded and pristine crops are regressed on `change`, and the pristine crops on 0: within a
    photograph an attribute follows its own types and no others, and photographs are alike.
    """
    mean, std = standardisation(torch.stack([ladder.pristine for ladder in ladders]))
    pristine = torch.stack([limited((ladder.pristine - mean) / std) for ladder in ladders]).double().numpy()
    differences = [
        (name, level, (limited((values - mean) / std).double().numpy() - own))
        for ladder, own in zip(ladders, pristine, strict=True)
        for name, (levels, found) in ladder.degraded.items()
        for level, values in zip(levels, found, strict=True)
    ]
    heads = {}
    for attribute_name, attribute in ATTRIBUTES.items():
        kept = [(name, level, x) for name, level, x in differences if name not in attribute.open]
        x = np.stack([*(each for _, _, each in kept), *pristine])
        y = np.array([*(change(attribute, name, level) for name, level, _ in kept), *([0.0] * len(pristine))])
        weights = np.array(
            [*(OWN_WEIGHT if name in attribute.own else OTHER_WEIGHT for name, _, _ in kept)]
            + [PRISTINE_WEIGHT] * len(pristine)
        )
        weight, _ = ridge(x, y, STRENGTH, weights, intercept=False)
        heads[attribute_name] = Head(mean, std, weight, attribute.pristine)
    return heads
