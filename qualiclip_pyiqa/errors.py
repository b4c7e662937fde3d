"""The package's exceptions. Each message is one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImageError(ValueError):
    """An image that cannot be scored: unreadable, too small, out of range, wrong shape."""


class PromptError(ValueError):
    """An invalid prompt set, antonym prompt pair or attribute mapping."""


class SettingsError(ValueError):
    """An unknown or contradictory setting: metric name, backbone, training option."""


class WeightsError(RuntimeError):
    """A weight file that is missing, damaged, unsafe to load, or of the wrong layout."""


def one_line(text: object) -> str:
    """Put a message that comes from elsewhere on one line: line breaks and other control characters become a space.

    Example:
        >>> one_line("broken\\n  header")
        'broken header'
    """
    line = str(text)
    return line if line.isprintable() else " ".join("".join(c if c.isprintable() else " " for c in line).split())


def reason(error: BaseException, limit: int = 300) -> str:
    """Return an exception's message for use in another: one line of at most `limit` characters; its type if empty.

    Example:
        >>> reason(OSError("Connection\\nrefused.")), reason(KeyboardInterrupt())
        ('Connection refused', 'KeyboardInterrupt')
    """
    return one_line(error)[:limit].rstrip(". ") or type(error).__name__


def kind_of(value: object) -> str:
    """Return the name of a value's type with its article.

    Example:
        >>> kind_of(3), kind_of([])
        ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words; `plural` if it is not the noun with an s.

    Example:
        >>> counted(1, "image"), counted(2, "image"), counted(0, "entry", "entries")
        ('1 image', '2 images', '0 entries')
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'niqe'?"` for the end of an error message, or `""` if no known name is similar.

    Example:
        >>> did_you_mean("clipqa", ["clipiqa", "qualiclip"])
        "; did you mean 'clipiqa'?"
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
