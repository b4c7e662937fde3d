"""How well a tower ranks degradation levels on photographs it does not learn from."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import Config
from .degradations import DEGRADATIONS, LEVELS
from .stacks import Recipe


def similarities(features: Tensor, anchors: Tensor) -> Tensor:
    """(M, D), (2P, D) -> (M, P, 2) cosines in a block's own units: of the block with its anchor, not of the whole."""
    return (features @ anchors.T).unflatten(1, (-1, 2))


@torch.no_grad()
def quality(tower: nn.Module, anchors: Tensor, pictures: Tensor, half: bool) -> Tensor:
    """(M, 3, H, W) uint8 -> (M, P) similarity differences, in slices that fit a small machine."""
    out = []
    for part in pictures.split(32):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=half):
            c = similarities(tower(part.float().div(255)).float(), anchors)
        out.append(c[..., 0] - c[..., 1])
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
                torch.stack([Recipe((name,), seed).apply(pristine, i) for i in range(1, LEVELS + 1)], dim=1)
                .mul(255)
                .round()
                .to(torch.uint8)
                for name in tqdm(self.names, desc="validation set", file=sys.stderr, leave=False)
            ]
        )

    def look(self, tower: nn.Module, anchors: Tensor, half: bool) -> tuple[dict[str, float], float]:
        """Ranking accuracy per type; the part of types whose mean falls strictly from level 1 to 5.

        The accuracy is the part of pairs i < j of one photograph, pristine included, that are in order (where levels
        of a type are not ordered: that are below pristine).
        """
        was_training = tower.training
        tower.eval()
        pristine = quality(tower, anchors, self.pristine, half).mean(1)
        accuracy, falling = {}, 0
        for name, pictures in zip(self.names, self.degraded, strict=True):
            q = quality(tower, anchors, pictures.flatten(0, 1), half).mean(1).unflatten(0, pictures.shape[:2])
            ladder = torch.cat([pristine[:, None], q], dim=1)
            right = ladder[:, :, None] > ladder[:, None, :]
            rows = [0] if not DEGRADATIONS[name].monotone else range(LEVELS)
            accuracy[name] = float(torch.cat([right[:, i, i + 1 :].float().flatten() for i in rows]).mean())
            falling += int((q.mean(0).diff() < 0).all())
        tower.train(was_training)
        return accuracy, falling / len(self.names)
