"""MobileTower: the image tower of the embedded models, a MobileNetV2 with pooled statistics and linear heads.

The trunk is the MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381) of width 1 of MediaPipe's Objectron, trained
on Open Images v4, with BatchNorm folded in. Quality shows in how activations spread over an image as much as in what
they are, so mean and standard deviation of every block's output are pooled, beside log energies that are not learned.

Each antonym prompt pair has one linear head on the standardised statistics: its output z is the logit of the pair's
score. The feature stores z as two numbers, whose similarities to the pair's prompts differ by z / SCALE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import kept_precise, without_autocast
from .base import channels_last
from .statistics import ENERGIES, StreamedMoments, log_energies, moments, root
from .streaming import Step, Window, joined, rows_at_once, stream, tail, valid
from .windows import SIDE, CellMoments, EnergyCells, ImageCells, StreamedCells, cell_moments

# Output channels and stride of each block (arXiv:1801.04381, table 2, width 1).
LAYOUT = (
    *[(16, 1)],
    *[(24, 2), (24, 1)],
    *[(32, 2), (32, 1), (32, 1)],
    *[(64, 2), (64, 1), (64, 1), (64, 1)],
    *[(96, 1), (96, 1), (96, 1)],
    *[(160, 2), (160, 1), (160, 1)],
    *[(320, 1)],
)
STEM, EXPANSION = 32, 6
# Factor on the difference of similarities that gives z. Similarities within a pair differ by at most sqrt(2), where
# the gradient is infinite, so z is clamped to +-FARTHEST * SCALE.
SCALE, FARTHEST = 8.0, 1.4
_HEADS = ("head_mean", "head_std", "head_weight", "head_bias")
_PRECISE = (*_HEADS, "window_heads", "window_bias")
# Largest absolute value of a standardised statistic: an unusual image must not be extrapolated to.
LIMIT = 3.0


def limited(x: Tensor) -> Tensor:
    """Limit standardised statistics softly to -LIMIT..LIMIT."""
    return LIMIT * torch.tanh(x / LIMIT)


def _relu6(x: Tensor) -> Tensor:
    """Apply ReLU6; without gradients in place, which saves a tenth of the time of a pass on a CPU."""
    if torch.compiler.is_exporting():  # `relu6` takes most of an export's time to decompose
        return F.hardtanh(x, 0, 6)
    return F.relu6(x, inplace=not torch.is_grad_enabled())


class Down(nn.Conv2d):
    """A 3x3 convolution of stride 2, padded at the lower and right edge: TensorFlow's SAME rule for even sizes."""

    def __init__(self, width_in: int, width: int, groups: int = 1) -> None:
        super().__init__(width_in, width, 3, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))

    def rows(self, x: Tensor) -> Tensor:
        """Convolve rows that are padded already."""
        return super().forward(F.pad(x, (0, 1)))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, project; add the input where shapes are equal."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = width_in * expansion
        self.expand = nn.Conv2d(width_in, wide, 1) if expansion > 1 else None
        self.depthwise = Down(wide, wide, wide) if stride == 2 else nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.project = nn.Conv2d(wide, width, 1)
        self.adds = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(_relu6(self.depthwise(self.widened(x))))
        if not self.adds:
            return y
        return x + y if torch.is_grad_enabled() else y.add_(x)

    def widened(self, x: Tensor) -> Tensor:
        return x if self.expand is None else _relu6(self.expand(x))


class MobileNet(nn.Module):
    """The trunk: RGB (N, 3, H, W) in 0..1 -> the output of each block, (N, C, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Down(3, STEM)
        width_in = STEM
        for number, (width, stride) in enumerate(LAYOUT):
            self.add_module(f"block{number}", InvertedResidual(width_in, width, stride, EXPANSION if number else 1))
            width_in = width

    @property
    def strides(self) -> list[int]:
        """Pixels between the places of each block's output."""
        return list(accumulate((stride for _, stride in LAYOUT), mul, initial=2))[1:]

    @property
    def blocks(self) -> list[InvertedResidual]:
        return [self.get_submodule(f"block{number}") for number in range(len(LAYOUT))]  # type: ignore[misc]

    def forward(self, rgb: Tensor) -> Iterator[Tensor]:
        x = _relu6(self.stem(_normalise(rgb)))
        for block in self.blocks:
            x = block(x)
            yield x

    def steps(self) -> Iterator[list[Step]]:
        """Yield each block as steps over strips."""
        stem: list[Step] = [_normalised, Window(lambda x: _relu6(self.stem.rows(x)), kernel=3, stride=2, above=0)]
        for block in self.blocks:
            yield [*stem, StreamedInvertedResidual(block)]
            stem = []


def _normalise(rgb: Tensor) -> Tensor:
    return channels_last(2 * rgb - 1)


def _normalised(rows: Tensor | None, last: bool) -> Tensor | None:
    return None if rows is None else _normalise(rows)


def _feature(logits: Tensor) -> Tensor:
    """Store logits (N, P) as pairs of numbers (N, 2P), whose similarities differ by logit / SCALE."""
    difference = (logits / SCALE).clamp(-FARTHEST, FARTHEST)
    total = (2 - difference.square()).sqrt()
    return torch.stack([total + difference, total - difference], dim=2).flatten(1) / 2


class StreamedInvertedResidual:
    """An `InvertedResidual` as a step over strips."""

    def __init__(self, block: InvertedResidual) -> None:
        conv, self.block = block.depthwise, block
        if isinstance(conv, Down):
            self.filter = Window(lambda x: block.project(_relu6(conv.rows(x))), kernel=3, stride=2, above=0)
        else:
            self.filter = Window(lambda x: block.project(_relu6(valid(conv, x))), kernel=3)
        self.waiting: Tensor | None = None  # input rows whose output rows are not complete yet

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        y = self.filter(None if rows is None else self.block.widened(rows), last)
        if not self.block.adds:
            return y
        waiting = joined(self.waiting, rows)
        if waiting is None or y is None:
            self.waiting = waiting
            return None
        self.waiting = tail(waiting, y.shape[2])
        return waiting[:, :, : y.shape[2]] + y


class MobileTower(nn.Module):
    """Image tower of `qualiclip-mini` and `qualiclip-mini+`. Its argument is stored as JSON in the weight file.

    Args:
        pairs: antonym prompt pairs P, each with a head.
        window_heads: (W, K) if the last W pairs have a second head, for small windows, which reads the first K
            statistics; None: no pair has one. Scores do not depend on them.

    Shape:
        rgb: (N, 3, H, W) in 0..1, H and W at least 32 -> (N, 2P), float32 (float64 for a double network). The two
        numbers of a pair have unit length together, so the feature's length is sqrt(P).
    """

    head_mean: Tensor
    head_std: Tensor
    window_heads: Tensor | None
    window_bias: Tensor | None

    def __init__(self, pairs: int, window_heads: Sequence[int] | None = None) -> None:
        super().__init__()
        self.pairs, self.feature_dim = pairs, 2 * pairs
        size = ENERGIES + 2 * sum(width for width, _ in LAYOUT)
        self.trunk = MobileNet()
        # Each head standardises by the images that it was fitted to.
        self.register_buffer("head_mean", torch.zeros(pairs, size, dtype=torch.float32))
        self.register_buffer("head_std", torch.ones(pairs, size, dtype=torch.float32))
        self.head_weight = nn.Parameter(torch.zeros(pairs, size, dtype=torch.float32))
        self.head_bias = nn.Parameter(torch.zeros(pairs, dtype=torch.float32))
        self.register_buffer("window_heads", None)  # mean, standard deviation and weight of each statistic
        self.register_buffer("window_bias", None)
        if window_heads is not None:
            self.window_heads = torch.zeros(3, *window_heads, dtype=torch.float32)
            self.window_bias = torch.zeros(window_heads[0], dtype=torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MobileTower:
        """Apply `.to()` and the like. Half precision is for the trunk only."""
        with kept_precise(self, _PRECISE):
            super()._apply(fn, recurse)
        return self

    def forward(self, rgb: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(rgb))

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the statistics (N, S): log energies, then mean and standard deviation of each block's channels."""
        precise = torch.promote_types(rgb.dtype, torch.float32)
        with without_autocast(rgb):
            found = [log_energies(rgb.to(precise))]
        rows = rows_at_once(self, rgb)
        if rows is None:
            for x in self.trunk(rgb):
                with without_autocast(rgb):
                    found += moments(x.to(precise))
        else:
            each = [self._pool_in_strips(image, rows) for image in rgb.split(1)]
            found += [torch.cat(values) for values in zip(*each, strict=True)]
        return torch.cat(found, dim=1)

    statistics = forward_features

    def cells(self, rgb: Tensor, blocks: int | None = None) -> ImageCells:
        """Compute, in one pass, the moments from which the statistics of any window are pooled.

        What is computed at a place depends on its surroundings beyond a window too.

        Args:
            rgb: as for `forward`.
            blocks: how many of the first blocks are computed; default: all.
        """
        sides = [SIDE // stride for stride in self.trunk.strides[:blocks]]
        precise = torch.promote_types(rgb.dtype, torch.float32)
        with without_autocast(rgb):
            energies = EnergyCells(rgb.to(precise))
        rows = rows_at_once(self, rgb)
        if rows is not None:
            each = [self._cells_in_strips(image, rows, sides) for image in rgb.split(1)]
            return ImageCells(energies, [CellMoments.of_batch(several) for several in zip(*each, strict=True)])
        found = []
        for side, x in zip(sides, self.trunk(rgb), strict=False):
            with without_autocast(rgb):
                found.append(CellMoments.of(cell_moments(x.to(precise), side), x.shape[2:], side))
        return ImageCells(energies, found)

    def logits(self, statistics: Tensor) -> Tensor:
        """Map statistics (N, S) to the logit of each pair's score, (N, P), not clamped."""
        with without_autocast(statistics):
            mean, std, weight, bias = (getattr(self, name).to(statistics) for name in _HEADS)
            if torch.compiler.is_exporting():
                # One by one, as OpenVINO 2026.4 adds a vector to the wrong sums if there are several images.
                heads = zip(mean, std, weight, bias, strict=True)
                return torch.stack([(limited((statistics - m) / s) * w).sum(-1) + b for m, s, w, b in heads], dim=1)
            # Not a matrix product, whose order of summation depends on the batch.
            return (limited((statistics[:, None] - mean) / std) * weight).sum(-1) + bias

    def window_logits(self, statistics: Tensor) -> Tensor:
        """Map the statistics of windows (N, S) to logits (N, P); pairs without a window head have those of `logits`."""
        logits = self.logits(statistics)
        if self.window_heads is None or self.window_bias is None:
            return logits
        with without_autocast(statistics):
            mean, std, weight = self.window_heads.to(statistics).unbind()
            own = (limited((statistics[:, None, : mean.shape[1]] - mean) / std) * weight).sum(-1)
            return torch.cat([logits[:, : -len(mean)], own + self.window_bias.to(statistics)], dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the output of `forward_features` to (N, 2P)."""
        return _feature(self.logits(features))

    def forward_window(self, statistics: Tensor) -> Tensor:
        """Map the statistics of windows (N, S) to (N, 2P), by the window heads where pairs have them."""
        return _feature(self.window_logits(statistics))

    def _pool_in_strips(self, image: Tensor, rows: int) -> list[Tensor]:
        """Pool every block of one image, strip by strip."""
        steps: list[Step] = []
        pools: list[StreamedMoments] = []
        for block in self.trunk.steps():
            pools.append(StreamedMoments())
            steps += [*block, pools[-1]]
        for _ in stream(steps, image, rows):
            pass
        return [value for each in pools for value in (each.mean, root(each.variance))]

    def _cells_in_strips(self, image: Tensor, rows: int, sides: list[int]) -> list[CellMoments]:
        """Compute every block's cells of one image, strip by strip."""
        steps: list[Step] = []
        pools: list[StreamedCells] = []
        for side, block in zip(sides, self.trunk.steps(), strict=False):
            pools.append(StreamedCells(side))
            steps += [*block, pools[-1]]
        for _ in stream(steps, image, rows):
            pass
        return [pool.moments() for pool in pools]
