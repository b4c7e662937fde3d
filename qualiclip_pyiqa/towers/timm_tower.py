"""timm's image towers in open_clip's models: ConvNeXt, FastViT, ViTamin, SigLIP, EVA and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import Tower
from .meta_parameters import parameters_on_meta
from .places import PlaceFeatures


class TimmTower(Tower):
    """timm's trunk with open_clip's projection.

    timm resizes the positional table on its grid. A rotary embedding is used with and without the table.
    """

    trunk: nn.Module
    head: nn.Module
    has_zero_table = False  # whether `prepare_to_freeze` zeroed the table

    @property
    def blocks(self) -> nn.Module:
        """A transformer's blocks; each maps tokens (N, L, C) to (N, L, C). Convolutional trunks have none."""
        return self.trunk.get_submodule("blocks")

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute the trunk's unpooled features: (N, L, C), (N, C, h, w) or (N, h, w, C), depending on the trunk."""
        x = (rgb - self.mean) / self.std
        features = _Features(self.trunk)
        table = getattr(self.trunk, "pos_embed", None)
        if table is None or self.add_table or self.has_zero_table:
            found: Tensor = features(x)
        else:  # in training, to leave the table in the state dict; not thread-safe, as the trunk is patched meanwhile
            found = functional_call(features, {"trunk.pos_embed": torch.zeros_like(table)}, (x,))
        return found

    def places(self, features: Tensor) -> Tensor:
        if features.dim() == 3:
            return features[:, getattr(self.trunk, "num_prefix_tokens", 0) :].transpose(1, 2)
        last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"  # Swin and its like
        return (features.movedim(-1, 1) if last else features).flatten(2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool the output of `forward_features` into image features (N, D)."""
        pooled: Tensor = self.head(self.trunk.forward_head(features))  # type: ignore[operator]
        return pooled

    def place_features(self, rgb: Tensor) -> PlaceFeatures | None:
        """Pool each place alone, for trunks whose pooling takes any number of places and no class token."""
        features = self.forward_features(rgb)
        height, width = rgb.shape[2:]
        if features.dim() == 4:
            last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
            grid = (features.shape[1], features.shape[2]) if last else (features.shape[2], features.shape[3])
            alone = self.places(features).transpose(1, 2).flatten(0, 1)  # (N * L, C)
            alone = alone[:, None, None] if last else alone[:, :, None, None]
            strides = [each["reduction"] for each in getattr(self.trunk, "feature_info", [])]
            step = (max(strides),) * 2 if strides else (round(height / grid[0]), round(width / grid[1]))
        else:
            patch = getattr(getattr(self.trunk, "patch_embed", None), "patch_size", None)
            if getattr(self.trunk, "num_prefix_tokens", 0) or patch is None:
                return None
            step = (patch[0], patch[1]) if isinstance(patch, Sequence) else (patch, patch)
            grid = height // step[0], width // step[1]
            if grid[0] * grid[1] != features.shape[1]:
                return None
            alone = features.flatten(0, 1)[:, None]
        places = self.forward_head(alone).unflatten(0, (len(rgb), -1))
        return PlaceFeatures(self.forward_head(features), places, grid, step)

    def prepare_to_freeze(self) -> None:
        """Zero the table unless `add_table`. BatchNorm is not folded: trunks do not name or order modules uniformly."""
        table = getattr(self.trunk, "pos_embed", None)
        if table is not None and not self.add_table:
            self.trunk.pos_embed = nn.Parameter(torch.zeros_like(table))
            self.has_zero_table = True


class _Features(nn.Module):
    """Wraps `trunk.forward_features` as a forward method, for `functional_call`."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Any:
        return self.trunk.forward_features(x)  # type: ignore[operator]


def take_any_size(visual: nn.Module, model: str) -> str | None:
    """Let a timm model built for one image size take any size, for which open_clip has no option.

    Args:
        visual: open_clip's `TimmModel`, on the meta device.
        model: timm's name of the model.

    Returns:
        None on success, else timm's reason for taking one size only.
    """
    trunk: Any = visual.trunk
    # Attributes of timm's transformers; if a version of timm has others, the trial below fails.
    if hasattr(trunk, "dynamic_img_size"):
        import timm

        flexible: Any = timm.create_model(model, dynamic_img_size=True)
        trunk.dynamic_img_size, trunk.patch_embed = True, flexible.patch_embed
        trunk.patch_embed.img_size = None  # crops rows and columns that do not fill a patch
        if hasattr(trunk, "rope"):
            trunk.rope = flexible.rope
    visual.eval()
    try:
        visual(torch.empty(1, 3, 33, 65, device="meta"))
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    finally:
        visual.train()
    return None


def make_buffers_real(trunk: nn.Module, model: str) -> None:
    """Give a trunk on the meta device real non-persistent buffers, such as rotary tables."""
    missing = {name for name, _ in trunk.named_buffers()} - set(trunk.state_dict())
    if not missing:
        return
    import timm

    options: dict[str, Any] = {"dynamic_img_size": True} if hasattr(trunk, "dynamic_img_size") else {}
    with parameters_on_meta():
        real = dict(timm.create_model(model, **options).named_buffers())
    for name in missing:
        module, _, buffer = name.rpartition(".")
        value = real[name].float() if real[name].is_floating_point() else real[name]
        setattr(trunk.get_submodule(module), buffer, value)
