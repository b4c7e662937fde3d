"""Grad-CAM by captum, with its sign: how the score follows a late feature map.

Selvaraju et al., ICCV 2017, arXiv:1610.02391.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..metrics.base import BlindMetric
from ..optional import require
from ..towers.mobile import MobileTower
from ..towers.resnet import STRIDE, ResNetTower
from ..towers.vit import ViTTower
from .found import Found, is_one_pass, no_such_map, refuse_tile

# Block of a MobileTower whose output is weighted: the last one at a sixteenth of the image's size.
MOBILE_BLOCK = 12


def grad_cam(metric: BlindMetric, rgb: Tensor, columns: Sequence[int]) -> Found:
    """Map images (N, 3, H, W): the feature map's channels, weighted by the mean gradient of the score."""
    captum = require("captum.attr", "explain", "a Grad-CAM map")
    refuse_tile("gradcam", metric)
    tower = metric.tower
    network: nn.Module = metric
    layer: nn.Module
    if isinstance(tower, ResNetTower):
        layer, step = tower.layer4, STRIDE
    elif isinstance(tower, MobileTower):
        layer, step = tower.trunk.blocks[MOBILE_BLOCK], tower.trunk.strides[MOBILE_BLOCK]
    elif isinstance(tower, ViTTower) and is_one_pass(metric):
        network = before = BeforeLastBlock(metric, tower)
        layer, step = before.tokens, tower.patch[0]
    else:
        raise no_such_map("gradcam", f"{metric.model_type} on {type(tower).__name__}", metric)
    with torch.enable_grad():
        scores: Tensor = network(rgb).detach()[:, list(columns)]
        maps = []
        for column in columns:
            x = rgb.detach().clone().requires_grad_()
            maps.append(captum.LayerGradCam(network, layer).attribute(x, target=column).detach())
    values = torch.cat(maps, dim=1)
    if isinstance(tower, ViTTower):
        values = values[:, :, 1:].unflatten(2, (rgb.shape[2] // step, rgb.shape[3] // step))
    return Found(
        values,
        scores,
        (step, step),
        "channels of a late feature map, weighted by the score's gradient",
        lambda _n, _a: "to first order, above zero: more of what is there raises the score; the values do not add up",
    )


class BeforeLastBlock(nn.Module):
    """A metric on a transformer, with the tokens before the last block, (N, C, 1 + L), as the output of a layer.

    After the last block the class token alone reaches the score, so that no other token has a gradient.
    """

    def __init__(self, metric: BlindMetric, tower: ViTTower) -> None:
        super().__init__()
        self.metric, self.tower = metric, tower
        self.tokens = nn.Identity()

    def forward(self, rgb: Tensor) -> Tensor:
        tokens = self.tower.embed(rgb)
        for block in self.tower.blocks[:-1]:
            tokens = block(tokens)
        tokens = self.tokens(tokens.transpose(1, 2)).transpose(1, 2)
        return self.metric.rate(self.tower.forward_head(self.tower.blocks[-1](tokens)))
