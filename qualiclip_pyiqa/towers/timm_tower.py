"""Towers of timm's inside open_clip's models: ConvNeXt, FastViT, ViTamin, SigLIP, EVA and others."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base import Tower
from .meta_parameters import parameters_on_meta


class TimmTower(Tower):
    """A trunk of timm's with open_clip's projection.

    A positional table is resized on its grid, as timm does; a rotary embedding is used with and without a table.
    """

    trunk: nn.Module
    head: nn.Module
    has_zero_table = False  # whether the trunk's own table was set to zero

    @property
    def blocks(self) -> nn.Module:
        """The blocks of a transformer; each maps tokens (N, L, C) to (N, L, C). Convolutional trunks have none."""
        return self.trunk.get_submodule("blocks")

    def forward_features(self, rgb: Tensor) -> Tensor:
        """Compute what the trunk pools: (N, L, C), (N, C, h, w) or (N, h, w, C), as timm has it."""
        x = (rgb - self.mean) / self.std
        features = _Features(self.trunk)
        table = getattr(self.trunk, "pos_embed", None)
        if table is None or self.add_table or self.has_zero_table:
            found: Tensor = features(x)
        else:  # In training, where the table stays in the state dict. Not thread-safe: the trunk is changed meanwhile.
            found = functional_call(features, {"trunk.pos_embed": torch.zeros_like(table)}, (x,))
        return found

    def forward_head(self, features: Tensor) -> Tensor:
        """Pool what `forward_features` returns into features (N, D)."""
        pooled: Tensor = self.head(self.trunk.forward_head(features))  # type: ignore[operator]
        return pooled

    def prepare_to_freeze(self) -> None:
        """Make the trunk add zeros if the table is not to be added. BatchNorm stays: trunks order modules freely."""
        table = getattr(self.trunk, "pos_embed", None)
        if table is not None and not self.add_table:
            self.trunk.pos_embed = nn.Parameter(torch.zeros_like(table))
            self.has_zero_table = True


class _Features(nn.Module):
    """`trunk.forward_features` as a module's forward, which `functional_call` needs."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Any:
        return self.trunk.forward_features(x)  # type: ignore[operator]


def take_any_size(visual: nn.Module, model: str) -> str | None:
    """Let a model of timm's that was built for one image size take any size; open_clip has no option for it.

    Args:
        visual: open_clip's `TimmModel`, on the meta device.
        model: timm's name of it.

    Returns:
        Why it takes one size only, or None if it takes any.
    """
    trunk: Any = visual.trunk
    # Attributes of timm's transformers. Where a version of timm has others, the trial below fails.
    if hasattr(trunk, "dynamic_img_size"):
        flexible: Any = timm.create_model(model, dynamic_img_size=True)
        trunk.dynamic_img_size, trunk.patch_embed = True, flexible.patch_embed
        trunk.patch_embed.img_size = None  # rows and columns that do not fill a patch are left out
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
    """Give a trunk on the meta device the buffers that no state dict holds, such as rotary tables."""
    missing = {name for name, _ in trunk.named_buffers()} - set(trunk.state_dict())
    if not missing:
        return
    options: dict[str, Any] = {"dynamic_img_size": True} if hasattr(trunk, "dynamic_img_size") else {}
    with parameters_on_meta():
        real = dict(timm.create_model(model, **options).named_buffers())
    for name in missing:
        module, _, buffer = name.rpartition(".")
        value = real[name].float() if real[name].is_floating_point() else real[name]
        setattr(trunk.get_submodule(module), buffer, value)
