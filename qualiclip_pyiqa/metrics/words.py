"""What higher and lower scores mean, as comparatives: "brighter", "blurrier"."""

from __future__ import annotations

from collections.abc import Sequence

from .prompts import ATTRIBUTES, LOOK, QUALITY_SETS, Pair

BETTER: Pair = ("better", "worse")
_WORDS: dict[str, Pair] = {
    "quality": BETTER,
    "brightness": ("brighter", "darker"),
    "sharpness": ("sharper", "blurrier"),
    "noisiness": ("cleaner", "noisier"),
    "colorfulness": ("more colorful", "duller"),
    "contrast": ("stronger in contrast", "weaker in contrast"),
    "compression": ("less compressed", "more compressed"),
}
# Predefined attributes of which more is better. The others say what an image is like.
_JUDGING = ("quality", "sharpness", "noisiness", "compression", "aesthetic", "beautiful")
_DESCRIBING: dict[str, Pair] = {name: pair for name, pair in ATTRIBUTES.items() if name not in _JUDGING}
_OF_LOOK: dict[Pair, Pair] = {LOOK[name]: words for name, words in _WORDS.items()}


def comparatives(pairs: Sequence[Pair] = (), lower_better: bool = False) -> Pair:
    """Return what an image with a higher score is, and one with a lower score.

    Brightness, colours and contrast describe an image: more of them is not better.

    Args:
        pairs: antonym prompt pairs, whose mean is the score; empty for a metric without prompts.
        lower_better: direction of a metric without prompts.

    Example:
        >>> comparatives([("Bright photo.", "Dark photo.")]), comparatives(lower_better=True)
        (('brighter', 'darker'), ('worse', 'better'))
        >>> comparatives([("Happy photo.", "Sad photo.")])
        ("closer to 'Happy photo.'", "closer to 'Sad photo.'")
    """
    if not pairs:
        return BETTER[::-1] if lower_better else BETTER
    if tuple(pairs) in QUALITY_SETS.values():
        return BETTER
    if len(pairs) == 1 and pairs[0] in _OF_LOOK:
        return _OF_LOOK[pairs[0]]
    more = f" (+{len(pairs) - 1})" if len(pairs) > 1 else ""
    high, low = (f"closer to {text + more!r}" for text in pairs[0])
    return high, low


def meaning_of(words: Pair, lower_better: bool) -> str:
    """Return what a score says about an image, for people.

    Args:
        words: `comparatives`.
        lower_better: whether a lower score is better.

    Example:
        >>> meaning_of(("brighter", "darker"), False), meaning_of(("worse", "better"), True)
        ('higher is brighter', 'lower is better')
    """
    return f"lower is {words[1]}" if lower_better else f"higher is {words[0]}"


def describes(attribute: str, pairs: Sequence[Pair] = ()) -> bool:
    """Return whether an attribute says what an image is like, and not how good it is.

    Attributes and pairs that are not predefined are taken to judge: nothing is known of them.

    Args:
        attribute: its name, which decides without pairs.
        pairs: antonym prompt pairs, whose mean is the score; empty for a metric without prompts.

    Example:
        >>> describes("contrast"), describes("light", [("Bright photo.", "Dark photo.")]), describes("sharpness")
        (True, True, False)
    """
    return all(pair in _DESCRIBING.values() for pair in pairs) if pairs else attribute in _DESCRIBING


def opposite(more: str) -> str:
    """Return what an image with a lower score is, given what one with a higher score is.

    Args:
        more: the first of two `comparatives`.

    Example:
        >>> opposite("brighter"), opposite("closer to 'Happy photo.'")
        ('darker', "further from 'Happy photo.'")
    """
    return dict(_WORDS.values()).get(more, f"further from {more.removeprefix('closer to ')}")
