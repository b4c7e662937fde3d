"""Load a model: the tensors of one weight file, and which towers they belong to."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError, WeightsError
from . import weights as weight_files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..towers import backbones
    from ..towers.text import TextTower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when it was loaded.

    Attributes:
        path: where it lay.
        stamp: device, inode, size in bytes and time of change in ns, by which a later change shows.
    """

    path: Path
    stamp: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: Path) -> WeightFile:
        """The file as it is now."""
        return cls(path, _stamp(path))

    @property
    def changed(self) -> bool:
        """Whether the file was changed, replaced or removed since it was loaded."""
        try:
            return _stamp(self.path) != self.stamp
        except OSError:
            return True

    def provenance(self) -> dict[str, Any]:
        """Hash and terms of what was loaded; the hash is None, with a warning, where the file changed since."""
        if not self.changed:
            out = weight_files.provenance(self.path)
            if not self.changed:
                return out
        logger.warning("%s changed after it was loaded, so its hash is no longer that of the model", self.path)
        return {
            "file": self.path.name,
            "path": str(self.path),
            "sha256": None,
            "verified": None,
            "record": None,
            "licence": "unknown",
            "source": "a file that changed after it was loaded",
        }


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
        if model is None or model.file.stamp != self.file.stamp:
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
        return _definition(self.path, self.backbone, self.openai, self.tower_options)

    def image_tower(self, pos_embedding: bool) -> nn.Module:
        """The image tower (N, 3, H, W) in 0..1 -> (N, D), trainable, with the tensors of `state`.

        Raises:
            SettingsError: a positional table was asked of a tower that has none.
            WeightsError: the file holds another tower.
        """
        from ..towers import backbones
        from ..towers.base import load_into

        visual = {key.removeprefix("visual."): value for key, value in self.state.items() if key.startswith("visual.")}
        if self.backbone == "mini":
            from ..towers.mini import MiniTower

            if pos_embedding:
                raise SettingsError("the mini tower has no positional table; expected pos_embedding=False")
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


def load_model(
    weights: str | Path | weight_files.WeightRecord, backbone: str, upstream_texts: Sequence[str] = ()
) -> LoadedModel:
    """Find a weight file and read the model in it.

    Args:
        weights: name of a manifest record, a record, or a file; looked up as `pretrained.weights` says.
        backbone: image tower of a file that does not say it itself (files trained with this package do).
        upstream_texts: texts of the stored prompt features, in order, of a file in upstream's QualiCLIP layout.

    Raises:
        WeightsError: no such file, a wrong hash, or a file that is damaged, not safe or no whole model.
        SettingsError: an unknown backbone.
    """
    openai = not weight_files.is_user_file(weights)
    return _load(weight_files.find(weights), backbone, openai, tuple(upstream_texts))


def _load(path: Path, backbone: str, openai: bool, upstream_texts: tuple[str, ...]) -> LoadedModel:
    file = WeightFile.of(path)
    state, metadata = weight_files.read(path)
    if file.changed:
        raise WeightsError(f"{path} changed while it was read; try again")
    rows = state.pop("prompts_features", None)
    options: dict[str, Any] = {}
    temperature = None
    texts: tuple[str, ...] = ()
    if metadata.get("format") == weight_files.OWN_FORMAT:
        backbone = metadata["backbone"]
        options = json.loads(metadata["tower"])
        temperature = float(metadata["temperature"]) if "temperature" in metadata else None
        texts = tuple(text for pair in json.loads(metadata["prompts"]) for text in pair)
    elif rows is not None:
        state = {key.removeprefix("clip_model."): value for key, value in state.items()}
        texts = upstream_texts
        openai = True  # fine-tuned from OpenAI's weights
    if rows is not None and len(rows) != len(texts):
        raise WeightsError(f"{path} holds {len(rows)} prompt features; expected {len(texts)}")
    scale = state.get("logit_scale")
    if scale is None:
        raise WeightsError(f"{path} has no 'logit_scale'; expected a whole CLIP or a trained model")
    return LoadedModel(
        file=file,
        backbone=backbone,
        openai=openai,
        activation="none" if backbone == "mini" else _definition(path, backbone, openai, options).activation,
        temperature=temperature,
        tower_options=options,
        upstream_texts=upstream_texts,
        logit_scale=float(scale),
        state=state,
        stored_features={} if rows is None else dict(zip(texts, rows, strict=True)),
    )


def _definition(path: Path, backbone: str, openai: bool, options: Mapping[str, Any]) -> backbones.Backbone:
    from ..towers import backbones

    try:
        return replace(backbones.find_backbone(backbone, openai), **options)
    except TypeError as error:
        raise WeightsError(f"{path}: unknown setting of a tower ({error}); update qualiclip-pyiqa") from error


def _stamp(path: Path) -> tuple[int, int, int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
