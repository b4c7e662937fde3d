"""The norm of a face embedding, which face recognition takes for the quality of a face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from ..pretrained.read import read
from ..pretrained.verify import provenance
from ..towers.base import freeze
from ..towers.face import SIDE, face_tower
from ..towers.resampling import resize_like_pillow
from .base import BlindMetric
from .registry import metric_spec

LAYOUT = "face"


class FaceNorm(BlindMetric):
    """L2 norm of the embedding of an aligned face, before it is normalised; higher is better.

    This is no measure of quality as people see it: it says how sure a network of face recognition is of a face, which
    grows with sharpness and frontal pose. QGFace (Song and Wang, arXiv:2312.17494) and AdaFace (Kim et al., CVPR 2022)
    train with it. Images must be aligned faces; of anything else the number means nothing.

    Args:
        model_type: `face-norm`.
        weights: name of the weight record, or a file: an IR-50 in the layout of AdaFace or QGFace.
        tile: see `BlindMetric`; each window is resized, which has no use for faces.

    Shape:
        x: (N, 3, 112, 112) or (N, 1, 112, 112), RGB or grey in 0..1, any floating-point dtype; others of at least 32
        pixels a side are resized as Pillow does -> (N, 1), at least 0, float32 (float64 for a metric in
        double precision).

    Raises:
        SettingsError: see `BlindMetric`.
        WeightsError: the file is missing, damaged or of another network.
    """

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined

    def __init__(
        self, model_type: str = "face-norm", weights: str | Path = "face-norm", tile: int | None = None
    ) -> None:
        spec = metric_spec(model_type)
        if spec.arch != type(self).__name__:
            raise SettingsError(f"model_type {model_type!r} belongs to {spec.arch}, not to {type(self).__name__}")
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        found = read(weights, layout=LAYOUT)
        self.tower = freeze(face_tower(found.tensors, str(found.file.path)))
        self.file = found.file

    def encode(self, rgb: Tensor) -> Tensor:
        """Embed faces: (N, 3, H, W) -> (N, D), not normalised."""
        if rgb.shape[2:] != (SIDE, SIDE):
            rgb = resize_like_pillow(rgb, SIDE, SIDE)
        embedding: Tensor = self.tower(rgb)
        return embedding

    def rate(self, features: Tensor) -> Tensor:
        """Compute the norm of embeddings: (M, D) -> (M, 1)."""
        return features.to(torch.promote_types(features.dtype, torch.float32)).norm(dim=1, keepdim=True)

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values."""
        to = f"resized to {SIDE}x{SIDE} pixels as by Pillow (bilinear, antialiased) unless it has that size"
        windows = f"the mean score of windows of at most {self.tile}x{self.tile} pixels, evenly spread, each {to}"
        return super().describe() | {
            "resize": f"the whole image, {to}" if self.tile is None else windows,
            "embedding": self.tower.output_layer[3].out_features,  # type: ignore[index,union-attr]
            "channels": "BGR, in -1..1",
            "images": "aligned faces",
            "weights": provenance(self.file),
        }
