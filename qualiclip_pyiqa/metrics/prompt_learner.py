"""Learned prompt contexts (CoOp) for antonym prompts, in the layout of pyiqa's `params` files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError, one_line
from ..pretrained.files import WeightFile
from ..pretrained.manifest import WeightRecord
from ..pretrained.read import read
from ..towers.text import TextTower, tokenize

N_CTX = 16  # default of both papers' code


@dataclass(frozen=True)
class FreshContext:
    """Initialisation of a context that is still to be learned.

    Attributes:
        n_ctx: number of context tokens; None: 16.
        ctx_init: words that initialise the context and set its length; empty: `std` decides.
        prompt_specific_ctx: whether there is one context per text; otherwise all share one.
        std: standard deviation of a normal initialisation; None: every token is the embedding of the placeholder `X`.
    """

    n_ctx: int | None = None
    ctx_init: str = ""
    prompt_specific_ctx: bool = True
    std: float | None = None

    def tokens(self, text: TextTower) -> Tensor:
        """Return the initial tokens (n_ctx, W) before `std` and sharing."""
        if self.ctx_init:
            row = tokenize([self.ctx_init.replace("_", " ")], text.context_length)[0]
            tokens = text.token_embedding(row[1 : int(row.argmax())])  # between start and end of text
        else:
            placeholder = text.token_embedding(tokenize(["X"], text.context_length))[0, 1]
            tokens = placeholder.expand(max(0, N_CTX if self.n_ctx is None else self.n_ctx), -1)
        if not len(tokens):
            raise SettingsError(
                f"n_ctx is {self.n_ctx} and ctx_init {self.ctx_init!r}; expected at least one context token"
            )
        return tokens

    @torch.no_grad()
    def values(self, text: TextTower, prompts: int) -> Tensor:
        """Return the initial context for a number of texts, float32: (prompts, n_ctx, W), or (n_ctx, W) if shared."""
        tokens = self.tokens(text).float()
        shape = (prompts, *tokens.shape) if self.prompt_specific_ctx else tokens.shape
        if self.std is not None and not self.ctx_init:
            return torch.randn(shape, dtype=torch.float32) * self.std
        return tokens.expand(shape).clone()


class PromptLearner(nn.Module):
    """Antonym prompts with a learned context: SOT, first half of the context, class words, second half, EOT.

    The class words are in the middle, as in CLIP-IQA's official code. Only `ctx` is learned. The state dict holds
    `ctx`, `token_prefix` and `token_suffix`, as pyiqa's does.

    Args:
        text: text tower with the token embeddings.
        texts: class words: 2P texts, positive and negative alternating.
        ctx: the context, (2P, n_ctx, W) or, shared by all texts, (n_ctx, W).

    Raises:
        SettingsError: the context leaves no room for the class words.
    """

    token_prefix: Tensor
    token_suffix: Tensor

    def __init__(self, text: TextTower, texts: Sequence[str], ctx: Tensor) -> None:
        super().__init__()
        length, n_ctx = text.context_length, ctx.shape[-2]
        # Token ids of the class words: each row is SOT, words, EOT, padding.
        rows = tokenize(list(texts), length)
        self.words_per_text: list[int] = (rows.argmax(dim=-1) - 1).tolist()
        if n_ctx + max(self.words_per_text) + 2 > length:
            raise SettingsError(
                f"{n_ctx} context tokens and {max(self.words_per_text)} tokens of class words do not fit into "
                f"CLIP's {length} tokens; use a smaller n_ctx"
            )
        with torch.no_grad():
            embedded = text.token_embedding(rows)
        self.ctx = nn.Parameter(ctx)
        self.register_buffer("token_prefix", embedded[:, :1].clone())
        self.register_buffer("token_suffix", embedded[:, 1 : length - n_ctx].clone())
        self.texts = tuple(texts)
        self.register_load_state_dict_pre_hook(_adopt_shape)

    @property
    def n_ctx(self) -> int:
        """Number of context tokens."""
        return self.ctx.shape[-2]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embed the prompts with their context.

        Returns:
            Embeddings (2P, T, W), cut after the last end-of-text token, and the index (2P,) of each end-of-text token.
        """
        half = self.n_ctx // 2
        rows = []
        ctx = self.ctx.to(self.token_prefix.dtype)
        for index, words in enumerate(self.words_per_text):
            own = ctx if ctx.dim() == 2 else ctx[index]
            suffix = self.token_suffix[index]
            rows.append(torch.cat([self.token_prefix[index], own[:half], suffix[:words], own[half:], suffix[words:]]))
        end = torch.tensor(self.words_per_text, device=ctx.device) + 1 + self.n_ctx
        return torch.stack(rows)[:, : self.n_ctx + max(self.words_per_text) + 2], end


def _adopt_shape(learner: PromptLearner, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Reshape the context to match a state dict about to be loaded: shared (CLIP-IQA+'s) or one per text (pyiqa's)."""
    ctx = state_dict.get(prefix + "ctx")
    shared = learner.ctx.shape[-2:]
    if ctx is not None and ctx.shape in (shared, (len(learner.texts), *shared)) and ctx.shape != learner.ctx.shape:
        learner.ctx.data = learner.ctx.new_empty(ctx.shape)


def load_learner(
    weights: str | Path | WeightRecord, text: TextTower, texts: Sequence[str], n_ctx: int | None = None
) -> tuple[PromptLearner, WeightFile]:
    """Read a learned context.

    Args:
        weights: name of a record, a record, or a file.
        text, texts: see `PromptLearner`.
        n_ctx: required number of context tokens; None: any.

    Raises:
        WeightsError: no such file, or no context that fits the model and the prompts.
        SettingsError: the context's length is not `n_ctx`.
    """
    context = read(weights, layout="context")
    file, loaded = context.file, context.tensors
    ctx = loaded.get("prompt_learner.ctx")
    if ctx is None or ctx.dim() not in (2, 3):
        raise WeightsError(f"{file.path} holds no prompt context; expected a tensor 'prompt_learner.ctx'")
    found, width = ctx.shape[-2:]
    if n_ctx not in (None, found):
        raise SettingsError(
            f"{file.path.name} has {found} context tokens, not n_ctx={n_ctx}; leave n_ctx out, or pass pretrained=False"
        )
    learner = PromptLearner(text, texts, torch.zeros(len(texts), found, width, dtype=torch.float32))
    # A bare context has no prefix and suffix.
    values = {key.removeprefix("prompt_learner."): value.float() for key, value in loaded.items()}
    try:
        learner.load_state_dict(learner.state_dict() | values)
    except RuntimeError as error:
        raise WeightsError(
            f"{file.path} does not fit this text tower and {len(texts)} prompts: {one_line(error)}"
        ) from error
    return learner, file
