"""Recipes for learning prompts: those of published contexts and papers, and the networks to start from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SettingsError
from ..images.convert import MIN_SIDE
from ..metrics import prompt_iqa
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from ..metrics.prompt_iqa import PromptIQA
from ..metrics.registry import metric_spec, with_context, with_deep_prompts

LOSSES = ("mse", "mse+plcc")
KEEP = ("last", "best")


@dataclass(frozen=True)
class Recipe:
    """How prompts are learned.

    Attributes:
        name: key in `RECIPES` of the recipe that the values are based on.
        optimiser: name of a class in `torch.optim`, used with its defaults except for the learning rate.
        learning_rate: learning rate of the first epoch.
        epochs: passes over the training images; an incomplete last batch is skipped.
        period: the learning rate falls along half a cosine that would reach zero after `period * epochs` epochs; None:
            it stays.
        batch: images per step; all images if there are fewer.
        crop: side in pixels of a random square crop; 0: the whole image at its own size, or for deep prompts a window.
        loss: "mse", or "mse+plcc" for MSE + (1 - PLCC of the batch) / 2, of scores and opinion scores in 0..1.
        shared: (contexts only) whether all prompts share one context (n_ctx, W), or have one each, (2P, n_ctx, W).
        context_std: standard deviation of a fresh context's normal initialisation; None: the architecture's default.
        n_ctx: tokens of a context, or of the prompts of a block.
        seed: determines the fresh prompts, the held-out images, the order, the crops and the mirroring.
        mirror: whether images are mirrored left to right with probability 1/2.
        keep: "last" for the prompts of the last epoch, or "best" for those of the epoch with the highest SRCC on the
            held-out images, which is then optimistic.
        patience: with "best", epochs without a higher SRCC after which training ends; 0: it goes on.
        alignment_weight: factor of the loss of alignment scores.

    Raises:
        SettingsError: a value out of range.
    """

    name: str
    optimiser: str
    learning_rate: float
    epochs: int
    period: float | None
    batch: int
    crop: int
    loss: str
    shared: bool
    context_std: float | None
    n_ctx: int
    seed: int
    mirror: bool = True
    keep: str = "last"
    patience: int = 0
    alignment_weight: float = 0.0

    def __post_init__(self) -> None:
        def need(good: bool, what: str, expected: str) -> None:
            if not good:
                raise SettingsError(f"{what} is {getattr(self, what)!r}; expected {expected}")

        need(0 < self.learning_rate < 1e30, "learning_rate", "a positive number below 1e30")
        need(self.epochs >= 1, "epochs", "at least 1")
        need(self.loss in LOSSES, "loss", " or ".join(LOSSES))
        least = 2 if self.loss == "mse+plcc" else 1
        need(self.batch >= least, "batch", f"at least {least}" + (" for a correlation" if least == 2 else ""))
        need(self.keep in KEEP, "keep", " or ".join(KEEP))
        need(self.crop == 0 or self.crop >= MIN_SIDE, "crop", f"0 for whole images, or at least {MIN_SIDE} pixels")

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        if self.period is None:
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / (self.epochs * self.period)))


# [S] published by the authors, [D] derived from what they published, [U] our own choice or unverified.
RECIPES = {
    # CLIP-IQA+ by its authors: clipiqa_coop_koniq.py and coopclipiqa.py of github.com/IceClear/CLIP-IQA.
    "official": Recipe(
        name="official",
        optimiser="SGD",  # [S] without momentum or weight decay
        learning_rate=0.002,  # [S]
        epochs=1450,  # [D] the published context is that of step 80,000 [S]: 55 steps of 128 of KonIQ's 7,058 images
        period=3.75,  # [D] the cosine is over 300,000 steps [S], not 80,000; its floor of 1e-7 [S] is left out
        batch=128,  # [D] 64 on each GPU, and a remark that there are 2 [S]
        crop=0,  # [S] KonIQ-10k at 1024x768, mirrored at random
        loss="mse",  # [S] to MOS / 100
        shared=True,  # [S]
        context_std=0.02,  # [S]
        n_ctx=16,  # [S]
        seed=123,  # [U] the authors set none
    ),
    # Options of pyiqa for CLIP-IQA+ (options/train/CLIPIQA) and QualiCLIP+ (options/train/QualiCLIP).
    "pyiqa": Recipe(
        name="pyiqa",
        optimiser="Adam",  # [S]
        learning_rate=2e-3,  # [S]
        epochs=50,  # [S]
        period=1.0,  # [S] a step of the cosine after each epoch
        batch=8,  # [S]
        crop=384,  # [S] mirrored at random
        loss="mse+plcc",  # [S] with equal weights
        shared=False,  # [S]
        context_std=None,  # [S] N(0, 0.02) for QualiCLIP+, the embedding of `X` for CLIP-IQA+
        n_ctx=16,  # [S]
        seed=123,  # [S] the number; the values drawn with it differ
    ),
    # CLIP-DQA by its authors: github.com/JunFu1995/CLIP-DQA.
    "clip-dqa": Recipe(
        name="clip-dqa",
        optimiser="Adam",  # [S] without weight decay
        learning_rate=1e-4,  # [S]
        epochs=25,  # [S]
        period=None,  # [S]
        batch=64,  # [S]
        crop=0,  # [S] a random window of 224, and the whole image
        loss="mse",  # [S] to MOS / 100
        shared=False,
        context_std=None,  # [S] N(0, 0.02); maps as PyTorch does
        n_ctx=8,  # [S]
        seed=10,  # [S] the number; the values drawn with it differ
        mirror=False,  # [S]
        keep="best",  # [D] from the name of the file; [U] that the SRCC decides
    ),
    # CLIP-AGIQA by its authors: github.com/JunFu1995/CLIP-AGIQA.
    "clip-agiqa": Recipe(
        name="clip-agiqa",
        optimiser="Adam",  # [S] without weight decay
        learning_rate=1e-4,  # [S]
        epochs=50,  # [S] at most
        period=None,  # [S]
        batch=64,  # [S]
        crop=0,  # [S] a random window of 224
        loss="mse",  # [S] to MOS / 5 (AGIQA-3K) or MOS / 100 (AIGCIQA2023)
        shared=False,
        context_std=None,  # [U] N(0, 0.02), as in CLIP-DQA; maps as PyTorch does
        n_ctx=8,  # [S]
        seed=10,  # [S] the number; the values drawn with it differ
        keep="best",  # [S]; [U] that the SRCC decides
        patience=15,  # [S]
        alignment_weight=0.1,  # [S]
    ),
}
CONTEXT_RECIPES = ("official", "pyiqa")


def default_recipe(metric: str) -> Recipe:
    """Return the recipe of a metric's published context, or of its paper.

    Raises:
        SettingsError: an unknown metric, or one without learned prompts.

    Example:
        >>> default_recipe("clipiqa+").name
        'official'
    """
    if metric in with_deep_prompts():
        return RECIPES[metric]
    if metric_spec(metric).name not in with_context():
        raise SettingsError(
            f"{metric} has no prompts to learn; expected one of {', '.join([*with_context(), *with_deep_prompts()])}"
        )
    return RECIPES["official" if metric == "clipiqa+" else "pyiqa"]


def fresh_deep_network(metric: str, recipe: Recipe, start: str | Path | None = None, **options: Any) -> DeepPromptIQA:
    """Create a metric by deep prompts to learn.

    Args:
        metric: its name.
        recipe: decides length and seed of fresh prompts.
        start: file of prompts to start from, see `DeepPromptIQA`; None: fresh ones.
        options: further arguments of `DeepPromptIQA`.
    """
    if start is not None:
        return DeepPromptIQA(metric, weights=start, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return DeepPromptIQA(metric, pretrained=False, n_ctx=recipe.n_ctx, **options)


def fresh_network(metric: str, recipe: Recipe, **options: Any) -> PromptIQA:
    """Create a metric with a fresh context; `options` are arguments of the architecture, such as `weights`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net: PromptIQA = getattr(prompt_iqa, metric_spec(metric).arch)(
            metric, pretrained=False, n_ctx=recipe.n_ctx, prompt_specific_ctx=not recipe.shared, **options
        )
        assert net.prompt_learner is not None
        if recipe.context_std is not None:
            torch.nn.init.normal_(net.prompt_learner.ctx, std=recipe.context_std)
    return net
