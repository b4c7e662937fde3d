"""The package's exceptions. Each message is one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class ImageError(ValueError):
    """An image that cannot be scored: unreadable, too small, out of range, wrong shape."""


class PromptError(ValueError):
    """An invalid prompt set, antonym prompt pair or attribute mapping."""


class SettingsError(ValueError):
    """An unknown or contradictory setting: metric name, backbone, training option."""


class WeightsError(RuntimeError):
    """A weight file that is missing, damaged, unsafe to load, or of the wrong layout."""


def visible(text: object) -> str:
    r"""Write out what a reader could not see, or what would reorder the text around it: how every name is shown.

    Control and format characters (such as a line break and the right-to-left override) and undecodable bytes of file
    names become backslash escapes.

    Example:
        >>> print(visible("photo\u202egpj.exe"), visible("latin\udce9.png"), visible("Grüße.jpg"))
        photo\u202egpj.exe latin\xe9.png Grüße.jpg
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in line)


def escaped(character: str) -> str:
    r"""Return a character's backslash escape: `\xe9` for a byte of a file name that is not UTF-8."""
    if "\udc80" <= character <= "\udcff":  # Python's escape of such a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def one_line(text: object) -> str:
    """Put a message that comes from elsewhere on one line: line breaks and other control characters become a space.

    Example:
        >>> one_line("broken\\n  header")
        'broken header'
    """
    line = str(text)
    if line.isprintable():
        return line
    bytes_shown = "".join(escaped(c) if "\udc80" <= c <= "\udcff" else c for c in line)
    return " ".join("".join(c if c.isprintable() else " " for c in bytes_shown).split())


def reason(error: BaseException, limit: int = 300) -> str:
    """Return an exception's message for use in another: one line, its type if empty.

    A message of more than `limit` characters ends with its last whole word before and "...".

    Example:
        >>> reason(OSError("Connection\\nrefused.")), reason(KeyboardInterrupt())
        ('Connection refused', 'KeyboardInterrupt')
        >>> reason(ValueError("not a word is cut"), 12)
        'not a word ...'
    """
    line = one_line(error)
    if len(line) > limit:
        return f"{line[: limit + 1].rpartition(' ')[0] or line[:limit]} ..."
    return line.rstrip(". ") or type(error).__name__


def quoted(text: str, limit: int = 80) -> str:
    """Quote a user's text in a message; of a long one only the start.

    Example:
        >>> quoted("Good photo."), quoted("a" * 100, limit=4)
        ("'Good photo.'", "'aaaa...'")
    """
    return repr(text if len(text) <= limit else f"{text[:limit]}...")


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


def decimals(number: float) -> str:
    """Format a score with four decimals; one of a million or more, as of a metric without bounds, in powers of ten.

    Example:
        >>> decimals(0.25), decimals(-3.5645816950000000e16)
        ('0.2500', '-3.5646e+16')
    """
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4e}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'niqe'?"` for the end of an error message, or `""` if no known name is similar.

    Example:
        >>> did_you_mean("clipqa", ["clipiqa", "qualiclip"])
        "; did you mean 'clipiqa'?"
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
