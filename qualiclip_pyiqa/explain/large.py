"""Images that are far larger than the photographs that a model was fitted to: their maps can mislead."""

from __future__ import annotations

from dataclasses import dataclass

from ..metrics.base import BlindMetric
from ..pretrained.manifest import manifest
from ..towers.mobile import MobileTower

#: An image is called far smaller or larger than others from this factor on.
FAR = 2


@dataclass(frozen=True)
class FittedTo:
    """Photographs that a model was fitted to.

    Attributes:
        side: pixels on the longer side of most of them.
    """

    side: int

    @classmethod
    def of(cls, metric: BlindMetric) -> FittedTo | None:
        """Return those of a metric; None if they are not known. A model is known by the sha256 of its file."""
        origin = getattr(metric, "origin", None)  # a tower in training has none
        if origin is None or not isinstance(metric.tower, MobileTower):  # a CLIP's file takes a second to hash
            return None
        sha256 = origin.file.sha256()
        sides = (record.fitted_side for record in manifest().values() if record.fitted_side and record.sha256 == sha256)
        side = next(sides, None)
        return None if side is None else cls(side)

    def note(self, width: int, height: int) -> str | None:
        """Return one line if an image is far larger, else None.

        Example:
            >>> FittedTo(512).note(1024, 768) is None, FittedTo(512).note(1025, 768).split(" (")[0]
            (True, 'far larger than the photographs that the model was fitted to')
        """
        if max(width, height) <= FAR * self.side:
            return None
        return (
            f"far larger than the photographs that the model was fitted to (most have {self.side} pixels on their "
            "longer side): maps can mislead, above all that of sharpness; in an enlarged image it can be upside down"
        )
