"""Quality maps for a page: 8 bits a place, few enough places that a page stays small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PromptError, SettingsError, WeightsError
from ..images.tensors import from_pixels
from .runs import Run
from .sheet import Column

if TYPE_CHECKING:
    from ..explain.mapper import Mapper
    from ..explain.quality_map import QualityMap
    from ..scoring.building import MetricLike

#: A page has maps of its own accord for at most this many images.
MAPS_MOST = 500
#: Longest side of a map in places; a finer one is averaged.
MAP_SIDE = 48

_SAME_SCORE = 0.01  # a map whose score differs more is not of the model that made the table


@dataclass(frozen=True)
class PageMap:
    """A quality map as a page holds it.

    Attributes:
        column: index of the column whose score it explains.
        height, width: in places.
        low, high: values of the bytes 0 and 255.
        extent: height and width of all places together, as shares of the image's.
        data: (height * width) bytes, row by row.
        note: one line if maps of an image of this size can mislead, else None.
    """

    column: int
    height: int
    width: int
    low: float
    high: float
    extent: tuple[float, float]
    data: bytes
    note: str | None = None


class PageMaps:
    """Makes the maps of every column of a run that a metric of this package scored.

    Args:
        run: the run.
        columns: columns of the report with their indices; those of other runs and changes are left out.
        index: which run of the report this is.
        required: raise instead of leaving out what has no map, and map by occlusion too, which takes long.
        device: for the networks; default: CUDA if available.

    Attributes:
        notes: why columns have no maps, in one line each.
        words: by column, what the map's values are and how they relate to the score.

    Raises:
        SettingsError: `required`, and no column has maps.
    """

    def __init__(
        self, run: Run, columns: Sequence[tuple[int, Column]], index: int, required: bool, device: str | None = None
    ) -> None:
        self.notes: list[str] = []
        self.words: dict[int, tuple[str, str]] = {}
        self._mappers: list[tuple[Mapper, dict[str, int]]] = []
        wanted: dict[str, dict[str | None, int]] = {}
        sources: dict[str, str] = {}
        for number, column in columns:
            if column.run == index:
                metric, attribute = run.metric_of(column.source)
                wanted.setdefault(metric, {})[attribute] = number
                sources.setdefault(metric, column.source)
        for metric, attributes in wanted.items():
            try:
                mapper, numbers = _mapper({metric: run.metric_like(sources[metric])}, attributes, device)
                if mapper.kind == "occlusion" and not required:
                    self.notes.append(
                        f"no maps for {metric}, whose maps are by occlusion, which takes long (--maps draws them)"
                    )
                else:
                    self._mappers.append((mapper, numbers))
            except (PromptError, SettingsError, WeightsError) as error:
                self.notes.append(f"no maps for {metric}: {error}")
        if required and not self._mappers:
            raise SettingsError("; ".join(self.notes) or f"{run.source} has no score that has maps")

    def __bool__(self) -> bool:
        return bool(self._mappers)

    def maps(self, pixels: np.ndarray, scores: Sequence[float | None]) -> list[PageMap]:
        """Map one image.

        Args:
            pixels: as from `read_pixels`.
            scores: of the image, by column; a map of another score is left out, with a note.

        Raises:
            ImageError: the image cannot be mapped.
        """
        rgb = from_pixels([pixels])
        found = []
        for mapper, numbers in self._mappers:
            for made in mapper.maps(rgb)[0]:
                number = numbers.get(made.attribute)
                if number is None:
                    continue
                stored = scores[number]
                if stored is None or abs(stored - made.score) > _SAME_SCORE * max(1.0, abs(stored)):
                    self._note(f"no maps where the score of {made.metric} is not that of the model here")
                    continue
                self.words[number] = (made.meaning, made.relation)
                found.append(_quantised(number, made))
        return found

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _mapper(
    metric: Mapping[str, MetricLike], attributes: dict[str | None, int], device: str | None
) -> tuple[Mapper, dict[str, int]]:
    """Return the mapper of a metric, and the columns of its attributes by their names."""
    from ..explain.mapper import Mapper

    if None in attributes:
        mapper = Mapper(metric, device=device)
        return mapper, dict.fromkeys(mapper.attributes, attributes[None])
    named = {name: number for name, number in attributes.items() if name is not None}
    return Mapper(metric, attributes=list(named), device=device), named


def _quantised(column: int, made: QualityMap) -> PageMap:
    values = np.asarray(made.values, np.float32)
    extent = tuple(
        float(count * step / length) for count, step, length in zip(values.shape, made.step, made.size, strict=True)
    )
    factor = -(-max(values.shape) // MAP_SIDE)
    if factor > 1:
        values, extent = _averaged(values, factor, extent)
    low, high = float(made.low), float(made.high)
    levels = np.clip((values - low) / (high - low) if high > low else values * 0, 0, 1)
    data = (levels * 255).round().astype(np.uint8)
    height, width = values.shape
    return PageMap(column, height, width, low, high, (extent[0], extent[1]), data.tobytes(), made.note)


def _averaged(values: np.ndarray, factor: int, extent: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Average squares of places; edge places repeat to fill the last ones, which then reach beyond the image."""
    short = [-count % factor for count in values.shape]
    grown = np.pad(values, [(0, each) for each in short], mode="edge")
    height, width = (count // factor for count in grown.shape)
    mean = grown.reshape(height, factor, width, factor).mean(axis=(1, 3))
    larger = tuple(share * new / old for share, new, old in zip(extent, grown.shape, values.shape, strict=True))
    return mean, larger
