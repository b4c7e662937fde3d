"""Fine-tuning of the later blocks to opinion scores, together with degraded crops."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...errors import SettingsError
from ...screen import Screen
from ...towers.mobile import MobileTower
from ..ema import update_ema, warmed_decay
from .crops import Crops
from .frozen import FROZEN, Passed, late_statistics, same_size, statistics
from .heads import Head, fit_head

# All values are our own choice, see weights/PROVENANCE.md.
EPOCHS = 4
BATCH = 16  # rated images, and crops, of a step
LEARNING_RATE, WEIGHT_DECAY, WARMUP, CLIP = 1e-4, 0.01, 20, 1.0
WINDOW = 40  # side of the random window of a rated image that a step sees, in cells of 8 pixels
DROPOUT = 0.5  # of the standardised statistics
CROPS_LOSS = 0.5  # weight of the crops' loss
SQUARED = 0.1  # weight of the mean squared error beside 1 - PLCC
AVERAGE = 0.98  # decay of the weights' moving average, which becomes the model
STRENGTH = 300.0  # of the ridge regressions
CROPS = 3000  # crops in a ridge regression
CROPS_WEIGHT = 0.15  # of a crop in it; a rated image, with its mirror image, has 1
EXTREMES = (0.03, 0.97)  # opinion scores are clamped to these shares of their range before the logit


@dataclass(frozen=True)
class Rated:
    """Rated images that have passed the frozen blocks.

    Attributes:
        passed: the 2N images, each followed by its mirror image.
        logits: (N,) logit of the opinion score's place in its range.
    """

    passed: Passed
    logits: Tensor

    def part(self, members: Sequence[int]) -> Rated:
        """Return some of the images."""
        both = [row for k in members for row in (2 * k, 2 * k + 1)]
        chosen = Passed([self.passed.activations[k] for k in both], self.passed.early[both])
        return Rated(chosen, self.logits[list(members)])


def logits_of(opinions: Tensor, low: float, high: float) -> Tensor:
    """Map opinion scores in low..high, higher being better, to logits."""
    return torch.logit(((opinions.double() - low) / (high - low)).clamp(*EXTREMES)).float()


def fit_opinions(tower: MobileTower, rated: Rated, crops: Crops, seed: int, epochs: int = EPOCHS) -> Head:
    """Fine-tune the tower in place and fit a quality head to it.

    From a ridge regression on, the later blocks and the head learn to correlate with both targets: 1 - PLCC within the
    rated images of a step and within its crops. The head is then fitted anew to the tower with averaged weights.

    Returns:
        The head, whose output is the logit of the opinion score.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"opinions {seed}")
    mean, std = rated.logits.mean(), rated.logits.std()
    targets = ((rated.logits - mean) / std).repeat_interleave(2)
    some = rng.sample(range(len(crops.targets)), min(CROPS, len(crops.targets)))
    few = Crops(Passed([crops.passed.activations[k] for k in some], crops.passed.early[some]), crops.targets[some])
    start = _regressed(tower, rated, targets, few)
    if epochs:
        _fine_tune(tower, rated, targets, crops, start, rng, epochs)
    return _regressed(tower, rated, targets, few).scaled(float(std), float(mean))


def _regressed(tower: MobileTower, rated: Rated, targets: Tensor, crops: Crops) -> Head:
    parts = [
        (statistics(tower, rated.passed), targets, 0.5),
        (statistics(tower, crops.passed), crops.targets, CROPS_WEIGHT),
    ]
    return fit_head(parts, STRENGTH)


def _fine_tune(
    tower: MobileTower, rated: Rated, targets: Tensor, crops: Crops, start: Head, rng: random.Random, epochs: int
) -> None:
    learned = nn.ParameterList([nn.Parameter(start.weight.clone()), nn.Parameter(torch.tensor(start.bias))])
    trained = nn.ModuleList([*tower.trunk.blocks[FROZEN:], learned])
    trained.requires_grad_(True)
    average = copy.deepcopy(trained)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = [batch for _ in range(epochs) for batch in _epoch(rated, rng)]
    if not steps:
        raise SettingsError(f"fewer than {BATCH} rated images to train on have the same size; expected a step's batch")
    bar = tqdm(steps, desc="fine-tuning", unit="step", file=Screen())
    for step, images in enumerate(bar):
        for group in optimiser.param_groups:
            warm, cosine = min(1.0, (step + 1) / WARMUP), 0.5 * (1 + math.cos(math.pi * step / len(steps)))
            group["lr"] = LEARNING_RATE * warm * cosine
        chosen = [rng.randrange(len(crops.targets)) for _ in range(BATCH)]
        loss = torch.zeros(())
        for passed, members, wanted, weight in (
            (rated.passed, images, targets, 1.0),
            (crops.passed, chosen, crops.targets, CROPS_LOSS),
        ):
            activations = _window(torch.stack([passed.activations[k] for k in members]), rng)
            found = torch.cat([passed.early[members], late_statistics(tower, activations)], dim=1)
            out = F.dropout(start.inputs(found), DROPOUT) @ learned[0] + learned[1]
            squared = F.mse_loss(out, wanted[members])
            loss = loss + weight * (1 - _plcc(out, wanted[members]) + SQUARED * squared)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimiser.step()
        update_ema(average, trained, warmed_decay(AVERAGE, step + 1))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    trained.load_state_dict(average.state_dict())
    trained.requires_grad_(False)


def _epoch(rated: Rated, rng: random.Random) -> list[list[int]]:
    """Draw batches of images of equal size, each image or its mirror image once."""
    order = [2 * k + rng.randrange(2) for k in rng.sample(range(len(rated.logits)), len(rated.logits))]
    return list(same_size(rated.passed, order, BATCH, whole=True))


def _window(activations: Tensor, rng: random.Random) -> Tensor:
    height, width = (min(WINDOW, side) for side in activations.shape[2:])
    top = rng.randint(0, activations.shape[2] - height)
    left = rng.randint(0, activations.shape[3] - width)
    return activations[:, :, top : top + height, left : left + width]


def _plcc(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-6)
