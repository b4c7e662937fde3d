"""Files of `qualiclip fit`: an image tower, a linear regression on its statistics, and how it was fitted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .layouts import FITTED_FORMAT, tower_metadata
from .model import LoadedTower, activation_of, check_backbone
from .read import read
from .write import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

_MAX_TEXT, _MAX_COUNT = 1000, 10**9
FIGURES = ("srcc", "plcc", "krcc")
SPREAD = ("median", "sd", "min", "max")


@dataclass(frozen=True)
class Fit:
    """How a regression was fitted, as the file's metadata tells it.

    Attributes:
        pos_embedding: whether the tower adds its positional table.
        regressor: `ridge`.
        strength: of the penalty on the sum of squared weights; opinion scores and statistics are standardised.
        at_edge: whether the strength is the smallest or largest that was tried.
        intercept: the prediction for an image whose statistics are all average.
        low, high: smallest and largest opinion score.
        lower_better: whether lower opinion scores, and so lower scores, are better.
        images, groups: numbers of images, and of groups that were never divided.
        splits, test_share, seed: repeated splits of the cross-validation.
        agreement: `srcc`, `plcc` and `krcc` over the splits, each with `median`, `sd`, `min` and `max`; None where a
            figure was undefined in every split.
        tower_name, tower_file, tower_sha256: the tower as the user named it, and the file that it came from; of
            several files, joined by " + ".
        ratings: columns of image names and opinion scores, as text.
        reading: rules of reading that differed from the default, as text.
    """

    pos_embedding: bool
    regressor: str
    strength: float
    at_edge: bool
    intercept: float
    low: float
    high: float
    lower_better: bool
    images: int
    groups: int
    splits: int
    test_share: float
    seed: int
    agreement: Mapping[str, Mapping[str, float | None]]
    tower_name: str
    tower_file: str
    tower_sha256: str
    ratings: str
    reading: str


@dataclass(frozen=True)
class FittedModel:
    """The content of a file of `qualiclip fit`.

    Attributes:
        tower: the image tower.
        fit: see `Fit`.
        regression: (3, S) float32: mean, scale and weight of each statistic; see `metrics.fitted`.
        images: (images, 32) uint8, sorted: the sha256 of the images that it was fitted on.
    """

    tower: LoadedTower
    fit: Fit
    regression: Tensor = field(repr=False)
    images: Tensor = field(repr=False)


def load_fitted(path: str | Path) -> FittedModel:
    """Read a file of `qualiclip fit`.

    Raises:
        WeightsError: no such file, or one that is damaged or of another kind.
    """
    if Path(path).is_dir():
        raise WeightsError(
            f"{path} is a folder; expected a file of `qualiclip fit`, which takes a folder of weights as "
            "--backbone-weights"
        )
    found = read(Path(path))
    if found.metadata.get("format") != FITTED_FORMAT:
        raise WeightsError(f"{path} is not a metric of `qualiclip fit`; expected a file that the command wrote")
    file, metadata, tensors = found.file, found.metadata, dict(found.tensors)
    backbone, options = metadata["backbone"], tower_metadata(file.path, metadata)
    check_backbone(file.path, backbone)
    fit = _fit(file.path, metadata["fit"])
    regression, images = tensors.pop("regression"), tensors.pop("images")
    _check_tensors(file.path, fit, regression, images)
    tower = LoadedTower(
        file=file,
        backbone=backbone,
        openai=False,  # the metadata names the activation
        activation=activation_of(backbone, False, options),
        temperature=None,
        tower_options=options,
        upstream_texts=(),
        state=tensors,
    )
    return FittedModel(tower, fit, regression, images)


def write_fitted(path: Path, model: FittedModel, licence: str, source: str) -> None:
    """Write a metric to a file, whole or not at all; equal metrics give equal bytes.

    The tower's tensors are stored in float16 where that loses nothing.

    Raises:
        OSError: the file cannot be written; an existing one is unchanged.
    """
    tower = model.tower
    tensors = {key: _compact(value) for key, value in tower.state.items() if key.startswith("visual.")}
    tensors |= {"regression": model.regression, "images": model.images}
    metadata = {
        "format": FITTED_FORMAT,
        "backbone": tower.backbone,
        "tower": json.dumps(tower.options_to_store()),
        "fit": json.dumps(asdict(model.fit)),
        "licence": licence,
        "source": source,
    }
    write_safetensors(path, tensors, metadata)


def _compact(value: Tensor) -> Tensor:
    import torch

    if not value.is_floating_point() or value.dtype == torch.float16:
        return value
    half = value.half()
    return half if torch.equal(half.to(value.dtype), value) else value


def _check_tensors(path: Path, fit: Fit, regression: Tensor, images: Tensor) -> None:
    import torch

    good = regression.dtype == torch.float32 and regression.dim() == 2 and len(regression) == 3
    if not good or not bool(regression.isfinite().all()) or not bool((regression[1] > 0).all()):
        raise WeightsError(
            f"{path}: 'regression' is {regression.dtype} of shape {tuple(regression.shape)}; expected (3, S) finite "
            "float32, with scales above 0 in the second row"
        )
    if images.dtype != torch.uint8 or images.shape != (fit.images, 32):
        raise WeightsError(
            f"{path}: 'images' is {images.dtype} of shape {tuple(images.shape)}; expected ({fit.images}, 32) uint8"
        )


def _fit(path: Path, text: str) -> Fit:
    """Validate the metadata `fit`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: metadata 'fit' is not JSON ({str(error)[:80]}); the file is damaged") from error
    names = [each.name for each in fields(Fit)]
    if not isinstance(found, dict) or set(found) != set(names):
        keys = sorted(map(str, found)) if isinstance(found, dict) else found
        raise WeightsError(f"{path}: metadata 'fit' has {str(keys)[:200]}; expected {', '.join(names)}")
    for name in names:
        check, expected = _CHECKS[name]
        if not check(found[name]):
            raise WeightsError(f"{path}: metadata 'fit.{name}' is {repr(found[name])[:80]}; expected {expected}")
    if not found["low"] < found["high"]:
        raise WeightsError(f"{path}: metadata 'fit' has the range {found['low']}..{found['high']}; expected low < high")
    return Fit(**found)


def _is_number(value: object) -> bool:
    # The bound keeps float32 arithmetic finite.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e30


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_agreement(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(FIGURES)
        and all(isinstance(each, dict) and set(each) == set(SPREAD) for each in value.values())
        and all(number is None or _is_number(number) for each in value.values() for number in each.values())
    )


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_COUNT = (_is_count, "a whole number")
_NUMBER = (_is_number, "a finite number")
_POSITIVE = (lambda value: _is_number(value) and value > 0, "a positive number")
_TEXT = (_is_text, f"a text of at most {_MAX_TEXT} characters")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pos_embedding": _FLAG,
    "regressor": (lambda value: value == "ridge", "'ridge'; for a newer file update qualiclip-pyiqa"),
    "strength": _POSITIVE,
    "at_edge": _FLAG,
    "intercept": _NUMBER,
    "low": _NUMBER,
    "high": _NUMBER,
    "lower_better": _FLAG,
    "images": _COUNT,
    "groups": _COUNT,
    "splits": _COUNT,
    "test_share": _POSITIVE,
    "seed": _COUNT,
    "agreement": (_is_agreement, f"{', '.join(FIGURES)}, each with {', '.join(SPREAD)}"),
    "tower_name": _TEXT,
    "tower_file": _TEXT,
    "tower_sha256": _TEXT,
    "ratings": _TEXT,
    "reading": _TEXT,
}
