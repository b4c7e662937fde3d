"""Load a model: the tensors of one weight file, and which towers they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, WeightsError
from .files import WeightFile
from .layouts import OWN_FORMAT, OwnMetadata, own_metadata
from .manifest import WeightRecord, is_user_file
from .read import read

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..towers import backbones
    from ..towers.text import TextTower

_MAX_LOGIT_SCALE = 20.0  # CLIP's own is at most ln 100


@dataclass(frozen=True)
class ModelOrigin:
    """What a weight file said of its model: plain values, which a metric keeps when the tensors are gone.

    Attributes:
        file: the file, as it was loaded.
        backbone: image tower: an OpenAI name, any name of open_clip's, or `mini`.
        openai: whether the weights are OpenAI's or fine-tuned from them, which need QuickGELU.
        activation: of the image tower's blocks; "none" for the mini tower, whose file says nothing of it.
        temperature: the one that the logit scale was chosen for; None where the file says none.
        tower_options: keywords of the mini tower, or what replaces fields of `towers.backbones.Backbone`.
        upstream_texts: texts of the stored prompt features of a file in upstream's QualiCLIP layout.
    """

    file: WeightFile
    backbone: str
    openai: bool
    activation: str
    temperature: float | None
    tower_options: Mapping[str, Any]
    upstream_texts: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where the file lay."""
        return self.file.path

    def reload(self) -> LoadedModel:
        """Read the same file again.

        Raises:
            WeightsError: it was changed, replaced or removed since; no other model is taken in its place.
        """
        model = None if self.file.changed else _load(self.path, self.backbone, self.openai, self.upstream_texts)
        if model is None or self.file.changed:
            raise WeightsError(f"{self.path} changed after this model was loaded from it; create the metric again")
        return model


@dataclass(frozen=True)
class LoadedModel(ModelOrigin):
    """A model read from one weight file.

    Attributes:
        logit_scale: natural logarithm, as in the file.
        state: tensors under CLIP's own names, memory-mapped where the format allows it.
        stored_features: (D,) feature of each text that the file holds one for; of any length.
    """

    logit_scale: float
    state: Mapping[str, Tensor] = field(repr=False)
    stored_features: Mapping[str, Tensor] = field(repr=False)

    @property
    def origin(self) -> ModelOrigin:
        """This model without its tensors."""
        return ModelOrigin(**{each.name: getattr(self, each.name) for each in fields(ModelOrigin)})

    def tower_definition(self) -> backbones.Backbone:
        """The backbone as these weights need it.

        Raises:
            SettingsError: an unknown backbone, or the mini tower, which is none of open_clip's.
        """
        return _definition(self.backbone, self.openai, self.tower_options)

    def image_tower(self, pos_embedding: bool) -> nn.Module:
        """The image tower (N, 3, H, W) in 0..1 -> (N, D), trainable, with the tensors of `state`.

        Raises:
            SettingsError: a positional table was asked of a tower that has none.
            WeightsError: the file holds another tower.
        """
        import torch

        from ..towers import backbones
        from ..towers.base import load_into

        visual = {key.removeprefix("visual."): value for key, value in self.state.items() if key.startswith("visual.")}
        if self.backbone == "mini":
            from ..towers.mini import MiniTower

            if pos_embedding:
                raise SettingsError("the mini tower has no positional table; expected pos_embedding=False")
            with torch.device("meta"):  # so that a file cannot ask for more memory than it has bytes
                tower = MiniTower(**self.tower_options)
            load_into(tower, visual, str(self.path))
            return tower
        return backbones.image_tower(self.tower_definition(), visual, pos_embedding, str(self.path))

    @property
    def has_text_tower(self) -> bool:
        """Whether the file holds a text encoder, so that any text can be encoded."""
        from ..towers import backbones

        return backbones.has_text_tower(self.state)

    def text_tower(self) -> TextTower:
        """The text tower.

        Raises:
            SettingsError: the backbone's text side is not CLIP's. WeightsError: the file holds another one or none.
        """
        from ..towers import backbones

        return backbones.text_tower(self.tower_definition(), self.state, str(self.path))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode P texts with the file's text tower -> features (P, D), not of unit length."""
        from ..towers import backbones

        return backbones.encode_texts(self.tower_definition(), self.state, texts, str(self.path))


def load_model(weights: str | Path | WeightRecord, backbone: str, upstream_texts: Sequence[str] = ()) -> LoadedModel:
    """Find a weight file and read the model in it.

    Args:
        weights: name of a manifest record, a record, or a file; looked up as `pretrained.find` says.
        backbone: image tower of a file that does not say it itself (files trained with this package do).
        upstream_texts: texts of the stored prompt features, in order, of a file in upstream's QualiCLIP layout.

    Raises:
        WeightsError: no such file, a wrong hash, or a file that is damaged, not safe or not a whole model.
        SettingsError: an unknown backbone.

    Example:
        >>> model = load_model("qualiclip-mini", "mini")
        >>> model.backbone, model.temperature, len(model.stored_features)
        ('mini', 1.0, 14)
        >>> tower = model.image_tower(pos_embedding=False)
    """
    return _load(weights, backbone, not is_user_file(weights), tuple(upstream_texts))


def _load(
    weights: str | Path | WeightRecord, backbone: str, openai: bool, upstream_texts: tuple[str, ...]
) -> LoadedModel:
    found = read(weights)
    path, state = found.file.path, dict(found.tensors)
    rows = state.pop("prompts_features", None)
    own = OwnMetadata(backbone, {}, (), None)
    if found.metadata.get("format") == OWN_FORMAT:
        own = own_metadata(path, found.metadata)
        openai = False  # its metadata says which activation it needs
        _check_backbone(path, own.backbone)
    elif rows is not None:
        state = {key.removeprefix("clip_model."): value for key, value in state.items()}
        own = replace(own, texts=upstream_texts)
        openai = True  # fine-tuned from OpenAI's weights
    return LoadedModel(
        file=found.file,
        backbone=own.backbone,
        openai=openai or found.from_openai,
        activation=_activation(own, openai or found.from_openai),
        temperature=own.temperature,
        tower_options=own.tower,
        upstream_texts=upstream_texts,
        logit_scale=_logit_scale(path, state),
        state=state,
        stored_features=_features_by_text(path, rows, own.texts),
    )


def _check_backbone(path: Path, backbone: str) -> None:
    from ..towers import backbones

    try:
        if backbone != "mini":
            backbones.find_backbone(backbone)
    except SettingsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _logit_scale(path: Path, state: Mapping[str, Tensor]) -> float:
    scale = state.get("logit_scale")
    if scale is None:
        raise WeightsError(f"{path} has no 'logit_scale'; expected a whole CLIP or a trained model")
    value = float(scale) if scale.numel() == 1 and scale.is_floating_point() else math.nan
    if not abs(value) <= _MAX_LOGIT_SCALE:
        found = value if scale.numel() == 1 else f"of shape {tuple(scale.shape)}"
        if not scale.is_floating_point():
            found = f"of type {str(scale.dtype).removeprefix('torch.')}"
        raise WeightsError(f"{path}: 'logit_scale' is {found}; expected one number, the logarithm of CLIP's scale")
    return value


def _features_by_text(path: Path, rows: Tensor | None, texts: Sequence[str]) -> dict[str, Tensor]:
    if rows is None:
        return {}
    if rows.dim() != 2 or not rows.is_floating_point():
        raise WeightsError(f"{path}: 'prompts_features' has shape {tuple(rows.shape)}; expected (2P, D) of floats")
    if len(rows) != len(texts):
        raise WeightsError(f"{path} holds {len(rows)} prompt features; expected {len(texts)}")
    return dict(zip(texts, rows, strict=True))


def _activation(own: OwnMetadata, openai: bool) -> str:
    return "none" if own.backbone == "mini" else _definition(own.backbone, openai, own.tower).activation


def _definition(backbone: str, openai: bool, options: Mapping[str, Any]) -> backbones.Backbone:
    from ..towers import backbones

    # Of these options `own_metadata` lets only mean, std and quick_gelu through.
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return replace(backbones.find_backbone(backbone, openai), **values)
