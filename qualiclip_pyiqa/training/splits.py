"""Divide images for cross-validation such that no group is ever on both sides."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]


class Split(NamedTuple):
    """Indices of images, ascending."""

    training: Indices
    test: Indices


def united(labels: Sequence[Iterable[Hashable]]) -> Indices:
    """Number the groups of images: those that share a label, directly or through other images, are one group.

    Args:
        labels: of each image.

    Returns:
        (n,) numbers from 0, in the order of each group's first image.

    Example:
        >>> united([["a"], ["b"], ["a", "c"], ["c"]]).tolist()
        [0, 1, 0, 0]
    """
    parents = list(range(len(labels)))

    def root(image: int) -> int:
        while parents[image] != image:
            parents[image] = parents[parents[image]]
            image = parents[image]
        return image

    first: dict[Hashable, int] = {}
    for image, each in enumerate(labels):
        for label in each:
            one, other = root(first.setdefault(label, image)), root(image)
            parents[max(one, other)] = min(one, other)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(image), len(numbers)) for image in range(len(labels))], np.int64)


def repeated_splits(groups: Indices, count: int, share: float, seed: int) -> Iterator[Split]:
    """Draw `count` random splits, each with `share` of the groups to test on: one at least, all but two at most."""
    numbers = np.unique(groups)
    size = max(1, min(round(share * len(numbers)), len(numbers) - 2))
    for number in range(count):
        drawn = np.random.default_rng([seed, number]).permutation(numbers)[:size]
        yield _split(np.isin(groups, drawn))


def folds(groups: Indices, count: int, seed: Sequence[int]) -> list[Split]:
    """Divide images into `count` folds of about equal numbers of images, or one for each group if these are fewer.

    Args:
        groups: group of each image; at least two different ones.
        count: number of folds.
        seed: of the random assignment.
    """
    numbers, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first, equal ones at random
    totals = np.zeros(min(count, len(numbers)), np.int64)
    fold_of = np.empty(len(numbers), np.int64)
    for group in order:
        fold_of[group] = totals.argmin()
        totals[fold_of[group]] += sizes[group]
    fold_of_image = fold_of[np.searchsorted(numbers, groups)]
    return [_split(fold_of_image == fold) for fold in range(len(totals))]


def _split(test: NDArray[np.bool_]) -> Split:
    return Split(np.flatnonzero(~test), np.flatnonzero(test))
