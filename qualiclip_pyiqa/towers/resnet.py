"""OpenAI's modified ResNets as a tower, and its frozen form, which computes large images in strips of rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Tower, fold_batchnorm, resize_flat
from .places import PlaceFeatures, Shares
from .streaming import Step, Window, in_strips, joined, rows_at_once, tail, valid
from .torch_hooks import has_global_hooks, has_hooks

_LAYERS = ("layer1", "layer2", "layer3", "layer4")
STRIDE = 32  # pixels between places of the feature map


class ResNetTower(Tower):
    """OpenAI's ModifiedResNet, whose attention pool has the mean token as its only query."""

    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module
    act1: nn.Module
    act2: nn.Module
    act3: nn.Module
    avgpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    attnpool: nn.Module  # open_clip's AttentionPool2d, used only for its weights

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the feature map: (N, 3, H, W) -> (N, C, H // 32, W // 32)."""
        rows = rows_at_once(self, rgb) if isinstance(self.layer1, FoldedLayer) else None
        return self._whole(rgb) if rows is None else in_strips(self._steps, rgb, rows, stride=STRIDE)

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool a feature map by attention: (N, C, h, w) -> (N, D).

        Exact and linear in h*w: with a single query q, the key projection moves to the query's side (q.(Wk x + bk) =
        (Wk^T q).x + const, and the softmax cancels the constant), and the value projection behind the weighted mean
        (the weights sum to one).
        """
        pool: Any = self.attnpool
        mean, tokens, weights = self._attend(features)
        heads, width = pool.num_heads, tokens.shape[2]
        mixed = weights[:, :, :1] * mean + torch.bmm(weights[:, :, 1:], tokens)  # (N, heads, C)
        value = _per_head(mixed, pool.v_proj.weight.view(heads, width // heads, width).transpose(1, 2))
        pooled: Tensor = pool.c_proj(value.flatten(1) + pool.v_proj.bias)
        return pooled

    def place_features(self, rgb: Tensor) -> PlaceFeatures:
        """Project each place as if the pooling attended to it alone."""
        pool: Any = self.attnpool
        features = self.forward_features(rgb)
        tokens = self._attend(features)[1]
        places = pool.c_proj(pool.v_proj(tokens))
        return PlaceFeatures(self.forward_head(features), places, _grid(features), (STRIDE, STRIDE))

    def shares(self, rgb: Tensor, directions: Tensor) -> Shares:
        """Split the inner products of unit features with `directions` (A, D) exactly into summands of places.

        The pooled feature is linear in the values of the tokens, once their weights are known. The mean token's value
        is the mean of the places' values, so it is theirs. To no place belong its positional embedding and the biases.
        """
        pool: Any = self.attnpool
        features = self.forward_features(rgb)
        image = self.forward_head(features)
        mean, tokens, weights = self._attend(features)
        heads, width = pool.num_heads, tokens.shape[2]
        unit = directions / image.norm(dim=1)[:, None, None]  # (N, A, D)
        values = unit @ pool.c_proj.weight
        per_head = values.unflatten(2, (heads, -1)), pool.v_proj.weight.view(heads, -1, width)
        inner = torch.einsum("nahd,hdc->nahc", *per_head)
        own = features.flatten(2)  # without positional embeddings, as the mean is of these
        places = torch.einsum("nahc,nhl,nlc->nal", inner, weights[:, :, 1:], tokens)
        places = places + torch.einsum("nahc,nh,ncl->nal", inner, weights[:, :, 0], own) / own.shape[2]
        table = mean[:, 0] - own.mean(dim=2)
        rest = torch.einsum("nahc,nh,nc->na", inner, weights[:, :, 0], table)
        rest = rest + values @ pool.v_proj.bias + unit @ pool.c_proj.bias
        return Shares(image, places, rest, _grid(features), (STRIDE, STRIDE))

    def _attend(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pooling's mean token (N, 1, C), the places' (N, L, C), and weights of both (N, heads, 1 + L)."""
        pool: Any = self.attnpool
        tokens = features.flatten(2).transpose(1, 2)  # (N, L, C)
        mean = tokens.mean(dim=1, keepdim=True)  # the first token; concatenating it would copy all others
        if self.add_table:
            table = resize_flat(pool.positional_embedding, 1 + tokens.shape[1])
            mean, tokens = mean + table[:1], tokens + table[1:]
        heads, width = pool.num_heads, tokens.shape[2]
        size = width // heads
        query = (pool.q_proj(mean[:, 0]) * size**-0.5).unflatten(1, (heads, size))
        query = _per_head(query, pool.k_proj.weight.view(heads, size, width))
        logits = torch.bmm(query, mean.transpose(1, 2)), torch.bmm(query, tokens.transpose(1, 2))
        weights = torch.cat(logits, dim=2).softmax(dim=-1)
        return mean, tokens, weights

    def prepare_to_freeze(self) -> None:
        """Fold every BatchNorm, and fuse each convolution with the ReLU or addition that follows it."""
        fold_batchnorm(self)
        for name in ("conv1", "conv2", "conv3"):
            setattr(self, name, FoldedConv(getattr(self, name)))
        for name in ("bn1", "bn2", "bn3", "act1", "act2", "act3"):
            setattr(self, name, nn.Identity())
        for name in _LAYERS:
            setattr(self, name, FoldedLayer(*map(FoldedBottleneck, getattr(self, name))))

    def _whole(self, rgb: Tensor) -> Tensor:
        x = self.normalise(rgb)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return features

    def _steps(self) -> list[Step]:
        """Return the layers of `_whole` as steps over strips."""
        return [
            Window(self.normalise, kernel=1),
            Window(lambda x: self.conv1(x, inner=True), kernel=3, stride=2),
            Window(lambda x: self.conv2(x, inner=True), kernel=3),
            Window(lambda x: self.avgpool(self.conv3(x, inner=True)), kernel=3, group=2),
            *(StreamedLayer(getattr(self, name)) for name in _LAYERS),
        ]


def _per_head(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each head's rows by its own matrix: (N, heads, A), (heads, A, B) -> (N, heads, B)."""
    product = torch.bmm(x.transpose(0, 1), weights).transpose(0, 1)
    return product.clone(memory_format=torch.contiguous_format)  # a view would tie an exported graph to a batch size


def _grid(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]


class Kernel(Protocol):
    """Alternative implementation of a `FoldedConv`; see `onednn`."""

    def convolve(self, conv: nn.Conv2d, x: Tensor, relu: bool, inner: bool) -> Tensor: ...

    def add(self, conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor: ...


class FoldedConv(nn.Module):
    """A frozen convolution with the ReLU or addition that follows it.

    Args:
        conv: the convolution, with BatchNorm folded in.

    Attributes:
        kernel: alternative implementation; None, the default: PyTorch's public functions.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.kernel: Kernel | None = None

    def forward(self, x: Tensor, relu: bool = True, inner: bool = False) -> Tensor:
        """Convolve, with a ReLU if `relu`: (N, C, H, W) -> (N, C', H', W').

        With `inner`, only the rows that do not depend on padding above or below.
        """
        if self.kernel is not None:
            return self.kernel.convolve(self.conv, x, relu, inner)
        y: Tensor = valid(self.conv, x) if inner else self.conv(x)
        return F.relu_(y) if relu else y

    def add(self, x: Tensor, other: Tensor, overwrite: bool = False) -> Tensor:
        """Convolve, add `other` and apply a ReLU; `overwrite` writes the result to the memory of `other`."""
        if self.kernel is not None:
            return self.kernel.add(self.conv, x, other if overwrite else other.clone())
        y: Tensor = self.conv(x)
        return F.relu_(other.add_(y) if overwrite else y.add_(other))


class FoldedBottleneck(nn.Module):
    """A frozen bottleneck, of ModifiedResNet, which pools before it narrows, or of torchvision, which strides.

    Args:
        block: open_clip's or torchvision's bottleneck, with BatchNorm folded into its convolutions, which are taken
            over.

    Attributes:
        pool: factor by which it pools.
        stride: of its convolutions.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = map(FoldedConv, (block.conv1, block.conv2, block.conv3))
        self.avgpool = getattr(block, "avgpool", nn.Identity())
        self.pool, self.stride = 1, block.conv2.stride[0]
        self.shortcut: FoldedConv | None = None
        if block.downsample is not None:
            *pools, conv, _ = block.downsample
            self.pool = pools[0].kernel_size if pools else 1
            # A pool over a single pixel would only copy.
            self.shortcut_pool = nn.Identity() if self.pool == 1 else pools[0]
            self.shortcut = FoldedConv(conv)

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W'); `overwrite` writes the result to the memory of the shortcut."""
        y = self.avgpool(self.conv2(self.conv1(x)))
        return self.conv3.add(y, x if self.shortcut is None else self.widen(x), overwrite)

    def widen(self, x: Tensor) -> Tensor:
        """Compute the shortcut of a layer's first block."""
        assert self.shortcut is not None
        widened: Tensor = self.shortcut(self.shortcut_pool(x), relu=False)
        return widened

    def window(self) -> Window:
        """Return the part between the 1x1 convolutions as a step over strips."""
        return Window(lambda x: self.avgpool(self.conv2(x, inner=True)), kernel=3, stride=self.stride, group=self.pool)


class FoldedLayer(nn.Sequential):
    """Bottlenecks in a row. With a kernel, each may overwrite the previous result, unless a hook has seen it."""

    def forward(self, x: Tensor) -> Tensor:
        blocks: list[Any] = list(self)
        may_overwrite = blocks[0].conv3.kernel is not None and not (
            has_global_hooks() or any(map(has_hooks, self.modules()))
        )
        for number, block in enumerate(blocks):
            x = block(x, overwrite=may_overwrite and (number > 0 or block.shortcut is not None))
        return x


class StreamedLayer:
    """A `FoldedLayer` as a step over the strips of one image.

    All blocks add to the same buffer `sums`, each trailing a few rows behind its predecessor.
    """

    def __init__(self, layer: nn.Sequential) -> None:
        self.blocks: list[Any] = list(layer)
        first = self.blocks[0]
        # A stride takes the first of an odd number of rows too, which a pool drops.
        self.widen = Window(first.widen, kernel=1, group=first.pool * first.stride, ceil=first.stride > 1)
        self.windows = [block.window() for block in self.blocks]
        self.sums: Tensor | None = None
        self.done = [0] * len(self.blocks)  # rows of `sums` completed by each block

    def __call__(self, rows: Tensor | None, last: bool) -> Tensor | None:
        sums = joined(self.sums, self.widen(rows, last))
        for k, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            y = window(None if rows is None else block.conv1(rows), last)
            rows = None
            if y is not None and sums is not None:
                rows = sums[:, :, self.done[k] : self.done[k] + y.shape[2]]
                block.conv3.add(y, rows, overwrite=True)
                self.done[k] += y.shape[2]
        complete = self.done[-1]
        if sums is None or not complete:
            self.sums = sums
            return None
        self.sums = tail(sums, complete)
        self.done = [done - complete for done in self.done]
        return sums[:, :, :complete]
