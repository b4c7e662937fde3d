"""Contributions: the summand that each place adds to the logit difference of an attribute's prompt pairs.

    z = g . f / |f|        g = scale * mean over the attribute's pairs of (t+ - t-)        f = sum over places + rest

f is the image's feature, which a tower splits (`Tower.shares`), and t the pairs' unit prompt features. No gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.base import BlindMetric
from ..metrics.prompt_iqa import PromptIQA
from ..towers.base import Tower
from ..towers.vit import ViTTower
from .found import Found, no_such_map, refuse_tile


@torch.no_grad()
def contributions(metric: BlindMetric, rgb: Tensor, columns: Sequence[int]) -> Found:
    """Split the logit differences of images (N, 3, H, W) into summands of places."""
    refuse_tile("contributions", metric)
    found = None
    if isinstance(metric, PromptIQA) and isinstance(metric.tower, Tower):
        found = metric.tower.shares(rgb, logit_directions(metric)[list(columns)])
    if found is None or not isinstance(metric, PromptIQA):
        what = f"{metric.model_type} on {type(metric.tower).__name__}, which is no CLIP ResNet or vision transformer"
        raise no_such_map("contributions", what, metric)
    pairs = [int(metric.membership[:, column].sum()) for column in columns]
    sums, rest = found.places.sum(dim=2), found.rest
    approximate = isinstance(metric.tower, ViTTower) and not metric.tower.averages

    def relation(n: int, a: int) -> str:
        total = sums[n, a] + rest[n, a]
        what = "the logit difference" if pairs[a] == 1 else f"the mean logit difference of {pairs[a]} prompt pairs"
        outside = "the map's error, of the class token and the last block's MLP" if approximate else "of no place"
        return (
            f"the sum of all places, {sums[n, a]:+.4f}, and {rest[n, a]:+.4f} ({outside}) are {what}, {total:+.4f}; "
            f"the score is its logistic function{'' if pairs[a] == 1 else ', pair by pair'}"
        )

    return Found(
        found.places.unflatten(2, found.grid),
        metric.rate(found.image)[:, list(columns)],
        found.step,
        "summand that each place adds to the logit",
        relation,
    )


def logit_directions(metric: PromptIQA) -> Tensor:
    """Return g of each attribute, (A, D): its product with a unit feature is the mean logit difference of its pairs."""
    text = F.normalize(metric.prompt_features.double(), dim=-1)
    members = metric.membership.double()
    pairs = (text[0::2] - text[1::2]) * (metric.logit_scale / metric.temperature)
    return (members.T @ pairs / members.sum(dim=0)[:, None]).to(metric.prompt_features.dtype)
