"""What is learned for a metric of deep prompts, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Learner:
    """Prompts for every block of both transformers, and the attribute that they are learned for.

    Attributes:
        attribute: name of the score, and of the learner in a file.
        words: class words of the positive and of the negative text, which follow the text prompts.
        text_maps: whether each text prompt goes through a linear map of its own.
        visual_maps: whether each visual prompt does.
        mixed_with: attribute of another learner whose visual prompts are appended to its own, feature by feature,
            before the maps; None for none.
    """

    attribute: str
    words: tuple[str, str]
    text_maps: bool
    visual_maps: bool
    mixed_with: str | None = None
