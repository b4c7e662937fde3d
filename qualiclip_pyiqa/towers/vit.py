"""open_clip's vision transformers, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Tower, resize_flat
from .places import PlaceFeatures, Shares
from .prompted import run_with_prompts

if TYPE_CHECKING:
    import open_clip


class ViTTower(Tower):
    """open_clip's VisionTransformer. Its patch convolution crops rows and columns that do not fill a patch.

    Pooling: the normalised class token (OpenAI's models), the mean of the other tokens, normalised afterwards (CLIPA),
    or the first query of an attention pool (CoCa).
    """

    conv1: nn.Module
    ln_pre: nn.Module
    ln_post: nn.Module
    transformer: nn.Module
    class_embedding: Tensor
    positional_embedding: Tensor
    proj: Tensor

    def __init__(
        self, visual: open_clip.VisionTransformer, add_table: bool, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(visual, add_table, mean, std)
        self.attn_pool: nn.Module | None = visual.attn_pool
        self.averages = visual.pool_type == "avg"
        # Normalisation commutes with picking a token, but not with the mean.
        self.norm_first = self.averages and not (visual.final_ln_after_pool and visual.attn_pool is None)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks; each maps tokens (N, L, C) to (N, L, C)."""
        blocks = self.transformer.resblocks
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        size: Any = self.conv1.kernel_size
        return size[0], size[1]

    def embed(self, rgb: Tensor) -> Tensor:
        """Compute the input of the first block: the class token and one token per patch, (N, 1 + h*w, C)."""
        x = self.conv1(self.normalise(rgb)).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([start, x], dim=1)
        if self.add_table:
            x = x + resize_flat(self.positional_embedding, x.shape[1]).to(x.dtype)
        tokens: Tensor = self.ln_pre(x)
        return tokens

    def forward_prompted(self, views: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Compute image features (N, D) from views of each image and prompts for each block.

        The first block's input is the class token, the patches of every view, each with the positions of its own view,
        and the prompts, which have no position.

        Args:
            views: (N, V, 3, S, S), RGB in 0..1, of the size that the positional table is for.
            prompts: of each block, (n, C).
        """
        images, count = views.shape[:2]
        patches = self.conv1(self.normalise(views.flatten(0, 1))).flatten(2).transpose(1, 2)
        table = self.positional_embedding.to(patches.dtype)
        patches = (patches + table[1:]).unflatten(0, (images, count)).flatten(1, 2)
        start, first = self.class_embedding.to(patches.dtype) + table[0], prompts[0].to(patches.dtype)
        tokens = torch.cat([start.expand(images, 1, -1), patches, first.expand(images, -1, -1)], dim=1)
        recompute = bool(self.transformer.grad_checkpointing)
        tokens = run_with_prompts(self.blocks, self.ln_pre(tokens), prompts, -len(first), recompute)
        return self.forward_head(tokens[:, : -len(first)])

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the unnormalised tokens after the last block: (N, 1 + h*w, C), the class token first."""
        tokens: Tensor = self.transformer(self.embed(rgb))
        return tokens

    def places(self, features: Tensor) -> Tensor:
        return features[:, 1:].transpose(1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool tokens (N, 1 + h*w, C) into image features (N, D)."""
        x = features if self.attn_pool is None else self.attn_pool(features)
        if self.norm_first:
            x = self.ln_post(x)
        x = x[:, 1:].mean(dim=1) if self.averages else x[:, 0]
        return (x if self.norm_first else self.ln_post(x)) @ self.proj

    def place_features(self, rgb: Tensor) -> PlaceFeatures | None:
        """Project each place as if the pooling saw it alone.

        For a class token: as if the last block attended to this place only. For a mean of tokens: the token itself.
        """
        if self.attn_pool is not None:
            return None
        grid, step = self._grid(rgb)
        if self.averages:
            features = self.forward_features(rgb)
            return PlaceFeatures(self.forward_head(features), self.ln_post(features[:, 1:]) @ self.proj, grid, step)
        last = self._attend(rgb)
        if last is None:
            return None
        block: Any = self.blocks[-1]
        x = last.token + block.ls_1(block.attn.out_proj(last.values[:, :, 1:].transpose(1, 2).flatten(2)))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return PlaceFeatures(self.forward_head(last.output), self.ln_post(x) @ self.proj, grid, step)

    def shares(self, rgb: Tensor, directions: Tensor) -> Shares | None:
        """Split the inner products of unit features with `directions` (A, D) into summands of places.

        For a mean of tokens, exactly. For a class token, what the last block's attention takes from each place, with
        the final LayerNorm at the feature's own mean and variance; all else (what the class token held before, and what
        the block's MLP adds) belongs to no place.
        """
        if self.attn_pool is not None:
            return None
        grid, step = self._grid(rgb)
        if self.averages:
            features = self.forward_features(rgb)
            image = self.forward_head(features)
            unit = directions / image.norm(dim=1)[:, None, None]
            if self.norm_first:
                places = torch.einsum("nad,nld->nal", unit, self.ln_post(features[:, 1:]) @ self.proj)
            else:
                inner = self._through_norm(unit, features[:, 1:].mean(dim=1))
                places = torch.einsum("nac,nlc->nal", inner, features[:, 1:])
            places = places / places.shape[2]
        else:
            last = self._attend(rgb)
            if last is None:
                return None
            block: Any = self.blocks[-1]
            image = self.forward_head(last.output)
            unit = directions / image.norm(dim=1)[:, None, None]
            inner = self._through_norm(unit, last.output[:, 0])
            scale = getattr(block.ls_1, "gamma", None)
            inner = inner if scale is None else inner * scale
            heads = (inner @ block.attn.out_proj.weight).unflatten(2, (block.attn.num_heads, -1))
            places = torch.einsum("nahd,nhl,nhld->nal", heads, last.weights[:, :, 1:], last.values[:, :, 1:])
        rest = torch.einsum("nad,nd->na", unit, image) - places.sum(dim=2)
        return Shares(image, places, rest, grid, step)

    def _grid(self, rgb: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return how many patches an image has, and how large they are."""
        return (rgb.shape[2] // self.patch[0], rgb.shape[3] // self.patch[1]), self.patch

    def _attend(self, rgb: Tensor) -> LastAttention | None:
        """Compute the class token's attention in the last block; None if that is not `nn.MultiheadAttention`."""
        block: Any = self.blocks[-1]
        attention = getattr(block, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            return None
        tokens = self.embed(rgb)
        for each in self.blocks[:-1]:
            tokens = each(tokens)
        normed = block.ln_1(tokens)
        heads = attention.num_heads
        query, key, value = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3)
        q = F.linear(normed[:, :1], query, biases[0]).unflatten(2, (heads, -1)).transpose(1, 2)
        k = F.linear(normed, key, biases[1]).unflatten(2, (heads, -1)).transpose(1, 2)
        values = F.linear(normed, value, biases[2]).unflatten(2, (heads, -1)).transpose(1, 2)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, 0]
        return LastAttention(tokens[:, :1], weights, values, block(tokens))

    def _through_norm(self, directions: Tensor, at: Tensor) -> Tensor:
        """Pull directions (N, A, D) back through the projection and the final LayerNorm at one input (N, C)."""
        norm: Any = self.ln_post
        inner = directions @ self.proj.T * norm.weight
        spread = (at.var(dim=1, correction=0) + norm.eps).sqrt()
        return (inner - inner.mean(dim=2, keepdim=True)) / spread[:, None, None]


@dataclass(frozen=True)
class LastAttention:
    """The class token in the last block.

    Attributes:
        token: the class token before the block, (N, 1, C).
        weights: of all tokens in its attention, (N, heads, 1 + L).
        values: of all tokens, (N, heads, 1 + L, C / heads).
        output: the block's output, (N, 1 + L, C).
    """

    token: Tensor
    weights: Tensor
    values: Tensor
    output: Tensor
