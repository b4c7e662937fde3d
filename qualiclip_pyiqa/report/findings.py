"""What a reader would not find by eye in a long table: outliers of each score, and near-duplicate images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: A robust z-score beyond this is an outlier. Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993), p. 12.
OUTLIER_Z = 3.5
#: Scores of fewer images than this have no outliers.
OUTLIER_COUNT = 8
#: Perceptual hashes of 64 bits that differ in at most this many bits are near-duplicates.
DUPLICATE_BITS = 6

# Makes the median absolute deviation, and the mean absolute deviation, of a normal distribution its standard deviation.
_MAD_SCALE = 1.4826
_MEAN_SCALE = 1.2533
_BAND_BITS = 8  # hashes within DUPLICATE_BITS agree in at least one of their 8 bytes
_PAIRS = 2**22  # compared at a time

_BITS = np.array([byte.bit_count() for byte in range(2**16)], np.uint8)


def robust_z(scores: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each score is from the median, in robust standard deviations of its own side.

    The deviation is 1.4826 times the median absolute deviation (MAD) of the scores on that side of the median, so that
    the long tail of a skewed distribution, such as that of scores near the end of their range, is none of outliers.
    Where it is 0, because most of the scores are equal, it is 1.2533 times the mean absolute deviation.

    Args:
        scores: of one column; NaN for a missing score.

    Returns:
        The same shape; NaN for missing scores, 0 for all if they are equal.

    Example:
        >>> robust_z([1, 2, 3, 4, 100]).round(1).tolist()
        [-1.3, -0.7, 0.0, 0.7, 65.4]
    """
    values = np.asarray(scores, np.float64)
    known = values[~np.isnan(values)]
    if not known.size:
        return values
    middle = np.median(known)

    def spread(away: NDArray[np.float64]) -> float:
        """Of the distances of one side, which has at least the median itself or its nearest neighbour."""
        return float(_MAD_SCALE * np.median(away) or _MEAN_SCALE * np.mean(away) or 1.0)

    below, above = spread(middle - known[known <= middle]), spread(known[known >= middle] - middle)
    return (values - middle) / np.where(values < middle, below, above)


def outliers(scores: Sequence[float] | NDArray[np.float64]) -> dict[int, float]:
    """Return the robust z-score of every outlier by its index; none among fewer than `OUTLIER_COUNT` scores.

    Example:
        >>> list(outliers([0.5, 0.52, 0.49, 0.51, 0.5, 0.48, 0.5, 0.1]))
        [7]
    """
    z = robust_z(scores)
    if np.count_nonzero(~np.isnan(z)) < OUTLIER_COUNT:
        return {}
    return {int(index): float(z[index]) for index in np.flatnonzero(np.abs(np.nan_to_num(z)) > OUTLIER_Z)}


def near_duplicates(hashes: Sequence[int | None], bits: int = DUPLICATE_BITS) -> list[list[int]]:
    """Group images whose perceptual hashes differ in few bits, directly or through others of the group.

    Args:
        hashes: 64-bit hash of each image; None for an image without one.
        bits: largest number of differing bits, 0 to 7.

    Returns:
        Groups of at least two indices, ascending, ordered by their first.

    Example:
        >>> near_duplicates([0b0, 2**63 - 1, 0b11, None, 2**63 - 1])
        [[0, 2], [1, 4]]
    """
    known = [index for index, value in enumerate(hashes) if value is not None]
    if len(known) < 2:
        return []
    values = np.array([hashes[index] for index in known], np.uint64)
    unique, which = np.unique(values, return_inverse=True)
    parents = list(range(len(unique)))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    for band in range(0, 64, _BAND_BITS):
        key = (unique >> np.uint64(band)) & np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(key, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            for one, other in _close(unique, members, bits):
                parents[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for index, value in zip(known, which.ravel().tolist(), strict=True):
        groups.setdefault(root(value), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _close(values: NDArray[np.uint64], members: NDArray[np.intp], bits: int) -> list[tuple[int, int]]:
    """Return the pairs of members whose values differ in at most so many bits."""
    found: list[tuple[int, int]] = []
    step = max(1, _PAIRS // max(1, len(members)))
    for start in range(0, len(members), step):
        rows = members[start : start + step]
        differing = values[rows][:, None] ^ values[members][None, :]
        count = sum(
            _BITS[((differing >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.intp)] for shift in (0, 16, 32, 48)
        )
        near = np.argwhere(np.asarray(count) <= bits)
        found += [(int(rows[i]), int(members[j])) for i, j in near if rows[i] < members[j]]
    return found
