"""Linear heads of a `MobileTower`, fitted by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...towers.mobile import MobileTower, limited

Floats = NDArray[np.float64]
_LEAST_STD = 1e-4  # of a statistic that is constant


@dataclass(frozen=True)
class Head:
    """`limited((s - mean) / std) @ weight + bias` of statistics s (N, S); mean, std and weight are (S,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: float

    def __call__(self, statistics: Tensor) -> Tensor:
        return self.inputs(statistics) @ self.weight + self.bias

    def inputs(self, statistics: Tensor) -> Tensor:
        return limited((statistics - self.mean) / self.std)

    def scaled(self, slope: float, offset: float) -> Head:
        """Return the head of `slope * output + offset`."""
        return Head(self.mean, self.std, slope * self.weight, slope * self.bias + offset)


def standardisation(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of statistics (N, S)."""
    return statistics.mean(0), statistics.std(0) + _LEAST_STD


def ridge(x: Floats, y: Floats, strength: float, weights: Floats, intercept: bool = True) -> tuple[Tensor, float]:
    """Minimise sum(weights * (y - b - x @ w)^2) + strength * |w|^2 over w (S,) and b: x (N, S), y and weights (N,)."""
    total = weights.sum()
    x_mean, y_mean = (weights @ x / total, weights @ y / total) if intercept else (np.zeros(x.shape[1]), 0.0)
    root = np.sqrt(weights)
    x, y = (x - x_mean) * root[:, None], (y - y_mean) * root
    if len(x) < x.shape[1]:
        solved = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y)
    else:
        solved = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return torch.from_numpy(solved).float(), float(y_mean - x_mean @ solved)


def fit_head(parts: Sequence[tuple[Tensor, Tensor, float]], strength: float) -> Head:
    """Fit a head to several sets of images at once.

    Args:
        parts: statistics (N, S), targets (N,) and the weight of an image of each set. The first set standardises.
    """
    mean, std = standardisation(parts[0][0])
    x = torch.cat([limited((statistics - mean) / std) for statistics, _, _ in parts])
    y = torch.cat([targets for _, targets, _ in parts])
    weights = np.concatenate([np.full(len(targets), weight) for _, targets, weight in parts])
    return Head(mean, std, *ridge(x.double().numpy(), y.double().numpy(), strength, weights))


@torch.no_grad()
def set_head(tower: MobileTower, pair: int, head: Head) -> None:
    """Put a head, of all statistics or of the first ones alone, into a tower."""
    size = len(head.weight)
    tower.head_weight[pair] = 0
    tower.head_mean[pair, :size], tower.head_std[pair, :size] = head.mean, head.std
    tower.head_weight[pair, :size], tower.head_bias[pair] = head.weight, head.bias
