"""The package's own errors: one line each, saying what was wrong, what was expected and what to do."""

from __future__ import annotations


class ImageError(ValueError):
    """A picture that cannot be scored: unreadable, too small, out of range, wrong shape."""


class PromptError(ValueError):
    """A prompt set, antonym prompt pair or attribute mapping that makes no sense."""


class SettingsError(ValueError):
    """A setting (metric name, backbone, training option) that is unknown or contradicts another."""


class WeightsError(RuntimeError):
    """A weight file that is missing, damaged, of another layout, or not safe to load."""
