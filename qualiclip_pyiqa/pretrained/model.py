"""Load a model from a weight file: its tensors, and the towers and prompts that they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, WeightsError
from .files import WeightFile
from .layouts import (
    CONTRASTIVE_TOWERS,
    FITTED_FORMAT,
    OWN_FORMAT,
    OWN_TOWERS,
    OwnMetadata,
    detect_layout,
    own_metadata,
)
from .manifest import WeightRecord, find_record
from .prompt_cache import cached_features
from .read import read
from .uses import how_to_use

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..towers import backbones
    from ..towers.text import TextTower

_MAX_LOGIT_SCALE = 20.0  # CLIP's own is at most ln 100


@dataclass(frozen=True)
class ModelOrigin:
    """Description of a loaded model without its tensors; a metric stores it.

    Attributes:
        file: the weight file.
        backbone: name of the image tower: OpenAI's, open_clip's, or `mini`.
        openai: whether the weights are OpenAI's or fine-tuned from them, and so need QuickGELU.
        activation: activation of the image tower's blocks; "none" for the mini tower.
        temperature: divides the logits; None if the file has none.
        tower_options: keywords of one of `OWN_TOWERS`, or replacements for fields of `towers.backbones.Backbone`, from
            the metadata of this package's files or the configuration beside a CLIP in the layout of transformers.
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
        """Path of the weight file."""
        return self.file.path

    def reload(self) -> LoadedModel:
        """Read the same file again.

        Raises:
            WeightsError: the file was changed, replaced or removed since it was loaded.
        """
        model = None if self.file.changed else _load(self.path, self.backbone, self.openai, self.upstream_texts)
        if model is None or self.file.changed or model.tower_options != self.tower_options:
            raise WeightsError(f"{self.path} changed after this model was loaded from it; create the metric again")
        return model


@dataclass(frozen=True)
class LoadedTower(ModelOrigin):
    """An image tower with the tensors of its weight file.

    Attributes:
        state: tensors under CLIP's names, memory-mapped if the format allows it; those of the image tower start with
            `visual.`.
        beside: the other weight files of a tower that has several.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    beside: tuple[WeightFile, ...] = field(default=(), kw_only=True)

    @property
    def origin(self) -> ModelOrigin:
        """This model without its tensors."""
        return ModelOrigin(**{each.name: getattr(self, each.name) for each in fields(ModelOrigin)})

    def tower_definition(self) -> backbones.Backbone:
        """Return the backbone's definition with the activation and pixel statistics that these weights need.

        Raises:
            SettingsError: an unknown backbone, or one of `OWN_TOWERS`, which are not open_clip's.
        """
        return _definition(self.backbone, self.openai, self.tower_options)

    def options_to_store(self) -> dict[str, Any]:
        """Return the metadata `tower` of a file of this package that holds these weights."""
        if self.backbone in OWN_TOWERS:
            return dict(self.tower_options)
        definition = self.tower_definition()
        return {key: getattr(definition, key) for key in ("mean", "std", "quick_gelu")}

    def image_tower(self, pos_embedding: bool) -> nn.Module:
        """Build the trainable image tower (N, 3, H, W) in 0..1 -> (N, D) on the tensors of `state`.

        Raises:
            SettingsError: `pos_embedding` for a tower without a positional table.
            WeightsError: the file holds another tower.
        """
        import torch

        from ..towers import backbones
        from ..towers.base import load_into

        visual = {key.removeprefix("visual."): value for key, value in self.state.items() if key.startswith("visual.")}
        if self.backbone in OWN_TOWERS:
            from ..towers import contrastive, mini, mobile

            if pos_embedding:
                raise SettingsError(f"the {self.backbone} tower has no positional table; expected pos_embedding=False")
            builders: dict[str, Callable[..., nn.Module]] = {
                "mini": mini.MiniTower,
                "mobile": mobile.MobileTower,
                "contrique": contrastive.contrique_tower,
                "re-iqa": contrastive.re_iqa_tower,
            }
            with torch.device("meta"):  # a hostile file cannot make it allocate more than its own size
                tower = builders[self.backbone](**self.tower_options)
            load_into(tower, visual, str(self.path))
            return tower
        return backbones.image_tower(self.tower_definition(), visual, pos_embedding, str(self.path))


@dataclass(frozen=True)
class LoadedModel(LoadedTower):
    """A model with the tensors of its weight file.

    Attributes:
        logit_scale: natural logarithm of the factor on the cosines.
        stored_features: prompt features in the file by text, (D,) each, not normalised.
    """

    logit_scale: float
    stored_features: Mapping[str, Tensor] = field(repr=False)

    @property
    def has_text_tower(self) -> bool:
        """Whether the file holds a text encoder, needed to encode new texts."""
        from ..towers import backbones

        return backbones.has_text_tower(self.state)

    def text_tower(self) -> TextTower:
        """Build the text tower on the tensors of `state`.

        Raises:
            SettingsError: the backbone's text encoder is not CLIP's.
            WeightsError: the file holds no text encoder or another one.
        """
        from ..towers import backbones

        return backbones.text_tower(self.tower_definition(), self.state, str(self.path))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode P texts with the file's text encoder -> features (P, D), not normalised."""
        from ..towers import backbones

        return backbones.text_encoder(self.tower_definition(), self.state, str(self.path))(texts)

    def prompt_features(self, texts: Sequence[str]) -> Tensor:
        """Look up P texts in the cache on disk, and encode those that it lacks -> features (P, D), not normalised.

        The text tower is built for missing texts only. Features equal those of `encode` up to rounding. The cache is
        for files whose hash was computed when they were read, as it is for published ones: to hash a user's own file
        takes longer than to encode its prompts.
        """
        import torch

        sha256 = self.file.computed_sha256
        if sha256 is None:
            return self.encode(texts)
        identity = {
            "model": sha256,
            "backbone": self.backbone,
            "activation": self.activation,
            "torch": str(torch.__version__),
            "open_clip": version("open_clip_torch"),
        }
        found = cached_features(identity, texts, self._encode_each)
        return torch.stack([found[text] for text in texts])

    def _encode_each(self, texts: Sequence[str]) -> list[Tensor]:
        from ..towers import backbones

        encode = backbones.text_encoder(self.tower_definition(), self.state, str(self.path))
        return [encode([text])[0] for text in texts]


def load_model(weights: str | Path | WeightRecord, backbone: str, upstream_texts: Sequence[str] = ()) -> LoadedModel:
    """Find a weight file and load its model.

    Args:
        weights: name of a manifest record, a record, a file, or a folder with a CLIP in the layout of transformers; for
            the look-up order see `pretrained.find`.
        backbone: name of the image tower; ignored for files trained with this package, which name their own.
        upstream_texts: texts, in order, of the stored prompt features of a file in upstream's QualiCLIP layout.

    Raises:
        WeightsError: no such file, a wrong hash, or a file that is damaged, unsafe or not a whole model.
        SettingsError: an unknown backbone.

    Example:
        >>> model = load_model("qualiclip-mini", "mobile")
        >>> model.backbone, model.temperature, len(model.stored_features)
        ('mobile', 1.0, 14)
        >>> tower = model.image_tower(pos_embedding=False)
    """
    return _load(weights, backbone, find_record(weights) is not None, tuple(upstream_texts))


def _load(
    weights: str | Path | WeightRecord, backbone: str, openai: bool, upstream_texts: tuple[str, ...]
) -> LoadedModel:
    found = read(weights)
    path, state = found.file.path, dict(found.tensors)
    if found.metadata.get("format") == FITTED_FORMAT:
        raise WeightsError(
            f"{path} is a metric of `qualiclip fit`, without prompts; use it by its path where a metric's name is "
            "expected, or create_metric('fitted', weights=FILE)"
        )
    layout = detect_layout(found.tensors, found.metadata)
    if (use := how_to_use(path, layout, found.tensors, found.metadata)) is not None:
        raise WeightsError(f"{use}; expected a whole CLIP or a trained model")
    rows = state.pop("prompts_features", None)
    own = OwnMetadata(backbone, {}, (), None)
    if found.metadata.get("format") == OWN_FORMAT:
        own = own_metadata(path, found.metadata)
        openai = False  # its metadata names the activation
        check_backbone(path, own.backbone)
    elif rows is not None:
        state = {key.removeprefix("clip_model."): value for key, value in state.items()}
        own = replace(own, texts=upstream_texts)
        openai = True  # fine-tuned from OpenAI's weights
    elif found.transformers is not None:
        from ..towers import backbones

        found.transformers.check_backbone(path, backbones.find_backbone(backbone))
        own = replace(own, tower=found.transformers.tower_options())
    return LoadedModel(
        file=found.file,
        backbone=own.backbone,
        openai=openai or found.from_openai,
        activation=activation_of(own.backbone, openai or found.from_openai, own.tower),
        temperature=own.temperature,
        tower_options=own.tower,
        upstream_texts=upstream_texts,
        logit_scale=_logit_scale(path, state),
        state=state,
        stored_features=_features_by_text(path, rows, own.texts),
    )


def check_backbone(path: Path, backbone: str) -> None:
    """Raise WeightsError if a file's metadata names a backbone that is unknown."""
    from ..towers import backbones

    try:
        if backbone not in OWN_TOWERS:
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


def activation_of(backbone: str, openai: bool, options: Mapping[str, Any]) -> str:
    """Name the activation of an image tower's blocks; see `ModelOrigin`."""
    if backbone in CONTRASTIVE_TOWERS:
        return "relu"
    return "none" if backbone in OWN_TOWERS else _definition(backbone, openai, options).activation


def _definition(backbone: str, openai: bool, options: Mapping[str, Any]) -> backbones.Backbone:
    from ..towers import backbones

    # `own_metadata` and `TransformersConfig` admit only mean, std and quick_gelu.
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return replace(backbones.find_backbone(backbone, openai), **values)
