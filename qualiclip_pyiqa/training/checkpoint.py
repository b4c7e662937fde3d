"""Checkpoints of a training run: one safetensors file each; reading one executes no code.

A checkpoint holds the tensors of the tower, its moving average (EMA) and the optimiser; its metadata holds, as JSON,
the run's progress and the state of the gradient scaler. No random state is needed: seed and batch number determine all
draws of a step (see `stacks` and `loop`).
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

from ..errors import SettingsError, WeightsError, reason
from ..pretrained.write import write_safetensors
from .losses import PARTS

FORMAT = "qualiclip-pyiqa-checkpoint/1"
PATTERN = "checkpoint-*.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state in the parameter's shape; the rest is `step`, a scalar
SUMS = (*PARTS, "waited", "spent", "steps")


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        run: digest of everything that determines the run.
        step: completed steps.
        seconds: time spent on them, over all attempts.
        log_bytes: length of the log at this point.
        overflows: consecutive steps, up to this one, with a gradient that was not finite.
        sums: sums since the last validation: parts of the loss, seconds waited for data, seconds in all, and steps.
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
        """Parse the output of `json.dumps(dataclasses.asdict(progress))`.

        Raises:
            ValueError: any other text.
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
    """State of a run that a checkpoint stores.

    Attributes:
        tower: what is trained, not wrapped for several processes: a tower, or for `qualiclip tune` prompts.
        ema: its moving average; for `qualiclip tune` the prompts of the best epoch so far.
        optimiser: over the trainable parameters of `tower`.
        scaler: gradient scaler of fp16; None for other precisions.
        progress: replaced when a checkpoint is read.
    """

    tower: nn.Module
    ema: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    progress: Progress

    def model_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of tower and EMA under their names in a checkpoint."""
        modules = {"tower": self.tower, "ema": self.ema}
        return {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the optimiser's parameters by name, in its order."""
        names = {id(parameter): name for name, parameter in self.tower.named_parameters()}
        return {names[id(each)]: each for group in self.optimiser.param_groups for each in group["params"]}

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors under their names in a checkpoint; none before its first step."""
        return {
            f"optimiser.{name}.{key}": value
            for name, parameter in self.trained().items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }


def find_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint in a run's folder."""
    return max(folder.glob(PATTERN), default=None)


def how_to_continue(folder: Path) -> str:
    """Say what continues a run that was stopped."""
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        return "stopped before the first checkpoint; the same command with --resume starts again"
    return f"stopped; the same command with --resume continues from {checkpoint}"


def delete_partial_files(folder: Path, result: str) -> None:
    """Delete the partly written checkpoints and results of a killed process; `result` is the name of the run's file."""
    for pattern in (f"{result}.*.part", f"{PATTERN}.*.part"):
        for path in folder.glob(pattern):
            path.unlink()


def write_checkpoint(folder: Path, state: State) -> Path:
    """Write a checkpoint, whole or not at all, then delete earlier ones.

    Raises:
        OSError: the file cannot be written; the earlier checkpoint remains.
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
        raise OSError(f"{path} cannot be written ({error.strerror or error}); make room, then pass --resume") from error
    delete_checkpoints(folder, but=path)
    return path


def delete_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Delete the checkpoints in a run's folder, except `but`."""
    for path in folder.glob(PATTERN):
        if path != but:
            path.unlink()


def read_checkpoint(path: Path, state: State, steps: int) -> None:
    """Restore a run's state from a checkpoint; if the file does not fit the run, the state is unchanged.

    Args:
        steps: total steps of the run.

    Raises:
        SettingsError: the checkpoint belongs to another run.
        WeightsError: the file is not a regular one, is damaged, or lacks tensors of this run or has others.
    """
    if path.is_symlink() or not path.is_file():
        raise WeightsError(f"{path} is not a regular file; delete it, or choose another folder")
    try:
        metadata, tensors = _read(path)
        progress = Progress.from_json(metadata["progress"])
        if progress.run != state.progress.run:
            raise SettingsError(
                f"{path} belongs to another run: settings, seed, images, --start or number of processes "
                "differ; repeat its command, or choose another folder"
            )
        if progress.step > steps:
            raise ValueError(f"its progress is {progress.step} of {steps} steps")
        _check_tensors(tensors, state)
        scaler = _check_scaler(json.loads(metadata["scaler"]), state)
    except SettingsError:
        raise
    except Exception as error:  # from safetensors, JSON (including RecursionError) or the checks above
        raise WeightsError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}: {reason(error, 200)}); "
            "delete it to restart the run"
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
    """Raise ValueError unless the tensors' names, shapes and dtypes are those of this run."""
    expected = state.model_tensors()
    for name, parameter in state.trained().items():
        own = {f"optimiser.{name}.step": torch.tensor(0.0)}
        own |= {f"optimiser.{name}.{moment}": parameter.detach() for moment in MOMENTS}
        if not tensors.keys().isdisjoint(own):  # a parameter has all of its state or none
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
    """Return the gradient scaler's state; raise ValueError if it is invalid."""
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
            # In the parameter's memory layout: a step over another layout may round differently.
            own = {moment: torch.empty_like(parameter).copy_(tensors[prefix + moment]) for moment in MOMENTS}
            loaded[number] = {"step": tensors[f"{prefix}step"].clone(), **own}
    # Parameter groups, learning rate included, follow from the configuration and the step.
    state.optimiser.load_state_dict({"state": loaded, "param_groups": state.optimiser.state_dict()["param_groups"]})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
