"""Shared parts of all towers: the base class, loading a state dict, and freezing a tower for scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import WeightsError
from .autocast import without_autocast
from .places import PlaceFeatures, Shares
from .statistics import std

# Raise it when the values of any tower's `statistics` change: cached ones are then computed again.
STATISTICS_VERSION = 1

_COUNTER = "num_batches_tracked"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Tower(nn.Module):
    """Base class of CLIP's image towers: `forward` is `forward_head(forward_features(rgb))`, as in timm.

    Args:
        visual: open_clip's module, whose children and parameters are taken over under the same names.
        add_table: whether to add the positional table; either way it stays in the state dict.
        mean, std: pixel normalisation of the weights, for RGB in 0..1.

    Shape:
        rgb: (N, 3, H, W), RGB in 0..1, H and W at least 32 -> (N, D), not normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, add_table: bool, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, child in visual.named_children():
            self.add_module(name, child)
        for name, parameter in visual.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.add_table = add_table
        # On the CPU in float32 even if the rest is built on the meta device or in another default dtype.
        for name, values in (("mean", mean), ("std", std)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(rgb))

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the unpooled feature map, (N, C, h, w), or tokens of a transformer, (N, L, C)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool the output of `forward_features` into image features (N, D)."""
        raise NotImplementedError

    def places(self, features: Tensor) -> Tensor:
        """View the output of `forward_features` as (N, C, L), without tokens that belong to no place."""
        return features.flatten(2)

    def statistics(self, rgb: Tensor) -> Tensor:
        """Compute what a regression on opinion scores takes, in one pass.

        Mean and standard deviation over places of `forward_features`, and the image feature of `forward_head`. A tower
        of another kind has this method too; its result depends on the image alone and grows neither with its size nor
        with the batch.

        Shape:
            rgb: (N, 3, H, W), RGB in 0..1, H and W at least 32 -> (N, S), S = 2 C + D, float32 or float64.
        """
        features = self.forward_features(rgb)
        image = self.forward_head(features)
        with without_autocast(rgb):
            precise = torch.promote_types(features.dtype, torch.float32)
            places = self.places(features).to(precise)
            return torch.cat([places.mean(dim=-1), std(places), image.to(precise)], dim=1)

    def place_features(self, rgb: Tensor) -> PlaceFeatures | None:
        """Project each place as if the pooling saw it alone; None if this tower's pooling cannot do so."""
        return None

    def shares(self, rgb: Tensor, directions: Tensor) -> Shares | None:
        """Split the inner products of unit features with `directions` (A, D) into summands of places.

        None if this tower's pooling is not a sum over places.
        """
        return None

    def normalise(self, rgb: Tensor) -> Tensor:
        """Apply the weights' pixel normalisation to RGB in 0..1; the result is channels-last."""
        return channels_last((rgb - self.mean) / self.std)

    def prepare_to_freeze(self) -> None:
        """Simplify a tower in eval mode that will not be trained again; its output changes only by rounding."""
        fold_batchnorm(self)


def load_into(tower: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Make a tower take over the tensors of a state dict, converted to float32.

    Args:
        what: name of the weight file, for error messages.

    Raises:
        WeightsError: a missing key or another shape; the file belongs to another model.
    """
    expected = tower.state_dict()
    # Some exports lack BatchNorm's counter, which no score depends on.
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
    """Freeze a tower for scoring, in place: eval mode, BatchNorm folded, every tensor a non-persistent buffer.

    Such buffers follow `.to()`, `deepcopy`, pickle and DataParallel, but are invisible to optimisers and state dicts,
    so a metric inside a model does not put CLIP into the model's checkpoints.
    """
    tower.eval()
    prepare = getattr(tower, "prepare_to_freeze", None)
    if prepare is None:
        fold_batchnorm(tower)
    else:
        prepare()
    for module in tower.modules():
        tensors: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        tensors += module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in tensors:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
        if isinstance(module, _BATCH_NORMS):
            # Otherwise `load_state_dict` would expect the counter; in eval mode this has no other effect.
            module.track_running_stats = False
    return tower.to(memory_format=torch.channels_last)


def fold_batchnorm(tower: nn.Module) -> None:
    """Fold each BatchNorm into its convolution: `convI` and `bnI` or `normI`, or neighbours in a Sequential."""
    for module in list(tower.modules()):
        children = dict(module.named_children())
        names = list(children)
        followers = [(name, name.replace("conv", norm)) for name in names for norm in ("bn", "norm") if "conv" in name]
        if isinstance(module, nn.Sequential):
            followers += pairwise(names)
        for first, second in followers:
            conv, norm = children.get(first), children.get(second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                # In double precision, so that weights are rounded only once.
                setattr(module, first, fuse_conv_bn_eval(conv.double(), norm.double()).float())
                setattr(module, second, nn.Identity())


def channels_last(x: Tensor) -> Tensor:
    """Convert images (N, C, H, W) to channels-last order, in which convolutions are fastest."""
    if torch.compiler.is_exporting():
        return x  # the order is the engine's choice, and to ask for one restricts a graph to some sizes
    try:
        return x.contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return x  # torch.func.vmap does not support the order


def resize_flat(table: Tensor, tokens: int) -> Tensor:
    """Resize a positional table (T, C) -> (tokens, C) bicubically as one flat image, ignoring its two-dimensional grid.

    This is pyiqa 0.1.16's rule, with which the contexts of clipiqa+_rn50_512 and clipiqa+_vitL14_512 were trained.
    """
    flat = F.interpolate(table[None, None].float(), size=(tokens, table.shape[1]), mode="bicubic")
    return flat[0, 0].to(table.dtype)
