"""The ranking-aware adapter: how much of what a caption asks an image shows (Yu et al., ICLR 2025, arXiv:2412.06760).

Tokens of the image attend to those of the caption, and a head scores their sum. A second head, for training, says of
two images which shows more. Modules have the names of the authors' checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from .backbones import Backbone, image_tower, text_tower
from .base import load_into
from .text import tokenize

HEADS = 8
TEXT_TOKENS = 32  # learned scalars before the caption's tokens
QUERIES = 16  # of the pair head
DROPOUT = 0.1  # in training
PREFIX = "adapter."  # of the adapter's tensors in a checkpoint


class RankingAdapter(nn.Module):
    """Adapter and both heads.

    Args:
        width: W, of the tokens of both towers, a multiple of 8.

    Shape:
        image: (N, L, W); text: (T, W), of one caption -> fused tokens (N, L, W).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.learnable_text_tokens = nn.Parameter(torch.randn(1, TEXT_TOKENS) * 0.02)
        self.crossmodal_block = CrossModalBlock(width)
        self.post_fuse_block = PostNormEncoder(width)
        self.reg_ln = nn.LayerNorm(width)
        self.regressor = Head(width, layers=2, norm_first=False)
        self.reg_tokens = nn.Parameter(torch.randn(QUERIES, width) * width**-0.5)
        self.reg_token_pooler = PairPooler(width)
        self.pair_regressor = Head(width, layers=3, norm_first=True)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        # Each learned scalar is repeated over the width.
        learned = self.learnable_text_tokens[0, :, None].expand(-1, text.shape[-1])
        caption = torch.cat([learned.to(text.dtype), text])[None].expand(len(image), -1, -1)
        fused: Tensor = self.post_fuse_block(self.crossmodal_block(image, caption))
        return fused

    def score(self, fused: Tensor) -> Tensor:
        """Score fused tokens: (N, L, W) -> (N,), unbounded; more of what the caption asks is higher."""
        scores: Tensor = self.regressor(self.reg_ln(fused).sum(dim=1))[:, 0]
        return scores

    def compare(self, fused: Tensor) -> Tensor:
        """Compare all images with each other: (N, L, W) -> logits (N, N) that row's image shows more than the column's.

        The logit of an image with itself is a constant of the weights, and (i, j) is not the negative of (j, i).
        """
        pooled = self.reg_token_pooler(self.reg_tokens, fused)
        logits: Tensor = self.pair_regressor(pooled)[..., 0]
        return logits


class CrossModalBlock(nn.Module):
    """Self-attention of image tokens, then cross-attention to the caption's, twice; a norm and a projection."""

    def __init__(self, width: int) -> None:
        from open_clip.transformer import ResidualAttentionBlock

        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, HEADS) for _ in range(2))
        self.cross_attn = nn.ModuleList(ResidualAttentionBlock(width, HEADS, is_cross_attention=True) for _ in range(2))
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, image: Tensor, caption: Tensor) -> Tensor:
        for own, across in zip(self.resblocks, self.cross_attn, strict=True):
            image = across(own(image), k_x=caption, v_x=caption)
        projected: Tensor = self.ln_final(image) @ self.projection
        return projected


class PostNormEncoder(nn.Module):
    """Two layers of a transformer that normalises after each addition.

    `nn.TransformerEncoder` has the same tensors, but another order of sums in eval mode without a gradient.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PostNormLayer(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PostNormLayer(nn.Module):
    """Attention and a feed-forward of the same width with ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, HEADS, dropout=DROPOUT, batch_first=True)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.self_attn(x, x, x, need_weights=False)
        x = self.norm1(x + self.dropout(attended))
        further = self.linear2(self.dropout(self.linear1(x).relu()))
        out: Tensor = self.norm2(x + self.dropout(further))
        return out


class PairPooler(nn.Module):
    """Difference of what the queries take from each of two images, in one attention over the tokens of both.

    A softmax over the tokens of both images is that over each one's, times the image's share of the sum; so the
    attention runs once for each image, not for each pair.

    Shape:
        queries: (Q, W); fused: (N, L, W) -> (N, N, W), row's image minus column's, summed over the queries.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, width)
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, fused: Tensor) -> Tensor:
        # Keys are the values. Norms are over the whole width, before it is split into heads.
        query = self.ln_q(self.q_proj(queries)).unflatten(-1, (HEADS, -1))  # (Q, heads, W / heads)
        value = self.ln_kv(self.kv_proj(fused)).unflatten(-1, (HEADS, -1))  # (N, L, heads, W / heads)
        logits = torch.einsum("qhd,nlhd->nhql", query, value) * query.shape[-1] ** -0.5
        attended = torch.einsum("nhql,nlhd->nhqd", logits.softmax(dim=-1), value)
        total = logits.logsumexp(dim=-1)
        share = (total[:, None] - total[None]).sigmoid()[..., None]  # of the row's image
        difference = attended[:, None] * share - attended[None] * (1 - share)  # (N, N, heads, Q, W / heads)
        joined = difference.transpose(2, 3).flatten(3)
        out: Tensor = self.out_proj(joined).sum(dim=2)
        return out


class Head(nn.Module):
    """Linear, LayerNorm and ReLU several times, then one output: (..., W) -> (..., 1)."""

    def __init__(self, width: int, layers: int, norm_first: bool) -> None:
        super().__init__()
        steps: list[nn.Module] = [nn.LayerNorm(width)] if norm_first else []
        for _ in range(layers):
            steps += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
        self.pre_linear_block = nn.Sequential(*steps)
        self.output_head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output_head(self.pre_linear_block(x))
        return out


def without_pooling(backbone: Backbone) -> Backbone:
    """Return a backbone whose timm trunk ends in a norm and a 1x1 convolution of each place, in place of its pooling.

    Raises:
        SettingsError: it is no convolutional trunk of timm, or its text tower has another width.
    """
    if "timm_model_name" not in backbone.vision or not backbone.plain_text:
        raise SettingsError(
            f"backbone {backbone.name!r} is no convolutional trunk of timm with CLIP's text tower; expected one such "
            "as 'convnext_large_d_320'"
        )
    if backbone.text["width"] != backbone.embed_dim or backbone.embed_dim % HEADS:
        raise SettingsError(
            f"backbone {backbone.name!r} has features of {backbone.embed_dim} and text tokens of "
            f"{backbone.text['width']}; the adapter needs one width for both, a multiple of {HEADS}"
        )
    return replace(backbone, vision=backbone.vision | {"timm_pool": "", "timm_proj": ""})


def token_tower(backbone: Backbone, state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Build the image tower of a checkpoint: (N, 3, H, W) in 0..1 -> (N, W, H / 32, W / 32), not pooled."""
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    return image_tower(without_pooling(backbone), visual, pos_embedding=False, what=what)


@torch.no_grad()
def caption_tokens(backbone: Backbone, state: Mapping[str, Tensor], caption: str, what: str) -> Tensor:
    """Encode a caption by the text tower of a checkpoint -> all its tokens after the last norm, unprojected, (T, W).

    Tokens after the caption's end are part of it, as in the authors' code.
    """
    tower = text_tower(backbone, state, what).eval()
    ids = tokenize([caption], tower.context_length)
    tokens: Tensor = tower.ln_final(tower.forward_features(tower.token_embedding(ids)))[0]
    return tokens


def adapter_of(width: int, state: Mapping[str, Tensor], what: str) -> RankingAdapter:
    """Build the adapter of a checkpoint."""
    with torch.device("meta"):
        adapter = RankingAdapter(width)
    load_into(adapter, {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}, what)
    return adapter
