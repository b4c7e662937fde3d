"""CLIP's text tower and tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import PromptError
from .prompted import run_with_prompts

if TYPE_CHECKING:
    import open_clip


class TextTower(nn.Module):
    """CLIP's causal text transformer, from token embeddings (so that it takes learned contexts) to features.

    Attention is causal, so tokens after the last end-of-text token can be cut: usual prompts need a third of CLIP's 77
    tokens, and a third of the time.

    Shape:
        embeddings: (P, T, W); end: (P,) int64, index of each end-of-text token -> (P, D), not normalised.
    """

    positional_embedding: Tensor
    causal_mask: Tensor

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.context_length: int = clip.context_length
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        shape = (self.context_length, self.context_length)
        causal = torch.full(shape, float("-inf"), dtype=torch.float32, device="cpu").triu_(1)
        self.register_buffer("causal_mask", causal, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks; each maps (P, T, W) to (P, T, W) and takes `attn_mask=tower.mask(T)`."""
        return self.transformer.resblocks

    def mask(self, tokens: int) -> Tensor:
        """Return the causal mask (T, T) that is added to attention logits: 0 up to the diagonal, -inf above."""
        return self.causal_mask[:tokens, :tokens]

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(embeddings), end)

    def forward_prompted(self, embeddings: Tensor, end: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Encode texts with prompts (n, W) for each block, behind the start of text -> features (P, D).

        `embeddings` hold those of the first block.
        """
        mask = self.mask(embeddings.shape[1])
        tokens = run_with_prompts(self.blocks, self.embed(embeddings), prompts, start=1, attn_mask=mask)
        return self.forward_head(tokens, end)

    def embed(self, embeddings: Tensor) -> Tensor:
        """Add the positional table to token embeddings (P, T, W), as input of the first block."""
        return embeddings.to(self.positional_embedding.dtype) + self.positional_embedding[: embeddings.shape[1]]

    def forward_features(self, embeddings: Tensor) -> Tensor:
        """Compute the tokens after the last block, (P, T, W)."""
        tokens: Tensor = self.transformer(self.embed(embeddings), attn_mask=self.mask(embeddings.shape[1]))
        return tokens

    def forward_head(self, tokens: Tensor, end: Tensor) -> Tensor:
        """Normalise and project each row's end-of-text token: (P, T, W) -> (P, D)."""
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        features: Tensor = self.ln_final(tokens)[rows, end] @ self.text_projection
        return features

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode token ids (P, T) int64 -> features (P, D). The end-of-text token has the highest id of its row."""
        end = tokens.argmax(dim=-1)
        features: Tensor = self(self.token_embedding(tokens[:, : int(end.max()) + 1]), end)
        return features


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """Encode texts with CLIP's byte-pair encoding -> token ids (P, T) int64.

    Raises:
        PromptError: a text is longer than T - 2 tokens, between those of start and end.

    Example:
        >>> tokenize(["Good photo."], context_length=8)
        tensor([[49406,   886,  1125,   269, 49407,     0,     0,     0]])
    """
    tokenizer = _tokenizer(context_length)
    for text in texts:
        count = len(tokenizer.encode(text))
        if count > context_length - 2:
            raise PromptError(
                f"{text[:40]!r}... has {count} tokens; expected a text of at most {context_length - 2}, which is what "
                "the text tower reads"
            )
    return tokenizer(list(texts))


@functools.cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    """Cache the tokenizer: reading its table of byte pairs takes 0.2 s."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length)
