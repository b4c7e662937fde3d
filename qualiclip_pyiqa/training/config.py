"""What a training run is made of: one frozen dataclass, read from a TOML file in which no key may be unknown."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import SettingsError

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """Settings of a run. Sizes in pixels, probabilities in 0..1, margins and losses in units of a cosine.

    L = 5 levels, two overlapping crops, the degradation bank and the three alignment losses are QualiCLIP's; every
    number below is our own choice for a small network trained from scratch on a CPU.
    """

    # Tower (keywords of MiniTower)
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    hidden: int
    dim: int
    # Stacks: photographs per step, levels drawn of each stack's five (pristine comes on top), crop sizes drawn from
    stacks: int
    levels: int
    crops: tuple[int, ...]
    overlap: float  # smallest part of a crop's side that both crops share
    native: float  # probability of no resampling; else the scale is uniform in (smallest_scale, 1)
    smallest_scale: float
    candidates: int  # of that many regions the sharpest is taken: flat and out-of-focus crops must not be pristine
    camera: float  # probability of each of the mild changes that all levels of a stack share
    delivery: float  # probability of each of scaling down and JPEG after the degradation, alike for all levels
    composition: float  # probability of a second type, from another group
    repeat: dict[str, float]  # how many times as often photographs of a top-level folder are drawn; 1 if not named
    type_weights: dict[str, float]  # how often a type is drawn; 1 where it is not named
    # Losses
    margin_consistency: float
    margin_rank: float
    margin_across: float
    gap_across: float
    weight_consistency: float
    weight_across: float
    weight_centre: float
    # Optimiser
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: int
    average: float  # decay of the averaged weights that are kept
    half: bool  # bfloat16 autocast
    # Data and looks
    validation: int  # photographs of the training set kept for validation
    validation_crop: int
    validate_every: int
    recalibrate: int  # batches for the averaged weights' normalisation statistics
    recalibrate_crop: int
    workers: int

    def __post_init__(self) -> None:
        _check(self)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the settings."""
        return sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def load_config(name: str | Path) -> Config:
    """Read a configuration: the name of one in `configs/` ("mini", "toy") or the path of a TOML file.

    Raises:
        SettingsError: no such file, not TOML, an unknown or missing key, or a value of the wrong kind or range.
    """
    path = CONFIGS / f"{name}.toml" if (CONFIGS / f"{name}.toml").is_file() else Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
        raise SettingsError(
            f"training configuration {str(name)!r} cannot be read ({error}); expected a TOML file or one of {known}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    return make_config(values, str(path))


def make_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Build a Config from plain values, checking every key and kind; `source` is what errors call it."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected keys are {', '.join(fields)}"
            raise SettingsError(f"{source}: unknown key {key!r}{hint}")
    missing = [name for name in fields if name not in values]
    if missing:
        raise SettingsError(f"{source}: missing {', '.join(missing)}; see qualiclip_pyiqa/training/configs/mini.toml")
    return Config(
        **{name: _convert(values[name], str(field.type), f"{source}: {name}") for name, field in fields.items()}
    )


def _convert(value: Any, kind: str, what: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and value == int(value):
        return int(value)
    if kind == "float" and number:
        return float(value)
    if kind.startswith("tuple") and isinstance(value, (list, tuple)):
        return tuple(_convert(item, "int", what) for item in value)
    if kind.startswith("dict") and isinstance(value, dict):
        return {str(key): _convert(item, "float", f"{what}.{key}") for key, item in value.items()}
    raise SettingsError(f"{what} is {value!r}; expected {kind}")


def _check(c: Config) -> None:
    from .degradations import DEGRADATIONS, LEVELS

    def need(good: bool, what: str, expected: str) -> None:
        if not good:
            raise SettingsError(f"training configuration: {what} is {getattr(c, what)!r}; expected {expected}")

    need(len(c.widths) == 4 and min(c.widths) > 0, "widths", "four positive integers")
    need(len(c.depths) == 4 and min(c.depths) > 0, "depths", "four positive integers")
    need(1 <= c.levels <= LEVELS, "levels", f"1 to {LEVELS}")
    need(bool(c.crops) and min(c.crops) >= 32, "crops", "sizes of at least 32")
    for name in ("native", "camera", "delivery", "composition", "overlap"):
        need(0 <= getattr(c, name) <= 1, name, "0 to 1")
    need(0 < c.smallest_scale <= 1, "smallest_scale", "more than 0, at most 1")
    need(0 <= c.average < 1, "average", "0 to less than 1")
    need(c.validation_crop >= 32, "validation_crop", "at least 32")
    need(c.recalibrate_crop >= 32, "recalibrate_crop", "at least 32")
    for name in ("hidden", "dim", "steps", "candidates", "validation", "validate_every", "recalibrate"):
        need(getattr(c, name) >= 1, name, "at least 1")
    need(c.dim >= 2, "dim", "at least 2: a pair needs two directions")
    need(c.stacks >= 2, "stacks", "at least 2: scores are compared across photographs")
    need(0 < c.learning_rate < 1, "learning_rate", "between 0 and 1")
    for name in ("workers", "warmup", "weight_decay", "weight_consistency", "weight_across", "weight_centre"):
        need(getattr(c, name) >= 0, name, "at least 0")
    for copies in c.repeat.values():
        need(copies >= 1 and copies == int(copies), "repeat", "whole numbers of at least 1")
    for name, weight in c.type_weights.items():
        need(name in DEGRADATIONS, "type_weights", f"degradation types as keys, not {name!r}")
        need(weight >= 0, "type_weights", "weights of at least 0")
