"""gMAD competitions: image pairs that one metric scores alike and another far apart (Ma et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import SettingsError


@dataclass(frozen=True)
class Duel:
    """A pair of images with similar scores by the defender, and very different scores by the attacker.

    Attributes:
        defender, attacker: names of the metrics.
        level: mean of the defender's two scores.
        better, worse: indices of the two images, ranked by the attacker.
        defender_gap, attacker_gap: absolute differences of the two scores, in units of each metric.
    """

    defender: str
    attacker: str
    level: float
    better: int
    worse: int
    defender_gap: float
    attacker_gap: float


def images_needed(levels: int) -> int:
    """Return the minimum number of images for a competition at `levels` levels.

    Raises:
        SettingsError: fewer than one level.
    """
    if levels < 1:
        raise SettingsError(f"a gMAD competition at {levels} levels has no pairs; expected at least 1")
    return 2 * (2 * levels + 1)


def gmad(scores: Mapping[str, Sequence[float]], lower_better: Mapping[str, bool], levels: int = 4) -> list[Duel]:
    """Select the pairs of a competition between two metrics; each defends once.

    The images are sorted by the defender's scores and split into 2 * `levels` + 1 sets of equal size. In every second
    set, whose images the defender scores alike, the attacker's best and worst images form a pair.

    Args:
        scores: finite scores of the same images, by metric.
        lower_better: whether a lower score is better, by metric.
        levels: pairs per defender.

    Returns:
        `levels` pairs defended by the first metric, in ascending order of its scores, then those of the second.

    Raises:
        SettingsError: not two metrics, no levels, too few images, or a metric without a direction.

    Example:
        >>> duels = gmad({"a": [1, 1, 1, 2, 2, 2], "b": [1, 2, 3, 1, 2, 3]}, {"a": False, "b": False}, levels=1)
        >>> [(duel.defender, duel.better, duel.worse) for duel in duels]
        [('a', 2, 3), ('b', 4, 1)]
    """
    needed = images_needed(levels)
    names = list(scores)
    if len(names) != 2:
        raise SettingsError(f"a gMAD competition is between two metrics, not {len(names)}")
    count = len(scores[names[0]])
    if count < needed:
        raise SettingsError(f"{count} images; a gMAD competition at {levels} levels needs at least {needed}")
    undirected = next((name for name in names if name not in lower_better), None)
    if undirected is not None:
        raise SettingsError(f"the direction of {undirected} is unknown; pass it in `lower_better`")
    duels = []
    for defender, attacker in (names, names[::-1]):
        defending, attacking = np.asarray(scores[defender], float), np.asarray(scores[attacker], float)
        sign = -1 if lower_better[attacker] else 1
        for members in np.array_split(np.argsort(defending, kind="stable"), 2 * levels + 1)[1::2]:
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
