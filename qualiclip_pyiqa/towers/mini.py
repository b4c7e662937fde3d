"""MiniTower: a small image tower for blind quality, trained from scratch without opinion scores.

The strategy of training is QualiCLIP's (Agnolucci et al., arXiv:2403.11176: rank degraded crops by their similarity to
antonym prompt anchors). The network is our own: quality lives in shallow, fine-grained features, so every stage of a
small residual network is pooled, beside log energies that need no learning. Pooled are mean, spread and percentiles: a
photograph is as sharp as its sharpest parts and as noisy as its quiet ones, however much of it is background.

The feature is a concatenation of unit-length blocks, each of which sees other inputs: an anchor of the p-th antonym
prompt pair is zero outside the p-th block, so that the mean over pairs is the mean of P independent opinions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streaming import Step, Window, joined, rest, rows_at_once, through, valid

SCALES = 4  # octaves of the log energies; 32 pixels are 4 at the coarsest
FINE = 4  # side of the cells, in pixels of the octave, whose local energy is averaged
CELL = 16  # side of the cells, in pixels of the picture, that percentiles are taken over
PERCENTILES = (10, 50, 90, 98)
# Variance of the Laplacian (coefficients 4, -1, -1, -1, -1) of a picture's rounding to 8 bits: 20 * (1/255)^2 / 12.
ROUNDING_ENERGY = 20.0 / 12.0 / 255.0**2
UNRANKED = 3 * SCALES + 6  # of `log_energies`, what comes before the percentiles
ENERGIES = UNRANKED + len(PERCENTILES) * SCALES

# What the block of each of the seven pairs of the prompt set `qualiclip` sees, in the set's order.
BLOCKS: tuple[tuple[str, ...], ...] = (
    ("energies", "stage1", "stage2", "stage3", "stage4"),  # Good photo.
    ("energies",),  # Sharp image.
    ("sharpness",),  # Sharp edges.
    ("stage2",),  # High-resolution image.
    ("energies", "stage1", "stage2"),  # Noise-free image.
    ("stage3",),  # High-quality image.
    ("stage4",),  # Good picture.
)


def log_energies(rgb: Tensor) -> Tensor:
    """What of a photograph's quality can be had without learning: sharpness by octave, exposure, colour.

    Per octave the log of the mean Laplacian energy (the classic sharpness measure; dominated by the strongest edges),
    the mean of the local log energy (dominated by flat parts, where noise and blocking show) and its standard
    deviation; then mean and standard deviation of luma, log spread of two opponent colours, dark and bright fractions;
    then per octave the PERCENTILES of the log energy of cells.

    Shape:
        rgb: (N, 3, H, W) in 0..1, float32 or float64, H, W >= 32 -> (N, ENERGIES).
    """
    red, green, blue = rgb.unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    stats, ranked = [], []
    octave = luma
    for scale in range(SCALES):
        if scale:
            octave = F.avg_pool2d(octave, 2)
        p = F.pad(octave, (1, 1, 1, 1), mode="replicate")
        laplacian = 4 * octave - p[..., :-2, 1:-1] - p[..., 2:, 1:-1] - p[..., 1:-1, :-2] - p[..., 1:-1, 2:]
        squared = laplacian.square()
        del laplacian  # as large as the picture
        energy = F.avg_pool2d(squared, FINE).flatten(1)
        local = (energy + ROUNDING_ENERGY).log()
        cells = F.avg_pool2d(squared, max(FINE, CELL >> scale), ceil_mode=True)
        ranked.append(_percentiles((cells + ROUNDING_ENERGY).log()))
        stats += [(energy.mean(1) + ROUNDING_ENERGY).log(), local.mean(1), _std(local)]
    flat = luma.flatten(1)
    stats += [flat.mean(1), _std(flat)]
    stats += [_std((red - green).flatten(1)).log(), _std((0.5 * (red + green) - blue).flatten(1)).log()]
    stats += [torch.sigmoid((0.08 - flat) * 50).mean(1), torch.sigmoid((flat - 0.92) * 50).mean(1)]
    return torch.cat([torch.stack(stats, dim=1), *ranked], dim=1)


def detail_and_top(energies: Tensor) -> Tensor:
    """How much detail there is and how sharp the sharpest parts are: median and 98th percentile of the log energy of
    cells, means of the first two octaves (in the first one alone, strong noise is sharper than weak noise).

    Shape:
        (N, ENERGIES) -> (N, 2).
    """
    first, second = energies[:, UNRANKED:].unflatten(1, (SCALES, len(PERCENTILES))).unbind(1)[:2]
    both = (first + second) / 2
    return torch.stack([both[:, PERCENTILES.index(50)], both[:, PERCENTILES.index(98)]], dim=1)


def _percentiles(cells: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, Q * C): PERCENTILES of every channel, linear between order statistics."""
    ranked = cells.flatten(2).sort(dim=-1).values  # torch.quantile takes 16 million values at most
    last = ranked.shape[-1] - 1
    out = []
    for percent in PERCENTILES:
        below = percent * last // 100
        # Not by an index in brackets, with which a compiled graph would be for this number of cells only.
        lower, upper = ranked.select(-1, below), ranked.select(-1, min(below + 1, last))
        out.append(lower + (percent * last % 100 / 100) * (upper - lower))
    return torch.cat(out, dim=1)


def _pooled(x: Tensor, cell: int) -> Tensor:
    """(N, C, H, W) -> (N, (2 + Q) * C): mean, log standard deviation, percentiles of the means of cells."""
    flat = x.flatten(2)
    return _summary(flat.mean(-1), flat.var(dim=-1, correction=0), F.avg_pool2d(x, cell, ceil_mode=True))


def _summary(mean: Tensor, variance: Tensor, cells: Tensor) -> Tensor:
    return torch.cat([mean, _root(variance).log(), _percentiles(cells)], dim=1)


def _std(x: Tensor) -> Tensor:
    return _root(x.var(dim=-1, correction=0))


def _root(variance: Tensor) -> Tensor:
    return (variance + 1e-5).sqrt()


class PooledInStrips:
    """`_pooled` of what goes past as strips, of which nothing but the means of cells is kept."""

    def __init__(self, cell: int) -> None:
        self.cells = Window(partial(F.avg_pool2d, kernel_size=cell, ceil_mode=True), kernel=1, group=cell, ceil=True)
        self.means: list[Tensor] = []
        self.count = 0
        self.mean: Any = 0.0
        self.deviation: Any = 0.0  # sum of squared differences from the mean

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        precise = None if rows is None else rows.to(torch.promote_types(rows.dtype, torch.float32))
        if precise is not None:
            # Two groups' means and variances make those of both (Chan, Golub, LeVeque, 1979).
            variance, mean = torch.var_mean(precise.flatten(2), dim=-1, correction=0)
            new = precise.shape[2] * precise.shape[3]
            share = new / (self.count + new)
            off = mean - self.mean
            self.deviation = self.deviation + variance * new + off.square() * (self.count * share)
            self.mean = self.mean + off * share
            self.count += new
        means = self.cells(precise, last)
        if means is not None:
            self.means.append(means)
        return rows

    def summary(self) -> Tensor:
        cells = torch.cat(self.means, dim=2)
        return _summary(self.mean, self.deviation / self.count, cells)


class Standardise(nn.Module):
    """Batch normalisation of pooled statistics (N, C) without parameters, in float32 whatever the network's dtype.

    Without it the unit-length features of a fresh network are all alike and training stays on a plateau.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, features: int, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean.to(x.dtype), self.var.to(x.dtype)
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                self.var.lerp_(var.to(self.var.dtype), self.momentum)
        return (x - mean) * (var + 1e-4).rsqrt()


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first may halve the picture and widen it."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.widen = nn.Conv2d(width_in, width, 1, bias=False) if stride > 1 or width_in != width else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.widened(x) + y)

    def widened(self, x: Tensor) -> Tensor:
        if self.widen is None:
            return x
        return self.widen(F.avg_pool2d(x, 2, ceil_mode=True) if self.stride > 1 else x)


class ResidualInStrips:
    """A `Residual` as a step over strips."""

    def __init__(self, block: Residual) -> None:
        self.first = Window(lambda x: F.relu(block.norm1(valid(block.conv1, x))), kernel=3, stride=block.stride)
        self.second = Window(lambda x: block.norm2(valid(block.conv2, x)), kernel=3)
        self.widened = Window(block.widened, kernel=1, group=block.stride, ceil=True)
        self.waiting: Tensor | None = None  # rows of the shortcut that are still to be added to

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        waiting = joined(self.waiting, self.widened(rows, last))
        y = self.second(self.first(rows, last), last)
        if waiting is None or y is None:
            self.waiting = waiting
            return None
        self.waiting = rest(waiting, y.shape[2])
        return F.relu(waiting[:, :, : y.shape[2]] + y)


class Head(nn.Module):
    """Pooled statistics (N, C) -> a block of unit length (N, D)."""

    dropout = 0.0  # share of the statistics that is left out at each step of training

    def __init__(self, width_in: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.standardise = Standardise(width_in)
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.standardise(x), self.dropout, self.training)
        x = F.linear(x, self.fc1.weight.to(x.dtype), self.fc1.bias.to(x.dtype))
        x = F.linear(F.gelu(x), self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))
        return F.normalize(x, dim=-1)


class RelativeSharpness(nn.Module):
    """How sharp the sharpest parts are for a photograph with so much detail: a block of unit length that knows nothing
    but undistorted photographs.

    There the sharpest parts go with detail, though all are equally good: a line of least squares says how much. A
    photograph lies z standard deviations above that line, and its difference of similarities to the anchors
    (the block's first two unit vectors) is (z + 1) / 8, so (z + 1) before the sigmoid at a scale of 8. What it is
    fitted with is no parameter, so in the losses of training it is a constant.

    Shape:
        (N, 2), what `detail_and_top` gives -> (N, dim).
    """

    FARTHEST = 1.4  # difference; of unit vectors it is at most sqrt(2), where the gradient is infinite

    line: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("line", torch.tensor([0.0, 0.0, 1.0]))  # offset, slope, standard deviation

    def fit(self, seen: Tensor) -> None:
        """(N, 2) of undistorted photographs, N >= 2."""
        detail, top = seen.double().unbind(1)
        slope = ((detail - detail.mean()) * (top - top.mean())).mean() / detail.var(correction=0).clamp(min=1e-9)
        offset = top.mean() - slope * detail.mean()
        self.line.copy_(torch.stack([offset, slope, _std(top - slope * detail)]))

    def forward(self, x: Tensor) -> Tensor:
        offset, slope, spread = self.line.to(x.dtype).unbind()
        z = (x[:, 1] - slope * x[:, 0] - offset) / spread
        difference = ((z + 1) / 8).clamp(-self.FARTHEST, self.FARTHEST)
        total = (2 - difference.square()).sqrt()
        return F.pad(torch.stack([total + difference, total - difference], dim=1) / 2, (0, self.dim - 2))


class MiniTower(nn.Module):
    """Image tower of `qualiclip-mini`; all arguments are JSON-serialisable and stand in the weight file.

    Args:
        widths: channels of the stages; stage k works at 1/2^k of the picture's size.
        depths: residual blocks of each stage.
        hidden: width of each head's hidden layer.
        dim: length of one block of the feature.
        blocks: per block the names of what it sees: `energies`, `stage1`, `stage2`, ...; or `sharpness` alone.

    Shape:
        rgb: (N, 3, H, W) in 0..1, H and W at least 32 -> (N, feature_dim), float32 (float64 for a double network);
        each of the P blocks of `dim` has unit length, so the feature's length is sqrt(P).
    """

    def __init__(
        self,
        widths: Sequence[int] = (24, 48, 96, 128),
        depths: Sequence[int] = (2, 2, 2, 1),
        hidden: int = 64,
        dim: int = 16,
        blocks: Sequence[Sequence[str]] = BLOCKS,
    ) -> None:
        super().__init__()
        self.dim, self.depths = dim, tuple(depths)
        self.blocks = tuple(tuple(block) for block in blocks)
        self.feature_dim = dim * len(self.blocks)
        # Stage 1 begins with the picture and its high-pass, at the size where blocking and noise still show.
        self.stem = nn.Sequential(
            nn.Conv2d(6, widths[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        width_in = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers = []
            for layer in range(depth):
                layers.append(Residual(width_in, width, stride=2 if stage and not layer else 1))
                width_in = width
            self.stages.append(nn.Sequential(*layers))
        sizes = {"energies": ENERGIES}
        sizes |= {f"stage{k}": (2 + len(PERCENTILES)) * width for k, width in enumerate(widths, 1)}
        self.heads = nn.ModuleList(
            RelativeSharpness(dim) if block == ("sharpness",) else Head(sum(sizes[name] for name in block), hidden, dim)
            for block in self.blocks
        )

    def forward(self, rgb: Tensor) -> Tensor:
        precise = torch.promote_types(rgb.dtype, torch.float32)
        with torch.autocast(rgb.device.type, enabled=False):
            seen = {"energies": log_energies(rgb.to(precise))}
        # In training normalisation statistics are those of the whole batch.
        rows = None if self.training else rows_at_once(self, rgb)
        if rows is not None:
            each = [self._in_strips(picture, rows) for picture in rgb.split(1)]
            seen |= {f"stage{k}": torch.cat(stage) for k, stage in enumerate(zip(*each, strict=True), 1)}
        else:
            x = self.stem(_with_high_pass(F.pad(rgb, (0, 0, 1, 1), mode="replicate")))
            for number, stage in enumerate(self.stages, 1):
                x = stage(x)
                with torch.autocast(rgb.device.type, enabled=False):
                    seen[f"stage{number}"] = _pooled(x.to(precise), CELL >> number)
        with torch.autocast(rgb.device.type, enabled=False):
            return self.features(seen)

    def features(self, seen: Mapping[str, Tensor]) -> Tensor:
        """Energies and what each stage's name stands for, (N, C) each -> (N, feature_dim)."""
        seen = {**seen, "sharpness": detail_and_top(seen["energies"])}
        heads = zip(self.heads, self.blocks, strict=True)
        return torch.cat([head(torch.cat([seen[name] for name in block], dim=1)) for head, block in heads], dim=1)

    def _in_strips(self, picture: Tensor, rows: int) -> list[Tensor]:
        """Of one picture what `_pooled` makes of each stage."""
        conv, norm, relu = self.stem
        assert isinstance(conv, nn.Conv2d)
        steps: list[Step] = [
            Window(_with_high_pass, kernel=3, replicate=True),
            Window(lambda x: relu(norm(valid(conv, x))), kernel=5, stride=2),
        ]
        pooled = [PooledInStrips(CELL >> number) for number in range(1, len(self.stages) + 1)]
        stages: Any = self.stages
        for stage, pool in zip(stages, pooled, strict=True):
            steps += [*map(ResidualInStrips, stage), pool]
        for _ in through(steps, picture, rows):
            pass
        return [pool.summary() for pool in pooled]


def _with_high_pass(rgb: Tensor) -> Tensor:
    """(N, 3, H + 2, W), with a row above and below -> (N, 6, H, W): colours, and what differs from the local mean."""
    inner = rgb[:, :, 1:-1]
    high = inner - F.avg_pool2d(F.pad(rgb, (1, 1, 0, 0), mode="replicate"), 3, stride=1)
    return torch.cat([inner - 0.45, 8 * high], dim=1).contiguous(memory_format=torch.channels_last)
