"""What the held-out images say while prompts are learned, and which epoch's prompts are kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import counted, decimals
from ..evaluation.ratings import Ratings
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from .examples import Tunable, whole_features, whole_scores
from .recipes import Recipe
from .validation import correlations

#: Figures by name; None where one does not exist.
Figures: TypeAlias = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class KeptEpoch:
    """The epoch whose prompts a finished run kept.

    Attributes:
        epoch, epochs: its number, and that of the last epoch.
        chosen: whether it is the best on the held-out images, not the last.
        images: number of held-out images.
        srcc, plcc: on those; None without any, or where undefined.
    """

    epoch: int
    epochs: int
    chosen: bool
    images: int
    srcc: float | None
    plcc: float | None

    @classmethod
    def of(cls, log: Path) -> KeptEpoch:
        """Read it from the log of a finished run."""
        first, *lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
        epochs = {line["epoch"]: line for line in lines}
        last = max(epochs)
        best = epochs[last].get("best_epoch")  # 0: no epoch has an SRCC, so the last one is kept
        kept = epochs[best or last]
        return cls(
            epoch=kept["epoch"],
            epochs=last,
            chosen=bool(best),
            images=first["validation_images"],
            srcc=kept.get("validation_srcc"),
            plcc=kept.get("validation_plcc"),
        )

    def __str__(self) -> str:
        kept = f"kept epoch {self.epoch} of {self.epochs}"
        if not self.images:
            return f"{kept}, the last; no images were held out, so no figure says how good it is"
        figures = ", ".join(
            f"{name} {'-' if value is None else decimals(value)}"
            for name, value in (("SRCC", self.srcc), ("PLCC", self.plcc))
        )
        held_out = counted(self.images, "held-out image")
        if self.chosen:
            return f"{kept}, the best on {held_out}: {figures}; optimistic, since these images chose it"
        return f"{kept}, the last; on {held_out}: {figures}"


class Watched:
    """The held-out images: their features, if only texts are learned, and their newest scores."""

    def __init__(self, net: Tunable, ratings: Ratings) -> None:
        self.net, self.ratings = net, ratings
        self.features = (
            None if isinstance(net, DeepPromptIQA) else whole_features(net, ratings.paths, "validation images")
        )
        self._scores = torch.empty(0)

    def scores(self) -> Tensor:
        """Return the scores (V, A) of the last evaluation."""
        return self._scores

    @torch.no_grad()
    def evaluate(self) -> Figures:
        """Score the images, and correlate with their opinion scores; None where that is undefined."""
        if not self.ratings.paths:
            return {}
        if self.features is None:
            self._scores = whole_scores(self.net, self.ratings.paths)
        else:
            self._scores = self.net.score(self.features)
        # Scores that are not finite come from prompts that diverge, which the next step reports.
        srcc, plcc = correlations(self._scores[:, 0].double().tolist(), self.ratings)
        return {"validation_srcc": srcc, "validation_plcc": plcc}


class Best:
    """The prompts to keep: the last, or those of the epoch with the highest SRCC on the held-out images.

    Args:
        learner: what is learned.
        recipe: whose `keep` and `patience` decide.
    """

    def __init__(self, learner: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.learner, self.kept = learner, copy.deepcopy(learner)
        self.epoch, self.srcc, self.last = 0, -math.inf, 0

    def restore(self, lines: Sequence[bytes]) -> None:
        """Read the epochs so far from the log; their prompts are those of the checkpoint."""
        for line in lines:
            figures = json.loads(line)
            if "epoch" in figures:
                self._count(figures["epoch"], figures)

    def add(self, epoch: int, figures: Figures) -> dict[str, int]:
        """Take note of an epoch; return what the log says of it."""
        if self.recipe.keep != "best" or "validation_srcc" not in figures:
            return {}
        if self._count(epoch, figures):
            self.kept.load_state_dict(self.learner.state_dict())
        return {"best_epoch": self.epoch}

    @property
    def is_over(self) -> bool:
        """Whether no later epoch is worth trying."""
        return bool(self.epoch and self.recipe.patience and self.last - self.epoch >= self.recipe.patience)

    def load(self) -> None:
        """Give the learner the prompts to keep."""
        if self.epoch:
            self.learner.load_state_dict(self.kept.state_dict())

    def _count(self, epoch: int, figures: Mapping[str, float | None]) -> bool:
        """Whether this epoch is the best so far."""
        self.last, srcc = epoch, figures.get("validation_srcc")
        if self.recipe.keep != "best" or srcc is None or srcc <= self.srcc:
            return False
        self.epoch, self.srcc = epoch, srcc
        return True
