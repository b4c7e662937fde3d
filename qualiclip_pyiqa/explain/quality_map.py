"""A quality map: a value for each place of an image, and how it relates to the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError, SettingsError
from ..images.convert import source_name
from ..metrics.prompts import Pair
from ..metrics.registry import DEFAULT_METRIC
from ..metrics.words import BETTER

if TYPE_CHECKING:
    import torch

    from ..images.tensors import Source

#: What a map's values are; `Mapper` has one line on each.
KINDS = ("local", "contributions", "gradcam", "occlusion")


@dataclass(frozen=True)
class QualityMap:
    """Values of an image's places for one attribute. A larger value is better in the attribute's direction.

    Attributes:
        values: (h, w) float32, of places that lie side by side from the image's upper left corner.
        size: height and width of the image in pixels, (H, W).
        step: height and width of a place in pixels. Places may end before the image does, or after it.
        metric: name of the metric.
        attribute: name of the attribute.
        kind: one of KINDS.
        score: the image's score.
        low, high: ends of a colour bar's scale, which may be wider than the values.
        meaning: what the values are, in one line.
        relation: how they relate to the score, in one line.
        comparatives: what a place with a larger value is, and one with a smaller value, such as "brighter", "darker".
        own_scale: whether the values are scores of another scale than the image's, which cannot be compared with it.
        note: one line if maps of an image of this size can mislead, else None.
    """

    values: NDArray[np.float32]
    size: tuple[int, int]
    step: tuple[float, float]
    metric: str
    attribute: str
    kind: str
    score: float
    low: float
    high: float
    meaning: str
    relation: str
    comparatives: Pair = BETTER
    own_scale: bool = False
    note: str | None = None

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        return (
            f"QualityMap({self.attribute} by {self.metric}, {self.kind}, {rows}x{columns} places of an image "
            f"{self.size[0]}x{self.size[1]}, values {self.values.min():.4g} to {self.values.max():.4g}, "
            f"score {self.score:.4g})"
        )

    @property
    def diverging(self) -> bool:
        """Whether zero is a value's middle: above it a place raises the score, below it lowers it."""
        return self.kind != "local"

    def enlarged(self) -> NDArray[np.float32]:
        """Interpolate the values linearly between the centres of the places: (H, W) float32."""
        across = [
            _interpolation(length, step, count)
            for length, step, count in zip(self.size, self.step, self.values.shape, strict=True)
        ]
        found: NDArray[np.float32] = (across[0] @ self.values @ across[1].T).astype(np.float32)
        return found

    def scaled(self, low: float, high: float) -> QualityMap:
        """Return the map with other ends of its colour bar: drawings of one scale can be compared.

        Raises:
            SettingsError: ends that are not finite, or the first not below the second.
        """
        low, high = check_scale(low, high)
        return replace(self, low=low, high=high)

    def figure(self, picture: Source) -> Any:
        """Draw the image, the map over it and the map's scale; see `explain.drawing.draw_maps`.

        Args:
            picture: the image, as for `quality_map`.

        Returns:
            A matplotlib Figure.

        Raises:
            SettingsError: matplotlib is not installed, or the image has another size than the map's.
        """
        from .drawing import draw_maps

        return draw_maps(picture, [self])


def _interpolation(length: int, step: float, count: int) -> NDArray[np.float32]:
    """Return the matrix (length, count) from values at the centres of places to values of pixels."""
    position = np.clip((np.arange(length) + 0.5) / step - 0.5, 0, count - 1)
    distance = np.abs(position[:, None] - np.arange(count))
    matrix: NDArray[np.float32] = np.clip(1 - distance, 0, None).astype(np.float32)
    return matrix


def quality_map(
    picture: Source,
    metric: str | torch.nn.Module = DEFAULT_METRIC,
    kind: str | None = None,
    attribute: str | None = None,
    device: str | torch.device | None = None,
) -> QualityMap:
    """Map one image's quality. For several images, attributes or metrics, use `explain.mapper.Mapper`.

    Args:
        picture: anything that `load_image` takes, or a tensor (1, C, H, W).
        metric: name or file of a metric, a metric of pyiqa, or a `BlindMetric`.
        kind: "local": the score of each place's surroundings; "contributions": each place's summand of the logit;
            "gradcam" or "occlusion": how the score reacts to a place. Default: "local", or "occlusion" for other
            packages' metrics.
        attribute: name of the attribute; may be left out if the metric has only one.
        device: default: CUDA if available; for a network, where it is.

    Raises:
        SettingsError: an unknown metric, kind or attribute, or a kind that this metric does not have.
        ImageError: the image cannot be read.
        WeightsError: a weight file is missing or damaged.

    Example:
        >>> from qualiclip_pyiqa import quality_map
        >>> found = quality_map("examples/photos/lighthouse.jpg", "qualiclip-mini-sharpness", device="cpu")
        >>> found.values.shape, found.size, found.kind
        ((24, 16), (768, 512), 'local')
    """
    from .mapper import Mapper

    mapper = Mapper(metric, kind, None if attribute is None else [attribute], device)
    if len(mapper.attributes) > 1:
        raise SettingsError(
            f"{mapper.metric} has {len(mapper.attributes)} attributes; pass attribute=NAME, one of "
            f"{', '.join(mapper.attributes)}"
        )
    return mapper.maps(one_image(picture))[0][0]


def explanations(maps: Sequence[QualityMap]) -> list[str]:
    """Return how maps of one image relate to its scores, and what makes them mislead, each once.

    Example:
        >>> found = quality_map("examples/photos/hats.jpg", "qualiclip-mini-sharpness", device="cpu")
        >>> explanations([found])[0][:51]
        'sharpness: windows have a head of their own, fitted'
    """
    said: dict[str, list[str]] = {}
    for each in maps:
        said.setdefault(each.relation, []).append(source_name(each.attribute))
    lines = [f"{', '.join(dict.fromkeys(attributes))}: {relation}" for relation, attributes in said.items()]
    noted: dict[str, list[str]] = {}
    for each in maps:
        if each.note is not None:
            noted.setdefault(each.note, []).append(source_name(each.metric))
    return lines + [f"{', '.join(dict.fromkeys(metrics))}: {note}" for note, metrics in noted.items()]


def one_image(picture: Source) -> torch.Tensor:
    """Load an image as a batch of one, (1, 3, H, W).

    Raises:
        ImageError: it cannot be read, or a tensor of several.
    """
    from ..images.tensors import as_batch

    rgb = as_batch(picture)
    if len(rgb) > 1:
        raise ImageError(f"tensor has {len(rgb)} images; expected one: `Mapper.maps` takes several")
    return rgb


def check_scale(low: float, high: float) -> tuple[float, float]:
    """Return the ends of a colour bar.

    Raises:
        SettingsError: not finite, or the first is not below the second.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SettingsError(
            f"range of the maps' colours is {low:g} {high:g}; expected two numbers, the lower one first"
        )
    return low, high


def scale_of(values: Sequence[float] | NDArray[np.float32], kind: str) -> tuple[float, float]:
    """Choose the ends of a colour bar.

    Scores span at least 0.1, so that the noise of an even map does not fill the scale; other kinds lie evenly on both
    sides of zero.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if kind != "local":
        most = max(abs(low), abs(high), 1e-6)
        return -most, most
    missing = max(0.0, 0.1 - (high - low)) / 2
    return low - missing, high + missing
