"""A metric for use inside a training loop: its frozen network, apart from the modules around it."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..metrics.specs import PromptedMetric
from ..metrics.words import describes
from ..scoring.building import MetricLike, build_metrics, columns_of, named_metrics
from ..scoring.description import attributes_of, lower_is_better


@dataclass(frozen=True)
class FrozenMetric:
    """A metric's network, frozen and in eval mode.

    Not an `nn.Module`, so that a module that holds it does not register it: the network is in no state dict, optimiser,
    `train()`, DistributedDataParallel or FSDP.

    Attributes:
        name: of the metric, as the caller wrote it.
        network: (N, 3, H, W) -> scores.
        attributes: names of the scores.
        describing: those of them that say what an image is like, and not how good it is.
        score_range: lowest and highest score, as pyiqa writes it: "0, 1"; None if unknown.
        lower_better: whether a lower score means a better image.
    """

    name: str
    network: nn.Module
    attributes: tuple[str, ...]
    describing: tuple[str, ...]
    score_range: str | None
    lower_better: bool

    @classmethod
    def of(cls, metric: MetricLike) -> FrozenMetric:
        """Build a named metric on the CPU, or copy a module, so that the caller's stays unchanged.

        Raises:
            SettingsError: not a metric, or one that needs a reference.
            PromptError: invalid prompts.
            WeightsError: weights are missing.
        """
        if not isinstance(metric, str | os.PathLike | PromptedMetric | nn.Module):
            raise SettingsError(f"metric is {metric!r}; expected a name or a metric, such as 'qualiclip-mini'")
        named = named_metrics(metric)
        (name,) = named
        if isinstance(metric, nn.Module):
            network = copy.deepcopy(getattr(metric, "net", metric))
        else:
            metric = build_metrics(named, torch.device("cpu"))[name]
            network = getattr(metric, "net", metric)
        if getattr(metric, "metric_mode", "NR") != "NR":
            raise SettingsError(f"{name} needs a reference; expected an NR metric")
        found = attributes_of(dict.fromkeys(columns_of(name, network), network)).values()
        return cls(
            name=name,
            network=network.eval().requires_grad_(False),
            attributes=tuple(attribute for attribute, _ in found),
            describing=tuple(attribute for attribute, pairs in found if describes(attribute, pairs)),
            score_range=getattr(metric, "score_range", None),
            lower_better=lower_is_better(metric),
        )

    def bounds(self) -> tuple[float, float]:
        """Return the worst and the best score.

        Raises:
            SettingsError: they are unknown or infinite.
        """
        try:
            # pyiqa marks bounds that are only typical by a tilde.
            low, high = (float(bound.strip().removeprefix("~")) for bound in str(self.score_range).split(","))
        except ValueError:
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SettingsError(
                f"score_range is {self.score_range!r}; expected a metric whose range of scores is finite"
            )
        return (high, low) if self.lower_better else (low, high)

    def scores(self, images: Tensor) -> Tensor:
        """Score images, differentiably: (N, 3, H, W) -> (N, A)."""
        scores: Tensor = self.network(images)
        if scores.numel() % len(images) or (scores.dim() == 0 and len(images) > 1):
            raise SettingsError(
                f"the metric returned a tensor of shape {tuple(scores.shape)} for {len(images)} images; "
                "expected a score for each image"
            )
        return scores.reshape(len(images), -1)

    @torch.no_grad()
    def measure(self, images: Tensor) -> Tensor:
        """Score images for a validation: without gradient, and in the network's precision whatever the loop's is."""
        with torch.autocast(images.device.type, enabled=False):
            return self.scores(images)
