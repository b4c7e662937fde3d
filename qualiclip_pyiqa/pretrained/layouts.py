"""Check the layout of a weight file, and the metadata of this package's own format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

OWN_FORMAT = "qualiclip-pyiqa/1"
OWN_METADATA = ("backbone", "tower", "prompts")
FITTED_FORMAT = "qualiclip-pyiqa-fitted/1"
FITTED_METADATA = ("backbone", "tower", "fit")
PROMPTS_FORMAT = "qualiclip-pyiqa-prompts/1"
PROMPTS_METADATA = ("metric", "backbone", "clip_sha256", "clip_file")
OWN_FORMATS = (OWN_FORMAT, FITTED_FORMAT, PROMPTS_FORMAT)
# Tensor keys that a layout requires; a final dot marks a prefix.
REQUIRED = {
    "openai-clip": ("visual.", "logit_scale"),
    "qualiclip": ("clip_model.visual.", "clip_model.logit_scale", "prompts_features"),
    "context": ("prompt_learner.ctx",),
    "contrique": ("encoder.0.weight", "encoder.7."),
    "ridge": ("coef", "intercept"),
    "re-iqa": ("encoder.conv1.weight", "encoder.layer4."),
    "ranking-aware": ("visual.trunk.", "token_embedding.weight", "adapter.learnable_text_tokens"),
    "face": ("input_layer.0.weight", "body.", "output_layer."),
    "qualiclip-pyiqa": ("visual.", "prompts_features", "logit_scale"),
    "qualiclip-pyiqa-fitted": ("visual.", "regression", "images"),
    "qualiclip-pyiqa-prompts": ("quality.text.", "quality.visual."),
    "deep-prompts": ("prompts_text.", "prompts_vis."),  # of the authors' code for CLIP-DQA and CLIP-AGIQA
}
_FORMATS = {
    "qualiclip-pyiqa": (OWN_FORMAT, OWN_METADATA),
    "qualiclip-pyiqa-fitted": (FITTED_FORMAT, FITTED_METADATA),
    "qualiclip-pyiqa-prompts": (PROMPTS_FORMAT, PROMPTS_METADATA),
}
# The first of these tensors that a file holds tells its layout.
_TELLTALES = {
    "prompts_features": "qualiclip",
    "prompt_learner.ctx": "context",
    "prompts_vis.0": "deep-prompts",
    "encoder.0.weight": "contrique",
    "encoder.conv1.weight": "re-iqa",
    "coef": "ridge",
    "adapter.learnable_text_tokens": "ranking-aware",
    "input_layer.0.weight": "face",
}
# What networks of face recognition are called inside the training module of AdaFace and of QGFace.
_FACE_PREFIXES = ("model.", "backbone.")
CONTEXT_LAYOUTS = ("context", "context-tensor", "params")

# Well above any real model, but small enough that a hostile file cannot define a network that exhausts memory.
_MAX_STAGES, _MAX_DEPTH, _MAX_WIDTH, _MAX_BLOCKS, _MAX_PAIRS, _MAX_TEXT = 8, 32, 2048, 64, 1000, 1000
_MAX_STATISTICS = 3042  # all that a MobileTower has


@dataclass(frozen=True)
class OwnMetadata:
    """Validated metadata of a file in this package's own format.

    Attributes:
        backbone: name of the image tower: open_clip's, OpenAI's, or one of `OWN_TOWERS`.
        tower: keywords of `MiniTower` or `MobileTower`, or `mean`, `std` and `quick_gelu` of a CLIP tower.
        texts: texts of the stored prompt features, positive and negative alternating.
        temperature: divides the logits; None if the file has none.
    """

    backbone: str
    tower: dict[str, Any] = field(hash=False)
    texts: tuple[str, ...]
    temperature: float | None


def own_metadata(path: Path, metadata: Mapping[str, str]) -> OwnMetadata:
    """Validate the metadata of a file in this package's own format; no other metadata affects the network.

    Raises:
        WeightsError: a value is missing, not JSON, of the wrong type, out of range, or has an unknown keyword.
    """
    missing = [key for key in OWN_METADATA if key not in metadata]
    if missing:
        raise WeightsError(f"{path} lacks metadata {', '.join(missing)}; expected a model trained with this package")
    tower = tower_metadata(path, metadata)
    return OwnMetadata(metadata["backbone"], tower, _texts(path, metadata["prompts"]), _temperature(path, metadata))


def tower_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Validate the keywords of the image tower that `backbone` names.

    Raises:
        WeightsError: see `own_metadata`.
    """
    backbone = metadata["backbone"]
    checks = OWN_TOWERS.get(backbone, _CLIP)
    tower = _json(path, "tower", metadata["tower"])
    if not isinstance(tower, dict):
        raise _wrong(path, "tower", tower, "a JSON object")
    for key, value in tower.items():
        if key not in checks:
            raise WeightsError(
                f"{path}: metadata 'tower' has the unknown keyword {str(key)[:80]!r}; expected some of "
                f"{', '.join(checks)}; for a newer file update qualiclip-pyiqa"
            )
        check, expected = checks[key]
        if not check(value):
            raise _wrong(path, f"tower.{key}", value, expected)
    if backbone in OWN_TOWERS:
        _check_complete(path, tower, checks)
    if backbone == "mini":
        _check_mini(path, tower)
    if backbone == "mobile" and "window_heads" in tower and tower["window_heads"][0] > tower["pairs"]:
        raise _wrong(path, "tower.window_heads", tower["window_heads"], f"at most {tower['pairs']} heads, the pairs")
    return tower


def check_layout(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], layout: str | None) -> None:
    """Check that a file holds what its layout requires.

    Args:
        layout: a layout of the manifest, or `context` for any kind of context file; None: detected from the content.

    Raises:
        WeightsError: required tensors or metadata are missing, or the file has another version of our own format.
    """
    layout = layout or detect_layout(state, metadata)
    required = REQUIRED["context" if layout in CONTEXT_LAYOUTS else layout]
    missing = [
        key for key in required if not (any(k.startswith(key) for k in state) if key.endswith(".") else key in state)
    ]
    if layout in _FORMATS:
        expected, keys = _FORMATS[layout]
        found = metadata.get("format", "none")
        if found != expected:
            raise WeightsError(
                f"{path} has format {found[:80]!r}; expected {expected!r}: for a newer file update qualiclip-pyiqa"
            )
        missing += [f"metadata {key!r}" for key in keys if key not in metadata]
    if missing:
        some = ", ".join(list(state)[:3])[:200] or "nothing"
        raise WeightsError(f"{path} is not of layout {layout}: it lacks {', '.join(missing)} (it holds {some}, ...)")


def detect_layout(state: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return the layout, a key of `REQUIRED`, that the names of a file's tensors suggest; `openai-clip` for any others.

    `check_layout` tells whether the file really has it.

    Example:
        >>> detect_layout(["encoder.0.weight", "projector.0.weight"], {}), detect_layout(["visual.proj"], {})
        ('contrique', 'openai-clip')
    """
    if metadata.get("format", "").startswith("qualiclip-pyiqa"):
        layout = metadata["format"].partition("/")[0]
        return layout if layout in _FORMATS else "qualiclip-pyiqa"
    names = set(state)
    return next((layout for name, layout in _TELLTALES.items() if name in names), "openai-clip")


def without_training_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the network of a checkpoint of AdaFace or QGFace, without the heads of its training; others unchanged."""
    for prefix in _FACE_PREFIXES:
        if f"{prefix}input_layer.0.weight" in state:
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _json(path: Path, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: metadata {key!r} is not JSON ({str(error)[:80]}); the file is damaged") from error


def _wrong(path: Path, key: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(f"{path}: metadata {key!r} is {repr(value)[:80]}; expected {expected}")


def _texts(path: Path, text: str) -> tuple[str, ...]:
    pairs = _json(path, "prompts", text)
    good = isinstance(pairs, list) and 0 < len(pairs) <= _MAX_PAIRS
    if not good or not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in pairs):
        raise _wrong(path, "prompts", pairs, "a list of [positive, negative] pairs of texts")
    return tuple(each for pair in pairs for each in pair)


def _temperature(path: Path, metadata: Mapping[str, str]) -> float | None:
    if "temperature" not in metadata:
        return None
    try:
        value = float(metadata["temperature"])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise _wrong(path, "temperature", metadata["temperature"], "a positive number")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= _MAX_TEXT


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: object, longest: int) -> bool:
    return isinstance(value, list) and 0 < len(value) <= longest


def is_rgb(value: object, positive: bool) -> bool:
    """Whether a value is a list of three numbers that can normalise pixels; a standard deviation is `positive`."""
    if not (isinstance(value, list) and len(value) == 3):
        return False
    numbers = [each for each in value if isinstance(each, int | float) and not isinstance(each, bool)]
    return len(numbers) == 3 and all(abs(each) <= 1000 and (each > 1e-6 or not positive) for each in numbers)


def _are_integers(value: Any, most: int) -> bool:
    return _is_list(value, _MAX_STAGES) and all(_is_integer(each, 1, most) for each in value)


def _are_blocks(value: Any) -> bool:
    return _is_list(value, _MAX_BLOCKS) and all(
        _is_list(block, _MAX_STAGES + 1) and all(isinstance(name, str) for name in block) for block in value
    )


def _are_window_heads(value: Any) -> bool:
    if not (_is_list(value, 2) and len(value) == 2):
        return False
    return _is_integer(value[0], 1, _MAX_BLOCKS) and _is_integer(value[1], 1, _MAX_STATISTICS)


def _is_order(value: Any) -> bool:
    from ..towers.contrastive import ORDERS

    return isinstance(value, str) and value in ORDERS


_CLIP = {
    "mean": (lambda value: is_rgb(value, positive=False), "three numbers"),
    "std": (lambda value: is_rgb(value, positive=True), "three positive numbers"),
    "quick_gelu": (lambda value: isinstance(value, bool), "true or false"),
}
_MINI = {
    "widths": (lambda value: _are_integers(value, _MAX_WIDTH), f"1 to {_MAX_STAGES} integers in 1..{_MAX_WIDTH}"),
    "depths": (lambda value: _are_integers(value, _MAX_DEPTH), f"1 to {_MAX_STAGES} integers in 1..{_MAX_DEPTH}"),
    "hidden": (lambda value: _is_integer(value, 1, _MAX_WIDTH), f"an integer in 1..{_MAX_WIDTH}"),
    "dim": (lambda value: _is_integer(value, 2, _MAX_WIDTH), f"an integer in 2..{_MAX_WIDTH}"),
    "blocks": (_are_blocks, f"1 to {_MAX_BLOCKS} lists of names"),
}
_MOBILE = {
    "pairs": (lambda value: _is_integer(value, 1, _MAX_BLOCKS), f"an integer in 1..{_MAX_BLOCKS}"),
    "window_heads": (_are_window_heads, f"two integers, in 1..{_MAX_BLOCKS} and 1..{_MAX_STATISTICS}"),
}
_RE_IQA = {"order": (_is_order, "content-first or quality-first")}
#: Encoders trained by contrast, with the keywords of their towers.
CONTRASTIVE_TOWERS: dict[str, dict[str, Any]] = {"contrique": {}, "re-iqa": _RE_IQA}
# Towers that this package builds, with their keywords; a file must have them all, except for the optional ones.
OWN_TOWERS = {"mini": _MINI, "mobile": _MOBILE, **CONTRASTIVE_TOWERS}
_OPTIONAL = ("window_heads",)


def _check_complete(path: Path, tower: Mapping[str, Any], checks: Mapping[str, Any]) -> None:
    required = [key for key in checks if key not in _OPTIONAL]
    missing = [key for key in required if key not in tower]
    if missing:
        raise WeightsError(f"{path}: metadata 'tower' lacks {', '.join(missing)}; expected {', '.join(required)}")


def _check_mini(path: Path, tower: Mapping[str, Any]) -> None:
    """Check that the keywords of a mini tower agree with each other."""
    if len(tower["widths"]) != len(tower["depths"]):
        raise _wrong(path, "tower.depths", tower["depths"], f"{len(tower['widths'])} integers, one for each width")
    names = {"energies", *(f"stage{k}" for k in range(1, len(tower["widths"]) + 1))}
    for block in tower["blocks"]:
        if block != ["sharpness"] and not names.issuperset(block):
            raise _wrong(path, "tower.blocks", block, f"some of {', '.join(sorted(names))}, or sharpness alone")
