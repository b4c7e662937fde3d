"""Learned prompt contexts (CoOp) around the class words of antonym prompts, in the layout of pyiqa's `params` files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..towers.text import TextTower, tokenize


class PromptLearner(nn.Module):
    """A prompt context: SOT, first half of the context, class words, second half, EOT.

    The context stands in the middle as in CLIP-IQA's official code; everything but `ctx` is fixed. State dict: `ctx`,
    `token_prefix`, `token_suffix`, as pyiqa writes and expects it.

    Args:
        text: the text tower whose token embeddings the prompts are made of.
        texts: the class words, 2P texts, positive and negative alternating.
        n_ctx: number of context tokens (16 in both papers' code).
        ctx_init: words that start the context and set its length; empty for `std` noise or placeholder tokens.
        prompt_specific_ctx: one context per text, (2P, n_ctx, W); otherwise one shared by all, (n_ctx, W).
        std: standard deviation of the normal distribution that a fresh context is drawn from (0.02 in QualiCLIP+);
            None starts from the embedding of the placeholder `X`, as CLIP-IQA+ does.

    Raises:
        SettingsError: a context that leaves no room for the class words.
    """

    token_prefix: Tensor
    token_suffix: Tensor

    def __init__(
        self,
        text: TextTower,
        texts: Sequence[str],
        n_ctx: int = 16,
        ctx_init: str = "",
        prompt_specific_ctx: bool = True,
        std: float | None = None,
    ) -> None:
        super().__init__()
        length = text.context_length
        if ctx_init:
            words = ctx_init.replace("_", " ")
            n_ctx = int(tokenize([words], length).argmax()) - 1
        if n_ctx < 1:
            raise SettingsError(f"n_ctx is {n_ctx}; expected at least one context token")
        # Token ids of the class words alone; a row is SOT, words, EOT, padding.
        rows = tokenize(list(texts), length)
        words_per_text = (rows.argmax(dim=-1) - 1).tolist()
        if n_ctx + max(words_per_text) + 2 > length:
            raise SettingsError(
                f"{n_ctx} context tokens and {max(words_per_text)} tokens of class words do not fit into "
                f"CLIP's {length} tokens; use a smaller n_ctx"
            )
        with torch.no_grad():
            embedded = text.token_embedding(rows)
            if ctx_init:
                start = text.token_embedding(tokenize([words], length))[0, 1 : 1 + n_ctx]
            elif std is None:
                placeholder = text.token_embedding(tokenize(["X"], length))[0, 1]
                start = placeholder.expand(n_ctx, -1)
            shape = (len(rows), n_ctx, embedded.shape[2]) if prompt_specific_ctx else (n_ctx, embedded.shape[2])
            ctx = torch.randn(shape) * std if not ctx_init and std is not None else start.expand(shape).clone()
        self.ctx = nn.Parameter(ctx.float())
        self.register_buffer("token_prefix", embedded[:, :1].clone())
        self.register_buffer("token_suffix", embedded[:, 1 : length - n_ctx].clone())
        self.words_per_text = words_per_text
        self.texts = tuple(texts)

    @property
    def n_ctx(self) -> int:
        return self.ctx.shape[-2]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings (2P, T, W) of the prompts with their context, cut after the last end-of-text token, and the index
        of each end-of-text token (2P,)."""
        half = self.n_ctx // 2
        rows = []
        ctx = self.ctx.to(self.token_prefix.dtype)
        for index, words in enumerate(self.words_per_text):
            own = ctx if ctx.dim() == 2 else ctx[index]
            suffix = self.token_suffix[index]
            rows.append(torch.cat([self.token_prefix[index], own[:half], suffix[:words], own[half:], suffix[words:]]))
        end = torch.tensor(self.words_per_text, device=ctx.device) + 1 + self.n_ctx
        return torch.stack(rows)[:, : self.n_ctx + max(self.words_per_text) + 2], end

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Published contexts come shared (CLIP-IQA+) and one per prompt (pyiqa's own); take whichever a file holds.
        ctx = state_dict.get(prefix + "ctx")
        shared = self.ctx.shape[-2:]
        if ctx is not None and ctx.shape in (shared, (len(self.texts), *shared)) and ctx.shape != self.ctx.shape:
            self.ctx.data = self.ctx.new_empty(ctx.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
