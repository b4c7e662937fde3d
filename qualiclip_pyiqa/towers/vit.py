"""open_clip's vision transformers, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor, nn

from .base import Tower, resize_flat


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

    def embed(self, rgb: Tensor) -> Tensor:
        """Compute the input of the first block: the class token and one token per patch, (N, 1 + h*w, C)."""
        x = self.conv1(self.normalise(rgb)).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([start, x], dim=1)
        if self.add_table:
            x = x + resize_flat(self.positional_embedding, x.shape[1]).to(x.dtype)
        tokens: Tensor = self.ln_pre(x)
        return tokens

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
