"""Statistics of sliding windows from one pass: moments are pooled in cells of 32x32 pixels, and cells in windows.

A cell has a whole number of places at every stride up to 32, except for the last row and column of an image whose sides
are no multiples of 32. These have fewer places, or none at coarse strides, so each cell has a weight at each stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import (
    FINE,
    PERCENTILES,
    ROUNDING_ENERGY,
    cell_energies,
    dark_and_bright,
    luma_and_opponents,
    octave_energies,
    root,
)
from .streaming import Window

SIDE = 32  # of a cell, in pixels of the image
WINDOW = 2  # side of the windows of a local map, in cells


@dataclass(frozen=True)
class CellMoments:
    """Mean and variance of a map's channels in every cell.

    Attributes:
        values: (N, 2C, h, w), means before variances, in float32 or float64.
        heights, widths: number of the map's places in each of its h rows and w columns of cells.
    """

    values: Tensor
    heights: Tensor
    widths: Tensor

    @classmethod
    def of(cls, values: Tensor, size: Sequence[int], side: int) -> CellMoments:
        """Weigh the cells of a map of `size` (height, width) places, `side` x `side` of them in a cell."""
        rows, columns = (_places(length, side, values) for length in size)
        return cls(values, rows, columns)

    @classmethod
    def of_batch(cls, images: Sequence[CellMoments]) -> CellMoments:
        """Stack the cells of several images of one size."""
        return cls(torch.cat([each.values for each in images]), images[0].heights, images[0].widths)

    def row(self, top: int, size: tuple[int, int], columns: int) -> tuple[Tensor, Tensor]:
        """Pool the windows of `size` cells whose first row of cells is `top`, of an image `columns` cells wide.

        Returns:
            Mean and variance, each (N, C, columns - size[1] + 1), in float64.
        """
        heights = self.heights[top : top + size[0]]
        mean, variance = self.values[:, :, top : top + size[0]].double().chunk(2, dim=1)
        pooled = torch.stack([mean, variance + mean.square()]) * heights[:, None]
        weights = F.pad(self.widths, (0, columns - len(self.widths))).unfold(0, size[1], 1).sum(-1)
        inside = F.pad(pooled.sum(3) * self.widths, (0, columns - len(self.widths))).unfold(-1, size[1], 1).sum(-1)
        first, second = inside / (weights * heights.sum())
        return first, (second - first.square()).clamp_min(0)


def _places(length: int, side: int, like: Tensor) -> Tensor:
    """Count the places of each cell along one dimension."""
    starts = torch.arange(0, length, side, device=like.device)
    return (length - starts).clamp_max(side).double()


def cell_moments(x: Tensor, side: int) -> Tensor:
    """Compute mean and variance in cells of `side` places, the last ones with fewer: (N, C, H, W) -> (N, 2C, h, w)."""
    mean = F.avg_pool2d(x, side, ceil_mode=True)
    if side == 1:
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)
    spread = mean.repeat_interleave(side, 2)[:, :, : x.shape[2]].repeat_interleave(side, 3)[..., : x.shape[3]]
    return torch.cat([mean, F.avg_pool2d((x - spread).square_(), side, ceil_mode=True)], dim=1)


class StreamedCells:
    """`CellMoments` as a step over strips, which it passes on unchanged."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.pool = Window(partial(cell_moments, side=side), kernel=1, group=side, ceil=True)
        self.parts: list[Tensor] = []
        self.height = self.width = 0

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        if rows is not None:
            self.height, self.width = self.height + rows.shape[2], rows.shape[3]
        part = self.pool(None if rows is None else rows.to(torch.promote_types(rows.dtype, torch.float32)), last)
        if part is not None:
            self.parts.append(part)
        return rows

    def moments(self) -> CellMoments:
        """Return the cells of all strips together."""
        return CellMoments.of(torch.cat(self.parts, dim=2), (self.height, self.width), self.side)


class EnergyCells:
    """The cells from which `statistics.log_energies` of any window is pooled.

    Args:
        rgb: (N, 3, H, W) in 0..1, float32 or float64, H, W >= 32.
    """

    def __init__(self, rgb: Tensor) -> None:
        luma, *opponents = luma_and_opponents(rgb)
        pixels = torch.cat([luma, *opponents, *dark_and_bright(luma)], dim=1)
        self.pixels = CellMoments.of(cell_moments(pixels, SIDE), pixels.shape[2:], SIDE)
        self.octaves: list[CellMoments] = []
        self.ranked: list[Tensor] = []  # of each octave, (N, h, w)
        self.per_cell: list[int] = []  # ranked values along a cell's side
        for scale, squared in enumerate(octave_energies(luma)):
            energy = F.avg_pool2d(squared, FINE)
            side = SIDE // FINE >> scale
            both = torch.cat([energy, (energy + ROUNDING_ENERGY).log()], dim=1)
            self.octaves.append(CellMoments.of(cell_moments(both, side), both.shape[2:], side))
            self.ranked.append(cell_energies(squared, scale)[:, 0])
            self.per_cell.append(min(2, side))

    def row(self, top: int, size: tuple[int, int], columns: int) -> list[Tensor]:
        """Return the statistics of a row of windows as in `CellMoments.row`, each (N, w) or (N, Q, w), in order."""
        stats: list[Tensor] = []
        for octave in self.octaves:
            mean, variance = octave.row(top, size, columns)
            stats += [(mean[:, 0] + ROUNDING_ENERGY).log(), mean[:, 1], root(variance[:, 1])]
        mean, variance = self.pixels.row(top, size, columns)
        spread = root(variance)
        stats += [mean[:, 0], spread[:, 0], spread[:, 1].log(), spread[:, 2].log(), mean[:, 3], mean[:, 4]]
        for values, count in zip(self.ranked, self.per_cell, strict=True):
            stats.append(_ranked_row(values, top * count, (size[0] * count, size[1] * count), columns * count, count))
        return stats


def _ranked_row(values: Tensor, top: int, size: tuple[int, int], columns: int, step: int) -> Tensor:
    """Compute the PERCENTILES of a row of windows of values (N, h, w), `step` columns apart: (N, Q, windows)."""
    rows = F.pad(values[:, top : top + size[0]], (0, columns - values.shape[2]), value=torch.inf)
    ranked = rows.unfold(2, size[1], step).transpose(1, 2).flatten(2).sort(dim=-1).values  # (N, windows, values)
    last = ranked.isfinite().sum(-1, keepdim=True) - 1
    out = []
    for percent in PERCENTILES:
        below = percent * last // 100
        lower, upper = ranked.gather(2, below), ranked.gather(2, (below + 1).minimum(last))
        out.append(lower + (percent * last % 100 / 100) * (upper - lower))
    return torch.cat(out, dim=2).transpose(1, 2)


@dataclass(frozen=True)
class ImageCells:
    """The cells of images of one size, from which the statistics of any window are pooled.

    Attributes:
        energies: for the log energies.
        blocks: for the channels of each block of the network.
    """

    energies: EnergyCells
    blocks: Sequence[CellMoments]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the images in cells."""
        return len(self.energies.pixels.heights), len(self.energies.pixels.widths)

    def whole(self) -> Tensor:
        """Return the statistics of the whole images, (N, S)."""
        return next(self.rows(self.grid))[:, 0]

    def rows(self, size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the statistics of each row of windows, a cell apart and all inside the images, from top to bottom.

        Args:
            size: height and width of a window in cells, at least 2 or all of the grid.

        Yields:
            (N, windows, S) in float32 or float64.
        """
        height, width = self.grid
        dtype = self.energies.pixels.values.dtype
        for top in range(height - size[0] + 1):
            found = [each if each.dim() == 3 else each[:, None] for each in self.energies.row(top, size, width)]
            for block in self.blocks:
                mean, variance = block.row(top, size, width)
                found += [mean, root(variance)]
            yield torch.cat([each.to(dtype) for each in found], dim=1).transpose(1, 2)
