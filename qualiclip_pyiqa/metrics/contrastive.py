"""CONTRIQUE and Re-IQA: linear regressions on the features of ResNet-50s that were trained by contrast.

    x = tower(rgb) (N, D), see `towers.contrastive`      score = x @ coefficients + intercept

CONTRIQUE's authors published a regression for each of several data sets, which is used as it is: its scores have the
unit of the data set's opinion scores, and nothing keeps them within their range. Re-IQA's published none; a metric on
its features is one of `qualiclip fit`, whose scores are bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError, WeightsError
from ..pretrained.contrastive import CONTRIQUE, RE_IQA, load_encoders, load_regression
from ..pretrained.find import check_by_hand
from ..pretrained.verify import provenance
from ..towers.autocast import kept_precise, without_autocast
from ..towers.base import freeze
from ..towers.contrastive import IMAGENET_MEAN, IMAGENET_STD, TwoScaleTower
from .base import BlindMetric
from .fitted import FittedIQA
from .registry import EncoderSpec, metric_spec

HALVING = "the whole image, and its half by Pillow's bicubic filter, rounded to levels if the image has 8-bit levels"


class ContriqueIQA(BlindMetric):
    """CONTRIQUE (Madhusudana et al., TIP 2022) with a regression of its authors.

    `contrique` is the regression on KonIQ-10k, whose opinion scores are MOS, as are those of `contrique-clive`;
    `contrique-live` and `contrique-csiq` predict DMOS, so lower is better. Scores may leave the range of the opinion
    scores a little, since the regression is not bounded.

    Args:
        model_type: one of those names.
        weights: file or record of the encoder.
        regression: file or record of the regression; default: that of `model_type`.
        tile: see `BlindMetric`.
        prompts: refused, as the metric takes none.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype
        -> (N, 1), float32 (float64 for a metric in double precision).

    Raises:
        SettingsError: another `model_type`, or prompts.
        WeightsError: a file is missing (the message says where to get it), damaged or of another kind.
    """

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined

    coefficients: Tensor

    def __init__(
        self,
        model_type: str = "contrique",
        weights: str | Path | None = None,
        regression: str | Path | None = None,
        tile: int | None = None,
        prompts: object = None,
    ) -> None:
        spec = metric_spec(model_type)
        if not isinstance(spec, EncoderSpec) or spec.arch != type(self).__name__:
            raise SettingsError(f"model_type {model_type!r} belongs to {spec.arch}, not to {type(self).__name__}")
        if prompts is not None:
            raise SettingsError(f"{model_type} takes no prompts; leave prompts out")
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        weights, regression = weights or spec.weights, regression or spec.regression
        check_by_hand(weights, regression)
        model = load_encoders(CONTRIQUE, weights)
        found = load_regression(regression)
        tower = freeze(model.image_tower(pos_embedding=False))
        assert isinstance(tower, TwoScaleTower)
        self.tower = tower
        self.files = {"weights": model.file, "regression": found.file}
        self.intercept = found.intercept
        if len(found.coefficients) != tower.width:
            raise WeightsError(
                f"{found.file.path}: its regression takes {len(found.coefficients)} features; expected one on "
                f"CONTRIQUE's {tower.width}"
            )
        self.register_buffer("coefficients", found.coefficients, persistent=False)

    def rate(self, features: Tensor) -> Tensor:
        """Score features: (M, D) -> (M, 1)."""
        precise = torch.promote_types(features.dtype, torch.float32)
        with without_autocast(features):
            # Not a matrix product, whose order of summation depends on the batch.
            products = features.to(precise) * self.coefficients.to(precise)
            return products.sum(dim=1, keepdim=True) + self.intercept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContriqueIQA:
        """Apply `.to()` and the like. Half precision is for the tower only."""
        with kept_precise(self, ("coefficients",)):
            super()._apply(fn, recurse)
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values."""
        return super().describe() | {
            "backbone": CONTRIQUE,
            "scales": HALVING,
            "pixel_mean": None,
            "pixel_std": None,
            "intercept": self.intercept,
            **{name: provenance(file) for name, file in self.files.items()},
        }


class ReIQA(FittedIQA):
    """Re-IQA (Saha et al., CVPR 2023) with a regression of your own, from a file of `qualiclip fit -m reiqa`.

    The authors published encoders but no regression, so without such a file there is no score.

    Args:
        model_type: `reiqa`.
        weights: the file, which holds the encoders too.
        tile, prompts: see `FittedIQA`.

    Raises:
        SettingsError: no file was passed, or prompts were.
        WeightsError: the file is missing, damaged, or was fitted on another tower.
    """

    __module__ = "qualiclip_pyiqa.archs"

    def __init__(
        self,
        model_type: str = "reiqa",
        weights: str | Path | None = None,
        tile: int | None = None,
        prompts: object = None,
    ) -> None:
        spec = metric_spec(model_type)
        if not weights:
            raise SettingsError(
                f"{model_type} needs a regression, and its authors published none: fit one with `qualiclip fit -m "
                f"{model_type} --ratings CSV --images DIR -o FILE.safetensors` and pass weights=FILE.safetensors (on "
                "the command line `qualiclip score -m FILE.safetensors`)"
            )
        super().__init__(model_type, weights, tile, prompts)
        if self.origin.backbone != RE_IQA:
            raise WeightsError(
                f"{self.origin.path} was fitted on the tower {self.origin.backbone}; expected a file of `qualiclip fit "
                f"-m {model_type}`, or create_metric('fitted', weights=FILE)"
            )
        self.paper = spec.paper

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values, and how the metric was fitted."""
        return super().describe() | {
            "scales": HALVING,
            "order": self.origin.tower_options["order"],
            "pixel_mean": {"quality": None, "content": list(IMAGENET_MEAN)},
            "pixel_std": {"quality": None, "content": list(IMAGENET_STD)},
        }
