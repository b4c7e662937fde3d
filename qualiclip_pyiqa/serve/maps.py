"""Quality maps of uploads: values of places, and an overlay to lay on the image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ..errors import SettingsError, did_you_mean
from ..explain.mapper import Mapper
from ..explain.quality_map import QualityMap
from ..images.tensors import from_pixels
from ..metrics.specs import column_belongs
from ..scoring.building import blind_metric

# Longest side of an overlay in pixels.
LONGEST = 768
# The worst places are red, middling ones orange, and the best are left as they are.
_WORST, _MIDDLE, _OPACITY = np.array([190, 40, 32]), np.array([240, 140, 40]), 0.9


class Maps:
    """Maps images by a server's own networks: local scores, which take one pass.

    Args:
        names: of the metrics.
        metrics: by the columns of their scores.
    """

    def __init__(self, names: Sequence[str], metrics: Mapping[str, nn.Module]) -> None:
        self._metrics = {
            name: next(metric for column, metric in metrics.items() if column_belongs(column, name)) for name in names
        }
        self._mappers: dict[tuple[str, str | None], Mapper] = {}
        self._mapped: dict[str, tuple[str, ...]] = {}

    def probe(self, pixels: np.ndarray) -> None:
        """Find out which metrics have maps, by mapping an image."""
        for name, network in self._metrics.items():
            own = blind_metric(network)
            try:
                self.map(pixels, name, None)
            except SettingsError:
                self._mapped[name] = ()
            else:
                self._mapped[name] = () if own is None else own.attributes

    def list(self) -> list[dict[str, Any]]:
        """Return the metrics in their order, each with its `name` and the attributes that have `maps`."""
        return [{"name": name, "maps": [*self._mapped.get(name, ())]} for name in self._metrics]

    def check(self, metric: str | None, attribute: str | None) -> None:
        """Refuse a map that does not exist, without one.

        Raises:
            SettingsError: no such metric or attribute.
        """
        self._mapper(metric, attribute)

    def map(self, pixels: np.ndarray, metric: str | None, attribute: str | None) -> QualityMap:
        """Map one image.

        Args:
            pixels: as from `read_pixels`.
            metric: default: the first.
            attribute: default: the metric's first.

        Raises:
            SettingsError: no such metric or attribute, or the metric has no map of this kind.
        """
        return self._mapper(metric, attribute).maps(from_pixels([pixels]))[0][0]

    def _mapper(self, metric: str | None, attribute: str | None) -> Mapper:
        name = next(iter(self._metrics)) if metric is None else metric
        if name not in self._metrics:
            raise SettingsError(
                f"metric is {name!r}; expected one of {', '.join(self._metrics)}{did_you_mean(name, self._metrics)}"
            )
        if self._mapped.get(name) == ():
            having = [each for each, attributes in self._mapped.items() if attributes]
            raise SettingsError(f"{name} has no quality map here; metrics that have one: {', '.join(having) or 'none'}")
        network = self._metrics[name]
        own = blind_metric(network)
        if attribute is None and own is not None:
            attribute = own.attributes[0]
        found = self._mappers.get((name, attribute))
        if found is None:
            found = Mapper({name: network}, "local", None if attribute is None else [attribute])
            self._mappers[name, attribute] = found
        return found


def overlay(found: QualityMap) -> bytes:
    """Draw a map as a PNG with transparency, to be stretched over its image.

    Returns:
        An RGBA PNG of the image's proportions, of at most LONGEST pixels a side.
    """
    shrink = min(1.0, LONGEST / max(found.size))
    size = tuple(max(1, round(length * shrink)) for length in found.size)
    step = tuple(each * new / old for each, new, old in zip(found.step, size, found.size, strict=True))
    small = replace(found, size=(size[0], size[1]), step=(step[0], step[1])).enlarged()
    span = found.high - found.low
    level: NDArray[np.float32] = np.clip((small - found.low) / span if span > 0 else small * 0 + 1, 0, 1)
    rgba = np.empty((*level.shape, 4), np.uint8)
    rgba[..., :3] = _WORST + (_MIDDLE - _WORST) * np.minimum(1, 2 * level)[..., None]
    rgba[..., 3] = 255 * _OPACITY * (1 - level)
    file = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(file, "PNG")
    return file.getvalue()


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
