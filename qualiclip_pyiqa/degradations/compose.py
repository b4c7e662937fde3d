"""Compositions: several types applied in turn, at one level."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import SettingsError
from .bank import DEGRADATIONS, degrade
from .base import GROUP_ORDER, Bank, known


def draw_types(
    rng: random.Random, counts: Sequence[float], weights: Mapping[str, float], bank: Bank = DEGRADATIONS
) -> tuple[str, ...]:
    """Draw the types of a composition, at most one of each group.

    Args:
        rng: source of every choice.
        counts: relative frequencies of one, two, three... types.
        weights: relative frequencies of the types; 1 for types without an entry.
        bank: the types to draw from.

    Returns:
        Keys of the bank, in the order of `GROUP_ORDER`.

    Raises:
        SettingsError: an unknown type, or more types than there are groups with a weight above zero.

    Example:
        >>> draw_types(random.Random(0), counts=[0, 1], weights={})
        ('pixelate', 'jpeg2000')
    """
    for name in sorted(weights):
        known(bank, name)
    left = {name: weights.get(name, 1.0) for name in bank if weights.get(name, 1.0) > 0}
    groups = {bank[name].group for name in left}
    if not any(counts) or any(counts[len(groups) :]):
        raise SettingsError(
            f"the frequencies of one, two... types are {list(counts)}; expected one above zero, and none for more than "
            f"the {len(groups)} groups with a weight above zero"
        )
    drawn: list[str] = []
    for _ in range(rng.choices(range(1, len(counts) + 1), counts)[0]):
        drawn += rng.choices(list(left), list(left.values()))
        group = bank[drawn[-1]].group
        left = {name: weight for name, weight in left.items() if bank[name].group != group}
    return tuple(sorted(drawn, key=lambda name: GROUP_ORDER.index(bank[name].group)))


def degrade_all(
    x: Tensor, names: Sequence[str], level: float, seed: int | Sequence[int], bank: Bank = DEGRADATIONS
) -> Tensor:
    """Degrade images by several types at the same level, one after the other.

    Args:
        x: (N, 3, H, W), float, RGB in 0..1; never changed.
        names: keys of the bank, at most one of each group, applied in this order.
        level, bank: as for `degrade`.
        seed: as for `degrade`; the type at position p is given `seed` + p.

    Returns:
        (N, 3, H, W), the dtype and device of x, in 0..1.

    Raises:
        SettingsError: as for `degrade`, or two types of one group.
    """
    groups = [bank[name].group for name in names if name in bank]
    if len(set(groups)) < len(groups):
        raise SettingsError(f"{', '.join(names)} cannot be composed; expected at most one type of each group")
    result = x.clone()
    for position, name in enumerate(names):
        seeds = seed + position if isinstance(seed, int) else [one + position for one in seed]
        result = degrade(result, name, level, seeds, bank)
    return result
