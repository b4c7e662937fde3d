"""Build image and text towers from open_clip's configurations and a state dict.

Towers are built on the meta device and take over the tensors of the state dict, so a memory-mapped file is not copied.
open_clip, timm and torchvision are imported where a tower needs them: that takes longer than to load an embedded model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError, did_you_mean, reason
from .base import load_into
from .meta_parameters import parameters_on_meta
from .resnet import ResNetTower
from .text import TextTower, tokenize
from .timm_tower import TimmTower, make_buffers_real, take_any_size
from .vit import ViTTower

if TYPE_CHECKING:
    import open_clip

# CLIP's pixel normalisation, for RGB in 0..1 (openai/CLIP, clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# OpenAI's names (as pyiqa spells them) -> open_clip's, whose configurations lack the QuickGELU of OpenAI's weights.
OPENAI_BACKBONES = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
_PLAIN_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}
# Dropped options: extra outputs, and the dropout of CLIP's own training.
_DROPPED = {"output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"}
# open_clip always builds both towers; these are placeholders for the unused one.
_NO_VISION = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64}
_NO_TEXT = {"context_length": 2, "vocab_size": 2, "layers": 1, "width": 64, "heads": 1}


@dataclass(frozen=True)
class Backbone:
    """Definition of an open_clip model, from `open_clip.get_model_config`.

    Attributes:
        name: open_clip's name.
        embed_dim: D, the length of both towers' features.
        vision, text: keywords of open_clip's towers.
        quick_gelu: whether transformer blocks use QuickGELU.
        mean, std: pixel normalisation of the pretrained weights, for RGB in 0..1.
    """

    name: str
    embed_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]
    quick_gelu: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def plain_text(self) -> bool:
        """Whether the text encoder is CLIP's causal transformer, which can take a learned context."""
        return set(self.text) <= _PLAIN_TEXT_KEYS

    @property
    def activation(self) -> str:
        """Name of the activation in the image tower's blocks."""
        if "timm_model_name" in self.vision:
            return f"that of timm's {self.vision['timm_model_name']}"
        return "QuickGELU" if self.quick_gelu else "GELU"

    def open_clip_model(self, **replacements: Any) -> open_clip.CLIP:
        """Build open_clip's model; `replacements` are another `vision_cfg` or `text_cfg`."""
        import open_clip

        towers = {"vision_cfg": self.vision, "text_cfg": self.text} | replacements
        return open_clip.CLIP(embed_dim=self.embed_dim, quick_gelu=self.quick_gelu, **towers)


def plain_name(name: str) -> str:
    """Return open_clip's name of a backbone that may be given by OpenAI's.

    Example:
        >>> plain_name("ViT-L/14")
        'ViT-L-14'
    """
    return OPENAI_BACKBONES.get(name, name)


def find_backbone(name: str, openai_weights: bool = False) -> Backbone:
    """Look up a backbone's definition.

    Args:
        name: an OpenAI name as pyiqa spells it (`RN50`, `ViT-L/14`) or any of `open_clip.list_models()`.
        openai_weights: whether the weights are OpenAI's and so need QuickGELU, whatever open_clip's configuration says.

    Raises:
        SettingsError: unknown name; the message suggests the nearest one.

    Example:
        >>> find_backbone("RN50").activation
        'QuickGELU'
    """
    import open_clip

    plain = plain_name(name)
    known = [*OPENAI_BACKBONES, *open_clip.list_models()]
    # Known names only: for `hf-hub:...` open_clip would download a configuration.
    config = open_clip.get_model_config(plain) if plain in known else None
    if config is None:
        raise SettingsError(f"unknown backbone {name!r}{did_you_mean(name, known)} (open_clip.list_models() lists all)")
    mean, std = _pixel_statistics(plain)
    return Backbone(
        name=plain,
        embed_dim=config["embed_dim"],
        vision={key: value for key, value in config["vision_cfg"].items() if key not in _DROPPED},
        text={key: value for key, value in config["text_cfg"].items() if key not in _DROPPED},
        quick_gelu=config.get("quick_gelu", False) or openai_weights or name in OPENAI_BACKBONES,
        mean=mean,
        std=std,
    )


def _pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std shared by all pretrained tags of a model, or CLIP's if the tags disagree.

    In open_clip 3.3 they disagree for ViT-L-14 only, whose tag laion2b_s32b_b82k has its own.
    """
    import open_clip

    listed = (open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name))
    found = {(tuple(one["mean"]), tuple(one["std"])) for one in listed if one.get("mean") and one.get("std")}
    return found.pop() if len(found) == 1 else (MEAN, STD)


# Image towers


def image_tower(backbone: Backbone, state: Mapping[str, Tensor], pos_embedding: bool, what: str) -> nn.Module:
    """Build an image tower, (N, 3, H, W) in 0..1 -> (N, D).

    Args:
        backbone: its definition.
        state: its tensors, with keys without `visual.`.
        pos_embedding: whether to add the positional table.
        what: name of the weight file, for error messages.

    Raises:
        WeightsError: `state` belongs to another model.
        SettingsError: see `empty_image_tower`.
    """
    tower = empty_image_tower(backbone, pos_embedding)
    load_into(tower, state, what)
    known = tower.state_dict()
    surplus = [key for key, value in state.items() if key not in known and value.is_floating_point()]
    if surplus:
        raise WeightsError(f"{what} holds another model: this backbone has no {surplus[0]!r}")
    return tower


def empty_image_tower(backbone: Backbone, pos_embedding: bool) -> nn.Module:
    """Build an image tower with its parameters on the meta device, for `load_into`.

    Raises:
        SettingsError: timm cannot build the tower, it takes images of one size only, or its pooling is not supported.
    """
    vision = backbone.vision
    with torch.device("meta"):
        try:
            visual = backbone.open_clip_model(text_cfg=_NO_TEXT).visual
        except RuntimeError as error:  # such as a model unknown to this version of timm
            raise SettingsError(f"backbone {backbone.name!r} cannot be built ({error}); update timm") from error
        if "timm_model_name" in vision:
            if (obstacle := take_any_size(visual, vision["timm_model_name"])) is not None:
                raise SettingsError(
                    f"backbone {backbone.name!r} takes images of one size only ({obstacle}), but images are scored at "
                    "their own size; choose another"
                )
            kind: type[ResNetTower | TimmTower | ViTTower] = TimmTower
        elif isinstance(vision.get("layers"), list | tuple):
            kind = ResNetTower
        elif isinstance(vision.get("attentional_pool"), str) or vision.get("pool_type") == "none":
            raise SettingsError(f"backbone {backbone.name!r} has a pooling that is not supported; choose another")
        else:
            kind = ViTTower
        tower = kind(visual, pos_embedding, backbone.mean, backbone.std)
    if isinstance(tower, TimmTower):
        make_buffers_real(tower.trunk, vision["timm_model_name"])
    return tower


# Text towers


def text_tower(backbone: Backbone, state: Mapping[str, Tensor], what: str) -> TextTower:
    """Build the text tower, which takes learned contexts, from a whole model's state dict.

    Raises:
        SettingsError: the backbone's text encoder is not CLIP's.
        WeightsError: `state` belongs to another model.
    """
    if not backbone.plain_text:
        raise SettingsError(
            f"backbone {backbone.name!r} has a text encoder that takes no learned context; "
            "choose one such as 'RN50', 'ViT-B-32' or 'convnext_base'"
        )
    text = _text_state(state)
    table = text.get("positional_embedding")
    config = backbone.text
    if table is not None and 0 < len(table) < config["context_length"]:  # trained for shorter texts
        config = config | {"context_length": len(table)}
    with torch.device("meta"):
        tower = TextTower(backbone.open_clip_model(vision_cfg=_NO_VISION, text_cfg=config))
    load_into(tower, text, what)
    return tower


def has_text_tower(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds a text encoder besides the image tower."""
    return "token_embedding.weight" in state or any(key.startswith("text.") for key in state)


def text_encoder(backbone: Backbone, state: Mapping[str, Tensor], what: str) -> Callable[[Sequence[str]], Tensor]:
    """Build the text encoder of a whole model's state dict: P texts -> features (P, D), not normalised.

    Raises:
        WeightsError: `state` belongs to another model, or the encoder's tokenizer or configuration, which are separate
            files for Hugging Face's encoders, are missing and cannot be downloaded.
    """
    if backbone.plain_text:
        tower = text_tower(backbone, state, what).eval()
        return torch.no_grad()(lambda texts: tower.encode(tokenize(texts, tower.context_length)))
    import open_clip

    # Prevents a download of pretrained weights: the values come from `state`.
    config = backbone.text | {"hf_model_pretrained": False}
    try:
        with parameters_on_meta():
            encoder: Any = open_clip.CustomTextCLIP(
                backbone.embed_dim, _NO_VISION, config, quick_gelu=backbone.quick_gelu
            ).text
        tokenizer = open_clip.get_tokenizer(backbone.name)
    except (OSError, ImportError, ValueError) as error:  # raised by Hugging Face's libraries
        raise WeightsError(
            f"the text encoder of {backbone.name!r} needs files from Hugging Face that are not here: "
            f"{reason(error, 200)}"
        ) from error
    load_into(encoder, _text_state(state), what)
    encoder.float().eval()  # non-persistent buffers were built in torch's default dtype
    return torch.no_grad()(lambda texts: encoder(tokenizer(list(texts))))


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the text encoder's tensors; some models hold it as a submodule `text`, others not."""
    return {key.removeprefix("text."): value for key, value in state.items() if not key.startswith("visual.")}
