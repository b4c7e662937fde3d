"""Antonym prompt pairs: the predefined sets, and validation of a `prompts=` argument."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..errors import PromptError, did_you_mean, quoted, reason

Pair: TypeAlias = tuple[str, str]

# Look and feel attributes of CLIP-IQA (Wang et al., AAAI 2023: section 4 and, from `warm` on, the AVA study of its
# appendix; texts from the authors' configuration files). A high score means the first text of a pair. The official
# configuration has `noisiness` reversed; here a high score means a clean image.
LOOK: dict[str, Pair] = {
    "quality": ("Good photo.", "Bad photo."),
    "brightness": ("Bright photo.", "Dark photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
    "noisiness": ("Clean photo.", "Noisy photo."),
    "colorfulness": ("Colorful photo.", "Dull photo."),
    "contrast": ("High contrast photo.", "Low contrast photo."),
    # Our own addition.
    "compression": ("Uncompressed photo.", "Photo with compression artifacts."),
}
FEEL: dict[str, Pair] = {
    "aesthetic": ("Aesthetic photo.", "Not aesthetic photo."),
    "happy": ("Happy photo.", "Sad photo."),
    "natural": ("Natural photo.", "Synthetic photo."),
    "new": ("New photo.", "Old photo."),
    "scary": ("Scary photo.", "Peaceful photo."),
    "complex": ("Complex photo.", "Simple photo."),
    "warm": ("Warm photo.", "Cold photo."),
    "real": ("Real photo.", "Abstract photo."),
    "beautiful": ("Beautiful photo.", "Ugly photo."),
    "lonely": ("Lonely photo.", "Sociable photo."),
    "relaxing": ("Relaxing photo.", "Stressful photo."),
}
ATTRIBUTES: dict[str, Pair] = LOOK | FEEL

# Sets with one score, the mean over their pairs.
QUALITY_SETS: dict[str, tuple[Pair, ...]] = {
    # pyiqa's `clipiqa`: five pairs, no full stop (pyiqa 0.1.16).
    "clipiqa": (
        ("Good image", "bad image"),
        ("Sharp image", "blurry image"),
        ("sharp edges", "blurry edges"),
        ("High resolution image", "low resolution image"),
        ("Noise-free image", "noisy image"),
    ),
    # Class words of CLIP-IQA+'s learned contexts, with one full stop more than in the paper: `..` is a single token.
    "clipiqa+": (("Good photo..", "Bad photo.."),),
    # The seven pairs QualiCLIP was trained with (arXiv:2403.11176).
    "qualiclip": (
        ("Good photo.", "Bad photo."),
        ("Sharp image.", "Blurry image."),
        ("Sharp edges.", "Blurry edges."),
        ("High-resolution image.", "Low-resolution image."),
        ("Noise-free image.", "Noisy image."),
        ("High-quality image.", "Low-quality image."),
        ("Good picture.", "Bad picture."),
    ),
}
ATTRIBUTE_SETS: dict[str, dict[str, Pair]] = {"look": LOOK, "feel": FEEL}


@dataclass(frozen=True)
class Prompts:
    """Antonym prompt pairs by attribute; an attribute's score is the mean over its pairs.

    Attributes:
        groups: (attribute name, its (positive, negative) pairs), in the order of the score columns.
    """

    groups: tuple[tuple[str, tuple[Pair, ...]], ...]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the score's A columns."""
        return tuple(name for name, _ in self.groups)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All P pairs, group after group."""
        return tuple(pair for _, pairs in self.groups for pair in pairs)

    @property
    def texts(self) -> tuple[str, ...]:
        """All 2P texts, positive and negative alternating: the row order of prompt features."""
        return tuple(text for pair in self.pairs for text in pair)

    def as_dict(self) -> dict[str, list[list[str]]]:
        """Return the groups as plain lists, for `describe()` and JSON."""
        return {name: [list(pair) for pair in pairs] for name, pairs in self.groups}


PromptsLike: TypeAlias = str | Prompts | Sequence[Sequence[str]] | Mapping[str, Sequence[str] | Sequence[Sequence[str]]]

# A TOML file of sets, and the name of one of them.
_FILE = re.compile(r"(?P<path>.+\.toml)(?::(?P<set>[^/:]+))?", re.DOTALL)
# Names of sets and attributes in files, which become a part of a column's name: METRIC:SET.ATTRIBUTE.
_NAME = re.compile(r"[^\s/:.]+")


def prompt_set_names() -> list[str]:
    """Return the name of every predefined prompt set.

    Example:
        >>> [name for name in prompt_set_names() if name.startswith("qual")]
        ['qualiclip', 'quality']
    """
    return [*QUALITY_SETS, *ATTRIBUTE_SETS, *ATTRIBUTES]


def resolve_prompts(prompts: PromptsLike, sets: Mapping[str, Prompts] | None = None) -> Prompts:
    """Validate a `prompts=` argument and return its antonym prompt pairs.

    Args:
        prompts: a text: the name of a set (`"qualiclip"`, `"look"`, `"sharpness"`, see `prompt_set_names()`), a pair
            (`"Clear photo./Foggy photo."`, see `parse_pair`), or a TOML file of sets (`"sets.toml:weather"`, or
            `"sets.toml"` if it has one set only, see `read_prompt_file`); or a list of (positive, negative) pairs,
            averaged into one score; or a mapping from attribute to a pair or a list of pairs, with one score for each
            attribute, in the mapping's order.
        sets: named sets besides the predefined ones.

    Returns:
        The pairs. The attribute of a list or of a single pair is called `quality`.

    Raises:
        PromptError: an unknown set, a flat list of texts, an empty set, a pair without exactly two texts, an empty
            text, a pair of equal texts, or a file that cannot be read or is not one of prompt sets.

    Example:
        >>> resolve_prompts({"light": ("Bright photo.", "Dark photo.")}).attributes
        ('light',)
        >>> resolve_prompts("quality").texts
        ('Good photo.', 'Bad photo.')
        >>> resolve_prompts("Clear photo./Foggy photo.").texts
        ('Clear photo.', 'Foggy photo.')
    """
    if isinstance(prompts, Prompts):
        return prompts
    if isinstance(prompts, str):
        return _resolve_text(prompts, sets or {})
    if isinstance(prompts, Mapping):
        if not prompts:
            raise PromptError("prompts is an empty mapping; expected attribute -> (positive, negative)")
        groups = []
        for name, value in prompts.items():
            if not isinstance(name, str) or not name:
                raise PromptError(f"prompts: attribute name {name!r} is not a text; expected one such as 'sharpness'")
            pairs = [value] if _looks_like_pair(value) else value
            groups.append((name, _check_pairs(pairs, f"prompts[{name!r}]")))
        return Prompts(tuple(groups))
    return Prompts((("quality", _check_pairs(prompts, "prompts")),))


def parse_pair(text: str) -> Pair:
    """Parse the pair `POSITIVE/NEGATIVE`; a slash within a text is written twice, white space around a text is cut.

    Raises:
        PromptError: other than two texts, an empty one, two equal ones, or a character that cannot be printed.

    Example:
        >>> parse_pair("Photo in 24//7 light./Photo at night.")
        ('Photo in 24/7 light.', 'Photo at night.')
    """
    if not text.isprintable():
        raise PromptError(f"prompt pair {text!r} has characters that cannot be printed; expected POSITIVE/NEGATIVE")
    texts = [part.replace("\0", "/").strip() for part in text.replace("//", "\0").split("/")]
    if len(texts) != 2:
        raise PromptError(
            f"prompt pair {text!r} has {len(texts)} texts; expected POSITIVE/NEGATIVE: write a slash within a text as "
            "//, and several pairs into a TOML file of sets"
        )
    return _check_pairs([texts], f"prompt pair {text!r}")[0]


def read_prompt_file(path: str | Path) -> dict[str, Prompts]:
    """Read a TOML file of named prompt sets.

    A set is a table from attribute to a (positive, negative) pair or a list of pairs:

        [weather]
        clear = ["Clear photo.", "Foggy photo."]
        dry = [["Dry street.", "Wet street."], ["Sunny photo.", "Rainy photo."]]

    Raises:
        PromptError: the file cannot be read, is not TOML, or holds something else; a name that cannot be used in the
            name of a column, or is that of a predefined set.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror or error}); expected a TOML file of sets") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise PromptError(f"{path} is not TOML ({reason(error)}); see docs/profile.md for an example") from error
    if not content:
        raise PromptError(f"{path} is empty; expected a table [NAME] with attribute = [positive, negative]")
    return {name: _check_set(path, name, table) for name, table in content.items()}


def _check_set(path: str | Path, name: str, table: object) -> Prompts:
    for called in (name, *(table if isinstance(table, dict) else ())):
        if not _NAME.fullmatch(called) or not called.isprintable():
            raise PromptError(
                f"{path}: {called!r} cannot name a set or an attribute; expected a name without white space, slash, "
                "colon or dot"
            )
    if name in prompt_set_names():
        raise PromptError(f"{path}: set {name!r} has the name of a predefined set; choose another name")
    if not isinstance(table, dict) or not table:
        found = "empty" if table == {} else f"{str(table)[:80]!r}, not a table"
        raise PromptError(f"{path}: set {name!r} is {found}; expected [{name}] with attribute = [positive, negative]")
    try:
        return resolve_prompts(table)
    except PromptError as error:
        raise PromptError(f"{path}: set {name!r}: {error}") from error


def _resolve_text(text: str, sets: Mapping[str, Prompts]) -> Prompts:
    if text in sets:
        return sets[text]
    if file := _FILE.fullmatch(text):
        return _find_in_file(file["path"], file["set"])
    if "/" in text.replace("//", ""):
        return Prompts((("quality", (parse_pair(text),)),))
    return _find_set(text, sets)


def _find_in_file(path: str, name: str | None) -> Prompts:
    sets = read_prompt_file(path)
    if name is None:
        if len(sets) > 1:
            raise PromptError(
                f"{path} has {len(sets)} sets; choose one: {', '.join(f'{path}:{each}' for each in sets)}"
            )
        return next(iter(sets.values()))
    if name not in sets:
        raise PromptError(f"{path} has no set {name!r}; expected one of {', '.join(sets)}{did_you_mean(name, sets)}")
    return sets[name]


def _find_set(name: str, sets: Mapping[str, Prompts]) -> Prompts:
    if name in QUALITY_SETS:
        return Prompts((("quality", QUALITY_SETS[name]),))
    if name in ATTRIBUTE_SETS:
        return Prompts(tuple((attribute, (pair,)) for attribute, pair in ATTRIBUTE_SETS[name].items()))
    if name in ATTRIBUTES:
        return Prompts(((name, (ATTRIBUTES[name],)),))
    known = [*sets, *prompt_set_names()]
    raise PromptError(
        f"unknown prompt set {quoted(name)}; expected one of {', '.join(known)}, or a pair POSITIVE/NEGATIVE"
        f"{did_you_mean(name, known)}"
    )


def _looks_like_pair(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(text, str) for text in value)
    )


def _check_pairs(pairs: object, where: str) -> tuple[Pair, ...]:
    if isinstance(pairs, str) or not isinstance(pairs, Sequence | Iterator):
        raise PromptError(f"{where} is {pairs!r}; expected a list of (positive, negative) pairs of texts")
    pairs = list(pairs)
    if not pairs:
        raise PromptError(f"{where} is empty; expected at least one (positive, negative) pair")
    if all(isinstance(item, str) for item in pairs):
        raise PromptError(
            f"{where} is a flat list of {len(pairs)} texts; expected pairs: [(positive, negative), ...] "
            "(check for a missing comma between two texts)"
        )
    checked = []
    for index, pair in enumerate(pairs):
        here = f"{where}[{index}]"
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise PromptError(f"{here} is {pair!r}; expected exactly two texts (positive, negative)")
        positive, negative = pair
        for text in pair:
            if not isinstance(text, str) or not text.strip():
                raise PromptError(f"{here} holds {text!r}; expected a non-empty text")
        # CLIP's tokenizer ignores case and folds white space.
        if " ".join(positive.lower().split()) == " ".join(negative.lower().split()):
            raise PromptError(f"{here} has the same text twice ({quoted(positive)}); expected two antonyms")
        checked.append((positive, negative))
    return tuple(checked)
