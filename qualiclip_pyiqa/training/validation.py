"""Validate during training: how held-out photographs' distortion levels are ranked, and SRCC on rated images."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..degradations.bank import degrade
from ..degradations.base import LEVELS
from ..evaluation.ladders import behaviour
from ..evaluation.ratings import Ratings
from ..images.tensors import load_image
from ..metrics.prompt_iqa import positive_probabilities
from ..screen import Screen
from ..towers.base import freeze
from .alignment import Aligned, similarities
from .config import Config
from .photographs import random_crop


@torch.no_grad()
def differences(tower: nn.Module, aligned: Aligned, images: Tensor) -> Tensor:
    """Compute similarity to the positive prompt minus that to the negative one: (M, 3, H, W) uint8 -> (M, P)."""
    device = aligned.anchors.device
    out = []
    for part in images.split(32):  # fits a small machine
        c = similarities(tower(part.to(device).float().div(255)), aligned.anchors, aligned.unit)
        out.append((c[..., 0] - c[..., 1]).cpu())
    return torch.cat(out)


class Validation:
    """Held-out photographs, degraded by every type at every level and stored in memory as uint8.

    Attributes:
        pristine: (V, 3, S, S), a crop of each photograph.
        degraded: (T, V, L, 3, S, S), by type and level.

    Args:
        photographs: (3, H, W) uint8 each.
        seed: determines crops and degradations.
    """

    def __init__(self, photographs: Sequence[Tensor], config: Config, seed: int) -> None:
        rng = random.Random(f"validation {seed}")
        size = min(config.validation_crop, *(min(p.shape[1:]) for p in photographs))
        pristine = torch.stack([random_crop(photograph, size, rng).float() / 255 for photograph in photographs])
        self.bank = config.bank
        self.names = [name for name in self.bank if config.type_weights.get(name, 1.0) > 0]
        self.pristine = (pristine * 255).round().to(torch.uint8)
        self.degraded = torch.stack(
            [
                torch.stack([degrade(pristine, name, level, seed, self.bank) for level in range(1, LEVELS + 1)], dim=1)
                .mul(255)
                .round()
                .to(torch.uint8)
                for name in tqdm(self.names, desc="validation set", file=Screen(), leave=False, disable=None)
            ]
        )

    def evaluate(self, tower: nn.Module, aligned: Aligned) -> tuple[dict[str, float], float]:
        """Measure the ranking accuracy per type (`Behaviour.in_order`) and the share of types that fall (`.falls`)."""
        tower.eval()
        pristine = differences(tower, aligned, self.pristine).mean(1)
        accuracy, falling = {}, 0
        for name, images in zip(self.names, self.degraded, strict=True):
            q = differences(tower, aligned, images.flatten(0, 1)).mean(1).unflatten(0, images.shape[:2])
            ladder = torch.cat([pristine[:, None], q], dim=1)
            found = behaviour(name, ladder, bank=self.bank)
            accuracy[name] = found.in_order
            falling += found.falls
        return accuracy, falling / len(self.names)


@torch.no_grad()
def rated_srcc(tower: nn.Module, aligned: Aligned, ratings: Ratings) -> float | None:
    """Compute the SRCC of scores of whole images with opinion scores: positive if they agree, None if undefined."""
    tower = freeze(copy.deepcopy(tower))  # a frozen copy streams large images
    device = aligned.anchors.device
    scale = math.exp(aligned.logit_scale) / float(aligned.metadata["temperature"])
    scores = []
    for path in tqdm(ratings.paths, desc="rated images", file=Screen(), leave=False, disable=None):
        features = tower(load_image(path)[None].to(device))
        scores.append(float(positive_probabilities(features, aligned.anchors, scale).mean()))
    return correlations(scores, ratings)[0]


def correlations(scores: Sequence[float], ratings: Ratings) -> tuple[float | None, float | None]:
    """Compute SRCC and PLCC of scores, higher being better, with opinion scores; positive if they agree.

    Returns:
        (None, None) if they are undefined: scores or opinion scores are constant, or scores are not finite.
    """
    from scipy import stats

    sign = -1 if ratings.lower_better else 1
    constant = min(scores) == max(scores) or min(ratings.opinions) == max(ratings.opinions)
    if constant or not all(map(math.isfinite, scores)):
        return None, None
    srcc, plcc = (float(f(scores, ratings.opinions)[0]) for f in (stats.spearmanr, stats.pearsonr))
    return sign * srcc, sign * plcc
