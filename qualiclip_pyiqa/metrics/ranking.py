"""The ranking-aware adapter as a metric: how much of what a caption asks an image shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError, WeightsError
from ..pretrained.read import read
from ..pretrained.verify import provenance
from ..towers.adapter import adapter_of, caption_tokens, token_tower
from ..towers.backbones import find_backbone
from ..towers.base import freeze
from ..towers.resampling import resize_like_pillow
from .base import BlindMetric, pixel_statistics
from .registry import metric_spec

LAYOUT = "ranking-aware"


class RankingAwareIQA(BlindMetric):
    """Ranking-aware adapter on CLIP's ConvNeXt-L (Yu et al., ICLR 2025, arXiv:2412.06760).

    The score says how much of what the caption asks an image shows, on the scale of what the weights were trained on.
    It is one of quality only with weights that were trained on opinion scores, under the caption they were trained
    with, which the authors did not publish.

    Args:
        model_type: `ranking-aware`.
        weights: name of the weight record, or a file: a checkpoint of the authors' training.
        caption: what to rank by. There is no default: the authors' for counting is `Rank the numbers of {class}.`, and
            none is published for quality, age or aesthetics.
        backbone: open_clip's name of a model with a convolutional trunk of timm and CLIP's text tower of one width.
        tile: see `BlindMetric`; each window is resized.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype; resized to
        the model's size (320x320) as Pillow does, without a gradient bit for bit -> scores (N, 1), unbounded, float32
        (float64 for a metric in double precision), higher is more.

    Raises:
        SettingsError: no caption, or a backbone of another kind.
        WeightsError: the file is missing, damaged or of another model.
    """

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined

    text_tokens: Tensor

    def __init__(
        self,
        model_type: str = "ranking-aware",
        weights: str | Path = LAYOUT,
        caption: str | None = None,
        backbone: str = "convnext_large_d_320",
        tile: int | None = None,
    ) -> None:
        spec = metric_spec(model_type)
        if spec.arch != type(self).__name__:
            raise SettingsError(f"model_type {model_type!r} belongs to {spec.arch}, not to {type(self).__name__}")
        if not isinstance(caption, str) or not caption.strip():
            raise SettingsError(
                f"{model_type} needs caption=TEXT (on the command line `qualiclip score -m '{model_type}:TEXT'`), "
                "the one its weights were trained with; its authors published none for quality, and "
                "'Rank the numbers of {class}.' for counting"
            )
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        definition = find_backbone(backbone)
        found = read(weights, layout=LAYOUT)
        state, path = found.tensors, str(found.file.path)
        tower = token_tower(definition, state, path)
        self.size = int(definition.vision["image_size"])
        self.caption, self.backbone, self.file = caption, definition.name, found.file
        self.tower = freeze(tower)
        self.adapter = freeze(adapter_of(definition.embed_dim, state, path))
        tokens = caption_tokens(definition, state, caption, path)
        if not torch.isfinite(tokens).all():
            raise WeightsError(f"{path} gives tokens of the caption that are not finite; check the file")
        self.register_buffer("text_tokens", tokens, persistent=False)

    def encode(self, rgb: Tensor) -> Tensor:
        """Compute image tokens (N, L * W), row by row, which metrics of other captions share."""
        tokens: Tensor = self.tower(resize_like_pillow(rgb, self.size, self.size))
        return tokens.flatten(2).transpose(1, 2).flatten(1)

    def rate(self, features: Tensor) -> Tensor:
        """Score image tokens: (M, L * W) -> (M, 1)."""
        scores = self.adapter.score(self.fuse(features))  # type: ignore[operator]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))[:, None]

    def fuse(self, features: Tensor) -> Tensor:
        """Let image tokens attend to the caption: (M, L * W) -> (M, L, W)."""
        fused: Tensor = self.adapter(features.unflatten(1, (-1, self.text_tokens.shape[1])), self.text_tokens)
        return fused

    def compare(self, x: Tensor) -> Tensor:
        """Compare all images of a batch with each other by the head that is for training.

        Shape:
            x: as in `forward` -> logits (N, N) that row's image shows more than column's.

        Raises:
            SettingsError: with `tile`, for which nothing is defined.
        """
        if self.tile is not None:
            raise SettingsError(f"images are not compared in windows; create {self.model_type} without tile")
        logits: Tensor = self.adapter.compare(self.fuse(self.features(x)))  # type: ignore[operator]
        return logits

    def encodes_like(self, other: BlindMetric) -> bool:
        return super().encodes_like(other) and self.size == getattr(other, "size", None)

    def train(self, mode: bool = True) -> RankingAwareIQA:
        """Set the training mode; the frozen networks always stay in eval mode."""
        super().train(mode)
        self.adapter.eval()
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values."""
        to = f"resized to {self.size}x{self.size} pixels as by Pillow (bilinear, antialiased, aspect ratio not kept)"
        windows = f"the mean score of windows of at most {self.tile}x{self.tile} pixels, evenly spread, each {to}"
        return super().describe() | {
            "resize": f"the whole image, {to}" if self.tile is None else windows,
            "backbone": self.backbone,
            "caption": self.caption,
            "pixel_mean": pixel_statistics(self.tower, "mean"),
            "pixel_std": pixel_statistics(self.tower, "std"),
            "weights": provenance(self.file),
        }
