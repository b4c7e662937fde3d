"""Load the files of CONTRIQUE and Re-IQA: encoders, and the ridge regressions on CONTRIQUE's features."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .files import WeightFile
from .find import check_by_hand
from .manifest import WeightRecord, find_record, manifest
from .model import LoadedTower
from .read import read

if TYPE_CHECKING:
    from torch import Tensor

CONTRIQUE, RE_IQA = "contrique", "re-iqa"
#: Backbones of this module: tower's encoder -> record of its file.
ENCODERS = {
    CONTRIQUE: {"encoder": "CONTRIQUE"},
    RE_IQA: {"quality": "Re-IQA_quality", "content": "Re-IQA_content"},
}
_DEFAULTS = {CONTRIQUE: {}, RE_IQA: {"order": "content-first"}}
# CONTRIQUE numbers torchvision's parts: 0 and 1 are the stem, 4 to 7 the layers.
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Regression:
    """A linear regression: `features @ coefficients + intercept`.

    Attributes:
        file: where it is from.
        coefficients: (D,) float32.
        intercept: a number.
    """

    file: WeightFile
    coefficients: Tensor = field(repr=False)
    intercept: float


def load_encoders(
    backbone: str, weights: str | Path | WeightRecord | None = None, options: Mapping[str, Any] | None = None
) -> LoadedTower:
    """Load the tower of CONTRIQUE or Re-IQA.

    Args:
        backbone: `contrique` or `re-iqa`.
        weights: CONTRIQUE's file or record; for Re-IQA a folder with both files, under the authors' names or those of
            `qualiclip weights convert`. None: the files of the records, wherever they are found.
        options: keywords of the tower: `order` of Re-IQA's features, see `towers.contrastive.ORDERS`.

    Raises:
        WeightsError: a missing or damaged file, or one of another layout.
    """
    files: list[WeightFile] = []
    state: dict[str, Tensor] = {}
    chosen = _chosen(backbone, weights)
    check_by_hand(*chosen.values())
    for name, file in chosen.items():
        found = read(file, layout=backbone)
        files.append(found.file)
        state |= {f"visual.{name}.{key}": value for key, value in _torchvision(backbone, found.tensors).items()}
    if backbone == RE_IQA:
        _check_different(files, state)
    return LoadedTower(
        file=files[0],
        beside=tuple(files[1:]),
        backbone=backbone,
        openai=False,
        activation="relu",
        temperature=None,
        tower_options=dict(options or _DEFAULTS[backbone]),
        upstream_texts=(),
        state=state,
    )


def load_regression(weights: str | Path | WeightRecord) -> Regression:
    """Load a linear regression on CONTRIQUE's features: the authors' pickle, which is not executed, or safetensors.

    Raises:
        WeightsError: a missing or damaged file, one of another layout, or numbers that are not finite.
    """
    found = read(weights, layout="ridge")
    coefficients, intercept = found.tensors["coef"], found.tensors["intercept"]
    good = coefficients.dim() == 1 and coefficients.is_floating_point() and intercept.numel() == 1
    if not good or not bool(coefficients.isfinite().all()) or not math.isfinite(float(intercept)):
        raise WeightsError(
            f"{found.file.path}: its regression has coefficients {tuple(coefficients.shape)} and intercept "
            f"{tuple(intercept.shape)}; expected finite numbers (D,) and ()"
        )
    return Regression(found.file, coefficients.float(), float(intercept))


def _chosen(backbone: str, weights: str | Path | WeightRecord | None) -> dict[str, str | Path | WeightRecord]:
    """Return the record or path of each encoder's file."""
    if weights is None:
        return dict(ENCODERS[backbone])
    if backbone == CONTRIQUE:
        return {"encoder": weights}
    folder = Path(str(weights))
    names = {encoder: manifest()[record].file for encoder, record in ENCODERS[backbone].items()}
    if find_record(weights) is not None or not folder.is_dir():
        raise WeightsError(
            f"{folder} is not a folder; Re-IQA has two files: pass that of {' and '.join(names.values())}"
        )
    found: dict[str, str | Path | WeightRecord] = {}
    for encoder, name in names.items():
        own = folder / name
        path = next((path for path in (own, own.with_suffix(".safetensors")) if path.exists()), None)
        if path is not None:
            found[encoder] = path
    if missing := [name for encoder, name in names.items() if encoder not in found]:
        raise WeightsError(
            f"{folder} does not hold {' and '.join(missing)}; expected both files of Re-IQA, under the authors' names "
            "or these with .safetensors"
        )
    return found


def _check_different(files: Sequence[WeightFile], state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError if both files of Re-IQA hold the same encoder."""
    import torch

    quality = {key: value for key, value in state.items() if key.startswith("visual.quality.")}
    twins = ((value, state.get(key.replace(".quality.", ".content.", 1))) for key, value in quality.items())
    if all(twin is not None and torch.equal(value, twin) for value, twin in twins):
        raise WeightsError(
            f"{files[0].path} and {files[1].path} hold the same encoder; expected that of quality and that of content"
        )


def _torchvision(backbone: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an encoder's tensors to those of torchvision's ResNet, without its heads for training."""
    found = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    if backbone == CONTRIQUE:
        found = {re.sub(r"^\d+", lambda part: _NUMBERED.get(part[0], part[0]), key): found[key] for key in found}
    return found
