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
from ..scoring.building import MetricLike, blind_metric, build_metrics, named_metrics
from ..scoring.description import lower_is_better


@dataclass(frozen=True)
class FrozenMetric:
    """A metric's network, frozen and in eval mode.

    Not an `nn.Module`, so that a module that holds it does not register it: the network is in no state dict, optimiser,
    `train()`, DistributedDataParallel or FSDP.

    Attributes:
        network: (N, 3, H, W) -> scores.
        attributes: names of the scores.
        score_range: lowest and highest score, as pyiqa writes it: "0, 1"; None if unknown.
        lower_better: whether a lower score means a better image.
    """

    network: nn.Module
    attributes: tuple[str, ...]
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
        if isinstance(metric, str | os.PathLike | PromptedMetric):
            metric = build_metrics(named_metrics({"metric": metric}), torch.device("cpu"))["metric"]
            network = getattr(metric, "net", metric)
        elif isinstance(metric, nn.Module):
            network = copy.deepcopy(getattr(metric, "net", metric))
        else:
            raise SettingsError(f"metric is {metric!r}; expected a name or a metric, such as 'qualiclip-mini'")
        if getattr(metric, "metric_mode", "NR") != "NR":
            raise SettingsError(f"{getattr(metric, 'metric_name', metric)} needs a reference; expected an NR metric")
        own = blind_metric(network)
        return cls(
            network=network.eval().requires_grad_(False),
            attributes=("quality",) if own is None else own.attributes,
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
