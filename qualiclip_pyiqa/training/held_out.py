"""Divide rated images into those to learn from and those held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from ..errors import SettingsError, counted
from ..evaluation.agreement import LEAST
from ..evaluation.ratings import Ratings
from .splits import repeated_splits, united


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rated images, one row each.

    Attributes:
        training, watched: to learn from, and held out.
        alignment: further opinion scores of the training images, in the same order; None for none.
        groups: number of groups in `training` and in `watched`; None without groups.
    """

    training: Ratings
    watched: Ratings
    alignment: Ratings | None
    groups: tuple[int, int] | None

    @property
    def rows(self) -> tuple[list[Path], list[float]]:
        """All images and opinion scores."""
        rated = [self.training, self.watched, *([] if self.alignment is None else [self.alignment])]
        return [path for each in rated for path in each.paths], [score for each in rated for score in each.opinions]


def hold_out(ratings: Ratings, alignment: Ratings | None, share: float, seed: int) -> Parts:
    """Average the opinion scores of each image, and hold out a share of the images at random.

    Args:
        ratings: if they have groups, a share of the groups is held out instead; an image of several groups unites them.
        alignment: further opinion scores of the same images.
        share: from 0 to less than 1.
        seed: of the random choice.

    Raises:
        SettingsError: a share out of range, too few images or groups to hold any out, images without alignment scores.
    """
    if not 0 <= share < 1:
        raise SettingsError(f"validation is {share:g}; expected a share from 0 to less than 1")
    labels: dict[Path, set[str]] = {}
    for image, group in zip(ratings.images, ratings.groups, strict=False):
        labels.setdefault(image, set()).add(group)
    averaged = ratings.averaged()
    if labels:
        held_out, groups = _choose_groups(averaged.paths, labels, share, seed)
    else:
        held_out, groups = _choose_images(averaged.paths, share, seed), None
    if share and len(held_out) < LEAST:
        raise SettingsError(
            f"{share:g} of {len(averaged.paths)} images are {len(held_out)} to validate on; expected at least {LEAST}: "
            "rate more images, or hold out a larger share or none (0)"
        )
    training, watched = (_part(averaged, held_out, inside) for inside in (False, True))
    return Parts(training, watched, None if alignment is None else _like(training, alignment), groups)


def _choose_images(paths: Sequence[Path], share: float, seed: int) -> set[Path]:
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return {paths[k] for k in order[: round(share * len(paths))]}


def _choose_groups(
    paths: Sequence[Path], labels: dict[Path, set[str]], share: float, seed: int
) -> tuple[set[Path], tuple[int, int]]:
    """Choose the images of a share of the groups, and count the groups on both sides."""
    empty = next((path for path in paths if "" in {label.strip() for label in labels[path]}), None)
    if empty is not None:
        raise SettingsError(f"{empty} has no group; expected one for every image")
    numbers = united([sorted(labels[path]) for path in paths])
    count = int(numbers.max()) + 1
    if not share:
        return set(), (count, 0)
    if count < 2:
        raise SettingsError(
            f"all {counted(len(paths), 'image')} are of one group, which is never divided; expected at least 2 groups, "
            "or hold out none (0)"
        )
    split = next(repeated_splits(numbers, 1, share, seed))
    test = len(set(numbers[split.test].tolist()))
    return {paths[k] for k in split.test}, (count - test, test)


def _part(ratings: Ratings, held_out: Collection[Path], inside: bool) -> Ratings:
    rows = [k for k, path in enumerate(ratings.paths) if (path in held_out) == inside]
    return dataclasses.replace(
        ratings, paths=[ratings.paths[k] for k in rows], opinions=[ratings.opinions[k] for k in rows]
    )


def _like(training: Ratings, others: Ratings) -> Ratings:
    """Return further opinion scores in the order of the training images."""
    means = others.mean_opinions()
    missing = next((path for path in training.paths if path not in means), None)
    if missing is not None:
        raise SettingsError(f"{missing} has no alignment score; expected one for every rated image")
    return dataclasses.replace(
        others, paths=training.paths, opinions=[means[path] for path in training.paths], groups=[]
    )


def check_range(training: Ratings, low: float, high: float, given: bool) -> None:
    """Raise SettingsError if nothing can be learned from opinion scores, or the range does not hold them."""
    if len(training.paths) < 2:
        raise SettingsError(f"{len(training.paths)} rated images to learn from; expected at least 2")
    smallest, largest = min(training.opinions), max(training.opinions)
    if smallest == largest:
        raise SettingsError(f"all opinion scores to learn from are {smallest:g}; expected at least two values")
    if given and not -math.inf < low < high < math.inf:
        raise SettingsError(f"the MOS range is {low:g} to {high:g}; expected two finite numbers, the lower one first")
    if not low <= smallest <= largest <= high:
        raise SettingsError(
            f"opinion scores are from {smallest:g} to {largest:g}, outside the MOS range {low:g} to {high:g}; "
            "expected a range that holds them all"
        )
