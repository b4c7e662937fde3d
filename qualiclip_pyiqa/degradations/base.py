"""The definition of a degradation, and the random choices and filters that degradations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from ..errors import SettingsError
from ..optional import require

LEVELS = 5
# Groups of all banks, in the order in which a composition applies them: from the scene to the file.
GROUP_ORDER = (
    "brightness change",
    "color distortion",
    "sharpness and contrast",
    "blur",
    "noise",
    "spatial distortion",
    "compression",
)
Generators: TypeAlias = Sequence[Generator]  # one for all images, or one for each


@dataclass(frozen=True)
class Degradation:
    """One type of a bank.

    Attributes:
        group: one of `GROUP_ORDER`.
        levels: strength at levels 1 (mildest) to 5, in the unit that the function documents.
        apply: maps (images, strength, generators) to degraded images, not yet clamped to 0..1.
        chains: which levels are ordered, 0 being pristine: within a chain each level is worse than those before it. The
            order of two levels that share no chain is unknown.
    """

    group: str
    levels: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, float, Generators], Tensor]
    chains: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4, 5),)

    def __post_init__(self) -> None:
        if self.group not in GROUP_ORDER:
            raise SettingsError(f"degradation group is {self.group!r}; expected one of {', '.join(GROUP_ORDER)}")

    def ordered(self, i: int, j: int) -> bool:
        """Return whether level j is known to be worse than level i, each from 0 to 5."""
        return i < j and any(i in chain and j in chain for chain in self.chains)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of levels (i, j), 0 being pristine, where j is known to be worse."""
        return [(i, j) for i, j in combinations(range(LEVELS + 1), 2) if self.ordered(i, j)]

    @property
    def monotone(self) -> bool:
        """Whether each of the five levels is worse than the one below it."""
        return all(self.ordered(level, level + 1) for level in range(1, LEVELS))


Bank: TypeAlias = Mapping[str, Degradation]


def known(bank: Bank, name: str) -> Degradation:
    """Look up a type.

    Raises:
        SettingsError: the bank has no type of that name.
    """
    if name not in bank:
        raise SettingsError(f"unknown degradation {name!r}; expected one of {', '.join(bank)}")
    return bank[name]


def kornia(module: str) -> ModuleType:
    """Import a module of kornia, which only degradations need: the extra `train`."""
    return require(f"kornia.{module}", "train", "a degradation")


def correlate(x: Tensor, kernels: Tensor) -> Tensor:
    """Correlate every channel with an odd-sized kernel, repeating the border.

    Args:
        x: (N, C, H, W).
        kernels: (1, kH, kW) for all images or (N, kH, kW), one for each.
    """
    # A kernel per image, even where all are equal: on a CPU it makes the convolution several times faster.
    filtered: Tensor = kornia("filters").filter2d(x, kernels.to(x).expand(len(x), -1, -1), "replicate")
    return filtered


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blur (N, C, H, W) by a Gaussian of `sigma` pixels, cut to 2 * ceil(2 * sigma) + 1 pixels; the border repeats."""
    size = 2 * math.ceil(2 * sigma) + 1
    # A sigma per image as in `correlate`; on the CPU, since kornia checks its sign, which would wait for a GPU.
    sigmas = torch.full((len(x), 2), sigma, dtype=torch.float64)
    blurred: Tensor = kornia("filters").gaussian_blur2d(x, (size, size), sigmas, "replicate")
    return blurred


def shared_choices(generators: Generators, *shape: int) -> Tensor:
    """Draw uniform numbers in 0..1 that the images of a generator share: (number of generators, *shape), on the CPU."""
    return torch.stack([torch.rand(shape, generator=generator, dtype=torch.float32) for generator in generators])


def own_choices(draw: Callable[..., Tensor], x: Tensor, generators: Generators, *shape: int) -> Tensor:
    """Draw random numbers for each image of x by itself: (N, *shape), with the device and dtype of x.

    Args:
        draw: `torch.rand` or `torch.randn`.
    """
    share = len(x) // len(generators)
    return torch.cat([draw((share, *shape), generator=each, dtype=torch.float32) for each in generators]).to(x)
