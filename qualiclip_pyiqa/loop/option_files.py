"""The loss and the metric in option files of pyiqa and BasicSR, under these packages' names for options.

pyiqa finds them by entry points. For BasicSR and packages with registries like its own, call `register`.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import SettingsError
from ..images.tensors import from_bgr
from . import loss
from .frozen import FrozenMetric


class QualityLoss(loss.QualityLoss):
    """`qualiclip_pyiqa.QualityLoss`, whose `weight` may be called `loss_weight` like that of other losses there.

    Args:
        metric: a metric's name, or the file of a model trained with this package.
        loss_weight: `weight` by the name that other losses have.
        options: as for `qualiclip_pyiqa.QualityLoss`.

    Raises:
        SettingsError: both `weight` and `loss_weight`; or as `qualiclip_pyiqa.QualityLoss`.
    """

    def __init__(self, metric: str, loss_weight: float | None = None, **options: Any) -> None:
        if loss_weight is not None:
            if "weight" in options:
                raise SettingsError("weight and loss_weight were given, which mean the same; expected one of them")
            options["weight"] = loss_weight
        super().__init__(metric, **options)


class QualityPerceptualLoss(QualityLoss):
    """The loss for `perceptual_opt`, whose losses return two values, of which the second, a style loss, is None."""

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor | None = None, *, input: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return super().forward(x, target, input=input), None


def calculate_quality(
    img: np.ndarray,
    img2: np.ndarray | None = None,
    metric: str = "qualiclip-mini+",
    crop_border: int = 0,
    better: str | None = None,
) -> float:
    """Score an image of a validation.

    Args:
        img: (H, W, 3) BGR or (H, W) grey, uint8, as `tensor2img` of BasicSR returns it.
        img2: the ground truth, ignored.
        metric: name of a no-reference metric with one score, or the file of a model trained with this package.
        crop_border: pixels to cut off each edge.
        better: "higher" or "lower", which the trainers read to choose the best model; checked against the metric.

    Returns:
        The score, on the metric's own scale.

    Raises:
        SettingsError: an invalid option.
        ImageError: not such an image.

    Example:
        >>> image = np.full((48, 64, 3), 128, np.uint8)
        >>> 0 <= calculate_quality(image, metric="qualiclip-mini", better="higher") <= 1
        True
    """
    built, device = _metric(metric)
    direction = "lower" if built.lower_better else "higher"
    if better not in (None, direction):
        raise SettingsError(f"better is {better!r}; expected {direction!r}, as a {direction} {metric} is better")
    if len(built.attributes) > 1:
        raise SettingsError(
            f"{metric} has {len(built.attributes)} scores; expected one, such as '{metric}:PROMPTS' with the name of "
            f"one attribute ({', '.join(built.attributes)})"
        )
    if isinstance(crop_border, bool) or not isinstance(crop_border, int) or crop_border < 0:
        raise SettingsError(f"crop_border is {crop_border!r}; expected an integer of at least 0")
    height, width = img.shape[:2]
    inner = img[crop_border : height - crop_border, crop_border : width - crop_border]
    return float(built.measure(from_bgr(inner).to(device)))


@functools.lru_cache(maxsize=8)
def _metric(name: str) -> tuple[FrozenMetric, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = FrozenMetric.of(name)
    built.network.to(device)
    return built, device


class Registry(Protocol):
    """A registry of pyiqa or BasicSR."""

    def register(self, obj: Any) -> Any: ...


def register(losses: Registry, metrics: Registry) -> None:
    """Add the losses and the metric to registries of BasicSR's kind.

    Example:
        >>> from pyiqa.utils.registry import Registry  # or LOSS_REGISTRY, METRIC_REGISTRY of basicsr.utils.registry
        >>> losses, metrics = Registry("loss"), Registry("metric")
        >>> register(losses, metrics)
        >>> "QualityLoss" in losses, "QualityPerceptualLoss" in losses, "calculate_quality" in metrics
        (True, True, True)
    """
    for each in (QualityLoss, QualityPerceptualLoss):
        losses.register(each)
    metrics.register(calculate_quality)
