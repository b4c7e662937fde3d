"""All degradation banks, by name. A type's name belongs to one bank alone, so that a type says which bank it is of."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SettingsError
from .bank import DEGRADATIONS
from .base import Bank
from .camera import CAMERA

BANKS: dict[str, Bank] = {"kadid": DEGRADATIONS, "camera": CAMERA}
ALL_TYPES: Bank = {name: row for bank in BANKS.values() for name, row in bank.items()}


def bank_of(names: Iterable[str]) -> Bank:
    """Join banks into one.

    Args:
        names: keys of `BANKS`.

    Returns:
        The types of all these banks, in the order of the names.

    Raises:
        SettingsError: no bank of a name, a name given twice, or no name.

    Example:
        >>> len(bank_of(["kadid", "camera"]))
        36
    """
    given = list(names)
    for name in given:
        if name not in BANKS:
            raise SettingsError(f"unknown degradation bank {name!r}; expected one of {', '.join(BANKS)}")
    if not given or len(set(given)) < len(given):
        raise SettingsError(f"degradation banks are {given}; expected one or more of {', '.join(BANKS)}, each once")
    return {name: row for bank in given for name, row in BANKS[bank].items()}
