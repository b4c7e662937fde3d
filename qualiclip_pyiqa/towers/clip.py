"""CLIP towers for quality, over open_clip's and timm's modules: any picture size, positional table optional.

Nothing here knows of names, files, prompts or pyiqa; `backbones` builds these towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import WeightsError
from .onednn import FusedBottleneck, FusedConv, FusedLayer, LayerInStrips, at_hand
from .streaming import Step, Window, in_strips, rows_at_once

_COUNTER = "num_batches_tracked"


def load_into(tower: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Let `tower` take over the tensors of `state` as float32; `what` names the file in an error.

    Raises:
        WeightsError: a key is missing, or a shape differs: the file is another model's.
    """
    expected = tower.state_dict()
    # Some exports leave out BatchNorm's counter, which no score depends on.
    state = {
        **{key: value.new_zeros((), device="cpu") for key, value in expected.items() if key.endswith(_COUNTER)},
        **state,
    }
    missing = [key for key in expected if key not in state]
    if missing:
        raise WeightsError(f"{what} lacks {len(missing)} tensors of this backbone (first: {missing[0]!r})")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise WeightsError(
                f"{what} holds another model: {key!r} has shape {tuple(state[key].shape)}, "
                f"this backbone expects {tuple(value.shape)}"
            )
    tensors = {key: state[key].float() if state[key].is_floating_point() else state[key] for key in expected}
    tower.load_state_dict(tensors, strict=True, assign=True)


def freeze(tower: nn.Module) -> nn.Module:
    """Make a tower part of a metric: eval mode, BatchNorm folded where the order is ours, every tensor a plain buffer.

    Buffers that are not persistent follow `.to()`, `deepcopy`, pickle and DataParallel, but are no parameters to
    optimise and stay out of state dicts, so that a metric inside a model does not put CLIP into its checkpoints.
    """
    tower.eval()
    if isinstance(tower, TimmTower):  # whose modules have names and orders of their own
        tower.drop_table()
    else:
        _fold_batchnorm(tower)
    if isinstance(tower, ResNetTower):
        tower.fuse()
    for module in tower.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach(), persistent=False)
        module._non_persistent_buffers_set.update(module._buffers)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Its counter would otherwise be looked for when a state dict is loaded; in eval mode nothing else changes.
            module.track_running_stats = False
    return tower.to(memory_format=torch.channels_last)


def _fold_batchnorm(tower: nn.Module) -> None:
    """Fold every BatchNorm that follows a convolution: `convI` and `bnI` or `normI`, or neighbours in a Sequential."""
    for module in list(tower.modules()):
        children = dict(module.named_children())
        names = list(children)
        followers = [(name, name.replace("conv", norm)) for name in names for norm in ("bn", "norm") if "conv" in name]
        if isinstance(module, nn.Sequential):
            followers += pairwise(names)
        for first, second in followers:
            conv, norm = children.get(first), children.get(second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                # In double precision, so that a weight is rounded once.
                setattr(module, first, fuse_conv_bn_eval(conv.double(), norm.double()).float())
                setattr(module, second, nn.Identity())


class _Tower(nn.Module):
    """Pixel normalisation and the parts that all kinds of image tower share.

    Args:
        visual: open_clip's module, whose parts are taken over under the same names.
        pos_embedding: whether the positional table is added; where it is not, it stays in the state dict.
        mean, std: of RGB in 0..1, that the weights were trained with.

    Shape:
        rgb: (N, 3, H, W), RGB in 0..1, H and W at least 32 -> features (N, D), not of unit length.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, pos_embedding: bool, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, child in visual.named_children():
            self.add_module(name, child)
        for name, parameter in visual.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.pos_embedding = pos_embedding
        # Values made here are real also when the rest is built on the meta device.
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(1, 3, 1, 1), persistent=False)

    def normalise(self, rgb: Tensor) -> Tensor:
        return ((rgb - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _flat_resize(table: Tensor, tokens: int) -> Tensor:
    """Positional table (T, C) -> (tokens, C), resized bicubically as one flat picture and not on its 2-d grid.

    That is how pyiqa 0.1.16 does it and how the published contexts of clipiqa+_rn50_512 and _vitL14_512 were trained.
    """
    flat = F.interpolate(table[None, None].float(), size=(tokens, table.shape[1]), mode="bicubic")
    return flat[0, 0].to(table.dtype)


class ResNetTower(_Tower):
    """OpenAI's ModifiedResNet with an attention pool whose only query is the mean token."""

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
    layer1: Any  # a Sequential, then a FusedLayer
    layer2: Any
    layer3: Any
    layer4: Any
    attnpool: Any  # open_clip's AttentionPool2d, of which only the weights are used

    @property
    def fused(self) -> bool:
        return isinstance(self.layer1, FusedLayer)

    def forward(self, rgb: Tensor) -> Tensor:
        if not self.fused:
            return self._pool(self._whole(rgb))
        rows = rows_at_once(self, rgb)
        x = self._pool(self._whole(rgb) if rows is None else in_strips(self._steps, rgb, rows, stride=32))
        if at_hand(rgb, self.attnpool.q_proj.weight):
            # A pixel that is not a number makes a score that is none, and so does a weight.
            x = x + 0 * rgb.sum(dim=(1, 2, 3))[:, None]
            if any(isinstance(module, FusedConv) and module.broken for module in self.modules()):
                x = x * torch.nan
        return x

    def fuse(self) -> None:
        """Compute each convolution, whose BatchNorm is folded, together with what follows it."""
        for name in ("conv1", "conv2", "conv3"):
            setattr(self, name, FusedConv(getattr(self, name)))
        for name in ("bn1", "bn2", "bn3", "act1", "act2", "act3"):
            setattr(self, name, nn.Identity())
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, FusedLayer(*map(FusedBottleneck, getattr(self, name))))

    def _whole(self, rgb: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/32, W/32)."""
        x = self.normalise(rgb)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))

    def _steps(self) -> list[Step]:
        """`_whole` over strips."""
        return [
            Window(self.normalise, kernel=1),
            Window(lambda x: self.conv1(x, inner=True), kernel=3, stride=2),
            Window(lambda x: self.conv2(x, inner=True), kernel=3),
            Window(lambda x: self.avgpool(self.conv3(x, inner=True)), kernel=3, group=2),
            *(LayerInStrips(layer) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)),
        ]

    def _pool(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D). Exact, and linear in h*w: with one query q the key projection can be moved to the
        query's side (q.(Wk x + bk) = (Wk^T q).x + const, and the softmax drops the constant), and the value projection
        behind the weighted mean (the weights sum to one)."""
        pool = self.attnpool
        tokens = x.flatten(2).transpose(1, 2)  # (N, L, C)
        mean = tokens.mean(dim=1, keepdim=True)  # the first token; never in one block with the others, which are large
        if self.pos_embedding:
            table = _flat_resize(pool.positional_embedding, 1 + tokens.shape[1])
            mean, tokens = mean + table[:1], tokens + table[1:]
        heads, width = pool.num_heads, tokens.shape[2]
        size = width // heads
        query = (pool.q_proj(mean[:, 0]) * size**-0.5).unflatten(1, (heads, size))
        query = torch.einsum("nhd,hdc->nhc", query, pool.k_proj.weight.view(heads, size, width))
        weights = torch.cat([query @ mean.transpose(1, 2), query @ tokens.transpose(1, 2)], dim=2).softmax(dim=-1)
        mixed = weights[:, :, :1] * mean + weights[:, :, 1:] @ tokens  # (N, heads, C)
        value = torch.einsum("nhc,hdc->nhd", mixed, pool.v_proj.weight.view(heads, size, width))
        return pool.c_proj(value.flatten(1) + pool.v_proj.bias)


class ViTTower(_Tower):
    """open_clip's VisionTransformer; its patch convolution leaves out the rows and columns that do not fill a patch.

    OpenAI's take the class token of normalised tokens; CLIPA's the mean of the others, normalised afterwards; CoCa's
    the first of the queries that attend to all tokens.
    """

    conv1: nn.Module
    ln_pre: nn.Module
    ln_post: nn.Module
    transformer: nn.Module
    class_embedding: Tensor
    positional_embedding: Tensor
    proj: Tensor

    def __init__(self, visual: open_clip.VisionTransformer, *args: Any) -> None:
        super().__init__(visual, *args)
        self.attn_pool: nn.Module | None = visual.attn_pool
        self.averages = visual.pool_type == "avg"
        # One token's norm is the same before and after it is picked; a mean's is not.
        self.norm_first = self.averages and not (visual.final_ln_after_pool and visual.attn_pool is None)

    def forward(self, rgb: Tensor) -> Tensor:
        x = self.conv1(self.normalise(rgb)).flatten(2).transpose(1, 2)  # (N, L, C)
        start = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([start, x], dim=1)
        if self.pos_embedding:
            x = x + _flat_resize(self.positional_embedding, x.shape[1]).to(x.dtype)
        x = self.transformer(self.ln_pre(x))
        if self.attn_pool is not None:
            x = self.attn_pool(x)
        if self.norm_first:
            x = self.ln_post(x)
        x = x[:, 1:].mean(dim=1) if self.averages else x[:, 0]
        return (x if self.norm_first else self.ln_post(x)) @ self.proj


class TimmTower(_Tower):
    """A tower of timm's with open_clip's projection: ConvNeXt, FastViT, ViTamin, SigLIP's, EVA's, ...

    A positional table is resized on its grid, as timm does it; a rotary embedding is there with and without a table.
    """

    trunk: nn.Module
    head: nn.Module

    def forward(self, rgb: Tensor) -> Tensor:
        x = (rgb - self.mean) / self.std
        table = getattr(self.trunk, "pos_embed", None)
        if table is None or self.pos_embedding:
            return self.head(self.trunk(x))
        # In training, where the table stays in the state dict. Not for several threads: the trunk is changed meanwhile.
        return self.head(functional_call(self.trunk, {"pos_embed": torch.zeros_like(table)}, (x,)))

    def drop_table(self) -> None:
        """Let the trunk add zeros, if the table is not to be added: for a tower that is only used from now on."""
        table = getattr(self.trunk, "pos_embed", None)
        if table is not None and not self.pos_embedding:
            self.trunk.pos_embed = nn.Parameter(torch.zeros_like(table))
            self.pos_embedding = True


class TextTower(nn.Module):
    """CLIP's plain causal text transformer, from token embeddings to features, so that learned contexts can enter.

    A token sees only those before it, so what comes after a row's end-of-text token may be left out: T need not be
    CLIP's 77, and is a third of that for usual prompts, as is the time.

    Shape:
        embeddings (P, T, W) and the index of each end-of-text token (P,) -> features (P, D), not of unit length.
    """

    positional_embedding: Tensor
    causal_mask: Tensor

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.context_length: int = clip.context_length
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        causal = torch.full((self.context_length, self.context_length), float("-inf"), device="cpu").triu_(1)
        self.register_buffer("causal_mask", causal, persistent=False)

    def forward(self, embeddings: Tensor, end: Tensor) -> Tensor:
        length = embeddings.shape[1]
        x = embeddings.to(self.positional_embedding.dtype) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=self.causal_mask[:length, :length]))
        return x[torch.arange(x.shape[0], device=x.device), end] @ self.text_projection

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids (P, T) int64 -> features (P, D). The end-of-text token has the highest id of a row."""
        end = tokens.argmax(dim=-1)
        return self(self.token_embedding(tokens[:, : int(end.max()) + 1]), end)


def tokenize(texts: list[str] | tuple[str, ...], context_length: int = 77) -> Tensor:
    """Texts -> token ids (P, T) int64 with CLIP's byte-pair encoding; longer texts are cut at T tokens."""
    return open_clip.SimpleTokenizer(context_length=context_length)(list(texts))
