"""How well scores agree with opinion scores: correlations and their uncertainty. Numbers in, numbers out.

SRCC and KRCC (tau-b) are of ranks, ties included. PLCC is of the plain scores and, as is usual since VQEG's report of
2003, of the scores after a monotone logistic with four parameters, fitted to the same data; RMSE is after that mapping
too, in the unit of the opinion scores. Intervals are percentiles of the bootstrap over images: pass one score and one
opinion score per image, since an image that appears twice would make its interval too narrow
(`Ratings.mean_opinions` averages repeated ratings).

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
LEAST = 3  # images: with fewer a correlation says nothing

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How well one metric's scores agree with opinion scores; positive is agreement, whatever the two directions.

    Except for `plcc_logistic`: the logistic may fall as well as rise, so it is high for a metric that disagrees, too.
    The sign is that of `srcc`.

    Attributes:
        n: images with both numbers.
        srcc, plcc, krcc: rank, linear and pairwise correlation, -1..1; None where a column is constant.
        plcc_logistic, rmse: after the four-parameter logistic, the latter in the unit of the opinion scores; None where
            the fit does not converge, a column is constant, or there are fewer than five images.
        srcc_ci95: 95 % bootstrap interval of `srcc`.
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
        opposite: whether one of the two is better when lower and the other when higher.
        seed: of the bootstrap.

    Raises:
        SettingsError: fewer than three images, numbers that are not finite, or SciPy is not installed.

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
    """SRCC of one metric minus that of another on the same images.

    Attributes:
        difference: of the two SRCCs.
        ci95: its 95 % interval over paired bootstrap samples.
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
        first, second, opinions: (n,) finite numbers, all of one direction.
        seed: of the bootstrap.

    Returns:
        None where a column is constant, or constant in every bootstrap sample.

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
        The mapping; None where the fit does not converge, a column is constant, or there are fewer than five images.

    Raises:
        SettingsError: as for `agreement`.
    """
    x, y = _columns(scores, opinions)
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rising = _pearson(_stats().rankdata(x), _stats().rankdata(y)) >= 0
    ends = (y.max(), y.min()) if rising else (y.min(), y.max())
    # MINPACK itself rather than `curve_fit`, which warns of a covariance that is not needed here.
    leastsq = require("scipy.optimize", "eval", "a fitted logistic").leastsq
    start = np.array((*ends, np.median(x), x.std()))
    found, *_, status = leastsq(lambda p: logistic(x, *p) - y, start, full_output=True, maxfev=20_000)
    if status not in (1, 2, 3, 4):
        return None
    return lambda values: logistic(values, *found)


def _stats() -> ModuleType:
    return require("scipy.stats", "eval", "a correlation")


def _pearson(x: Floats, y: Floats) -> float:
    # As in `scipy.stats.pearsonr`, without its warnings and p-value.
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.dot(x / np.linalg.norm(x), y / np.linalg.norm(y)), -1, 1))


def _columns(scores: ArrayLike, opinions: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(scores, float), np.asarray(opinions, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < LEAST:
        raise SettingsError(f"{x.size} scores and {y.size} opinion scores; expected as many, and at least {LEAST}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SettingsError("scores or opinion scores are not finite; leave such images out")
    return x, y


def _bootstrap(columns: Sequence[Floats], y: Floats, seed: int) -> list[Floats]:
    """SRCC of each column with y on the same resampled images; samples in which a column is constant are left out."""
    rng = np.random.default_rng(seed)
    rankdata = _stats().rankdata
    out: list[list[float]] = [[] for _ in columns]
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(y), len(y))
        if min(np.ptp(column[chosen]) for column in (*columns, y)) == 0:
            continue
        ranks = rankdata(y[chosen])
        for column, rows in zip(columns, out, strict=True):
            rows.append(_pearson(rankdata(column[chosen]), ranks))
    return [np.array(rows) for rows in out]


def _interval(samples: Floats) -> tuple[float, float] | None:
    if not len(samples):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, (tail, 1 - tail))
    return (float(low), float(high))
