"""Checkpoints of a training run: one safetensors file each, written and read without executing anything.

A checkpoint holds the tensors of the tower, of its moving average (EMA) and of the optimiser, and as JSON in its
metadata how far the run is and the state of the gradient scaler. It holds no state of a random number generator: all
that a step draws is decided by the seed and the number of its batch (see `stacks` and `run`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..pretrained.write import write_safetensors
from .losses import PARTS

FORMAT = "qualiclip-pyiqa-checkpoint/1"
PATTERN = "checkpoint-*.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, each of its parameter's shape; beside them `step`, a number
SUMS = (*PARTS, "waited", "spent", "steps")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        run: digest of everything that decides the run.
        step: steps that are done.
        seconds: time spent on them, over all attempts.
        log_bytes: length of the log at this point.
        overflows: steps in a row, up to this one, whose gradient was not finite.
        sums: sums since the last validation: of each part of the loss, of the seconds waited for data and spent in
            all, and of steps.
    """

    run: str
    step: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    overflows: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add to the sums."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Read what `json.dumps(dataclasses.asdict(progress))` gave.

        Raises:
            ValueError: anything else.
        """
        values = json.loads(text)
        names = {each.name for each in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != names or not isinstance(values["sums"], dict):
            raise ValueError("its progress has other entries")
        counts = [values[name] for name in ("step", "log_bytes", "overflows")]
        if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or not isinstance(values["run"], str):
            raise ValueError("its progress is not counted in whole numbers")
        if not values["sums"].keys() <= set(SUMS):
            raise ValueError("its progress has unknown sums")
        if not all(_is_number(value) for value in (values["seconds"], *values["sums"].values())):
            raise ValueError("its progress has a value that is not a number")
        return cls(**values)


@dataclass
class State:
    """What a checkpoint keeps of a run.

    Attributes:
        tower: what is trained, not wrapped for several processes.
        ema: its moving average.
        optimiser: AdamW over the parameters of `tower` that are trained.
        scaler: gradient scaler of fp16; None without one.
        progress: replaced when a checkpoint is read.
    """

    tower: nn.Module
    ema: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    progress: Progress

    def model_tensors(self) -> dict[str, Tensor]:
        """Tensors of tower and average, as they are named in a checkpoint."""
        modules = {"tower": self.tower, "ema": self.ema}
        return {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimiser changes, in its order, by name."""
        names = {id(parameter): name for name, parameter in self.tower.named_parameters()}
        return {names[id(each)]: each for group in self.optimiser.param_groups for each in group["params"]}

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """Tensors of the optimiser, as they are named in a checkpoint; none before its first step."""
        return {
            f"optimiser.{name}.{key}": value
            for name, parameter in self.trained().items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }


def find_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run's folder."""
    return max(folder.glob(PATTERN), default=None)


def write_checkpoint(folder: Path, state: State) -> Path:
    """Write a checkpoint, whole or not at all, and then delete the earlier ones.

    Raises:
        SettingsError: it cannot be written; the earlier one stays.
    """
    progress = state.progress
    path = folder / f"checkpoint-{progress.step:09d}-{progress.run[:8]}.safetensors"
    scaler = {} if state.scaler is None else state.scaler.state_dict()
    metadata = {
        "format": FORMAT,
        "progress": json.dumps(dataclasses.asdict(progress)),
        "scaler": json.dumps(scaler),
    }
    try:
        write_safetensors(path, state.model_tensors() | state.optimiser_tensors(), metadata)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}); make room, then pass --resume") from error
    delete_checkpoints(folder, but=path)
    return path


def delete_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Delete the checkpoints of a run's folder, but for one."""
    for path in folder.glob(PATTERN):
        if path != but:
            path.unlink()


def read_checkpoint(path: Path, state: State, steps: int) -> None:
    """Set a run's state to that of a checkpoint. Nothing of the run is changed if the file does not fit it.

    Args:
        steps: steps of the whole run.

    Raises:
        SettingsError: the checkpoint of another run.
        WeightsError: not a regular file, damaged, or with other tensors than this run's; nothing in it is executed.
    """
    if path.is_symlink() or not path.is_file():
        raise WeightsError(f"{path} is not a regular file; delete it, or choose another folder")
    try:
        metadata, tensors = _read(path)
        progress = Progress.from_json(metadata["progress"])
        if progress.run != state.progress.run:
            raise SettingsError(
                f"{path} belongs to another run: configuration, seed, photographs, --start or number of processes "
                "differ; repeat its command, or choose another folder"
            )
        if progress.step > steps:
            raise ValueError(f"its progress is {progress.step} of {steps} steps")
        _check_tensors(tensors, state)
        scaler = _check_scaler(json.loads(metadata["scaler"]), state)
    except SettingsError:
        raise
    except Exception as error:  # of safetensors' parser, of JSON's (also RecursionError), of the checks above
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}: {reason}); delete it to start the run anew"
        ) from error
    for name, module in (("tower", state.tower), ("ema", state.ema)):
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
    _load_optimiser(tensors, state)
    if state.scaler is not None and scaler:
        state.scaler.load_state_dict(scaler)
    state.progress = progress


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check_tensors(tensors: dict[str, Tensor], state: State) -> None:
    """Raise ValueError unless the tensors are those of this run, in shape and dtype."""
    expected = state.model_tensors()
    for name, parameter in state.trained().items():
        own = {f"optimiser.{name}.step": torch.tensor(0.0)}
        own |= {f"optimiser.{name}.{moment}": parameter.detach() for moment in MOMENTS}
        if not tensors.keys().isdisjoint(own):  # a parameter has either no state yet or all of it
            expected |= own
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{wrong[0]!r} is {'missing' if wrong[0] in expected else 'not of this run'}")
    for name, like in expected.items():
        found = tensors[name]
        if found.shape != like.shape or found.dtype != like.dtype:
            raise ValueError(
                f"{name!r} has shape {[*found.shape]} and {found.dtype}, not {[*like.shape]} and {like.dtype}"
            )


def _check_scaler(found: Any, state: State) -> dict[str, Any]:
    """The gradient scaler's state; ValueError if it is not one."""
    expected = {} if state.scaler is None else state.scaler.state_dict()
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise ValueError("its gradient scaler has other entries")
    for name, value in found.items():
        if not _is_number(value) or value < 0 or type(value) is not type(expected[name]):
            raise ValueError(f"its gradient scaler has {name} {value!r}")
    return found


@torch.no_grad()
def _load_optimiser(tensors: dict[str, Tensor], state: State) -> None:
    loaded = {}
    for number, (name, parameter) in enumerate(state.trained().items()):
        prefix = f"optimiser.{name}."
        if f"{prefix}step" in tensors:
            # Laid out in memory as the parameter is: a step over another layout may round differently.
            own = {moment: torch.empty_like(parameter).copy_(tensors[prefix + moment]) for moment in MOMENTS}
            loaded[number] = {"step": tensors[f"{prefix}step"].clone(), **own}
    # Groups, learning rate and all, are decided by the configuration and the step.
    state.optimiser.load_state_dict({"state": loaded, "param_groups": state.optimiser.state_dict()["param_groups"]})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
