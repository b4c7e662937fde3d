"""The alignment losses of QualiCLIP, and two of ours that make scores comparable across contents.

Similarities c(x, t) are cosines in -1..1. Indices: b stack (one photograph), i level (ascending: 0 is the mildest of
the stack), k crop, p antonym prompt pair. Arguments called `similarity` have shape (B, L, K, P).

The form of the first three is derived from QualiCLIP's description (arXiv:2403.11176, section 3); all are means over
their terms rather than sums, so that weights do not depend on the numbers of crops, levels and pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def consistency_loss(similarity: Tensor, margin: float) -> Tensor:
    """L_cons = mean of max(0, |c(x_i^1, t) - c(x_i^2, t)| - margin): two crops of one level are equally good.

    Shape:
        similarity: (B, L, 2, T), T prompts, positive and negative -> scalar.
    """
    first, second = similarity.unbind(2)
    return ((first - second).abs() - margin).clamp(min=0).mean()


def ranking_loss(
    similarity: Tensor, margin: float, ordered: Tensor | None = None, severity: Tensor | None = None
) -> Tensor:
    """Mean over i < j and crops k, l of max(0, margin - (c(x_i^k) - c(x_j^l))): similarity falls with the level.

    L_pos is `ranking_loss` of the similarities to the positive prompts, L_neg of those to the negative ones negated.

    Args:
        ordered: (B, L, L) bool; which i < j of each stack are truly ordered. None: all.
        severity: (B, P); factors of the margin. With 0, a pair must still not rise with the level. None: 1.

    Shape:
        similarity: (B, L, K, P) -> scalar (0 where nothing is ordered).
    """
    b, n_levels, _, _ = similarity.shape
    counted = torch.ones(n_levels, n_levels, dtype=torch.bool, device=similarity.device).triu(1).expand(b, -1, -1)
    if ordered is not None:
        counted = counted & ordered
    # [b, i, j, k, l, p]
    difference = similarity[:, :, None, :, None, :] - similarity[:, None, :, None, :, :]
    margins = margin if severity is None else margin * severity[:, None, None, None, None, :]
    terms = (margins - difference).clamp(min=0).mean(dim=(3, 4, 5))
    return (terms * counted).sum() / counted.sum().clamp(min=1)


def across_loss(quality: Tensor, severity: Tensor, stack: Tensor, margin: float, gap: float) -> Tensor:
    """Ours: ranks pictures of different photographs whose severities are at least `gap` apart.

    The ranking losses above compare only pictures of one photograph, so nothing in them makes a score of one content
    comparable with that of another, which is what a metric is used for. Levels of different types are not equally
    annoying, hence severities, and only those clearly apart. Mean over such pairs of
    max(0, margin * (s_j - s_i) - (q_i - q_j)).

    Shape:
        quality (M, P) differences c(x, tp) - c(x, tn), severity (M, P) level times severity of a level, stack (M,)
        number of the photograph -> scalar.
    """
    steps = severity[None, :] - severity[:, None]
    counted = (steps >= gap) & (stack[None, :] != stack[:, None])[..., None]
    terms = (margin * steps - (quality[:, None] - quality[None, :])).clamp(min=0)
    return (terms * counted).sum() / counted.sum().clamp(min=1)


def centre_loss(difference: Tensor) -> Tensor:
    """Ours: the mean difference c(x, tp) - c(x, tn) of every pair over a batch is kept at zero.

    Rankings leave an offset free; a softmax of two similarities has none to correct it with afterwards.

    Shape:
        difference: (M, P) -> scalar.
    """
    return difference.mean(dim=0).square().mean()
