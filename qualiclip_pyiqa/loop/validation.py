"""Quality as a metric of torchmetrics, for validation in Lightning and other loops (extra `torchmetrics`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from ..images.tensors import as_batch
from ..optional import require
from ..scoring.building import MetricLike
from .frozen import FrozenMetric

require("torchmetrics", "torchmetrics", "QualityMetric")
from torchmetrics import Metric  # noqa: E402


class QualityMetric(Metric):
    """Mean score of all images, for each attribute.

    The network follows `.to()` and `.cuda()` but stays in float32 whatever the precision of the loop, and is not in the
    parent's parameters or checkpoints. The sums are synchronised between processes.

    Args:
        metric: see `FrozenMetric.of`: a name, file, metric of pyiqa or network.
        kwargs: options of `torchmetrics.Metric`, such as `dist_sync_on_step`.

    Attributes:
        attributes: names of the scores.

    Shape:
        preds: (N, 3, H, W) or (N, 1, H, W), RGB or grey, floating point in 0..1 or uint8; H and W at least 32
        -> scalar float32, on the metric's own scale; for several attributes a dict of them.

    Raises:
        SettingsError: not a no-reference metric, or torchmetrics is not installed; in `compute`, no image was added.
        ImageError: in `update`, a wrong shape or dtype, or values outside 0..1.

    Example:
        >>> import torch
        >>> quality = QualityMetric("qualiclip-mini+:look")
        >>> quality.update(torch.full((2, 3, 48, 64), 0.5))
        >>> sorted(quality.compute())[:3], quality.higher_is_better
        (['brightness', 'colorfulness', 'compression'], True)
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, metric: MetricLike, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frozen = FrozenMetric.of(metric)
        self.attributes = self.frozen.attributes
        zeros = torch.zeros(len(self.attributes), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a higher score means a better image."""
        return not self.frozen.lower_better

    def update(self, preds: Tensor, target: Tensor | None = None) -> None:
        """Add images.

        Args:
            preds: the images, (N, 3, H, W).
            target: ignored, so that it can stand beside metrics with a reference in a `MetricCollection`.
        """
        scores = self.frozen.measure(as_batch(preds).to(self.total.device))
        self.total += scores.sum(dim=0, dtype=self.total.dtype)
        self.count += len(scores)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the mean score.

        Raises:
            SettingsError: no image was added, in any process.
        """
        if not self.count:
            raise SettingsError(
                "QualityMetric has no images, so there is no mean; call update(images) before compute(), and compute() "
                "before reset()"
            )
        means = (self.total / self.count).float()
        return means[0] if len(means) == 1 else dict(zip(self.attributes, means.unbind(), strict=True))

    def extra_repr(self) -> str:
        return repr(self.frozen.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> QualityMetric:
        """Apply `.to()` and the like, of which the network follows only the device."""
        parameter = next(self.frozen.network.buffers())
        device = fn(torch.empty(0, device=parameter.device)).device
        if device.type != "meta":  # the network is needed as it is
            self.frozen.network.to(device)
        super()._apply(fn, exclude_state)
        return self
