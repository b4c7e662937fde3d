"""What a tower computes for the places of images: features of their own, or shares of the image's feature."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlaceFeatures:
    """Projected features of places, in the space of the image's feature.

    Attributes:
        image: the images' features, (N, D), not normalised.
        places: (N, h*w, D), not normalised.
        grid: height and width in places, (h, w).
        step: height and width of a place in pixels.
    """

    image: Tensor
    places: Tensor
    grid: tuple[int, int]
    step: tuple[int, int]


@dataclass(frozen=True)
class Shares:
    """Summands of the inner products of images' unit features with some directions.

    `places.sum(-1) + rest` is the inner product.

    Attributes:
        image: the images' features, (N, D), not normalised.
        places: (N, A, h*w), of each place.
        rest: (N, A), of what belongs to no place.
        grid, step: as in `PlaceFeatures`.
    """

    image: Tensor
    places: Tensor
    rest: Tensor
    grid: tuple[int, int]
    step: tuple[int, int]
