"""Quality as a loss for training loops."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ImageError, SettingsError
from ..metrics.base import check_batch
from ..metrics.prompts import ATTRIBUTES
from ..metrics.specs import split_spec
from ..scoring.building import MetricLike
from ..towers.recompute import recompute_activations
from .frozen import FrozenMetric
from .range import clamp_keeping_gradient, far_outside
from .views import check_crops, check_scales, crop_boxes, cut, resized

logger = logging.getLogger(__name__)

#: The first calls of a loss, whose images are checked: reading their values waits for the GPU.
CHECKED_CALLS = 3
REDUCTIONS = ("mean", "sum", "none")
RELATIVE_TO = (None, "input", "target")


class QualityLoss(nn.Module):
    """Distance of an image's quality from the best score, differentiable in the image. Lower is better, 0..1.

    With s the score on the scale 0 (worst) to 1 (best), an image's loss is

        1 - s(x)                     relative_to=None
        max(0, s(target) - s(x))     relative_to="target", and likewise "input"

    averaged over the crops and scales, times `weight`. The relative forms ask how much worse the image is than the
    other one, and reward nothing beyond: once the score is reached, the gradient is zero. A network that optimises a
    frozen metric without such a bound finds images that only the metric likes (reward hacking).
    `relative_to="target"` is for training with ground truth; `"input"` is a guard that an image must not come out worse
    than it went in.

    The metric is copied, frozen and always in eval mode. It does not appear in the parent's parameters, buffers or
    state dict, but follows the parent's `.to()`, `.cuda()`, `.half()` and `.to_empty()` (which leaves its values
    undefined, like the parent's: build a new loss).

    Values outside 0..1 count as 0 or 1, as in a saved image. Their gradient is kept where it leads back into 0..1, and
    is zero where it leads farther out: no pixel is stuck outside, and none drifts away without limit. The first calls
    log one warning if values are far outside, as of a forgotten division by 255 (not in a compiled graph, which it
    would break). NaN stays NaN.

    Args:
        metric: a no-reference metric: its name (also with prompts, `"qualiclip-mini+:sharpness"`), the file of a model
            trained with this package, a metric of `pyiqa.create_metric` (with or without `as_loss`), or its network.
            Named ones are built on the CPU.
        weight: factor on the loss, at least 0.
        reduction: "mean" or "sum" over the batch, or "none".
        relative_to: None, "target" or "input", see above.
        crops: (n, size): score n random crops of `size` pixels a side of every image, or the whole of a shorter side,
            instead of the image. Positions are new in every call, drawn by torch's generator of the image's device. An
            image that is smaller than a crop is scored whole, of which one warning is logged.
        scales: factors, at most 4, by which images are resized (bilinear, antialiased) before they are scored or
            cropped.
        checkpointing: recompute activations in the backward pass instead of storing them: much less memory, and the
            time of another forward pass.
        attributes: those of the metric's attributes whose mean is the score. Default: all of them, unless some say what
            an image is like and not how good it is, such as brightness and contrast of `"qualiclip-mini+:look"`: then
            a choice is needed. A metric of one attribute (`"qualiclip-mini+:contrast"`) needs none.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey; H and W at least 32, at every scale
        target: the same N, H and W as x
        input: the same N; H and W may differ, as in super-resolution, unless there are crops
        -> scalar, or (N,) without reduction; float32 (float64 for a metric in double precision).

    Raises:
        SettingsError: not a metric, a full-reference metric, one whose range of scores is unknown or infinite, or an
            invalid option; in `forward`, the image that `relative_to` names is missing.
        ImageError: in `forward`, a wrong shape, size or dtype, no image, or an image that is too small.

    Example:
        >>> import torch
        >>> loss = QualityLoss("qualiclip-mini", relative_to="target")
        >>> restored = torch.rand(1, 3, 64, 64, requires_grad=True)
        >>> loss(restored, torch.rand(1, 3, 64, 64)).backward()
        >>> restored.grad.shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(
        self,
        metric: MetricLike,
        weight: float = 1.0,
        reduction: str = "mean",
        relative_to: str | None = None,
        crops: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        checkpointing: bool = False,
        attributes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_weight(weight, "weight")
        if reduction not in REDUCTIONS:
            raise SettingsError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        if relative_to not in RELATIVE_TO:
            raise SettingsError(f"relative_to is {relative_to!r}; expected None, 'input' or 'target'")
        if not isinstance(checkpointing, bool):
            raise SettingsError(f"checkpointing is {checkpointing!r}; expected True or False")
        self.weight, self.reduction, self.relative_to = float(weight), reduction, relative_to
        self.crops, self.scales = check_crops(crops), check_scales(scales)
        self.metric = FrozenMetric.of(metric)
        self.worst, self.best = self.metric.bounds()
        self.attributes = chosen_attributes(self.metric, attributes)
        self.checkpointing = checkpointing
        if checkpointing:
            recompute_activations(self.metric.network)
        self._calls = 0
        self._warned: set[str] = set()

    def extra_repr(self) -> str:
        options = ("weight", "reduction", "relative_to", "crops", "scales", "checkpointing", "attributes")
        return ", ".join([repr(self.metric.name), *(f"{name}={getattr(self, name)!r}" for name in options)])

    def forward(self, x: Tensor, target: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            x: the network's output.
            target: the ground truth, needed for `relative_to="target"` and otherwise ignored, so that the loss can
                stand where a pixel loss is called.
            input: the network's input, needed for `relative_to="input"` and otherwise ignored.
        """
        x = self._prepared(x, "x")
        other = self._other(x, target, input)
        if not torch.compiler.is_compiling():
            self._calls += 1
        each = [self._loss_of_scale(x, other, scale) for scale in self.scales]
        loss = self.weight * (each[0] if len(each) == 1 else torch.stack(each).mean(dim=0))
        return loss if self.reduction == "none" else loss.sum() if self.reduction == "sum" else loss.mean()

    def _other(self, x: Tensor, target: Tensor | None, input: Tensor | None) -> Tensor | None:
        """Return the image to compare with, prepared."""
        if self.relative_to is None:
            return None
        given = target if self.relative_to == "target" else input
        if given is None:
            call = "loss(restored, target)" if self.relative_to == "target" else "loss(restored, input=degraded)"
            raise SettingsError(f"relative_to={self.relative_to!r} needs the {self.relative_to}: call {call}")
        other = self._prepared(given.detach(), self.relative_to)
        if len(other) != len(x):
            raise ImageError(f"{self.relative_to} has {len(other)} images and x has {len(x)}; expected as many")
        if other.shape[2:] != x.shape[2:] and (self.relative_to == "target" or self.crops is not None):
            expected = (
                "expected the ground truth in the size of the network's output"
                if self.relative_to == "target"
                else "crops need equal sizes: resize one, or leave crops out"
            )
            raise ImageError(
                f"{self.relative_to} is {other.shape[3]}x{other.shape[2]} pixels and x is {x.shape[3]}x{x.shape[2]}; "
                f"{expected}"
            )
        return other

    def _prepared(self, x: Tensor, name: str) -> Tensor:
        x = check_batch(x)
        # Compiled, a log would break the graph.
        if not torch.compiler.is_compiling() and self._calls < CHECKED_CALLS and (found := far_outside(x)) is not None:
            self._warn("values", f"{name} has {found}")
        # Resizing needs float32.
        return clamp_keeping_gradient(x.to(torch.promote_types(x.dtype, torch.float32)))

    def _loss_of_scale(self, x: Tensor, other: Tensor | None, scale: float) -> Tensor:
        """Compute each image's loss at one scale: (N, 3, H, W) -> (N,)."""
        x = resized(x, scale)
        boxes = None if self.crops is None else crop_boxes(x, *self.crops)
        if boxes is not None and not torch.compiler.is_compiling() and x.shape[2:] == boxes[2:]:
            self._warn(
                "crops",
                f"an image of {x.shape[3]}x{x.shape[2]} pixels is not larger than a crop of crops={self.crops}, so it "
                "is scored whole; expected smaller crops or larger images",
            )
        scores = self._scores(x if boxes is None else cut(x, boxes))
        if other is None:
            loss = 1 - scores
        else:
            with torch.no_grad():
                other = resized(other, scale)
                bound = self._scores(other if boxes is None else cut(other, boxes))
            loss = (bound - scores).relu()
        return loss.unflatten(0, (len(x), -1)).mean(dim=1)

    def _scores(self, x: Tensor) -> Tensor:
        """Score images on the scale 0 (worst) to 1 (best): (M, 3, H, W) -> (M,)."""
        scores = self.metric.scores(x)
        if self.attributes != self.metric.attributes:
            # Not by a list of indices, which would be copied to the GPU in every call.
            columns = [self.metric.attributes.index(name) for name in self.attributes]
            scores = torch.stack([scores[:, column] for column in columns], dim=1)
        return (scores.mean(dim=1) - self.worst) / (self.best - self.worst)

    def _warn(self, kind: str, message: str) -> None:
        """Log a warning, one of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("QualityLoss: %s", message)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QualityLoss:
        """Apply `.to()` and the like, all of which go through this method of `nn.Module`, to the network too."""
        self.metric.network._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def check_weight(weight: float, name: str) -> None:
    """Raise `SettingsError` unless a weight is a finite number of at least 0.

    Args:
        weight: the number.
        name: of the option.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        hint = " (YAML reads 1e-2 as text: write 0.01 or 1.0e-2)" if isinstance(weight, str) else ""
        raise SettingsError(f"{name} is {weight!r}; expected a number of at least 0{hint}")


def chosen_attributes(metric: FrozenMetric, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """Return the attributes whose mean is the score.

    Args:
        metric: whose attributes they are.
        chosen: the caller's choice; None: all.

    Raises:
        SettingsError: not some of the metric's attributes; or no choice from several of which some only describe.
    """
    known = metric.attributes
    if chosen is None:
        if len(known) > 1 and metric.describing:
            judging = [name for name in known if name not in metric.describing]
            advice = f"all or some of {', '.join(judging)}" if judging else "those that the loss is to raise"
            own, prompts = split_spec(metric.name)
            if prompts is not None and judging and judging[0] in ATTRIBUTES:
                advice += f", or one of them in the metric: {own}:{judging[0]}"
            raise SettingsError(
                f"{metric.name} has attributes of which more is not better ({', '.join(metric.describing)}); "
                f"expected attributes=[...] with {advice}"
            )
        return known
    several = tuple(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else ()
    if not several or not all(several.count(name) == 1 and name in known for name in several):
        raise SettingsError(f"attributes is {chosen!r}; expected a list of some of {', '.join(known)}, each once")
    return several
