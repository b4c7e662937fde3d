"""Quality as a loss for training loops."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..errors import SettingsError


class QualityLoss(nn.Module):
    """Lower is better: how far a batch's mean quality is from the best score, differentiable in the picture.

    The metric is copied, frozen and kept in eval mode whatever the parent does; nothing of it is in the parent's
    parameters, buffers or state dict, while `.to()`, `.cuda()` and `.half()` of the parent move it along.

    Args:
        metric: a no-reference metric of `pyiqa.create_metric` (with or without `as_loss`), or its network.

    Shape:
        x: (N, 3, H, W), RGB in 0..1, H and W at least 32. Values a little outside are passed on, not clamped, since
        a clamp would cut the gradient -> a scalar >= 0: `1 - mean score` for a metric in 0..1 where higher is better,
        `mean score` where lower is better.

    Raises:
        SettingsError: a full-reference metric, or one whose best score is not known.

    Example:
        >>> loss = QualityLoss(pyiqa.create_metric("qualiclip-mini"))
        >>> (l1 + 0.01 * loss(restored)).backward()
    """

    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        if getattr(metric, "metric_mode", "NR") != "NR":
            raise SettingsError(f"{getattr(metric, 'metric_name', metric)} needs a reference; expected an NR metric")
        bounds = str(getattr(metric, "score_range", None)).split(",")
        self.lower_better = bool(getattr(metric, "lower_better", False))
        try:
            self.best = float(bounds[0] if self.lower_better else bounds[1])
        except (ValueError, IndexError):
            raise SettingsError(f"score_range is {bounds}; expected a metric whose best score is known") from None
        network = copy.deepcopy(getattr(metric, "net", metric)).eval().requires_grad_(False)
        # A tuple hides the network from parameters(), state_dict(), train() and DDP; _apply below still reaches it.
        self._hidden: tuple[nn.Module] = (network,)

    def forward(self, x: Tensor) -> Tensor:
        return (self._hidden[0](x).mean() - self.best) * (1.0 if self.lower_better else -1.0)

    def _apply(self, fn: Any, recurse: bool = True) -> QualityLoss:
        self._hidden[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)
