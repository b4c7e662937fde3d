"""Quality of generated images in the evaluations of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import SettingsError
from ..images.tensors import Source, as_batch
from ..scoring.building import MetricLike
from .frozen import FrozenMetric


class QualityCallback(TrainerCallback):
    """Scores images that a model makes, at every evaluation of a Trainer, and logs the mean of each score.

    The means are `eval_ATTRIBUTE` (`eval_quality` for a metric of one score) in the log, with every tracker, and in the
    evaluation's metrics, so that `metric_for_best_model="quality"` chooses checkpoints by it.

    Every process of a distributed training makes and scores images; the means are over all of them.

    Args:
        trainer: the Trainer that it is added to.
        metric: see `FrozenMetric.of`: a name, file, metric of pyiqa or network. It follows the model's device.
        make_images: returns images for a model, which is in eval mode and without gradient: paths, PIL images, arrays
            (H, W, C) or tensors (C, H, W), as for `load_image`.

    Raises:
        SettingsError: not a no-reference metric; in an evaluation, `make_images` returned no image in any process.
        ImageError: in an evaluation, an image that cannot be scored.
    """

    def __init__(
        self, trainer: Trainer, metric: MetricLike, make_images: Callable[[nn.Module], Iterable[Source]]
    ) -> None:
        self.trainer, self.make_images = trainer, make_images
        self.metric = FrozenMetric.of(metric)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make and score the images."""
        assert model is not None
        self.metric.network.to(args.device)
        # In float64, as sums of many scores; the last one counts the images.
        sums = torch.zeros(len(self.metric.attributes) + 1, dtype=torch.float64, device=args.device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for image in self.make_images(model):
                    sums[:-1] += self.metric.measure(as_batch(image).to(args.device))[0]
                    sums[-1] += 1
        finally:
            model.train(was_training)
        sums = self.trainer.accelerator.reduce(sums, reduction="sum")
        if not sums[-1]:  # NaN would be logged, and might choose the checkpoint
            raise SettingsError(
                "make_images returned no images, so quality has no mean; expected at least one at every evaluation"
            )
        means = (sums[:-1] / sums[-1]).tolist()
        found = {f"eval_{name}": mean for name, mean in zip(self.metric.attributes, means, strict=True)}
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(found)
