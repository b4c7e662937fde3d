"""Comparatives for the predefined antonym prompt pairs of look attributes."""

from __future__ import annotations

from ..metrics.prompts import LOOK, Pair

_WORDS: dict[str, Pair] = {
    "quality": ("better", "worse"),
    "brightness": ("brighter", "darker"),
    "sharpness": ("sharper", "blurrier"),
    "noisiness": ("cleaner", "noisier"),
    "colorfulness": ("more colorful", "duller"),
    "contrast": ("higher in contrast", "lower in contrast"),
    "compression": ("less compressed", "more compressed"),
}
#: By pair: what an image with a higher score is, and one with a lower score.
COMPARATIVES: dict[Pair, Pair] = {LOOK[name]: words for name, words in _WORDS.items()}
