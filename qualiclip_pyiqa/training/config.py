"""What a training run is made of: one frozen dataclass, read from a TOML file in which no key may be unknown."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import random
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

    docs/training.md says where the values of the shipped configurations come from.
    """

    # Tower
    backbone: str  # `mini`, or a name that `OpenQualiCLIP` takes, such as RN50
    # Stacks: photographs a step (of one process and one accumulated part), levels drawn of each stack's five
    stacks: int
    levels: int
    pristine: bool  # whether the undistorted crops are the stack's lowest level, on top of `levels`
    crops: tuple[int, ...]  # sizes drawn from
    overlap: float  # smallest part of a crop's side that both crops share
    native: float  # probability of no resampling; else the scale is uniform in (smallest_scale, 1)
    smallest_scale: float
    candidates: int  # of that many regions the sharpest is taken: flat and out-of-focus crops must not be pristine
    bokeh: float  # probability that all but the middle of a region is out of focus, alike at all levels
    camera: float  # probability of each of the mild changes that all levels of a stack share
    delivery: float  # probability of each of scaling down and JPEG after the degradation, alike for all levels
    types: tuple[float, ...]  # how often 1, 2, ... degradation types, of as many groups, are put on top of each other
    share_levels: bool  # whether angle, positions and noise are the same at all levels of a stack
    share_crops: bool  # whether angle and positions are the same for both crops; noise is drawn for each
    repeat: dict[str, float]  # how many times as often photographs of a top-level folder are drawn; 1 if not named
    type_weights: dict[str, float]  # how often a type is drawn; 1 where it is not named
    severity: dict[str, float]  # of a level, by group of types; margins follow it; 1 if not named
    # Losses
    pairs: str  # `each`: every antonym prompt pair ranks for itself; `mean`: the mean similarity over the pairs ranks
    margin_consistency: float
    margin_rank: float
    margin_across: float
    gap_across: float
    weight_consistency: float
    weight_positive: float
    weight_negative: float
    weight_across: float
    weight_centre: float
    # Optimiser (AdamW)
    steps: int
    accumulate: int  # forward and backward passes for each step
    learning_rate: float
    betas: tuple[float, ...]
    weight_decay: float  # of weights, not of biases and normalisation
    warmup: int  # steps of linear warm-up
    cosine: bool  # whether the rate then falls to 0 along half a cosine
    clip: float  # largest norm of the gradient; 0: not clipped
    average: float  # decay of the averaged weights that are kept; 0: the last ones are kept
    precision: str  # `fp32`, `bf16` or `fp16`
    recompute: bool  # whether activations are computed again for the gradient and not kept: less memory, more time
    statistics: bool  # whether normalisation statistics are learned too; false: they stay those of the loaded weights
    # Data, looks and checkpoints
    validation: int  # photographs of the training set kept for validation
    validation_crop: int
    validate_every: int
    checkpoint_every: int
    recalibrate: int  # batches for the averaged weights' normalisation statistics; 0: they are averaged themselves
    recalibrate_crop: int
    workers: int  # processes that read photographs; 0: the training process does
    degrade_on: str  # `workers`: degraded by these processes; `device`: by the training process, where the tower is
    # Of backbones other than mini: `openai`, a name of the weight manifest, or a file
    weights: str = ""
    # Of the mini tower: keywords of MiniTower
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    hidden: int = 0
    dim: int = 0
    dropout: float = 0.0  # share of the pooled statistics that a head does without at each step

    def __post_init__(self) -> None:
        _check(self)

    @property
    def smallest_photograph(self) -> int:
        """Shorter side that a photograph needs, in pixels."""
        return max(*self.crops, self.recalibrate_crop if self.recalibrate else 0, 32)

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
    missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if missing:
        raise SettingsError(f"{source}: missing {', '.join(missing)}; see qualiclip_pyiqa/training/configs/mini.toml")
    return Config(
        **{name: _convert(value, str(fields[name].type), f"{source}: {name}") for name, value in values.items()}
    )


def _convert(value: Any, kind: str, what: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and value == int(value):
        return int(value)
    if kind == "float" and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, (list, tuple)):
        return tuple(_convert(item, kind[6:-6], what) for item in value)  # "tuple[int, ...]"
    if kind.startswith("dict") and isinstance(value, dict):
        return {str(key): _convert(item, "float", f"{what}.{key}") for key, item in value.items()}
    raise SettingsError(f"{what} is {value!r}; expected {kind}")


def _check(c: Config) -> None:
    from ..degradations.bank import DEGRADATIONS
    from ..degradations.base import GROUP_ORDER, LEVELS
    from ..degradations.compose import draw_types

    def need(good: bool, what: str, expected: str) -> None:
        if not good:
            raise SettingsError(f"training configuration: {what} is {getattr(c, what)!r}; expected {expected}")

    if c.backbone == "mini":
        need(len(c.widths) == 4 and min(c.widths) > 0, "widths", "four positive integers")
        need(len(c.depths) == 4 and min(c.depths) > 0, "depths", "four positive integers")
        need(c.hidden >= 1, "hidden", "at least 1")
        need(0 <= c.dropout < 1, "dropout", "0 to less than 1")
        need(c.dim >= 2, "dim", "at least 2: a pair needs two directions")
        need(c.statistics, "statistics", "true: the mini tower starts without any")
        need(not c.weights, "weights", "none for the mini tower; --start begins from a model")
    else:
        of_mini = c.widths or c.depths or c.hidden or c.dim or c.dropout
        need(not of_mini, "backbone", "mini where widths, depths, ... are given")
        need(bool(c.weights), "weights", "openai, a name of the weight manifest or a file")
    need(
        c.levels + c.pristine >= 2 and 1 <= c.levels <= LEVELS, "levels", f"2 to {LEVELS}; with pristine 1 to {LEVELS}"
    )
    need(bool(c.crops) and min(c.crops) >= 32, "crops", "sizes of at least 32")
    for name in ("native", "bokeh", "camera", "delivery", "overlap"):
        need(0 <= getattr(c, name) <= 1, name, "0 to 1")
    need(0 < c.smallest_scale <= 1, "smallest_scale", "more than 0, at most 1")
    need(0 <= c.average < 1, "average", "0 to less than 1")
    need(c.validation_crop >= 32, "validation_crop", "at least 32")
    need(c.recalibrate_crop >= 32, "recalibrate_crop", "at least 32")
    for name in ("steps", "accumulate", "candidates", "validation", "validate_every", "checkpoint_every"):
        need(getattr(c, name) >= 1, name, "at least 1")
    need(c.stacks >= (2 if c.weight_across else 1), "stacks", "at least 2 where scores are compared across photographs")
    need(0 < c.learning_rate < 1, "learning_rate", "between 0 and 1")
    need(len(c.betas) == 2 and all(0 <= beta < 1 for beta in c.betas), "betas", "two numbers of at least 0, below 1")
    for name in ("workers", "warmup", "weight_decay", "clip", "recalibrate"):
        need(getattr(c, name) >= 0, name, "at least 0")
    for name in ("consistency", "positive", "negative", "across", "centre"):
        need(getattr(c, f"weight_{name}") >= 0, f"weight_{name}", "at least 0")
    need(c.statistics or not c.recalibrate, "recalibrate", "0 where statistics are not learned")
    need(any((c.weight_consistency, c.weight_positive, c.weight_negative)), "weight_positive", "a loss with a weight")
    need(c.pairs in ("each", "mean"), "pairs", "each or mean")
    need(c.precision in ("fp32", "bf16", "fp16"), "precision", "fp32, bf16 or fp16")
    need(c.degrade_on in ("workers", "device"), "degrade_on", "workers or device")
    need(bool(c.types) and min(c.types) >= 0 and sum(c.types) > 0, "types", "frequencies of 1, 2, ... types")
    for copies in c.repeat.values():
        need(copies >= 1 and copies == int(copies), "repeat", "whole numbers of at least 1")
    for name, weight in c.type_weights.items():
        need(name in DEGRADATIONS, "type_weights", f"degradation types as keys, not {name!r}")
        need(weight >= 0, "type_weights", "weights of at least 0")
    for name, factor in c.severity.items():
        need(name in GROUP_ORDER, "severity", f"groups as keys ({', '.join(GROUP_ORDER)}), not {name!r}")
        need(factor >= 0, "severity", "factors of at least 0")
    draw_types(random.Random(0), c.types, c.type_weights)  # says when there are fewer groups than types to be drawn
