"""Quality as a loss for training loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import Tensor, nn

from ..errors import SettingsError


class QualityLoss(nn.Module):
    """Distance of a batch's mean quality from the best score, differentiable in the image. Lower is better.

    The metric is copied, frozen and always in eval mode. It does not appear in the parent's parameters, buffers or
    state dict, but follows the parent's `.to()`, `.cuda()`, `.half()` and `.to_empty()` (which leaves its values
    undefined, like the parent's: build a new loss).

    Args:
        metric: a no-reference metric of `pyiqa.create_metric` (with or without `as_loss`), or its network.

    Shape:
        x: (N, 3, H, W), RGB in 0..1, H and W at least 32. Values outside are not clamped, which would cut the gradient.
        -> scalar: `best - mean score`, so `1 - mean score` for scores in 0..1; `mean score - best` if lower is better.

    Raises:
        SettingsError: not a metric, a full-reference metric, or one whose best score is unknown or infinite.

    Example:
        >>> import pyiqa, torch
        >>> loss = QualityLoss(pyiqa.create_metric("qualiclip-mini", device="cpu"))
        >>> restored = torch.rand(1, 3, 64, 64, requires_grad=True)
        >>> loss(restored).backward()
        >>> restored.grad.shape
        torch.Size([1, 3, 64, 64])
    """

    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        if not isinstance(metric, nn.Module):
            raise SettingsError(
                f"metric is {metric!r}; expected a metric, such as pyiqa.create_metric('qualiclip-mini')"
            )
        if getattr(metric, "metric_mode", "NR") != "NR":
            raise SettingsError(f"{getattr(metric, 'metric_name', metric)} needs a reference; expected an NR metric")
        score_range = getattr(metric, "score_range", None)
        bounds = str(score_range).split(",")
        self.lower_better = bool(getattr(metric, "lower_better", False))
        try:
            self.best = float(bounds[0] if self.lower_better else bounds[1])
        except (ValueError, IndexError):
            self.best = math.nan
        if not math.isfinite(self.best):
            raise SettingsError(
                f"score_range is {score_range!r}; expected a metric whose best score is known and finite"
            )
        network = copy.deepcopy(getattr(metric, "net", metric)).eval().requires_grad_(False)
        # A tuple hides the network from parameters(), state_dict(), train(), DDP and FSDP.
        self._unregistered: tuple[nn.Module] = (network,)

    def forward(self, x: Tensor) -> Tensor:
        return (self._unregistered[0](x).mean() - self.best) * (1.0 if self.lower_better else -1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QualityLoss:
        """Apply `.to()` and the like, all of which go through this method of `nn.Module`, to the network too."""
        self._unregistered[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self
