"""Training by QualiCLIP's strategy (arXiv:2403.11176): an image tower is aligned with prompts, without opinion scores.

Stacks of equally degraded pairs of crops are ranked by their similarity to frozen antonym anchors: away from the
positive one and towards the negative one as the level rises, alike for the two crops of a level.

The folder of a run holds `model.safetensors` when the run is done, `log.jsonl`, TensorBoard's events and, while it
runs, the last checkpoint. The seed and the number of a batch decide all that is drawn for it (see `stacks`), dropout
too, so a run that was killed and resumed gives the same model, bit for bit, as one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import ImageError, SettingsError, WeightsError
from ..evaluation.ratings import Ratings
from ..images.convert import MIN_SIDE
from ..pretrained.read import read
from ..screen import Screen
from ..towers.mini import RelativeSharpness
from ..towers.statistics import detail_and_top
from .alignment import Aligned, build, save
from .checkpoint import (
    PATTERN,
    Progress,
    State,
    delete_checkpoints,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .config import Config
from .ema import recalibrate, update_ema, warmed_decay
from .losses import alignment_losses
from .photographs import read_energies, read_photograph, shorter_side, split_photographs
from .stacks import Degraded, Stacks, batch_of
from .validation import Validation, rated_srcc

log = logging.getLogger(__name__)

MODEL, LOG = "model.safetensors", "log.jsonl"
# Overflows in a row that fp16 may have: each halves the scale, which begins at 2^16, so by then it is 2^-16.
OVERFLOWS = 32
# Photographs that the mini tower's `RelativeSharpness` is fitted to, at most.
FITTED = 500


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


def train(
    config: Config,
    pristine: Path,
    out: Path,
    seed: int = 0,
    exclude: Path | None = None,
    licence: str = "not stated",
    start: Path | None = None,
    ratings: Ratings | None = None,
    resume: bool = False,
    device: str | None = None,
) -> Path:
    """Run a training and return the path of its model.

    Configuration, photographs, seed and number of processes decide the bytes of the model file, on one machine with
    one version of torch and the same number of threads, whether the run was interrupted or not.

    Args:
        pristine: folder of photographs; see `photographs.list_photographs`.
        out: folder of the run.
        exclude: list of photographs not to train on.
        licence: written into the model file as it is.
        start: model whose tower and anchors the run begins from.
        ratings: rated images; the SRCC with their opinion scores is logged at every validation and decides nothing.
        resume: continue from the last checkpoint in `out`, or from the beginning if there is none.
        device: `cpu` leaves a GPU that is there alone.

    Raises:
        SettingsError: photographs missing or too few, weights that do not fit, a folder that holds another run.
        ImageError: a photograph that cannot be decoded.
        WeightsError: weights or a checkpoint that cannot be found or read.
        DivergedError: the loss became NaN or infinite; says at which step and in which part.
    """
    if torch.get_default_dtype() != torch.float32:
        raise SettingsError(f"torch's default dtype is {torch.get_default_dtype()}; expected torch.float32 to train")
    accelerator = create_accelerator(config, out, device)
    earlier = [path.name for name in (MODEL, LOG, PATTERN) for path in out.glob(name)]
    if earlier and not resume:
        raise SettingsError(
            f"{out} holds {' and '.join(earlier)} of an earlier run; pass --resume to continue it, "
            "or choose another folder"
        )
    quiet = not accelerator.is_main_process
    training, validation = split_photographs(config, pristine, exclude, seed, quiet)
    if ratings is not None:
        if not quiet:
            log.info("opinion scores: %s", ratings)
        ratings = ratings.averaged()
        _check_rated(ratings)
    accelerator.wait_for_everyone()  # before the first process leaves traces that another takes for an earlier run's
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be created ({error.strerror}); choose another folder") from error
    # What the caller draws afterwards does not depend on the run.
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        aligned = build(config, seed, start)
        names = [path.relative_to(pristine).as_posix() for path in training]
        decisive = [config.digest, seed, aligned.source, accelerator.num_processes, names]
        digest = sha256(json.dumps(decisive).encode()).hexdigest()
        if not (resume and _is_finished(out, digest)):
            _Run(config, accelerator, aligned, training, validation, out, seed, licence, ratings, digest).go(resume)
        elif not quiet:
            _delete_partial_files(out)
    accelerator.end_training()
    return out / MODEL


def create_accelerator(config: Config, out: Path, device: str | None) -> Accelerator:
    """Choose device, processes and precision anew, whatever an earlier run of this process had.

    Raises:
        SettingsError: a device or precision that cannot be had.
    """
    if device not in (None, "cpu"):
        raise SettingsError(f"device is {device!r}; expected cpu or none: `accelerate launch` chooses GPUs")
    # Accelerate keeps both for the whole process, with no public way to forget them. Without the private one it
    # refuses what differs, below.
    forget = getattr(AcceleratorState, "_reset_state", None)
    if is_initialized() and forget is not None:
        forget(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            gradient_accumulation_steps=config.accumulate,
            log_with="tensorboard",
            project_dir=out,
            # The others wait while the first process validates, and prepares the validation images.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"precision {config.precision} or the device cannot be used ({reason})") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would go on in fp32
        raise SettingsError("precision is fp16, which needs a GPU; expected fp32 or bf16 on a CPU")
    return accelerator


def _check_rated(ratings: Ratings) -> None:
    """Let an image that cannot be scored stop the run before it begins, not at its first validation."""
    for path in ratings.paths:
        if (side := shorter_side(path, "leave it out of --ratings")) < MIN_SIDE:
            raise ImageError(f"{path} has a side of {side} pixels; expected at least {MIN_SIDE} to be scored")


def _is_finished(out: Path, digest: str) -> bool:
    """Whether a folder holds this run's model and no checkpoint to continue from."""
    path = out / MODEL
    if find_checkpoint(out) is not None or not path.exists():
        return False
    metadata = read(path).metadata
    try:
        run = json.loads(metadata.get("training", "{}")).get("run")
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} does not say which run it is of ({error}); choose another folder") from error
    if run != digest:
        raise SettingsError(f"{out} holds another run, which is finished; choose another folder")
    return True


def _delete_partial_files(out: Path) -> None:
    """Delete what a killed process left half written."""
    for pattern in (f"{MODEL}.*.part", f"{PATTERN}.*.part"):
        for path in out.glob(pattern):
            path.unlink()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Reduce a loader worker's error, whose text contains the worker's traceback, to its own message."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).strip().splitlines()[-1].rpartition("ImageError: ")[2]) from None


@dataclass
class _Run:
    """One run of one process. Only the main process writes."""

    config: Config
    accelerator: Accelerator
    aligned: Aligned
    training: list[Path]
    validation_paths: list[Path]
    out: Path
    seed: int
    licence: str
    ratings: Ratings | None
    digest: str

    def __post_init__(self) -> None:
        config, device = self.config, self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.aligned.anchors = self.aligned.anchors.to(device)
        parameters = [parameter for parameter in self.aligned.tower.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
        )
        ema = copy.deepcopy(self.aligned.tower).to(device).requires_grad_(False)
        self.tower, self.optimiser = self.accelerator.prepare(self.aligned.tower, optimiser)
        unwrapped: nn.Module = self.accelerator.unwrap_model(self.tower)
        self.state = State(unwrapped, ema, optimiser, self.accelerator.scaler, Progress(self.digest))

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def go(self, resume: bool) -> None:
        """Train from the beginning or the last checkpoint to the end, and write the model."""
        checkpoint = find_checkpoint(self.out) if resume else None
        if checkpoint is not None:
            read_checkpoint(checkpoint, self.state, self.config.steps)
        if self.main:
            self._open_logs()
        if checkpoint is None:
            self._fit_sharpness()
            self._log(
                seed=self.seed,
                photographs=len(self.training),
                processes=self.accelerator.num_processes,
                device=str(self.accelerator.device),
                config=dataclasses.asdict(self.config),
                digest=self.config.digest,
            )
        self._train()
        self.accelerator.wait_for_everyone()
        if self.main:
            self._finish()
            delete_checkpoints(self.out)
            self.journal.close()

    def _fit_sharpness(self) -> None:
        """Fit `RelativeSharpness` to undistorted photographs, which has to be done before any training."""
        towers = self.state.tower, self.state.ema
        heads = [module for tower in towers for module in tower.modules() if isinstance(module, RelativeSharpness)]
        if not heads:
            return
        paths = list(dict.fromkeys(self.training))[:FITTED]  # which `split_photographs` has shuffled
        energies = read_energies(paths, silent=not self.main)
        for head in heads:
            head.fit(detail_and_top(energies).to(head.line.device))

    # ------------------------------------------------------------ the loop

    def _train(self) -> None:
        config, progress = self.config, self.progress
        bar = tqdm(
            total=config.steps, initial=progress.step, desc="steps", file=Screen(), disable=not self.main, unit="step"
        )
        batches = self._batches(progress.step)
        began = time.monotonic() - progress.seconds
        self.tower.train(config.statistics)
        while progress.step < config.steps:
            loss = self._step(batches)
            progress.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if progress.step % config.validate_every == 0 or progress.step == config.steps:
                self._validate()
            if progress.step % config.checkpoint_every == 0 or progress.step == config.steps:
                self._write_checkpoint()
        bar.close()

    def _batches(self, step: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield this process's batches after a step, with their numbers: all processes together take 0, 1, 2, ..."""
        config, accelerator = self.config, self.accelerator
        each = accelerator.num_processes * config.accumulate
        numbers = range(step * each + accelerator.process_index, config.steps * each, accelerator.num_processes)
        stacks = Stacks(self.training, config, self.seed)
        in_workers = config.degrade_on == "workers"
        loader: DataLoader[Any] = DataLoader(
            Degraded(stacks) if in_workers else stacks,
            batch_size=None,
            sampler=numbers,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            pin_memory=in_workers and accelerator.device.type == "cuda",
        )
        iterator = iter(loader)
        for number in numbers:
            asked = time.monotonic()
            with _in_one_line():
                item = next(iterator)
            self.progress.add(waited=time.monotonic() - asked)
            if in_workers:
                yield number, {name: value.to(accelerator.device, non_blocking=True) for name, value in item.items()}
            else:
                yield number, batch_of(item, config, accelerator.device)

    def _step(self, batches: Iterator[tuple[int, dict[str, Tensor]]]) -> float:
        """Take one step of the optimiser and return its loss."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        began = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, progress.step)
        progress.step += 1
        total = 0.0
        for _ in range(config.accumulate):
            number, batch = next(batches)
            torch.manual_seed(random.Random(f"dropout {self.seed} {number}").getrandbits(63))
            with accelerator.accumulate(self.tower):
                with accelerator.autocast():
                    parts = alignment_losses(self.tower, self.aligned, batch, config)
                values = {name: part.item() for name, part in parts.items()}
                self._check_losses(values)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.tower.parameters(), config.clip or math.inf)
                    self._check_gradient(float(norm))
                self.optimiser.step()
                self.optimiser.zero_grad()
            progress.add(**{name: value / config.accumulate for name, value in values.items()})
            total += values["loss"] / config.accumulate
        update_ema(self.state.ema, self.state.tower, warmed_decay(config.average, progress.step))
        progress.add(spent=time.monotonic() - began, steps=1)
        return total

    def _check_losses(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self._stop(name, f"{name} loss is {value}")

    def _check_gradient(self, norm: float) -> None:
        if is_lost(norm, self.progress, self.config.precision):
            self._stop("gradient", f"gradient of the loss is {norm}")

    def _stop(self, name: str, what: str) -> None:
        self._log(step=self.progress.step, stopped=name)
        raise DivergedError(f"the {what} at step {self.progress.step}; try a lower learning_rate")

    def _write_checkpoint(self) -> None:
        if self.main:
            self.progress.log_bytes = self.journal.tell()
            write_checkpoint(self.out, self.state)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ validation and logs

    def _validate(self) -> None:
        """Log how the averaged weights rank, and the means of the losses since the last validation."""
        progress, sums = self.progress, self.progress.sums
        count = sums.pop("steps")
        waiting = sums.pop("waited") / sums.pop("spent")
        means = {name: round(value / count, 5) for name, value in sums.items()}
        sums.clear()
        if self.main:
            found = self._evaluate()
            rate = learning_rate(self.config, progress.step - 1)  # of the step that was just done
            self._log(step=progress.step, **means, learning_rate=rate, waiting=round(waiting, 3), **found)
            self.accelerator.log(
                {f"loss/{name}": value for name, value in means.items()}
                | {"learning_rate": rate, "waiting": waiting, "accuracy/all": found["accuracy"]}
                | {f"accuracy/{name}": value for name, value in found["types"].items()}
                | ({"srcc": found["srcc"]} if found.get("srcc") is not None else {}),
                step=progress.step,
            )
        self.accelerator.wait_for_everyone()

    def _evaluate(self) -> dict[str, Any]:
        accuracy, falling = self.validation.evaluate(self.state.ema, self.aligned)
        found: dict[str, Any] = {
            "accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
            "falling": round(falling, 4),
            "types": {name: round(value, 3) for name, value in accuracy.items()},
        }
        if self.ratings is not None:
            srcc = rated_srcc(self.state.ema, self.aligned, self.ratings)
            found["srcc"] = None if srcc is None else round(srcc, 4)
        return found

    def _open_logs(self) -> None:
        """Cut both logs to where the checkpoint left them, and prepare the validation images."""
        _delete_partial_files(self.out)
        self.validation = Validation([read_photograph(path) for path in self.validation_paths], self.config, self.seed)
        self.accelerator.init_trackers(
            "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.progress.step + 1}}
        )
        self.journal = (self.out / LOG).open("ab")
        self.journal.truncate(min(self.progress.log_bytes, self.journal.tell()))  # a log that was lost begins anew
        self.journal.seek(0, os.SEEK_END)

    def _log(self, **record: Any) -> None:
        if self.main:
            line = {"seconds": round(self.progress.seconds, 1)} | record
            self.journal.write(json.dumps(line).encode() + b"\n")
            self.journal.flush()

    def _finish(self) -> None:
        """Take the averaged weights' statistics anew, evaluate them and write the model."""
        config = self.config
        if config.recalibrate:
            size = (config.recalibrate_crop,)
            large = Degraded(Stacks(self.training, config, self.seed + 1_000_003, size))
            numbers = range(config.recalibrate)
            loader: DataLoader[Any] = DataLoader(large, batch_size=None, sampler=numbers, num_workers=config.workers)
            with _in_one_line():
                recalibrate(self.state.ema, loader, self.accelerator.device)
        self._log(step=self.progress.step, finished=True, **self._evaluate())
        summary = {
            "run": self.digest,
            "seed": self.seed,
            "steps": config.steps,
            "config_sha256": config.digest,
            "photographs": len(self.training),
            "start": self.aligned.source,
        }
        save(self.out / MODEL, self.aligned, self.state.ema.state_dict(), summary, self.licence)


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of a step, counted from 0: a linear warm-up, times half a cosine if `config.cosine`."""
    factor = min(1.0, (step + 1) / max(1, config.warmup))
    if config.cosine:
        factor = factor * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * factor


def is_lost(norm: float, progress: Progress, precision: str) -> bool:
    """Count overflows of the gradient in a row; whether there are too many.

    With fp16 the gradient overflows now and then: the scaler leaves the step out and halves its scale. With any other
    precision a single overflow is too many.
    """
    progress.overflows = 0 if math.isfinite(norm) else progress.overflows + 1
    return progress.overflows > (OVERFLOWS if precision == "fp16" else 0)
