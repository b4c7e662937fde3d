"""Backbones by name: open_clip's configuration of each, and its towers with the values of a state dict.

A tower is built without memory of its own and takes over the tensors of a state dict, so that a memory-mapped file is
not copied. Nothing here knows where a file lies or what prompts are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from .clip import ResNetTower, TextTower, TimmTower, ViTTower, load_into, tokenize

# Mean and std of RGB in 0..1 that CLIP was trained with (openai/CLIP, clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# OpenAI's names as pyiqa spells them. These models have QuickGELU; open_clip's configs of the same name do not.
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
# What else a tower returns, and what training CLIP left out at random.
_LEFT_OUT = {"output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"}
# In the place of the tower that is not wanted: open_clip builds both.
_NO_VISION = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64}
_NO_TEXT = {"context_length": 2, "vocab_size": 2, "layers": 1, "width": 64, "heads": 1}


@dataclass(frozen=True)
class Backbone:
    """An open_clip model as `open_clip.get_model_config` describes it.

    Attributes:
        name: open_clip's.
        embed_dim: D, of the features of both towers.
        vision, text: keywords of open_clip's towers.
        quick_gelu: whether transformer blocks have QuickGELU; as with open_clip, the name says so (`...-quickgelu`).
        mean, std: of RGB in 0..1, that the weights were trained with.
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
        """Whether the text side is OpenAI's causal transformer, which a learned context can enter."""
        return set(self.text) <= _PLAIN_TEXT_KEYS

    @property
    def activation(self) -> str:
        """Of the image tower's blocks, or for towers of timm's, which have their own, whose they are."""
        if "timm_model_name" in self.vision:
            return f"that of timm's {self.vision['timm_model_name']}"
        return "QuickGELU" if self.quick_gelu else "GELU"

    def open_clip_model(self, **instead: Any) -> open_clip.CLIP:
        """open_clip's model, with another `vision_cfg` or `text_cfg`."""
        towers = {"vision_cfg": self.vision, "text_cfg": self.text} | instead
        return open_clip.CLIP(embed_dim=self.embed_dim, quick_gelu=self.quick_gelu, **towers)


def plain_name(name: str) -> str:
    """open_clip's spelling of a backbone that may be given in OpenAI's."""
    return OPENAI_BACKBONES.get(name, name)


def find_backbone(name: str, openai_weights: bool = False) -> Backbone:
    """The backbone of a name.

    Args:
        name: an OpenAI name as pyiqa spells it (`RN50`, `ViT-L/14`) or any of `open_clip.list_models()`.
        openai_weights: whether the weights are OpenAI's, which need QuickGELU whatever the configuration says.

    Raises:
        SettingsError: an unknown name (the nearest is offered).
    """
    plain = plain_name(name)
    known = [*OPENAI_BACKBONES, *open_clip.list_models()]
    config = open_clip.get_model_config(plain) if plain in known else None  # which would fetch `hf-hub:...`
    if config is None:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise SettingsError(f"unknown backbone {name!r}; did you mean {near!r}? open_clip.list_models() has all")
    mean, std = _pixel_statistics(plain)
    return Backbone(
        name=plain,
        embed_dim=config["embed_dim"],
        vision={key: value for key, value in config["vision_cfg"].items() if key not in _LEFT_OUT},
        text={key: value for key, value in config["text_cfg"].items() if key not in _LEFT_OUT},
        quick_gelu=config.get("quick_gelu", False) or openai_weights or name in OPENAI_BACKBONES,
        mean=mean,
        std=std,
    )


def _pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of all weights that open_clip lists for a name where they agree, else CLIP's.

    In open_clip 3.3 they differ for ViT-L-14 alone, of whose weights laion2b_s32b_b82k has others than CLIP's.
    """
    listed = (open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name))
    found = {(tuple(one["mean"]), tuple(one["std"])) for one in listed if one.get("mean") and one.get("std")}
    return found.pop() if len(found) == 1 else (MEAN, STD)


# Image towers


def image_tower(backbone: Backbone, state: Mapping[str, Tensor], pos_embedding: bool, what: str) -> nn.Module:
    """An image tower (N, 3, H, W) in 0..1 -> (N, D) with the values of `state`, whose keys have no `visual.`.

    Args:
        what: name of the file in an error.

    Raises:
        WeightsError: `state` is another model's. SettingsError: see `empty_image_tower`.
    """
    tower = empty_image_tower(backbone, pos_embedding)
    load_into(tower, state, what)
    known = tower.state_dict()
    more = [key for key, value in state.items() if key not in known and value.is_floating_point()]
    if more:
        raise WeightsError(f"{what} holds another model: this backbone has no {more[0]!r}")
    return tower


def empty_image_tower(backbone: Backbone, pos_embedding: bool) -> nn.Module:
    """The tower with parameters on the meta device, for `load_into`.

    Raises:
        SettingsError: a tower that takes pictures of one size only, or pools in a way that no name of open_clip's does.
    """
    vision = backbone.vision
    with torch.device("meta"):
        try:
            visual = backbone.open_clip_model(text_cfg=_NO_TEXT).visual
        except RuntimeError as error:  # such as a model that this timm does not know
            raise SettingsError(f"backbone {backbone.name!r} cannot be built ({error}); update timm") from error
        if "timm_model_name" in vision:
            _take_any_size(backbone, visual)
            kind: type[ResNetTower | TimmTower | ViTTower] = TimmTower
        elif isinstance(vision.get("layers"), list | tuple):
            kind = ResNetTower
        elif isinstance(vision.get("attentional_pool"), str) or vision.get("pool_type") == "none":
            raise SettingsError(f"backbone {backbone.name!r} has a pooling that is not known here; choose another")
        else:
            kind = ViTTower
        tower = kind(visual, pos_embedding, backbone.mean, backbone.std)
    if isinstance(tower, TimmTower):
        _make_buffers_real(backbone, tower.trunk)
    return tower


def _take_any_size(backbone: Backbone, visual: nn.Module) -> None:
    """Let a transformer of timm's that was built for one size take any; open_clip has no way to ask for one."""
    trunk: Any = visual.trunk
    if hasattr(trunk, "dynamic_img_size"):
        flexible = _any_size_trunk(backbone, trunk)
        trunk.dynamic_img_size, trunk.patch_embed = True, flexible.patch_embed
        trunk.patch_embed.img_size = None  # rows and columns that do not fill a patch are left out
        if hasattr(trunk, "rope"):
            trunk.rope = flexible.rope
    try:
        visual.eval()(torch.empty(1, 3, 33, 65, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"backbone {backbone.name!r} takes pictures of one size only, and here they keep their own "
            f"({str(error).splitlines()[0]}); choose another"
        ) from error
    visual.train()


def _make_buffers_real(backbone: Backbone, trunk: nn.Module) -> None:
    """Rotary tables and the like, which stand in no file."""
    loose = {name for name, _ in trunk.named_buffers()} - set(trunk.state_dict())
    if loose:
        with _without_memory():
            real = dict(_any_size_trunk(backbone, trunk).named_buffers())
        for name in loose:
            module, _, buffer = name.rpartition(".")
            setattr(trunk.get_submodule(module), buffer, real[name])


def _any_size_trunk(backbone: Backbone, like: nn.Module) -> Any:
    import timm

    flexible: dict[str, Any] = {"dynamic_img_size": True} if hasattr(like, "dynamic_img_size") else {}
    return timm.create_model(backbone.vision["timm_model_name"], **flexible)


def _without_memory() -> AbstractContextManager[None]:
    """In which parameters, but not buffers, are built on the meta device."""
    from accelerate import init_empty_weights  # takes half a second, and most backbones do without

    return init_empty_weights(include_buffers=False)


# Text towers


def text_tower(backbone: Backbone, state: Mapping[str, Tensor], what: str) -> TextTower:
    """The text tower, for prompts and contexts, with the values of a whole model's state dict.

    Raises:
        SettingsError: the backbone's text side is not CLIP's. WeightsError: `state` is another model's.
    """
    if not backbone.plain_text:
        raise SettingsError(
            f"backbone {backbone.name!r} has a text encoder of its own, which takes no learned context; "
            "choose one such as 'RN50', 'ViT-B-32' or 'convnext_base'"
        )
    with torch.device("meta"):
        tower = TextTower(backbone.open_clip_model(vision_cfg=_NO_VISION))
    load_into(tower, _text_state(state), what)
    return tower


def has_text_tower(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a whole model's and not that of an image tower."""
    return "token_embedding.weight" in state or any(key.startswith("text.") for key in state)


@torch.no_grad()
def encode_texts(backbone: Backbone, state: Mapping[str, Tensor], texts: Sequence[str], what: str) -> Tensor:
    """P texts -> features (P, D), not of unit length, by the text side of a whole model's state dict.

    Raises:
        WeightsError: `state` is another model's, or the tokenizer or the configuration of a text encoder of Hugging
            Face's, which are files of their own, are not there and cannot be fetched.
    """
    if backbone.plain_text:
        tower = text_tower(backbone, state, what).eval()
        return tower.encode(tokenize(list(texts), tower.context_length))
    # Values come from `state`; those that Hugging Face has for the encoder alone would be fetched in vain.
    config = backbone.text | {"hf_model_pretrained": False}
    try:
        with _without_memory():
            encoder: Any = open_clip.CustomTextCLIP(
                backbone.embed_dim, _NO_VISION, config, quick_gelu=backbone.quick_gelu
            ).text
        tokens = open_clip.get_tokenizer(backbone.name)(list(texts))
    except (OSError, ImportError, ValueError) as error:  # whatever Hugging Face's libraries raise
        raise WeightsError(
            f"the text side of {backbone.name!r} needs files from Hugging Face that are not here: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    load_into(encoder, _text_state(state), what)
    return encoder.eval()(tokens)


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a text side that is a module of its own in some models and a part of the model in others."""
    return {key.removeprefix("text."): value for key, value in state.items() if not key.startswith("visual.")}
