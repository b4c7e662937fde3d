"""The towers of CONTRIQUE and Re-IQA: ResNet-50s trained by contrast, whose features are of two scales.

    f = [pooled(image), pooled(halved image)] of each encoder, pooled = the mean over places of the last feature map

CONTRIQUE (Madhusudana et al., TIP 2022) has one encoder, takes RGB in 0..1 as it is, and divides each scale's feature
by its length. Re-IQA (Saha et al., CVPR 2023) has two, one for quality, which takes RGB as it is, and one for content,
with ImageNet's pixel normalisation; its features keep their lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import without_autocast
from .base import Tower, fold_batchnorm
from .halving import halved
from .resnet import STRIDE, FoldedBottleneck, FoldedConv, FoldedLayer, StreamedLayer
from .streaming import Step, Window, in_strips, rows_at_once

#: Bottlenecks in each layer of a ResNet-50.
DEPTHS = (3, 4, 6, 3)
WIDTH = 2048  # of its last feature map
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Orders in which the features of Re-IQA's two encoders may follow each other: no order is documented by the authors.
ORDERS = {"content-first": ("content", "quality"), "quality-first": ("quality", "content")}
DEFAULT_ORDER = "content-first"

_LAYERS = ("layer1", "layer2", "layer3", "layer4")


class ResNet50Tower(Tower):
    """torchvision's ResNet-50 without its classifier: the feature is the mean over places, (N, WIDTH).

    Args:
        mean, std: pixel normalisation; by default none.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        from torchvision.models.resnet import Bottleneck, ResNet

        trunk = ResNet(Bottleneck, list(DEPTHS))
        del trunk.avgpool, trunk.fc
        super().__init__(trunk, add_table=False, mean=mean, std=std)

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the feature map: (N, 3, H, W) -> (N, 2048, ceil(H / 32), ceil(W / 32))."""
        rows = rows_at_once(self, rgb) if isinstance(self.layer1, FoldedLayer) else None
        return self._whole(rgb) if rows is None else in_strips(self._steps, rgb, rows, stride=STRIDE)

    def forward_head(self, features: Tensor) -> Tensor:
        """Average a feature map over places, in float32 or wider: (N, C, h, w) -> (N, C)."""
        with without_autocast(features):
            return features.to(torch.promote_types(features.dtype, torch.float32)).mean(dim=(2, 3))

    def prepare_to_freeze(self) -> None:
        """Fold every BatchNorm, and fuse each convolution with the ReLU or addition that follows it."""
        fold_batchnorm(self)
        self.conv1 = FoldedConv(self.conv1)  # type: ignore[arg-type]
        self.bn1, self.relu = nn.Identity(), nn.Identity()
        for name in _LAYERS:
            setattr(self, name, FoldedLayer(*map(FoldedBottleneck, getattr(self, name))))

    def _whole(self, rgb: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalise(rgb)))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features

    def _steps(self) -> list[Step]:
        """Return the layers of `_whole` as steps over strips."""
        return [
            Window(self.normalise, kernel=1),
            Window(lambda x: self.conv1(x, inner=True), kernel=7, stride=2),
            # After a ReLU, rows of zeros are as good as rows without a value.
            Window(lambda x: F.max_pool2d(x, 3, 2, padding=(0, 1)), kernel=3, stride=2),
            *(StreamedLayer(getattr(self, name)) for name in _LAYERS),
        ]


class TwoScaleTower(nn.Module):
    """Features of encoders at full and at half size.

    Args:
        encoders: by name, in the order of their features.
        unit_length: whether each encoder's feature of each scale is divided by its length.

    Shape:
        rgb: (N, 3, H, W), RGB in 0..1, H and W at least 32 -> (N, 2 D), D the sum of the encoders' feature sizes; for
        each encoder the feature of the whole image, then that of its half. float32 or wider.
    """

    def __init__(self, encoders: Mapping[str, Tower], unit_length: bool) -> None:
        super().__init__()
        self.names, self.unit_length = tuple(encoders), unit_length
        for name, encoder in encoders.items():
            self.add_module(name, encoder)

    @property
    def width(self) -> int:
        """Number of features."""
        return 2 * len(self.names) * WIDTH

    def forward(self, rgb: Tensor) -> Tensor:
        scales = rgb, halved(rgb)
        found = [self.get_submodule(name)(x) for name in self.names for x in scales]
        if self.unit_length:
            with without_autocast(rgb):
                found = [F.normalize(each, dim=1) for each in found]
        return torch.cat(found, dim=1)

    statistics = forward

    def prepare_to_freeze(self) -> None:
        """Prepare every encoder."""
        for name in self.names:
            self.get_submodule(name).prepare_to_freeze()  # type: ignore[operator]


def contrique_tower() -> TwoScaleTower:
    """Build CONTRIQUE's tower, untrained, with 4096 features."""
    return TwoScaleTower({"encoder": ResNet50Tower()}, unit_length=True)


def re_iqa_tower(order: str = DEFAULT_ORDER) -> TwoScaleTower:
    """Build Re-IQA's towers, untrained, with 8192 features.

    Args:
        order: of the encoders' features, one of ORDERS.
    """
    encoders = {"quality": ResNet50Tower(), "content": ResNet50Tower(IMAGENET_MEAN, IMAGENET_STD)}
    return TwoScaleTower({name: encoders[name] for name in ORDERS[order]}, unit_length=False)
