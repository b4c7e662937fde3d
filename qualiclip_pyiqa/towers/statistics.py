"""Statistics of images and feature maps without learned parameters: log energies, mean, spread and percentiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .streaming import Window

SCALES = 4  # octaves of the log energies; an image of 32 pixels has 4 at the coarsest
FINE = 4  # side of the cells of local energy, in pixels of the octave
CELL = 16  # side of the cells for percentiles, in pixels of the image
PERCENTILES = (10, 50, 90, 98)
# Laplacian energy of the rounding error of 8-bit images: variance (1/255)^2 / 12 times 20, the sum of the squared
# coefficients 4, -1, -1, -1, -1.
ROUNDING_ENERGY = 20.0 / 12.0 / 255.0**2
UNRANKED = 3 * SCALES + 6  # values of `log_energies` before the percentiles
ENERGIES = UNRANKED + len(PERCENTILES) * SCALES


def log_energies(rgb: Tensor) -> Tensor:
    """Measure sharpness by octave, exposure and colour.

    For each octave: the log of the mean Laplacian energy (the classic sharpness measure, dominated by the strongest
    edges), the mean of the local log energy (dominated by flat parts, where noise and blocking show) and its standard
    deviation. Then mean and standard deviation of luma, log spread of two opponent colours, dark and bright fractions.
    Then, for each octave, the PERCENTILES of the cells' log energy.

    Shape:
        rgb: (N, 3, H, W) in 0..1, float32 or float64, H, W >= 32 -> (N, ENERGIES).
    """
    stats, ranked = [], []
    luma, *opponents = luma_and_opponents(rgb)
    for scale, squared in enumerate(octave_energies(luma)):
        energy = F.avg_pool2d(squared, FINE)
        local = (energy + ROUNDING_ENERGY).log().flatten(1)
        ranked.append(percentiles(cell_energies(squared, scale)))
        stats += [(energy.flatten(1).mean(1) + ROUNDING_ENERGY).log(), local.mean(1), std(local)]
    flat = luma.flatten(1)
    stats += [flat.mean(1), std(flat)]
    stats += [std(each.flatten(1)).log() for each in opponents]
    stats += [each.mean(1) for each in dark_and_bright(flat)]
    return torch.cat([torch.stack(stats, dim=1), *ranked], dim=1)


def luma_and_opponents(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute luma and two opponent colours, each (N, 1, H, W)."""
    red, green, blue = rgb.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue, red - green, 0.5 * (red + green) - blue


def dark_and_bright(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each pixel counts as dark, and as bright, in 0..1."""
    return torch.sigmoid((0.08 - luma) * 50), torch.sigmoid((luma - 0.92) * 50)


def octave_energies(luma: Tensor) -> Iterator[Tensor]:
    """Yield the squared Laplacian of each octave of a luma image (N, 1, H, W), finest first."""
    octave = luma
    for scale in range(SCALES):
        if scale:
            octave = F.avg_pool2d(octave, 2)
        yield laplacian(F.pad(octave, (1, 1, 1, 1), mode="replicate")).square()


def cell_energies(squared: Tensor, scale: int) -> Tensor:
    """Compute the log energy of the cells that `log_energies` ranks, from an octave's squared Laplacian."""
    return (cell_means(squared, max(FINE, CELL >> scale)) + ROUNDING_ENERGY).log()


def cell_means(x: Tensor, side: int) -> Tensor:
    """Average cells of `side` x `side` places, the last of a row or column with fewer: (N, C, H, W) -> (N, C, h, w)."""
    if not torch.compiler.is_exporting():
        return F.avg_pool2d(x, side, ceil_mode=True)
    # A graph for any size cannot hold the shape rule of `ceil_mode`.
    border = (0, side - 1, 0, side - 1)
    share = F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), border), side)
    return F.avg_pool2d(F.pad(x, border), side) / share


def laplacian(x: Tensor) -> Tensor:
    """Apply the Laplacian with coefficients 4, -1, -1, -1, -1: (..., H + 2, W + 2) -> (..., H, W)."""
    inner = x[..., 1:-1, 1:-1]
    return 4 * inner - x[..., :-2, 1:-1] - x[..., 2:, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]


def detail_and_top(energies: Tensor) -> Tensor:
    """Select the amount of detail and the sharpness of the sharpest parts from `log_energies`.

    These are the median and the 98th percentile of the cells' log energy, averaged over the first two octaves; in the
    first octave alone, strong noise would count as sharper than weak noise.

    Shape:
        (N, ENERGIES) -> (N, 2).
    """
    first, second = energies[:, UNRANKED:].unflatten(1, (SCALES, len(PERCENTILES))).unbind(1)[:2]
    both = (first + second) / 2
    return torch.stack([both[:, PERCENTILES.index(50)], both[:, PERCENTILES.index(98)]], dim=1)


def percentiles(cells: Tensor) -> Tensor:
    """Compute the Q PERCENTILES of every channel, interpolated linearly: (N, C, H, W) -> (N, Q * C)."""
    ranked = cells.flatten(2).sort(dim=-1).values  # torch.quantile is limited to 16 million values
    last = ranked.shape[-1] - 1
    out = []
    for percent in PERCENTILES:
        lower, upper, share = _neighbours(ranked, percent * last)
        out.append(lower + share * (upper - lower))
    return torch.cat(out, dim=1)


def _neighbours(ranked: Tensor, hundredths: int) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return the values below and above a rank that is no integer, and how far it is from the lower one, in 0..1."""
    last = ranked.shape[-1] - 1
    if torch.compiler.is_exporting():  # as tensors, so that the graph's sizes stay free
        rank, end = (torch.scalar_tensor(n, dtype=torch.int64, device=ranked.device) for n in (hundredths, last))
        both = torch.stack([rank // 100, (rank // 100 + 1).minimum(end)])
        lower, upper = ranked.index_select(-1, both).unbind(-1)
        return lower, upper, (rank % 100).to(ranked.dtype) / 100
    below = hundredths // 100
    # Indexing with [] would specialise a compiled graph to this number of cells.
    return ranked.select(-1, below), ranked.select(-1, min(below + 1, last)), hundredths % 100 / 100


def pooled(x: Tensor, cell: int) -> Tensor:
    """Compute mean, log standard deviation and percentiles of cell means: (N, C, H, W) -> (N, (2 + Q) * C)."""
    flat = x.flatten(2)
    return summary(flat.mean(-1), flat.var(dim=-1, correction=0), cell_means(x, cell))


def summary(mean: Tensor, variance: Tensor, cells: Tensor) -> Tensor:
    """Assemble the result of `pooled` from mean and variance (N, C) and cell means (N, C, h, w)."""
    return torch.cat([mean, root(variance).log(), percentiles(cells)], dim=1)


def moments(x: Tensor) -> list[Tensor]:
    """Compute mean and standard deviation of every channel, never zero: (N, C, H, W) -> two of (N, C)."""
    flat = x.flatten(2)
    return [flat.mean(-1), root(flat.var(dim=-1, correction=0))]


def std(x: Tensor) -> Tensor:
    """Compute the standard deviation over the last dimension, never zero."""
    return root(x.var(dim=-1, correction=0))


def root(variance: Tensor) -> Tensor:
    """Take the square root with a finite gradient at zero."""
    return (variance + 1e-5).sqrt()


class StreamedMoments:
    """Mean and variance of every channel as a step over strips, which it passes on unchanged."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.deviation: Tensor = torch.zeros(())  # sum of squared differences from the mean

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        if rows is not None:
            self.add(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        return rows

    def add(self, rows: Tensor) -> None:
        """Update mean and variance with rows (1, C, h, W) (Chan, Golub, LeVeque, 1979)."""
        variance, mean = torch.var_mean(rows.flatten(2), dim=-1, correction=0)
        if not self.count:
            self.mean, self.deviation = torch.zeros_like(mean), torch.zeros_like(variance)
        new = rows.shape[2] * rows.shape[3]
        share = new / (self.count + new)
        off = mean - self.mean
        self.deviation = self.deviation + variance * new + off.square() * (self.count * share)
        self.mean = self.mean + off * share
        self.count += new

    @property
    def variance(self) -> Tensor:
        """Population variance of each channel, (1, C)."""
        return self.deviation / self.count


class StreamedPooling(StreamedMoments):
    """`pooled` as a step over strips, which it passes on unchanged; it stores only cell means and moments."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cells = Window(partial(F.avg_pool2d, kernel_size=cell, ceil_mode=True), kernel=1, group=cell, ceil=True)
        self.means: list[Tensor] = []

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        precise = None if rows is None else rows.to(torch.promote_types(rows.dtype, torch.float32))
        if precise is not None:
            self.add(precise)
        means = self.cells(precise, last)
        if means is not None:
            self.means.append(means)
        return rows

    def summary(self) -> Tensor:
        """Return `pooled` of all strips together."""
        return summary(self.mean, self.variance, torch.cat(self.means, dim=2))
