"""MiniTower: a small image tower for blind quality, trained from scratch without opinion scores.

Trained by QualiCLIP's strategy (Agnolucci et al., arXiv:2403.11176): degraded crops are ranked by their similarity to
antonym prompt anchors. The network is this package's own. Quality shows in shallow, fine-grained features, so every
stage of a small residual network is pooled, along with log energies that are not learned. Pooling takes mean, spread
and percentiles: a photograph is as sharp as its sharpest parts and as noisy as its flat parts, however much of it is
background.

The feature concatenates blocks of unit length, each from its own inputs. The anchors of the p-th antonym prompt pair
are zero outside the p-th block, so the mean over pairs is the mean of P independent opinions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import without_autocast
from .base import channels_last
from .statistics import (
    CELL,
    ENERGIES,
    PERCENTILES,
    StreamedPooling,
    cell_means,
    detail_and_top,
    log_energies,
    pooled,
    std,
)
from .streaming import Step, Window, joined, rows_at_once, stream, tail, valid

# Inputs of each block: one block per pair of the prompt set `qualiclip`, in the set's order.
BLOCKS: tuple[tuple[str, ...], ...] = (
    ("energies", "stage1", "stage2", "stage3", "stage4"),  # Good photo.
    ("energies",),  # Sharp image.
    ("sharpness",),  # Sharp edges.
    ("stage2",),  # High-resolution image.
    ("energies", "stage1", "stage2"),  # Noise-free image.
    ("stage3",),  # High-quality image.
    ("stage4",),  # Good picture.
)


class Standardise(nn.Module):
    """Standardise pooled statistics (N, C) by running mean and variance, without parameters.

    Otherwise the unit-length features of a fresh network are nearly equal, and training stays on a plateau.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, features: int, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("var", torch.ones(features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean.to(x.dtype), self.var.to(x.dtype)
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                self.var.lerp_(var.to(self.var.dtype), self.momentum)
        return (x - mean) * (var + 1e-4).rsqrt()


class Residual(nn.Module):
    """Residual block of two 3x3 convolutions; the first may halve the resolution and change the width."""

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
        return F.relu(self.shortcut(x) + y)

    def shortcut(self, x: Tensor) -> Tensor:
        """Compute the summand of the convolutions' result."""
        if self.widen is None:
            return x
        return self.widen(cell_means(x, 2) if self.stride > 1 else x)


class StreamedResidual:
    """A `Residual` as a step over strips."""

    def __init__(self, block: Residual) -> None:
        self.first = Window(lambda x: F.relu(block.norm1(valid(block.conv1, x))), kernel=3, stride=block.stride)
        self.second = Window(lambda x: block.norm2(valid(block.conv2, x)), kernel=3)
        self.shortcut = Window(block.shortcut, kernel=1, group=block.stride, ceil=True)
        self.waiting: Tensor | None = None  # shortcut rows whose convolution rows are not complete yet

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        waiting = joined(self.waiting, self.shortcut(rows, last))
        y = self.second(self.first(rows, last), last)
        if waiting is None or y is None:
            self.waiting = waiting
            return None
        self.waiting = tail(waiting, y.shape[2])
        return F.relu(waiting[:, :, : y.shape[2]] + y)


class Head(nn.Module):
    """Map pooled statistics (N, C) to a block of unit length (N, D).

    Args:
        width_in, hidden, dim: C, the width of the hidden layer, and D.
        dropout: probability of zeroing a statistic in training.
    """

    def __init__(self, width_in: int, hidden: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.standardise = Standardise(width_in)
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.standardise(x), self.dropout, self.training)
        x = F.linear(x, self.fc1.weight.to(x.dtype), self.fc1.bias.to(x.dtype))
        x = F.linear(F.gelu(x), self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))
        return F.normalize(x, dim=-1)


class RelativeSharpness(nn.Module):
    """Sharpness relative to detail: residual of the 98th-percentile energy after regressing on the median. Not learned.

    In pristine photographs the sharpest parts are sharper the more detail there is, though all are equally good; `fit`
    fits that line by least squares. For a photograph z standard deviations above the line, similarities to the anchors
    (the block's first two unit vectors) differ by (z + 1) / 8, which is (z + 1) before the sigmoid at a scale of 8. The
    line is a buffer, so the head is a constant in training.

    Shape:
        (N, 2), from `detail_and_top` -> (N, dim).
    """

    FARTHEST = 1.4  # clamp of the difference; unit vectors reach sqrt(2), where the gradient is infinite

    line: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        line = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float32)  # offset, slope, standard deviation
        self.register_buffer("line", line)

    def fit(self, pristine: Tensor) -> None:
        """Fit the line to `detail_and_top` of N >= 2 pristine photographs, (N, 2)."""
        detail, top = pristine.double().unbind(1)
        slope = ((detail - detail.mean()) * (top - top.mean())).mean() / detail.var(correction=0).clamp(min=1e-9)
        offset = top.mean() - slope * detail.mean()
        self.line.copy_(torch.stack([offset, slope, std(top - slope * detail)]))

    def forward(self, x: Tensor) -> Tensor:
        offset, slope, spread = self.line.to(x.dtype).unbind()
        z = (x[:, 1] - slope * x[:, 0] - offset) / spread
        difference = ((z + 1) / 8).clamp(-self.FARTHEST, self.FARTHEST)
        total = (2 - difference.square()).sqrt()
        return F.pad(torch.stack([total + difference, total - difference], dim=1) / 2, (0, self.dim - 2))


class MiniTower(nn.Module):
    """The tower of `qualiclip train --config mini`. All arguments but `dropout` are stored as JSON in the weight file.

    Args:
        widths: channels of each stage; stage k has 1/2^k of the image's resolution.
        depths: residual blocks of each stage.
        hidden: width of each head's hidden layer.
        dim: length of one block of the feature.
        blocks: input names of each block: `energies`, `stage1`, `stage2`, ...; or `sharpness` alone.
        dropout: dropout of the heads' inputs in training.

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
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depths = dim, tuple(depths)
        self.blocks = tuple(tuple(block) for block in blocks)
        self.feature_dim = dim * len(self.blocks)
        # The input is RGB and its high-pass at a resolution where blocking and noise still show.
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
            RelativeSharpness(dim)
            if block == ("sharpness",)
            else Head(sum(sizes[name] for name in block), hidden, dim, dropout)
            for block in self.blocks
        )

    def forward(self, rgb: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(rgb))

    def forward_features(self, rgb: Tensor) -> dict[str, Tensor]:
        """Compute the inputs of the blocks by name, (N, C) each: log energies and every stage's pooled values."""
        precise = torch.promote_types(rgb.dtype, torch.float32)
        with without_autocast(rgb):
            found = {"energies": log_energies(rgb.to(precise))}
        # In training BatchNorm needs the whole batch.
        rows = None if self.training else rows_at_once(self, rgb)
        if rows is not None:
            each = [self._pool_in_strips(image, rows) for image in rgb.split(1)]
            return found | {f"stage{k}": torch.cat(stage) for k, stage in enumerate(zip(*each, strict=True), 1)}
        for number, x in enumerate(self.feature_maps(rgb), 1):
            with without_autocast(rgb):
                found[f"stage{number}"] = pooled(x.to(precise), CELL >> number)
        return found

    def forward_head(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the output of `forward_features` to (N, feature_dim)."""
        with without_autocast(features["energies"]):
            inputs = {**features, "sharpness": detail_and_top(features["energies"])}
            heads = zip(self.heads, self.blocks, strict=True)
            return torch.cat([head(torch.cat([inputs[name] for name in block], dim=1)) for head, block in heads], dim=1)

    def statistics(self, rgb: Tensor) -> Tensor:
        """Compute what a regression on opinion scores takes, all outputs of `forward_features` in a row: (N, S)."""
        return torch.cat(list(self.forward_features(rgb).values()), dim=1)

    def feature_maps(self, rgb: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage, (N, C, h, w); h and w of stage k are H / 2^k and W / 2^k, rounded up."""
        x = self.stem(_with_high_pass(F.pad(rgb, (0, 0, 1, 1), mode="replicate")))
        for stage in self.stages:
            x = stage(x)
            yield x

    def _pool_in_strips(self, image: Tensor, rows: int) -> list[Tensor]:
        """Pool every stage of one image, strip by strip."""
        conv, norm, relu = self.stem
        assert isinstance(conv, nn.Conv2d)
        steps: list[Step] = [
            Window(_with_high_pass, kernel=3, replicate=True),
            Window(lambda x: relu(norm(valid(conv, x))), kernel=5, stride=2),
        ]
        pools = [StreamedPooling(CELL >> number) for number in range(1, len(self.stages) + 1)]
        stages: Any = self.stages
        for stage, pool in zip(stages, pools, strict=True):
            steps += [*map(StreamedResidual, stage), pool]
        for _ in stream(steps, image, rows):
            pass
        return [pool.summary() for pool in pools]


def _with_high_pass(rgb: Tensor) -> Tensor:
    """Add a high-pass: (N, 3, H + 2, W) with a padding row above and below -> (N, 6, H, W)."""
    inner = rgb[:, :, 1:-1]
    high = inner - F.avg_pool2d(F.pad(rgb, (1, 1, 0, 0), mode="replicate"), 3, stride=1)
    return channels_last(torch.cat([inner - 0.45, 8 * high], dim=1))
