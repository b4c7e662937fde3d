"""The loss and the metric in option files of pyiqa and BasicSR, under these packages' names for options.

pyiqa finds them by entry points. For BasicSR and packages with registries like its own, call `register`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, SettingsError, did_you_mean
from ..images.convert import MIN_SIDE
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
        SettingsError: no metric, an unknown option, both `weight` and `loss_weight`; or as
            `qualiclip_pyiqa.QualityLoss`.
    """

    def __init__(self, metric: str | None = None, loss_weight: float | None = None, **options: Any) -> None:
        known = [*inspect.signature(loss.QualityLoss).parameters, "loss_weight"]
        _refuse_unknown(options, type(self).__name__, known)
        if metric is None:
            raise SettingsError(f"{type(self).__name__} has no metric; expected one such as metric: qualiclip-mini+")
        if loss_weight is not None:
            if "weight" in options:
                raise SettingsError("weight and loss_weight were given, which mean the same; expected one of them")
            loss.check_weight(loss_weight, "loss_weight")
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
    input_order: str = "HWC",
    test_y_channel: bool = False,
    **unknown: object,
) -> float:
    """Score an image of a validation.

    Args:
        img: (H, W, 3) BGR or (H, W) grey, uint8, as `tensor2img` of BasicSR returns it; (3, H, W) with `input_order`.
        img2: the ground truth, ignored.
        metric: name of a no-reference metric with one score, or the file of a model trained with this package.
        crop_border: pixels to cut off each edge.
        better: "higher" or "lower", which the trainers read to choose the best model; checked against the metric.
        input_order: "HWC" or "CHW".
        test_y_channel: False, which option files for other metrics write: the score is of the colours too.
        unknown: refused, with a list of the options.

    Returns:
        The score, on the metric's own scale.

    Raises:
        SettingsError: an invalid option.
        ImageError: not such an image, or one that `crop_border` leaves too little of.

    Example:
        >>> image = np.full((48, 64, 3), 128, np.uint8)
        >>> 0 <= calculate_quality(image, metric="qualiclip-mini", better="higher") <= 1
        True
    """
    known = inspect.signature(calculate_quality).parameters
    _refuse_unknown(unknown, "calculate_quality", [name for name in known if name not in ("img", "img2", "unknown")])
    if not isinstance(metric, str):
        raise SettingsError(f"metric is {metric!r}; expected a name, such as qualiclip-mini+")
    if test_y_channel:
        raise SettingsError(f"test_y_channel is {test_y_channel!r}; expected False: the score is of the colours too")
    if input_order not in ("HWC", "CHW"):
        raise SettingsError(f"input_order is {input_order!r}; expected 'HWC' or 'CHW'")
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
    if input_order == "CHW" and isinstance(img, np.ndarray) and img.ndim == 3:
        img = img.transpose(1, 2, 0)
    rgb = from_bgr(img)
    height, width = (side - 2 * crop_border for side in rgb.shape[2:])
    if crop_border and min(height, width) < MIN_SIDE:
        raise ImageError(
            f"crop_border is {crop_border}, which leaves {max(width, 0)}x{max(height, 0)} pixels of an image of "
            f"{rgb.shape[3]}x{rgb.shape[2]}; the smallest that can be scored is {MIN_SIDE}x{MIN_SIDE}"
        )
    inner = rgb[:, :, crop_border : crop_border + height, crop_border : crop_border + width]
    return float(built.measure(inner.contiguous().to(device)))


def _refuse_unknown(options: Iterable[str], kind: str, known: Collection[str]) -> None:
    """Raise `SettingsError` if an option is not one of those known."""
    for name in options:
        if name not in known:
            advice = did_you_mean(name, known)
            raise SettingsError(f"{kind} has no option {name!r}; expected some of {', '.join(known)}{advice}")


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
