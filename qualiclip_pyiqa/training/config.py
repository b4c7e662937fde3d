"""The configuration of a training run: a frozen dataclass, read from a TOML file and validated."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tomllib
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..degradations.banks import BANKS, bank_of
from ..degradations.base import GROUP_ORDER, LEVELS, Bank
from ..degradations.compose import draw_types
from ..errors import SettingsError, did_you_mean

CONFIGS = Path(__file__).parent / "configs"


CHOICES = {
    "pairs": ("each", "mean"),
    "precision": ("fp32", "bf16", "fp16"),
    "degrade_on": ("workers", "device"),
}


@dataclass(frozen=True)
class Config:
    """Settings of a run. Sizes are in pixels, probabilities in 0..1, margins and losses in units of a cosine.

    For the sources of the shipped values see docs/training.md.

    Raises:
        SettingsError: a value out of range or contradicting another.
    """

    # Tower
    backbone: str  # `mini`, or a name that `OpenQualiCLIP` takes, such as RN50
    # Stacks
    stacks: int  # photographs per batch: per step, process and accumulated pass
    levels: int  # distortion levels drawn for each stack, of five
    pristine: bool  # whether the undistorted crops are the lowest level of a stack, on top of `levels`
    crops: tuple[int, ...]  # sizes to draw from
    overlap: float  # smallest part of a crop's side that both crops share
    native: float  # probability of no resampling; otherwise the scale is uniform in (smallest_scale, 1)
    smallest_scale: float
    candidates: int  # regions to take the sharpest of: flat and out-of-focus crops must not count as pristine
    bokeh: float  # probability of blurring all but the middle of a region, equally at all levels
    camera: float  # probability of each mild change shared by all levels of a stack
    delivery: float  # probability of downscaling, and of JPEG, after the degradation, equally at all levels
    types: tuple[float, ...]  # weights of applying 1, 2, ... degradation types, each of another group, in turn
    share_levels: bool  # whether all levels of a stack share angle, positions and noise
    share_crops: bool  # whether both crops share angle and positions; noise is drawn for each
    repeat: dict[str, float]  # how many times to repeat the photographs of a top-level folder; default 1
    type_weights: dict[str, float]  # weights for drawing a type; default 1
    severity: dict[str, float]  # margin multiplier of a level, by group of types; default 1
    # Losses
    pairs: str  # `each`: rank by each antonym prompt pair's similarity; `mean`: by the mean similarity over the pairs
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
    accumulate: int  # forward and backward passes per step
    learning_rate: float
    betas: tuple[float, ...]
    weight_decay: float  # of weights; none of biases and normalisation
    warmup: int  # steps of linear warm-up
    cosine: bool  # whether the rate then falls to 0 along half a cosine
    clip: float  # largest norm of the gradient; 0: no clipping
    average: float  # decay of the weights' moving average (EMA), which becomes the model; 0: the last weights do
    precision: str  # `fp32`, `bf16` or `fp16`
    recompute: bool  # activation checkpointing: less memory, more time
    statistics: bool  # whether to update normalisation statistics; false: those of the loaded weights
    # Data, validation and checkpoints
    validation: int  # photographs held out for validation
    validation_crop: int
    validate_every: int  # steps
    checkpoint_every: int  # steps
    recalibrate: int  # batches to compute the EMA's normalisation statistics from; 0: these are averaged too
    recalibrate_crop: int
    workers: int  # processes that read photographs; 0: the training process does
    degrade_on: str  # `workers`: degrade in these processes; `device`: in the training process, on the tower's device
    # Backbones other than mini: `openai`, a name of the weight manifest, a file, or a folder in transformers' layout
    weights: str = ""
    # The mini tower: keywords of MiniTower
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    hidden: int = 0
    dim: int = 0
    dropout: float = 0.0  # dropout of the pooled statistics in each head
    # Stacks
    banks: tuple[str, ...] = ("kadid",)  # banks whose degradation types are drawn

    def __post_init__(self) -> None:
        self._check_tower()
        self._check_ranges()
        self._check_losses()
        self._check_stacks()

    def _need(self, good: bool, name: str, expected: str) -> None:
        if not good:
            raise SettingsError(f"training configuration: {name} is {getattr(self, name)!r}; expected {expected}")

    def _check_tower(self) -> None:
        if self.backbone != "mini":
            of_mini = self.widths or self.depths or self.hidden or self.dim or self.dropout
            self._need(not of_mini, "backbone", "mini where widths, depths, ... are given")
            self._need(bool(self.weights), "weights", "openai, a name of the weight manifest, a file or a folder")
            return
        self._need(len(self.widths) == 4 and min(self.widths) > 0, "widths", "four positive integers")
        self._need(len(self.depths) == 4 and min(self.depths) > 0, "depths", "four positive integers")
        self._need(self.hidden >= 1, "hidden", "at least 1")
        self._need(0 <= self.dropout < 1, "dropout", "0 to less than 1")
        self._need(self.dim >= 2, "dim", "at least 2: a prompt pair needs two directions")
        self._need(self.statistics, "statistics", "true: the mini tower starts without any")
        self._need(not self.weights, "weights", "none for the mini tower; --start begins from a model")

    def _check_ranges(self) -> None:
        least = dict.fromkeys(("workers", "warmup", "weight_decay", "clip", "recalibrate"), 0)
        least |= dict.fromkeys(
            ("steps", "accumulate", "candidates", "validation", "validate_every", "checkpoint_every"), 1
        )
        least |= {"validation_crop": 32, "recalibrate_crop": 32}
        for name, smallest in least.items():
            self._need(getattr(self, name) >= smallest, name, f"at least {smallest}")
        for name in ("native", "bokeh", "camera", "delivery", "overlap"):
            self._need(0 <= getattr(self, name) <= 1, name, "0 to 1")
        self._need(0 < self.smallest_scale <= 1, "smallest_scale", "more than 0, at most 1")
        self._need(0 <= self.average < 1, "average", "0 to less than 1")
        self._need(0 < self.learning_rate < 1, "learning_rate", "between 0 and 1")
        good_betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._need(good_betas, "betas", "two numbers of at least 0, below 1")
        self._need(self.statistics or not self.recalibrate, "recalibrate", "0 where statistics are not updated")
        for name, choices in CHOICES.items():
            expected = " or ".join((", ".join(choices[:-1]), choices[-1]))
            self._need(getattr(self, name) in choices, name, expected)

    def _check_losses(self) -> None:
        for name in ("consistency", "positive", "negative", "across", "centre"):
            self._need(getattr(self, f"weight_{name}") >= 0, f"weight_{name}", "at least 0")
        ranked = any((self.weight_consistency, self.weight_positive, self.weight_negative))
        self._need(ranked, "weight_positive", "a loss with a weight")
        fewest = 2 if self.weight_across else 1
        self._need(self.stacks >= fewest, "stacks", "at least 2 where scores are compared across photographs")

    def _check_stacks(self) -> None:
        enough = self.levels + self.pristine >= 2 and 1 <= self.levels <= LEVELS
        self._need(enough, "levels", f"2 to {LEVELS}; with pristine 1 to {LEVELS}")
        self._need(bool(self.crops) and min(self.crops) >= 32, "crops", "sizes of at least 32")
        some = bool(self.types) and min(self.types) >= 0 and sum(self.types) > 0
        self._need(some, "types", "frequencies of 1, 2, ... types")
        good_banks = bool(self.banks) and set(self.banks) <= set(BANKS) and len(set(self.banks)) == len(self.banks)
        self._need(good_banks, "banks", f"one or more of {', '.join(BANKS)}, each once")
        for copies in self.repeat.values():
            self._need(copies >= 1 and copies == int(copies), "repeat", "whole numbers of at least 1")
        for name, weight in self.type_weights.items():
            expected = f"types of the banks {', '.join(self.banks)} as keys, not {name!r}"
            self._need(name in self.bank, "type_weights", expected)
            self._need(weight >= 0, "type_weights", "weights of at least 0")
        for name, factor in self.severity.items():
            self._need(name in GROUP_ORDER, "severity", f"groups as keys ({', '.join(GROUP_ORDER)}), not {name!r}")
            self._need(factor >= 0, "severity", "factors of at least 0")
        draw_types(random.Random(0), self.types, self.type_weights, self.bank)  # raises if there are too few groups

    @property
    def smallest_photograph(self) -> int:
        """Smallest allowed shorter side of a photograph, in pixels."""
        return max(*self.crops, self.recalibrate_crop if self.recalibrate else 0, 32)

    @property
    def bank(self) -> Bank:
        """The degradation types to draw from."""
        return bank_of(self.banks)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the settings."""
        return sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def load_config(name: str | Path) -> Config:
    """Read a configuration, by the name of one in `configs/`, such as "mini" or "toy", or the path of a TOML file.

    Raises:
        SettingsError: no such file, not TOML, an unknown or missing key, or a value of the wrong type or range.

    Example:
        >>> load_config("toy").steps
        60
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
    """Build a Config from plain values, validating keys and types; `source` names it in error messages.

    Raises:
        SettingsError: an unknown or missing key, or a value of the wrong type or range.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            hint = did_you_mean(key, fields) or f"; expected keys are {', '.join(fields)}"
            raise SettingsError(f"{source}: unknown key {key!r}{hint}")
    missing = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if missing:
        raise SettingsError(f"{source}: missing {', '.join(missing)}; see qualiclip_pyiqa/training/configs/mini.toml")
    return Config(**{name: _convert(value, _kinds()[name], f"{source}: {name}") for name, value in values.items()})


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Config)


def _convert(value: Any, kind: Any, what: str) -> Any:
    """Convert a plain value to a field's type; `what` names it in error messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, inner[0], what) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, inner[1], f"{what}.{key}") for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise SettingsError(f"{what} is {value!r}; expected {kind if origin else kind.__name__}")
