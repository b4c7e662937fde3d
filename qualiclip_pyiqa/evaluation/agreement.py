"""How well scores agree with opinion scores: correlations, their uncertainty, and competitions between metrics.

Nothing here knows of networks: numbers in, numbers out.

SRCC and KRCC (tau-b) are of ranks, ties included. PLCC is of the plain scores and, as is usual since VQEG's report of
2003, of the scores after a monotone logistic with four parameters, fitted to the same data; RMSE is after that mapping
too, in the unit of the opinion scores. Intervals are of the bootstrap over pictures (percentiles).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ..errors import SettingsError

RESAMPLES = 1000
CONFIDENCE = 0.95
LEAST = 3  # pictures that a correlation says anything about

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """How well one metric's scores agree with opinion scores; positive is agreement whatever their directions.

    But for `plcc_logistic`: the logistic may fall as well as rise, so a metric that disagrees has a high one too. Look
    at `srcc` for the sign.

    Attributes:
        n: pictures with both numbers.
        srcc, plcc, krcc: rank, linear and pairwise correlation in -1..1; None where a column is constant.
        plcc_logistic, rmse: after the four-parameter logistic, the latter in the unit of the opinion scores; None where
            the fit does not converge or a column is constant.
        srcc_ci95: the 95 % bootstrap interval of `srcc`.
    """

    n: int
    srcc: float | None
    plcc: float | None
    plcc_logistic: float | None
    krcc: float | None
    rmse: float | None
    srcc_ci95: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        said = asdict(self)
        return {**said, "srcc_ci95": None if self.srcc_ci95 is None else list(self.srcc_ci95)}


def agreement(scores: ArrayLike, opinions: ArrayLike, opposite: bool = False, seed: int = 0) -> Agreement:
    """Correlate scores (n,) with opinion scores (n,).

    Args:
        scores, opinions: finite numbers, one each per picture.
        opposite: whether one of the two is better when lower and the other when higher.
        seed: of the bootstrap.

    Raises:
        SettingsError: fewer than three pictures, or numbers that are not finite.
    """
    x, y = _columns(scores, opinions)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(len(x), None, None, None, None, None, None)
    sign = -1.0 if opposite else 1.0
    mapping = fitted_logistic(x, y)
    mapped = None if mapping is None else mapping(x)
    plain = float(stats.pearsonr(x, y)[0])
    return Agreement(
        n=len(x),
        srcc=sign * float(stats.spearmanr(x, y)[0]),
        plcc=sign * plain,
        plcc_logistic=None if mapped is None or np.ptp(mapped) == 0 else float(stats.pearsonr(mapped, y)[0]),
        krcc=sign * float(stats.kendalltau(x, y)[0]),
        rmse=None if mapped is None else float(np.sqrt(np.mean((mapped - y) ** 2))),
        srcc_ci95=_interval(_bootstrap([sign * x], y, seed)[0]),
    )


@dataclass(frozen=True)
class Difference:
    """SRCC of the first metric minus that of the second on the same pictures.

    Attributes:
        difference: of the two SRCCs.
        ci95: its 95 % interval over paired bootstrap samples.
        p: two-sided bootstrap p-value, 2 min(P(d <= 0), P(d >= 0)) over the samples, at least 1 / samples.
    """

    difference: float
    ci95: tuple[float, float]
    p: float


def compare(first: ArrayLike, second: ArrayLike, opinions: ArrayLike, seed: int = 0) -> Difference | None:
    """Whether two metrics' SRCCs differ on the same pictures; both must have the direction of the opinions.

    None where one of the columns is constant.
    """
    x, y = _columns(first, opinions)
    z, _ = _columns(second, opinions)
    if min(np.ptp(x), np.ptp(y), np.ptp(z)) == 0:
        return None
    one, other = _bootstrap([x, z], y, seed)
    differences = one - other
    p = 2 * min(np.mean(differences <= 0), np.mean(differences >= 0))
    return Difference(
        float(stats.spearmanr(x, y)[0] - stats.spearmanr(z, y)[0]),
        _interval(differences),
        float(np.clip(p, 1 / len(differences), 1)),
    )


def logistic(scores: ArrayLike, top: float, bottom: float, middle: float, width: float) -> Floats:
    """(top - bottom) / (1 + exp(-(s - middle) / |width|)) + bottom: the usual four-parameter mapping (VQEG 2003)."""
    s = (np.asarray(scores, float) - middle) / max(abs(width), 1e-12)
    return (top - bottom) / (1 + np.exp(-np.clip(s, -500, 500))) + bottom


def fitted_logistic(scores: ArrayLike, opinions: ArrayLike) -> Callable[[ArrayLike], Floats] | None:
    """The mapping `logistic` fitted to these pictures; None where it does not converge or has too few points."""
    x, y = _columns(scores, opinions)
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rising = stats.spearmanr(x, y)[0] >= 0
    ends = (y.max(), y.min()) if rising else (y.min(), y.max())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)  # the covariance, which is not used
            found, _ = optimize.curve_fit(logistic, x, y, p0=(*ends, np.median(x), x.std()), maxfev=20_000)
    except RuntimeError:
        return None
    return lambda values: logistic(values, *found)


def _columns(scores: ArrayLike, opinions: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(scores, float), np.asarray(opinions, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < LEAST:
        raise SettingsError(f"{x.size} scores and {y.size} opinion scores; expected as many, and at least {LEAST}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SettingsError("scores or opinion scores are not finite; leave such pictures out")
    return x, y


def _bootstrap(columns: Sequence[Floats], y: Floats, seed: int) -> list[Floats]:
    """SRCC of each column with y on the same resampled pictures; samples in which a column is constant are left out."""
    rng = np.random.default_rng(seed)
    out: list[list[float]] = [[] for _ in columns]
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(y), len(y))
        if min(np.ptp(column[chosen]) for column in (*columns, y)) == 0:
            continue
        ranks = stats.rankdata(y[chosen])
        for column, rows in zip(columns, out, strict=True):
            rows.append(float(np.corrcoef(stats.rankdata(column[chosen]), ranks)[0, 1]))
    return [np.array(rows) for rows in out]


def _interval(samples: Floats) -> tuple[float, float]:
    if not len(samples):
        return (math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, (tail, 1 - tail))
    return (float(low), float(high))


@dataclass(frozen=True)
class Duel:
    """One pair of a gMAD competition (Ma et al., CVPR 2016): alike for the defender, farthest apart for the attacker.

    Attributes:
        defender, attacker: names of the metrics.
        level: mean of the defender's two scores.
        better, worse: numbers of the two pictures, by the attacker.
        defender_gap, attacker_gap: how far apart the two find them.
    """

    defender: str
    attacker: str
    level: float
    better: int
    worse: int
    defender_gap: float
    attacker_gap: float


def gmad(scores: Mapping[str, Sequence[float]], opposite: Mapping[str, bool], levels: int = 4) -> list[Duel]:
    """The pairs of a gMAD competition between two metrics, each defending once.

    Pictures are sorted by the defender and cut into 2 * `levels` + 1 sets of equal number; in every second set, which
    the defender finds all alike, the attacker's best and worst picture are the pair.

    Args:
        scores: two metrics' scores of the same pictures.
        opposite: whether a metric is better when lower.
        levels: pairs for each defender.

    Raises:
        SettingsError: not two metrics, no levels, or too few pictures.
    """
    if levels < 1:
        raise SettingsError(f"a gMAD competition at {levels} levels has no pairs; expected at least 1")
    names = list(scores)
    if len(names) != 2:
        raise SettingsError(f"a gMAD competition is between two metrics, not {len(names)}")
    count = len(scores[names[0]])
    sets = 2 * levels + 1
    if count < 2 * sets:
        raise SettingsError(f"{count} pictures; a gMAD competition at {levels} levels needs at least {2 * sets}")
    duels = []
    for defender, attacker in (names, names[::-1]):
        defending, attacking = np.asarray(scores[defender], float), np.asarray(scores[attacker], float)
        sign = -1 if opposite.get(attacker, False) else 1
        for members in np.array_split(np.argsort(defending, kind="stable"), sets)[1::2]:
            ranked = members[np.argsort(sign * attacking[members], kind="stable")]
            worse, better = int(ranked[0]), int(ranked[-1])
            duels.append(
                Duel(
                    defender,
                    attacker,
                    float(defending[[better, worse]].mean()),
                    better,
                    worse,
                    float(abs(defending[better] - defending[worse])),
                    float(abs(attacking[better] - attacking[worse])),
                )
            )
    return duels
