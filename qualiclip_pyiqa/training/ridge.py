"""Ridge regression on standardised statistics, its strength chosen by cross-validation.

    w, b = argmin mean((y - b - Z w)^2) + strength * |w|^2      Z = standardised(X, mean, scale)

NumPy suffices: one eigendecomposition of the Gram matrix gives the solutions for all strengths, where a solver would
run once for each. A test compares them with scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..metrics.fitted import bounded, regress, standardised
from .splits import Split

# Half decades. The largest eigenvalue of Z^T Z / n is at most about S, the number of statistics.
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-4, 11))
# A statistic with a smaller standard deviation, relative to its mean, differs by rounding only.
_CONSTANT = 1e-5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ridge:
    """Regressions of one set of images for K strengths.

    Attributes:
        mean, scale: (S,); of the statistics.
        weights: (S, K); 0 for a constant statistic.
        intercepts: (K,).
        low, high: smallest and largest target.
    """

    mean: Floats
    scale: Floats
    weights: Floats
    intercepts: Floats
    low: float
    high: float

    def scores(self, x: Floats) -> Floats:
        """Score images as the K metrics would: statistics (n, S) -> (n, K)."""
        predicted = _standardised(x, self.mean, self.scale) @ self.weights + self.intercepts
        if self.low == self.high:
            return np.full_like(predicted, self.low)
        scores: Floats = bounded(torch.from_numpy(predicted), self.low, self.high).numpy()
        return scores

    def stored(self) -> torch.Tensor:
        """Return mean, scale and weight of each statistic as a file holds them, for the first strength: (3, S)."""
        return torch.from_numpy(np.stack([self.mean, self.scale, self.weights[:, 0]]).astype(np.float32))

    def stored_scores(self, x: Floats) -> Floats:
        """Score images as the metric in a file does, in float32: (n, S) -> (n,), for the first strength."""
        statistics = torch.from_numpy(x.astype(np.float32))
        scores = regress(statistics, self.stored(), float(self.intercepts[0]), self.low, self.high)
        return scores[:, 0].double().numpy()


def fit_ridge(x: Floats, y: Floats, strengths: Sequence[float]) -> Ridge:
    """Fit a regression for each strength.

    Args:
        x: (n, S) statistics.
        y: (n,) targets.
        strengths: K positive numbers.
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    constant = scale <= _CONSTANT * np.abs(mean) + np.finfo(np.float32).tiny  # a file holds float32
    scale = np.where(constant, 1.0, scale)
    z = np.where(constant, 0.0, _standardised(x, mean, scale))
    centre = z.mean(axis=0)
    z = z - centre
    targets = y - y.mean()
    dual = len(z) <= z.shape[1]
    values, vectors = np.linalg.eigh(z @ z.T if dual else z.T @ z)
    projected = vectors.T @ (targets if dual else z.T @ targets)
    shrunk = projected[:, None] / (values.clip(0)[:, None] + len(z) * np.asarray(strengths))
    weights = np.where(constant[:, None], 0.0, (z.T @ vectors if dual else vectors) @ shrunk)
    return Ridge(mean, scale, weights, y.mean() - centre @ weights, float(y.min()), float(y.max()))


def choose_strength(x: Floats, y: Floats, inner: Sequence[Split], strengths: Sequence[float] = STRENGTHS) -> int:
    """Return the index of the strength whose scores have the smallest squared error; the larger of two equal ones.

    The scores are the bounded ones: by the regression's own predictions, a single image with unusual statistics would
    choose a strength far too large.

    Args:
        x: (n, S) statistics.
        y: (n,) targets.
        inner: folds of the n images.
        strengths: to try, ascending.
    """
    errors = np.zeros(len(strengths))
    for training, test in inner:
        found = fit_ridge(x[training], y[training], strengths).scores(x[test])
        errors += np.square(found - y[test, None]).sum(axis=0)
    return len(strengths) - 1 - int(errors[::-1].argmin())


def _standardised(x: Floats, mean: Floats, scale: Floats) -> Floats:
    found: Floats = standardised(*map(torch.from_numpy, (x, mean, scale))).numpy()
    return found
