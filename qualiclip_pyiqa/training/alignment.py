"""The model of a training run: a trainable image tower and the frozen antonym anchors that it is aligned with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..metrics.prompts import QUALITY_SETS
from ..pretrained.layouts import OWN_FORMAT
from ..pretrained.manifest import WeightRecord, openai_record
from ..pretrained.model import load_model
from ..pretrained.read import read
from ..pretrained.write import write_safetensors
from ..towers.backbones import plain_name
from ..towers.mini import BLOCKS, MiniTower, RelativeSharpness
from ..towers.timm_tower import TimmTower
from .config import Config
from .recompute import recompute_activations

PROMPTS = QUALITY_SETS["qualiclip"]
TEXTS = [text for pair in PROMPTS for text in pair]
# Factor before the sigmoid on differences of cosines within a block of the mini tower. At this scale pairs nearly vote,
# as they do at CLIP's scale of 100.
MINI_SCALE = 8.0


@dataclass
class Aligned:
    """A tower and its frozen anchors.

    Attributes:
        tower: (N, 3, H, W) in 0..1 -> (N, D); trainable.
        anchors: (2P, D), unit length, positive and negative of each antonym prompt pair alternating.
        unit: factor from cosine to similarity: sqrt(P) if each pair has its own block of the feature, so that a
            similarity is the cosine within the block; 1 otherwise.
        logit_scale: natural logarithm of the factor on the cosines of the whole feature, which are `unit` times smaller
            than similarities.
        metadata: metadata of the model file, to which `save` adds the run's.
        rest: tensors of the model file that training does not change.
        source: sha256 of the file that the tower was read from; "" for a fresh tower.
    """

    tower: nn.Module
    anchors: Tensor
    unit: float
    logit_scale: float
    metadata: dict[str, str]
    rest: dict[str, Tensor] = field(default_factory=dict)
    source: str = ""


def similarities(features: Tensor, anchors: Tensor, unit: float) -> Tensor:
    """Compare features with the positive and negative anchor of each pair, in float32: (M, D), (2P, D) -> (M, P, 2)."""
    with torch.autocast(features.device.type, enabled=False):  # bfloat16's rounding error is half a margin
        return (F.normalize(features.float(), dim=-1) @ anchors.T * unit).unflatten(1, (-1, 2))


def build(config: Config, seed: int, start: Path | None = None) -> Aligned:
    """Build the model to train.

    Args:
        seed: determines a fresh tower's weights and anchors.
        start: model file to start from, instead of `config.weights` or a fresh tower.

    Raises:
        SettingsError: the weights belong to another tower.
        WeightsError: the weights cannot be found or read.
    """
    aligned = _mini(config, seed, start) if config.backbone == "mini" else _clip(config, start)
    if config.recompute:
        recompute_activations(aligned.tower, config)
    return aligned


def _mini(config: Config, seed: int, start: Path | None) -> Aligned:
    torch.manual_seed(seed)
    tower = MiniTower(config.widths, config.depths, config.hidden, config.dim, BLOCKS, config.dropout)
    anchors = block_anchors(tower, seed)
    source = ""
    if start is not None:
        found = read(start, layout="qualiclip-pyiqa")
        state, source = found.tensors, found.file.sha256() or ""
        try:
            tower.load_state_dict(
                {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
            )
            anchors.copy_(state["prompts_features"])
        except RuntimeError:
            raise SettingsError(
                f"--start {start} does not fit; expected a model of the configuration's tower"
            ) from None
    keywords = {
        "widths": config.widths,
        "depths": config.depths,
        "hidden": config.hidden,
        "dim": config.dim,
        "blocks": tower.blocks,
    }
    unit = math.sqrt(len(tower.blocks))
    return Aligned(
        tower=tower.to(memory_format=torch.channels_last),
        anchors=anchors,
        unit=unit,
        logit_scale=math.log(MINI_SCALE * unit),
        metadata={"backbone": "mini", "tower": json.dumps(keywords), "temperature": "1"},
        source=source,
    )


def block_anchors(tower: MiniTower, seed: int) -> Tensor:
    """Draw fixed antonym anchors (2P, D) of unit length, positive and negative alternating.

    They stand in for the frozen text encoder of QualiCLIP. Pair p is zero outside block p of the feature, so the P
    softmaxes depend on P different blocks. Within the block its two directions are random and orthogonal; those of
    `RelativeSharpness` are the first two unit vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.zeros(2 * len(tower.blocks), tower.feature_dim)
    for p, head in enumerate(tower.heads):
        directions, _ = torch.linalg.qr(torch.randn(tower.dim, 2, generator=generator))
        if isinstance(head, RelativeSharpness):
            directions = torch.eye(tower.dim, 2)
        anchors[2 * p : 2 * p + 2, p * tower.dim : (p + 1) * tower.dim] = directions.T
    return anchors


def _clip(config: Config, start: Path | None) -> Aligned:
    weights: str | Path | WeightRecord = start or config.weights
    if weights == "openai":
        weights = openai_record(plain_name(config.backbone))
    model = load_model(weights, config.backbone, TEXTS)
    if plain_name(model.backbone) != plain_name(config.backbone):
        raise SettingsError(
            f"{model.path} holds a {model.backbone} tower; the configuration asks for {config.backbone}"
        )
    # The file is memory-mapped; trained tensors need memory of their own.
    state = {key: value.clone() if key.startswith("visual.") else value for key, value in model.state.items()}
    tower = replace(model, state=state).image_tower(pos_embedding=False)
    for name, parameter in tower.named_parameters():
        # Features do not depend on these, so DistributedDataParallel would wait for their gradients in vain.
        parameter.requires_grad_(not name.endswith(("positional_embedding", "pos_embed", "attnpool.k_proj.bias")))
    if all(name in model.stored_features for name in TEXTS):
        anchors = F.normalize(torch.stack([model.stored_features[name] for name in TEXTS]).float(), dim=-1)
    elif model.has_text_tower:
        anchors = F.normalize(model.encode(TEXTS), dim=-1)
    else:
        raise WeightsError(f"{model.path} has no text tower; expected a whole CLIP or a trained model")
    backbone = model.tower_definition()
    if not isinstance(tower, TimmTower):  # oneDNN crashes in the gradient of FastViT's first layer (torch 2.15)
        tower = tower.to(memory_format=torch.channels_last)
    return Aligned(
        tower=tower,
        anchors=anchors,
        unit=1.0,
        logit_scale=model.logit_scale,
        # Temperature 2 is what pyiqa scores QualiCLIP with.
        metadata={
            "backbone": config.backbone,
            "tower": json.dumps({key: getattr(backbone, key) for key in ("mean", "std", "quick_gelu")}),
            "temperature": "2",
        },
        rest={key: value for key, value in state.items() if not key.startswith("visual.") and key != "logit_scale"},
        source=model.file.sha256() or "",
    )


def save(
    path: Path,
    aligned: Aligned,
    tower_state: Mapping[str, Tensor],
    summary: dict[str, Any],
    licence: str,
) -> None:
    """Write a model in the package's own format, whole or not at all; equal models give equal bytes.

    Args:
        tower_state: state dict of the tower to write.
        summary: settings that determined the run, in plain values.
    """
    tensors = {f"visual.{key}": value for key, value in tower_state.items()} | aligned.rest
    tensors |= {"prompts_features": aligned.anchors, "logit_scale": torch.tensor(aligned.logit_scale)}
    metadata = aligned.metadata | {
        "format": OWN_FORMAT,
        "prompts": json.dumps(PROMPTS),
        "licence": licence,
        "source": "trained with `qualiclip train`",
        "training": json.dumps(summary),
    }
    try:
        write_safetensors(path, tensors, metadata)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); make room, then pass --resume") from error
