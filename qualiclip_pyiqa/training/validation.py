"""How well a tower ranks: degradation levels of photographs it does not learn from, and rated pictures."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..degradations.bank import DEGRADATIONS, degrade
from ..degradations.base import LEVELS
from ..evaluation.ladders import behaviour
from ..evaluation.ratings import Ratings
from ..images.tensors import load_image
from ..towers.base import freeze
from .alignment import Aligned, similarities
from .config import Config


@torch.no_grad()
def differences(tower: nn.Module, aligned: Aligned, pictures: Tensor) -> Tensor:
    """(M, 3, H, W) uint8 -> (M, P) similarity to the positive prompt minus that to the negative one, in slices that fit
    a small machine."""
    device = aligned.anchors.device
    out = []
    for part in pictures.split(32):
        c = similarities(tower(part.to(device).float().div(255)), aligned.anchors, aligned.unit)
        out.append((c[..., 0] - c[..., 1]).cpu())
    return torch.cat(out)


class Validation:
    """Photographs of the training set that are not trained on, at every type and level, kept in memory.

    One picture per level is enough here: (T, V, L + 1, 3, S, S) for T types and V photographs.
    """

    def __init__(self, photographs: Sequence[Tensor], config: Config, seed: int) -> None:
        rng = random.Random(f"validation {seed}")
        size = min(config.validation_crop, *(min(p.shape[1:]) for p in photographs))
        crops = []
        for photograph in photographs:
            top, left = (rng.randint(0, side - size) for side in photograph.shape[1:])
            crops.append(photograph[:, top : top + size, left : left + size].float() / 255)
        pristine = torch.stack(crops)
        self.names = [name for name in DEGRADATIONS if config.type_weights.get(name, 1.0) > 0]
        self.pristine = (pristine * 255).round().to(torch.uint8)
        self.degraded = torch.stack(
            [
                torch.stack([degrade(pristine, name, level, seed) for level in range(1, LEVELS + 1)], dim=1)
                .mul(255)
                .round()
                .to(torch.uint8)
                for name in tqdm(self.names, desc="validation set", file=sys.stderr, leave=False)
            ]
        )

    def evaluate(self, tower: nn.Module, aligned: Aligned) -> tuple[dict[str, float], float]:
        """Ranking accuracy per type (`Behaviour.in_order`); the part of types that fall (`Behaviour.falls`)."""
        tower.eval()
        pristine = differences(tower, aligned, self.pristine).mean(1)
        accuracy, falling = {}, 0
        for name, pictures in zip(self.names, self.degraded, strict=True):
            q = differences(tower, aligned, pictures.flatten(0, 1)).mean(1).unflatten(0, pictures.shape[:2])
            ladder = torch.cat([pristine[:, None], q], dim=1)
            found = behaviour(name, ladder)
            accuracy[name] = found.in_order
            falling += found.falls
        return accuracy, falling / len(self.names)


@torch.no_grad()
def rated_srcc(tower: nn.Module, aligned: Aligned, ratings: Ratings) -> float:
    """SRCC of the scores of whole pictures with their opinion scores; positive is agreement, NaN if one is constant."""
    from scipy.stats import spearmanr

    tower = freeze(copy.deepcopy(tower))  # which takes large pictures in little memory
    device = aligned.anchors.device
    scale = math.exp(aligned.logit_scale) / aligned.unit / float(aligned.metadata["temperature"])
    scores = []
    for path in tqdm(ratings.paths, desc="rated pictures", file=sys.stderr, leave=False):
        c = similarities(tower(load_image(path)[None].to(device)), aligned.anchors, aligned.unit)
        scores.append(float(torch.sigmoid(scale * (c[..., 0] - c[..., 1])).mean()))
    if min(scores) == max(scores) or min(ratings.opinions) == max(ratings.opinions):
        return math.nan
    sign = -1 if ratings.lower_better else 1
    return sign * float(spearmanr(scores, ratings.opinions)[0])
