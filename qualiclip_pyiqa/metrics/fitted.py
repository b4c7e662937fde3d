"""Metrics of `qualiclip fit`: a linear regression on an image tower's statistics.

    x = tower.statistics(rgb) (N, S)      z = standardised(x, mean, scale)      y = z @ weight + intercept

The score is `bounded(y, low, high)`, low and high being the smallest and largest opinion score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingsError, WeightsError
from ..images.convert import MIN_SIDE
from ..pretrained.fitted import load_fitted
from ..pretrained.verify import provenance
from ..towers.autocast import kept_precise, without_autocast
from ..towers.base import freeze
from .base import BlindMetric, pixel_statistics
from .registry import FITTED_PAPER

# Largest absolute value of a standardised statistic.
LIMIT = 3.0
# Share of half the range, at either end, in which a prediction is bent.
MARGIN = 0.1
HOW_TO_FIT = "qualiclip fit -m TOWER --ratings CSV --images DIR -o FILE.safetensors"


def standardised(statistics: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardise statistics (N, S), softly limited to -LIMIT..LIMIT.

    An image unlike those that the metric was fitted on, such as a black one, has some statistics dozens of standard
    deviations away, which would decide its score alone.
    """
    return LIMIT * torch.tanh((statistics - mean) / (scale * LIMIT))


def bounded(predictions: Tensor, low: float, high: float) -> Tensor:
    """Map a regression's predictions into low..high, keeping their order and a gradient everywhere.

    Predictions in the middle of the range are unchanged; beyond, where `u` is the distance from the middle in halves of
    the range and `t = (|u| - 1 + MARGIN) / MARGIN`, |u| becomes `1 - MARGIN + MARGIN * t / (1 + t)`.

    Example:
        >>> [round(score, 1) for score in bounded(torch.tensor([-50.0, 10, 50, 97, 99, 1000]), 0, 100).tolist()]
        [0.4, 10.0, 50.0, 96.4, 97.2, 100.0]
    """
    middle, half = (low + high) / 2, (high - low) / 2
    u = (predictions - middle) / half
    over = F.relu(u.abs() - (1 - MARGIN)) / MARGIN
    bent = u.sign() * (1 - MARGIN + MARGIN * over / (1 + over))
    return (middle + half * torch.where(over > 0, bent, u)).clamp(low, high)  # only rounding is clamped


def regress(statistics: Tensor, regression: Tensor, intercept: float, low: float, high: float) -> Tensor:
    """Score statistics (M, S) -> (M, 1) by a regression (3, S) of their dtype: mean, scale and weight."""
    mean, scale, weight = regression
    # Not a matrix product, whose order of summation depends on the batch.
    predictions = (standardised(statistics, mean, scale) * weight).sum(dim=1, keepdim=True)
    return bounded(predictions + intercept, low, high)


class FittedIQA(BlindMetric):
    """A metric fitted by `qualiclip fit`, from its file; also `pyiqa.create_metric("fitted", weights=FILE)`.

    Range and direction of the scores are those of the opinion scores.

    Args:
        model_type: `fitted`.
        weights: the file.
        tile: see `BlindMetric`; a metric fitted on whole images may be far off on windows.
        prompts: refused, as the regression takes none.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype
        -> (N, 1), float32 (float64 for a metric in double precision), within the range of the opinion scores.

    Raises:
        SettingsError: no file was passed, or prompts were.
        WeightsError: the file is missing, damaged, of another kind, or its regression does not fit its tower.
    """

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined

    regression: Tensor

    def __init__(
        self,
        model_type: str = "fitted",
        weights: str | Path | None = None,
        tile: int | None = None,
        prompts: object = None,
    ) -> None:
        if not weights:
            raise SettingsError(
                f"{model_type} is a metric of your own; pass weights=FILE (on the command line `qualiclip score -m "
                f"FILE`), made with `{HOW_TO_FIT}`"
            )
        if prompts is not None:
            raise SettingsError(f"{weights} is a metric of `qualiclip fit`, which takes no prompts; leave prompts out")
        model = load_fitted(weights)
        fit = model.fit
        super().__init__(model_type, FITTED_PAPER, f"{fit.low!r}, {fit.high!r}", fit.lower_better, tile)
        self.fit, self.origin = fit, model.tower.origin
        self.tower = freeze(model.tower.image_tower(fit.pos_embedding))
        width = count_statistics(self.tower)
        if model.regression.shape[1] != width:
            raise WeightsError(
                f"{self.origin.path}: its regression takes {model.regression.shape[1]} statistics, but its tower has "
                f"{width}; the file is damaged"
            )
        self.register_buffer("regression", model.regression, persistent=False)

    def encode(self, rgb: Tensor) -> Tensor:
        """Compute the tower's statistics (N, S), in float32 or wider."""
        statistics: Tensor = self.tower.statistics(rgb)  # type: ignore[operator]
        return statistics

    def rate(self, features: Tensor) -> Tensor:
        """Score statistics: (M, S) -> (M, 1)."""
        precise = torch.promote_types(features.dtype, torch.float32)
        with without_autocast(features):
            fit, regression = self.fit, self.regression.to(precise)
            return regress(features.to(precise), regression, fit.intercept, fit.low, fit.high)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedIQA:
        """Apply `.to()` and the like. Half precision is for the tower only."""
        with kept_precise(self, ("regression",)):
            super()._apply(fn, recurse)
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values, and how the metric was fitted."""
        fit = {key: value for key, value in asdict(self.fit).items() if key != "pos_embedding"}
        return super().describe() | {
            "backbone": self.origin.backbone,
            "activation": self.origin.activation,
            "pixel_mean": pixel_statistics(self.tower, "mean"),
            "pixel_std": pixel_statistics(self.tower, "std"),
            "pos_embedding": self.fit.pos_embedding,
            "statistics": self.regression.shape[1],
            "fit": fit,
            "weights": provenance(self.origin.file),
        }


@torch.no_grad()
def count_statistics(tower: torch.nn.Module) -> int:
    """Count the statistics S of a frozen tower, by a pass over the smallest image."""
    grey = torch.full((1, 3, MIN_SIDE, MIN_SIDE), 0.5, dtype=torch.float32, device="cpu")
    statistics: Tensor = tower.statistics(grey)  # type: ignore[operator]
    return statistics.shape[1]
