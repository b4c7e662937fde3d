"""Alignment losses: QualiCLIP's three, and two of our own that make scores of different photographs comparable.

Similarities c(x, t) are cosines in -1..1. Indices: b stack (crops of one photograph), i level (ascending: 0 is the
mildest of the stack), k crop, p antonym prompt pair. Arguments called `similarity` have shape (B, L, K, P).

The first three are derived from the description in QualiCLIP's paper (arXiv:2403.11176, section 3). All losses are
means over their terms, not sums, so that their weights do not depend on the numbers of crops, levels and pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .alignment import Aligned, similarities
from .config import Config

PARTS = ("consistency", "positive", "negative", "across", "centre", "loss")  # keys of `alignment_losses`


def alignment_losses(tower: nn.Module, aligned: Aligned, batch: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Compute the parts of the loss of one batch, and their weighted sum under `loss`.

    Args:
        tower: `aligned.tower`, or its wrapper for several processes.
        batch: from `stacks.batch_of`.

    Returns:
        Scalars by the names in `PARTS`; `across` and `centre` only if their weight is not 0.
    """
    images, level = batch["pictures"], batch["level"]
    b, n_levels, k = images.shape[:3]
    features = tower(images.flatten(0, 2).float().div(255))
    c = similarities(features, aligned.anchors, aligned.unit)
    if config.pairs == "mean":
        c = c.mean(1, keepdim=True)
    stacked = c.unflatten(0, (b, n_levels, k))
    positive, negative = stacked[..., 0], stacked[..., 1]
    parts = {
        "consistency": consistency_loss(stacked.flatten(3), config.margin_consistency),
        "positive": ranking_loss(positive, config.margin_rank, batch["ordered"], batch["severity"]),
        "negative": ranking_loss(-negative, config.margin_rank, batch["ordered"], batch["severity"]),
    }
    difference = c[..., 0] - c[..., 1]
    if config.weight_across:
        each = level[:, :, None].expand(-1, -1, k).flatten()
        # If a type's levels are not monotone, only the pristine crops have a known quality.
        known = batch["monotone"][:, None].expand(-1, n_levels * k).flatten() | (each == 0)
        number = torch.arange(b, device=level.device)[:, None].expand(-1, n_levels * k).flatten()
        severity = each[:, None] * batch["severity"][:, None].expand(-1, n_levels * k, -1).flatten(0, 1)
        parts["across"] = across_loss(
            difference[known], severity[known], number[known], config.margin_across, config.gap_across
        )
    if config.weight_centre:
        parts["centre"] = centre_loss(difference)
    parts["loss"] = sum((getattr(config, f"weight_{name}") * part for name, part in parts.items()), torch.zeros(()))
    return parts


def consistency_loss(similarity: Tensor, margin: float) -> Tensor:
    """Compute QualiCLIP's L_cons, the mean of `max(0, |c(x_i^1, t) - c(x_i^2, t)| - margin)`.

    Two crops of one level are equally good.

    Shape:
        similarity: (B, L, 2, T) for T prompts, positive and negative -> scalar.
    """
    first, second = similarity.unbind(2)
    return ((first - second).abs() - margin).clamp(min=0).mean()


def ranking_loss(
    similarity: Tensor, margin: float, ordered: Tensor | None = None, severity: Tensor | None = None
) -> Tensor:
    """Compute the mean over i < j and crops k, l of max(0, margin - (c(x_i^k) - c(x_j^l))).

    Similarity to a positive prompt falls as the level rises. QualiCLIP's L_pos is this loss of the similarities to the
    positive prompts, its L_neg that of the negated similarities to the negative ones.

    Args:
        ordered: (B, L, L) bool, the pairs i < j of each stack that are known to be ordered. None: all.
        severity: (B, P), factors on the margin; with 0 the similarity must still not rise with the level. None: 1.

    Shape:
        similarity: (B, L, K, P) -> scalar, 0 if nothing is ordered.
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
    """Rank images of different photographs whose severities are at least `gap` apart. Our own.

    QualiCLIP's losses compare only images of one photograph, but a metric must also compare different photographs.
    Equal levels of different types are not equally annoying, so only images of clearly different severity count. The
    loss is the mean over these of max(0, margin * (s_j - s_i) - (q_i - q_j)).

    Args:
        quality: differences c(x, positive) - c(x, negative).
        severity: level times the severity per level of its types.
        stack: index of the photograph.

    Shape:
        quality (M, P), severity (M, P), stack (M,) -> scalar.
    """
    steps = severity[None, :] - severity[:, None]
    counted = (steps >= gap) & (stack[None, :] != stack[:, None])[..., None]
    terms = (margin * steps - (quality[:, None] - quality[None, :])).clamp(min=0)
    return (terms * counted).sum() / counted.sum().clamp(min=1)


def centre_loss(difference: Tensor) -> Tensor:
    """Compute the mean over pairs of the squared batch mean of c(x, positive) - c(x, negative). Our own.

    Rankings leave this offset undetermined, and the softmax of a pair cannot correct it later.

    Shape:
        difference: (M, P) -> scalar.
    """
    return difference.mean(dim=0).square().mean()
