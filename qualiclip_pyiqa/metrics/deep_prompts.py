"""Deep prompts: learned tokens that enter every block of both CLIP transformers (MaPLe, Khattak et al., CVPR 2023).

The prompts of a transformer's first block are part of its input; before each further block they are replaced by its
own, so that what a block makes of them goes no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..towers.text import TextTower, tokenize
from .learners import Learner


class DeepPrompts(nn.Module):
    """The prompts of one learner: `length` tokens for each block of the text tower and of the image tower.

    Args:
        learner: which maps there are.
        text: blocks and width of the text tower.
        visual: blocks and width of the image tower.
        length: tokens per block.
        std: standard deviation of the normal initialisation; maps have PyTorch's.
    """

    def __init__(
        self, learner: Learner, text: tuple[int, int], visual: tuple[int, int], length: int, std: float
    ) -> None:
        super().__init__()
        self.text = _drawn(*text, length, std)
        self.visual = _drawn(*visual, length, std)
        (text_blocks, text_width), (visual_blocks, visual_width) = text, visual
        inputs = visual_width * (1 if learner.mixed_with is None else 2)
        self.text_maps = _maps(text_blocks if learner.text_maps else 0, text_width, text_width)
        self.visual_maps = _maps(visual_blocks if learner.visual_maps else 0, inputs, visual_width)

    def text_prompts(self) -> list[Tensor]:
        """Return the text prompts of each block, (length, W); all but the first with the precision of float16."""
        mapped = _mapped(list(self.text), self.text_maps)
        return [mapped[0], *map(in_half_precision, mapped[1:])]

    def visual_prompts(self, others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the visual prompts of each block, (length, W), with the precision of float16.

        Args:
            others: prompts of another learner, before any map, that are appended on the feature axis.
        """
        own = list(self.visual)
        if others is not None:
            own = [torch.cat(pair, dim=-1) for pair in zip(own, others, strict=True)]
        return [in_half_precision(prompts) for prompts in _mapped(own, self.visual_maps)]


def in_half_precision(prompts: Tensor) -> Tensor:
    """Round to float16 and back, as the published code of both metrics does; scores change by about 1e-4."""
    return prompts.to(torch.float16).to(prompts.dtype)


def visual_prompts(learners: Sequence[Learner], prompts: Mapping[str, nn.Module]) -> list[list[Tensor]]:
    """Return the visual prompts of each learner, mixed as the learners say."""
    found = []
    for learner in learners:
        own, other = prompts[learner.attribute], learner.mixed_with
        assert isinstance(own, DeepPrompts)
        found.append(own.visual_prompts(None if other is None else list(prompts[other].visual)))  # type: ignore[arg-type]
    return found


class PromptFrame(nn.Module):
    """The fixed tokens around text prompts: start of text, [prompts], class words, end of text.

    The embeddings are non-persistent buffers: they belong to the text tower.

    Args:
        text: text tower with the token embeddings.
        words: class words of each text.
        length: tokens of a prompt.

    Raises:
        SettingsError: the prompts leave no room for the class words.
    """

    start: Tensor
    rest: Tensor
    end: Tensor

    def __init__(self, text: TextTower, words: Sequence[str], length: int) -> None:
        super().__init__()
        end = tokenize(list(words), text.context_length).argmax(dim=-1) + length
        if int(end.max()) >= text.context_length:
            raise SettingsError(f"prompts of {length} tokens do not fit into CLIP's {text.context_length} tokens")
        rows = tokenize([" ".join(["X"] * length + [each]) for each in words], text.context_length)
        with torch.no_grad():
            embedded = text.token_embedding(rows[:, : int(end.max()) + 1])
        self.register_buffer("start", embedded[:, :1].clone(), persistent=False)
        self.register_buffer("rest", embedded[:, 1 + length :].clone(), persistent=False)
        self.register_buffer("end", end, persistent=False)

    def encode(self, text: TextTower, prompts: Sequence[Tensor]) -> Tensor:
        """Encode the texts with the prompts of each block -> features (P, D), not normalised."""
        first = prompts[0].to(self.start.dtype).expand(len(self.start), -1, -1)
        return text.forward_prompted(torch.cat([self.start, first, self.rest], dim=1), self.end, prompts)


def _drawn(blocks: int, width: int, length: int, std: float) -> nn.ParameterList:
    return nn.ParameterList(torch.randn(length, width, dtype=torch.float32) * std for _ in range(blocks))


def _maps(blocks: int, inputs: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, width, dtype=torch.float32) for _ in range(blocks))


def _mapped(prompts: list[Tensor], maps: nn.ModuleList) -> list[Tensor]:
    return [linear(each) for linear, each in zip(maps, prompts, strict=True)] if len(maps) else prompts
