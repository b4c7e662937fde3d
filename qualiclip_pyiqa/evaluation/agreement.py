"""Agreement of scores with opinion scores: correlations and their uncertainty.

SRCC and KRCC (tau-b) compare ranks, and handle ties. PLCC is computed on the raw scores and, as is usual since VQEG's
report of 2003, after a monotone four-parameter logistic fitted to the same data; RMSE is computed after the logistic,
in units of the opinion scores. Confidence intervals are percentiles of a bootstrap over images. Pass each image once,
since duplicates would make the interval too narrow (`Ratings.mean_opinions` averages repeated ratings).

Needs SciPy (the extra `eval`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SettingsError
from ..optional import require

RESAMPLES = 1000
CONFIDENCE = 0.95
LARGEST = 1e100  # of a score or opinion score: the squares of larger ones overflow
LEAST = 3  # images, the minimum for a meaningful correlation
_BLOCK = 2**20  # numbers of bootstrap samples that are ranked at a time

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Agreement of one metric with opinion scores. Positive is agreement, whatever the two directions.

    `plcc_logistic` is an exception: the logistic may fall, so a metric that disagrees also has a high value; its sign
    is that of `srcc`.

    Attributes:
        n: number of images.
        srcc, plcc, krcc: rank, linear and pairwise correlation, -1..1; None if scores or opinion scores are constant.
        plcc_logistic, rmse: after the four-parameter logistic, `rmse` in units of the opinion scores; None if the fit
            does not converge, scores or opinion scores are constant, or there are fewer than five images.
        srcc_ci95: 95 % bootstrap confidence interval of `srcc`.
    """

    n: int
    srcc: float | None = None
    plcc: float | None = None
    plcc_logistic: float | None = None
    krcc: float | None = None
    rmse: float | None = None
    srcc_ci95: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, JSON-ready."""
        return {**asdict(self), "srcc_ci95": None if self.srcc_ci95 is None else list(self.srcc_ci95)}


def agreement(scores: ArrayLike, opinions: ArrayLike, opposite: bool = False, seed: int = 0) -> Agreement:
    """Correlate scores with opinion scores.

    Args:
        scores, opinions: (n,) finite numbers, one each per image.
        opposite: whether the two have opposite directions.
        seed: of the bootstrap.

    Raises:
        SettingsError: fewer than three images, numbers that are not finite or beyond 1e100, or SciPy is not installed.

    Example:
        >>> found = agreement([0.1, 0.4, 0.3, 0.9], [70, 40, 50, 10], opposite=True)
        >>> found.n, round(found.srcc, 6), round(found.plcc, 3)
        (4, 1.0, 0.989)
    """
    x, y = _columns(scores, opinions)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(len(x))
    sign = -1.0 if opposite else 1.0
    mapping = fitted_logistic(x, y)
    mapped = None if mapping is None else mapping(x)
    ranks = _stats().rankdata
    return Agreement(
        n=len(x),
        srcc=sign * _pearson(ranks(x), ranks(y)),
        plcc=sign * _pearson(x, y),
        plcc_logistic=None if mapped is None or np.ptp(mapped) == 0 else _pearson(mapped, y),
        krcc=sign * float(_stats().kendalltau(x, y)[0]),
        rmse=None if mapped is None else float(np.sqrt(np.mean((mapped - y) ** 2))),
        srcc_ci95=_interval(_bootstrap([sign * x], y, seed)[0]),
    )


@dataclass(frozen=True)
class Difference:
    """Difference in SRCC between two metrics on the same images.

    Attributes:
        difference: SRCC of the first minus SRCC of the second.
        ci95: 95 % confidence interval from a paired bootstrap.
        p: two-sided bootstrap p-value, 2 min(P(d <= 0), P(d >= 0)) over the samples, at least 1 / samples.
    """

    difference: float
    ci95: tuple[float, float]
    p: float

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes, JSON-ready."""
        return {"srcc_difference": self.difference, "ci95": list(self.ci95), "p": self.p}


def compare(first: ArrayLike, second: ArrayLike, opinions: ArrayLike, seed: int = 0) -> Difference | None:
    """Compare two metrics' SRCCs on the same images by a paired bootstrap.

    Args:
        first, second, opinions: (n,) finite numbers, all with the same direction.
        seed: of the bootstrap.

    Returns:
        The difference; None if one of the three is constant, altogether or in every bootstrap sample.

    Raises:
        SettingsError: as for `agreement`.
    """
    x, y = _columns(first, opinions)
    z, _ = _columns(second, opinions)
    if min(np.ptp(x), np.ptp(y), np.ptp(z)) == 0:
        return None
    one, other = _bootstrap([x, z], y, seed)
    differences = one - other
    ci95 = _interval(differences)
    if ci95 is None:
        return None
    ranks = _stats().rankdata
    p = 2 * min(np.mean(differences <= 0), np.mean(differences >= 0))
    return Difference(
        _pearson(ranks(x), ranks(y)) - _pearson(ranks(z), ranks(y)), ci95, float(np.clip(p, 1 / len(differences), 1))
    )


def logistic(scores: ArrayLike, top: float, bottom: float, middle: float, width: float) -> Floats:
    """Map scores s to `(top - bottom) / (1 + exp(-(s - middle) / |width|)) + bottom`, the mapping of VQEG 2003."""
    s = (np.asarray(scores, float) - middle) / max(abs(width), 1e-12)
    return (top - bottom) / (1 + np.exp(-np.clip(s, -500, 500))) + bottom


def fitted_logistic(scores: ArrayLike, opinions: ArrayLike) -> Callable[[ArrayLike], Floats] | None:
    """Fit `logistic` to scores and opinion scores by least squares.

    Returns:
        The mapping; None if the fit does not converge, one of the two is constant, or there are fewer than five images.

    Raises:
        SettingsError: as for `agreement`.
    """
    x, y = _columns(scores, opinions)
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rising = _pearson(_stats().rankdata(x), _stats().rankdata(y)) >= 0
    ends = (y.max(), y.min()) if rising else (y.min(), y.max())
    # `curve_fit` would warn about a covariance that is not needed here.
    leastsq = require("scipy.optimize", "eval", "a fitted logistic").leastsq
    start = np.array((*ends, np.median(x), x.std()))
    found, *_, status = leastsq(lambda p: logistic(x, *p) - y, start, full_output=True, maxfev=20_000)
    if status not in (1, 2, 3, 4):
        return None
    return lambda values: logistic(values, *found)


def _stats() -> ModuleType:
    return require("scipy.stats", "eval", "a correlation")


def _pearson(x: Floats, y: Floats) -> float:
    # Like `scipy.stats.pearsonr`, without its warnings and p-value.
    x, y = _near_one(x - x.mean()), _near_one(y - y.mean())
    return float(np.clip(np.dot(x / np.linalg.norm(x), y / np.linalg.norm(y)), -1, 1))


def _near_one(x: Floats) -> Floats:
    """Scale numbers, of which some is not 0, by a power of two, so that their squares neither overflow nor vanish."""
    return np.ldexp(x, -np.frexp(np.abs(x).max())[1])


def _columns(scores: ArrayLike, opinions: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(scores, float), np.asarray(opinions, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < LEAST:
        raise SettingsError(f"{x.size} scores and {y.size} opinion scores; expected equal numbers of at least {LEAST}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SettingsError("some scores or opinion scores are not finite; leave these images out")
    if max(np.abs(x).max(), np.abs(y).max()) > LARGEST:
        raise SettingsError(f"some scores or opinion scores are beyond {LARGEST:g}; leave these images out")
    return x, y


def _bootstrap(columns: Sequence[Floats], y: Floats, seed: int) -> list[Floats]:
    """Return SRCCs of each column with y on the same bootstrap samples, except those where a column is constant."""
    rng = np.random.default_rng(seed)
    rankdata = _stats().rankdata
    n, out = len(y), [[np.empty(0)] for _ in columns]
    rows = max(1, _BLOCK // n)
    for start in range(0, RESAMPLES, rows):
        chosen = rng.integers(0, n, (min(rows, RESAMPLES - start), n))
        samples = [values[chosen] for values in (*columns, y)]
        varied = np.all([np.ptp(sample, axis=1) > 0 for sample in samples], axis=0)
        # The mean rank is (n + 1) / 2, ties included. Sums of products of ranks are exact, so equal SRCCs are equal.
        *ranks, opinions = (rankdata(sample[varied], axis=1) - (n + 1) / 2 for sample in samples)
        squares = (opinions**2).sum(axis=1)
        for each, found in zip(ranks, out, strict=True):
            srcc = (each * opinions).sum(axis=1) / np.sqrt((each**2).sum(axis=1) * squares)
            found.append(np.clip(srcc, -1, 1))
    return [np.concatenate(found) for found in out]


def _interval(samples: Floats) -> tuple[float, float] | None:
    if not len(samples):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, (tail, 1 - tail))
    return (float(low), float(high))
