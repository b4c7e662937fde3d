"""The package's own errors: one line each, saying what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImageError(ValueError):
    """An image that cannot be scored: unreadable, too small, out of range, wrong shape."""


class PromptError(ValueError):
    """A prompt set, antonym prompt pair or attribute mapping that makes no sense."""


class SettingsError(ValueError):
    """A setting (metric name, backbone, training option) that is unknown or contradicts another."""


class WeightsError(RuntimeError):
    """A weight file that is missing, damaged, of another layout, or not safe to load."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: `"; did you mean 'niqe'?"`, or nothing if no name is near.

    Example:
        >>> did_you_mean("clipqa", ["clipiqa", "qualiclip"])
        "; did you mean 'clipiqa'?"
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
