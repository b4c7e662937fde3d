"""What all towers share: pixel normalisation, loading a state dict, and freezing a tower for scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import WeightsError

_COUNTER = "num_batches_tracked"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Tower(nn.Module):
    """Base class of CLIP's image towers: `forward` is `forward_head` of `forward_features`, as in timm.

    Args:
        visual: open_clip's module, whose children and parameters are taken over under the same names.
        add_table: whether the positional table is added; if not, it only stays in the state dict.
        mean, std: of RGB in 0..1, that the weights were trained with.

    Shape:
        rgb: (N, 3, H, W), RGB in 0..1, H and W at least 32 -> (N, D), not of unit length.
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
        # On the CPU and in float32 also where the rest is built on the meta device or in another default dtype.
        for name, values in (("mean", mean), ("std", std)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(rgb))

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the feature map, (N, C, h, w), or the tokens of a transformer, (N, L, C), before they are pooled."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool what `forward_features` returns into image features (N, D)."""
        raise NotImplementedError

    def normalise(self, rgb: Tensor) -> Tensor:
        """RGB in 0..1 -> what the weights were trained with, in channels-last order."""
        return channels_last((rgb - self.mean) / self.std)

    def prepare_to_freeze(self) -> None:
        """Simplify a tower in eval mode that will not be trained any more; values stay the same but for rounding."""
        fold_batchnorm(self)


def load_into(tower: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Make `tower` take over the tensors of `state`, converted to float32; `what` names the file in an error.

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
    """Make a tower part of a metric: eval mode, BatchNorm folded, every tensor a buffer that is not persistent.

    Such buffers follow `.to()`, `deepcopy`, pickle and DataParallel, but no optimiser sees them and no state dict holds
    them, so that a metric inside a model does not put CLIP into the model's checkpoints.
    """
    tower.eval()
    if isinstance(tower, Tower):
        tower.prepare_to_freeze()
    else:
        fold_batchnorm(tower)
    for module in tower.modules():
        tensors: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        tensors += module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in tensors:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
        if isinstance(module, _BATCH_NORMS):
            # Otherwise its counter would be expected in a state dict; in eval mode nothing else depends on this.
            module.track_running_stats = False
    return tower.to(memory_format=torch.channels_last)


def fold_batchnorm(tower: nn.Module) -> None:
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


def channels_last(x: Tensor) -> Tensor:
    """Put images (N, C, H, W) into channels-last order, which convolutions are fastest in."""
    try:
        return x.contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return x  # torch.func.vmap knows no such order


def resize_flat(table: Tensor, tokens: int) -> Tensor:
    """Resize a positional table (T, C) -> (tokens, C) bicubically as one flat image, not on its two-dimensional grid.

    pyiqa 0.1.16 does so, and the published contexts of clipiqa+_rn50_512 and clipiqa+_vitL14_512 were trained with it.
    """
    flat = F.interpolate(table[None, None].float(), size=(tokens, table.shape[1]), mode="bicubic")
    return flat[0, 0].to(table.dtype)
