"""Two small restorers: a denoiser and a 2x super-resolver."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def convolutions(width: int, depth: int, out: int) -> nn.Sequential:
    """Stack `depth` 3x3 convolutions of `width` channels between the image and `out` channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    last = nn.Conv2d(width, out, 3, padding=1)
    nn.init.zeros_(last.weight)  # training starts from the identity, or from plain enlargement
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class Denoiser(nn.Module):
    """Subtract the noise that a plain convolutional network finds, as DnCNN does (Zhang et al., TIP 2017).

    Shape:
        noisy: (N, 3, H, W), RGB in 0..1 -> the same, not clamped.
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.noise = convolutions(width, depth, 3)

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - self.noise(noisy)


class SuperResolver(nn.Module):
    """Add what a sub-pixel convolution (ESPCN; Shi et al., CVPR 2016) finds to the bicubic enlargement.

    Shape:
        small: (N, 3, H, W), RGB in 0..1 -> (N, 3, 2H, 2W), not clamped.
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        layers = convolutions(width, depth, 12)
        for layer in layers[:-1]:
            if isinstance(layer, nn.Conv2d):  # by PyTorch's default a smooth image fades to nothing over the layers
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.detail = nn.Sequential(layers, nn.PixelShuffle(2))

    def forward(self, small: Tensor) -> Tensor:
        enlarged = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
        detail: Tensor = self.detail(small)
        return enlarged + detail
