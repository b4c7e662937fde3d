"""How severe each type of degradation is at each level, on one scale for all banks."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

from ..errors import SettingsError
from .banks import ALL_TYPES
from .base import LEVELS, known


@cache
def severities() -> dict[str, tuple[float, ...]]:
    """Return the severity of levels 1 to 5 of every type, from the table that `benchmarks/severity.py` measured."""
    text = (files(__package__) / "severities.toml").read_text(encoding="utf-8")
    return {name: tuple(row["severity"]) for name, row in tomllib.loads(text).items()}


def severity(name: str, level: float) -> float:
    """Return how severe a type is at a level, comparable between types and banks.

    A photograph is degraded by every type at every level. The severity of one of these images is the share of them that
    full-reference metrics find better than it; it is averaged over metrics and photographs. These are FSIM, VSI, GMSD,
    NLPD and PSNR, not viewers: the scale compares types roughly, and says nothing of equal steps in opinion.

    Args:
        name: a type of any bank.
        level: from 1 to 5, or 0 for pristine; between two levels severity is interpolated linearly.

    Returns:
        0 (pristine) to 1 (worse than all others).

    Raises:
        SettingsError: an unknown type, or a level outside 0..5.

    Example:
        >>> severity("jpeg", 0), severity("jpeg", 5) > severity("jpeg", 1)
        (0.0, True)
    """
    known(ALL_TYPES, name)
    if not 0 <= level <= LEVELS:
        raise SettingsError(f"degradation level is {level!r}; expected a number from 0 to {LEVELS}")
    table = (0.0, *severities()[name])
    below = min(int(level), LEVELS - 1)
    return table[below] + (level - below) * (table[below + 1] - table[below])
