"""CLIPs in the layout of Hugging Face transformers: `CLIPModel`, or a vision and a text encoder with projection.

Their tensors are renamed to open_clip's, which builds the same towers. What tensors do not say is in JSON files beside
them: `config.json` (activation, heads) and `preprocessor_config.json` (pixel normalisation).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError, reason
from .layouts import is_rgb

if TYPE_CHECKING:
    from torch import Tensor

    from ..towers.backbones import Backbone

# Of the folder of a whole model, or of an encoder; safetensors first. An index lists the parts of a divided file.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Folders of separate encoders: as TripletCLIP publishes them, and with an underscore.
ENCODERS = (("vision-encoder", "vision_encoder"), ("text-encoder", "text_encoder"))
# Logarithm of the factor on cosines where encoders are published without one: 100, at which OpenAI's training stopped
# it (Radford et al., ICML 2021, section 2.5).
LOGIT_SCALE = math.log(100)

_MAX_JSON = 2**22  # bytes
# The values that transformers takes for what a configuration does not say (CLIPVisionConfig, CLIPTextConfig).
_DEFAULTS = {
    "vision": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12},
    "text": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 8},
}
_EPSILON = 1e-5  # of every LayerNorm in open_clip's towers
_ENDS = (49407, [49407], 2)  # end-of-text token; transformers takes 2, of old configurations, for the highest id

# transformers' name of a tensor -> open_clip's. Projections are stored transposed.
_NAMES = {
    "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_ATTENTION = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_BLOCKS = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransformersConfig:
    """What the JSON files beside the tensors say; None where there is no such file.

    Attributes:
        quick_gelu: whether blocks use QuickGELU rather than GELU.
        vision_heads, text_heads: attention heads of a block.
        mean, std: pixel normalisation, for RGB in 0..1.
    """

    quick_gelu: bool | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def tower_options(self) -> dict[str, Any]:
        """Return what replaces the values of a `Backbone`."""
        options = {"quick_gelu": self.quick_gelu, "mean": self.mean, "std": self.std}
        return {key: value for key, value in options.items() if value is not None}

    def check_backbone(self, path: Path, backbone: Backbone) -> None:
        """Refuse a backbone whose attention has other heads, which shapes of tensors do not show.

        Raises:
            WeightsError: other heads, or a backbone that is no vision transformer of open_clip's.
        """
        width = backbone.vision.get("width")
        if not isinstance(backbone.vision.get("layers"), int) or width is None:
            raise WeightsError(
                f"{path} holds vision transformers in the layout of transformers, and backbone {backbone.name!r} is "
                "none of open_clip's; pass the backbone of these weights, such as backbone='ViT-B-32'"
            )
        heads = width // backbone.vision.get("head_width", 64), backbone.text.get("heads")
        for what, own, its in zip(("image", "text"), (self.vision_heads, self.text_heads), heads, strict=True):
            if own is not None and its is not None and own != its:
                raise WeightsError(
                    f"{path} has {own} attention heads in its {what} tower, and backbone {backbone.name!r} has {its}; "
                    "pass the backbone of these weights"
                )


def is_transformers_clip(names: Iterable[str]) -> bool:
    """Whether tensors have the names of transformers' towers, possibly after a leading `model.`.

    Example:
        >>> is_transformers_clip(["model.vision_model.post_layernorm.bias"]), is_transformers_clip(["visual.proj"])
        (True, False)
    """
    return any(re.match(r"(model\.)?(vision|text)_model\.", name) for name in names)


def towers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return which of "vision" and "text" the names belong to."""
    found = {match[2] for name in names if (match := re.match(r"(model\.)?(vision|text)_model\.", name))}
    return tuple(tower for tower in _BLOCKS if tower in found)


def to_open_clip(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from transformers' names to open_clip's; queries, keys and values become one tensor.

    Raises:
        WeightsError: a name that transformers' CLIP does not have, such as SigLIP's, or a part that is missing.
    """
    import torch

    state: dict[str, Tensor] = {}
    attention: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        name = key.removeprefix("model.")
        if name.endswith(".position_ids"):  # buffers of older versions
            continue
        if name in _NAMES:
            target = _NAMES[name]
            state[target] = value.T.contiguous() if target in _TRANSPOSED and value.dim() == 2 else value
            continue
        match = _BLOCK.fullmatch(name)
        if match is not None and match[3] in _PARTS:
            state[f"{_BLOCKS[match[1]]}.{match[2]}.{_PARTS[match[3]]}.{match[4]}"] = value
        elif match is not None and match[3] in _ATTENTION:
            joined = f"{_BLOCKS[match[1]]}.{match[2]}.attn.in_proj_{match[4]}"
            attention.setdefault(joined, {})[_ATTENTION[match[3]]] = value
        else:
            raise WeightsError(
                f"{path} holds {key[:80]!r}, which transformers' CLIPModel does not have; expected the tensors of a "
                "CLIPModel, or of a CLIPVisionModelWithProjection and a CLIPTextModelWithProjection"
            )
    for name, parts in attention.items():
        if len(parts) != 3 or len({part.shape for part in parts.values()}) != 1:
            raise WeightsError(f"{path} lacks a query, key or value of {name!r}; it is damaged or another model's")
        state[name] = torch.cat([parts[k] for k in range(3)])
    if "logit_scale" not in state:
        logger.warning(
            "%s has no logit_scale; cosines are multiplied by 100, OpenAI's value, and divided by `temperature`", path
        )
        state["logit_scale"] = torch.tensor(LOGIT_SCALE, dtype=torch.float32)
    return state


# Files


def weight_files(folder: Path) -> list[Path]:
    """Find the files of tensors in a folder: of a whole model, or of its separate encoders.

    Raises:
        WeightsError: there are none, a part or one of two encoders is missing, or an index is damaged.
    """
    whole = _files_in(folder)
    if whole:
        return whole
    found = []
    missing = []
    for names in ENCODERS:
        files = next((files for name in names if (files := _files_in(folder / name))), [])
        found += files
        if not files:
            missing.append(names[0])
    if not found:
        raise WeightsError(
            f"{folder} is a folder without {FILES[0]} or {FILES[2]}, and without {ENCODERS[0][0]} and {ENCODERS[1][0]} "
            "that hold one; expected a weight file, or the folder of a CLIP in the layout of transformers"
        )
    if missing:
        raise WeightsError(f"{folder} lacks {missing[0]} with {FILES[0]}; put both encoders into the folder")
    return found


def _files_in(folder: Path) -> list[Path]:
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        parts = _json(path).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise WeightsError(f"{path} is damaged: expected a 'weight_map' from tensors to files; fetch it again")
        files = [folder / part for part in dict.fromkeys(parts.values())]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise WeightsError(f"{path} names {file.name!r}, which is not in the folder; fetch it")
        return files
    return []


# What transformers calls a whole CLIP and its encoders in `config.json`.
MODEL_TYPES = ("clip", "clip_vision_model", "clip_text_model")


def read_config(folder: Path, towers: Sequence[Sequence[str]], files: Sequence[Path]) -> TransformersConfig:
    """Read the JSON files beside the tensors.

    Args:
        folder: that the user named, or the folder of the file that the user named.
        towers: for each file, which of "vision" and "text" it holds.
        files: of tensors.

    Raises:
        WeightsError: a file is damaged, or says what open_clip's towers cannot do.
    """
    sections: dict[str, tuple[Path, dict[str, Any]]] = {}
    for held, file in zip(towers, files, strict=True):
        path = file.parent / "config.json"
        if path.is_file():
            values = _json(path)
            if (kind := values.get("model_type", "clip")) not in MODEL_TYPES:
                raise WeightsError(
                    f"{path} is that of a model of type {str(kind)[:80]!r}; expected one of {', '.join(MODEL_TYPES)}: "
                    "fetch the one that belongs to the tensors"
                )
            sections |= {tower: (path, _section(path, values, tower, whole=len(held) == 2)) for tower in held}
    activations = {tower: _activation(*found) for tower, found in sections.items()}
    if len(set(activations.values())) > 1:
        raise WeightsError(
            f"{folder} has {activations['vision']} in its vision and {activations['text']} in its text encoder; "
            "expected one activation for both"
        )
    mean, std = _pixel_statistics(folder, files)
    return TransformersConfig(
        quick_gelu=next((name == "quick_gelu" for name in activations.values()), None),
        vision_heads=_heads(*sections["vision"]) if "vision" in sections else None,
        text_heads=_heads(*sections["text"]) if "text" in sections else None,
        mean=mean,
        std=std,
    )


def _section(path: Path, values: dict[str, Any], tower: str, whole: bool) -> dict[str, Any]:
    """Return the part of a `config.json` about one tower, with transformers' defaults."""
    section = values.get(f"{tower}_config")
    if section is None:
        section = {} if whole else values
    again = values.get(f"{tower}_config_dict")  # of versions before 4.23, and what it leaves out is a default
    if not isinstance(section, dict) or not isinstance(again, dict | None):
        raise WeightsError(f"{path} is damaged: expected an object as {tower}_config; fetch it again")
    known = section if again is None else section | _DEFAULTS[tower] | again
    return _DEFAULTS[tower] | known


def _activation(path: Path, section: Mapping[str, Any]) -> str:
    name = section["hidden_act"]
    if name not in ("gelu", "quick_gelu"):
        raise WeightsError(f"{path}: hidden_act is {repr(name)[:80]}; expected 'gelu' or 'quick_gelu'")
    for key, possible in (("layer_norm_eps", (_EPSILON,)), ("eos_token_id", _ENDS)):
        if key in section and section[key] not in possible:
            found = repr(section[key])[:80]
            raise WeightsError(f"{path}: {key} is {found}; expected {possible[0]}, which open_clip's towers have")
    return str(name)


def _heads(path: Path, section: Mapping[str, Any]) -> int:
    heads = section["num_attention_heads"]
    if not isinstance(heads, int) or heads < 1:
        raise WeightsError(f"{path}: num_attention_heads is {repr(heads)[:80]}; expected a positive integer")
    return heads


def _pixel_statistics(folder: Path, files: Sequence[Path]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Read mean and std from the first `preprocessor_config.json`; None without one."""
    for place in dict.fromkeys((folder, *(file.parent for file in files))):
        path = place / "preprocessor_config.json"
        if not path.is_file():
            continue
        values = _json(path)
        if values.get("do_normalize") is False:
            return (0.0,) * 3, (1.0,) * 3
        mean, std = values.get("image_mean"), values.get("image_std")
        if mean is None and std is None:
            return None, None
        if not is_rgb(mean, positive=False) or not is_rgb(std, positive=True):
            raise WeightsError(f"{path}: expected three numbers as image_mean and three positive ones as image_std")
        return tuple(map(float, mean or ())), tuple(map(float, std or ()))
    return None, None


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON + 1)
        if len(content) > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} bytes")
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({reason(error, 80)}); fetch it again") from error
    return values
