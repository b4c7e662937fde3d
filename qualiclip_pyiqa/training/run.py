"""Alignment training by QualiCLIP's strategy (arXiv:2403.11176), without opinion scores.

Stacks of equally degraded pairs of crops are ranked by their similarity to frozen antonym anchors: away from the
positive one and towards the negative one as the level rises, alike for the two crops of a level.

A run's folder holds `model.safetensors` when it is done, `log.jsonl` and TensorBoard's events, and while it runs the
last checkpoint. Everything a step looks at is decided by the seed and the step's number (see `stacks`), so a checkpoint
is weights, optimiser and a number, and a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import ImageError, SettingsError
from ..evaluation.ratings import Ratings
from ..images.convert import MIN_SIDE
from ..pretrained import weights as weight_files
from ..towers.mini import RelativeSharpness, Standardise, detail_and_top
from .alignment import Aligned, build, save, similarities
from .config import Config
from .losses import across_loss, centre_loss, consistency_loss, ranking_loss
from .stacks import Degraded, Stacks, batch_of, list_photographs, read_energies, read_photograph, shorter_side
from .validation import Validation, rated_srcc

log = logging.getLogger(__name__)

MODEL, LOG = "model.safetensors", "log.jsonl"
# Overflows in a row that fp16 may have: each halves the scale, which begins at 2^16, so by then it is 2^-16.
OVERFLOWS = 32
# Photographs that the mini tower's `RelativeSharpness` is fitted to, at most.
FITTED = 500


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


def losses(tower: nn.Module, aligned: Aligned, batch: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """All parts of the loss of one step, and their weighted sum under `loss`."""
    pictures, level = batch["pictures"], batch["level"]
    b, n_levels, k = pictures.shape[:3]
    features = tower(pictures.flatten(0, 2).float().div(255))
    c = similarities(features, aligned.anchors, aligned.unit)
    if config.pairs == "mean":
        c = c.mean(1, keepdim=True)
    stacked = c.unflatten(0, (b, n_levels, k))
    positive, negative = stacked[..., 0], stacked[..., 1]
    parts = {
        "consistency": consistency_loss(stacked.flatten(3), config.margin_consistency),
        "positive": ranking_loss(positive, config.margin_rank, batch["ordered"], batch["severity"]),
        "negative": ranking_loss(-negative, config.margin_rank, batch["ordered"], batch["severity"]),
    }
    difference = c[..., 0] - c[..., 1]
    if config.weight_across:
        each = level[:, :, None].expand(-1, -1, k).flatten()
        # Where levels are not monotone, only what is pristine is known.
        known = batch["monotone"][:, None].expand(-1, n_levels * k).flatten() | (each == 0)
        number = torch.arange(b, device=level.device)[:, None].expand(-1, n_levels * k).flatten()
        severity = each[:, None] * batch["severity"][:, None].expand(-1, n_levels * k, -1).flatten(0, 1)
        parts["across"] = across_loss(
            difference[known], severity[known], number[known], config.margin_across, config.gap_across
        )
    if config.weight_centre:
        parts["centre"] = centre_loss(difference)
    parts["loss"] = sum((getattr(config, f"weight_{name}") * part for name, part in parts.items()), torch.zeros(()))
    return parts


@torch.no_grad()
def recalibrate(tower: nn.Module, batches: DataLoader[dict[str, Tensor]], device: torch.device) -> None:
    """Set all normalisation statistics to their averages over batches: averaged weights have none of their own."""
    norms = [m for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]
    heads = [m for m in tower.modules() if isinstance(m, Standardise)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    tower.train()
    for count, batch in enumerate(batches, 1):
        for head in heads:
            head.momentum = 1 / count
        tower(batch["pictures"].flatten(0, 2).to(device).float().div(255))
    tower.eval()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A worker's error comes with the worker's traceback in its text; what it said itself is the last line."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).strip().splitlines()[-1].rpartition("ImageError: ")[2]) from None


@dataclasses.dataclass
class Progress:
    """How far a run is; what a checkpoint holds beside what torch and Accelerate know.

    Attributes:
        run: digest of everything that decides the run.
        step: steps done. seconds: spent on them, all attempts together. log_bytes: length of the log by then.
        sums: of each part of the loss, and of the seconds waited for data and spent in all, since the last look.
    """

    run: str
    step: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


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

    The result is decided by configuration, photographs, seed and number of processes (on one machine with one version
    of torch and as many threads); a run that was killed and resumed gives the same as one that was not.

    Args:
        pristine: folder of photographs; see `list_photographs`.
        out: folder of the run.
        exclude: list of photographs not to train on.
        licence: goes into the model's file as it is.
        start: model whose tower and anchors the run begins from.
        ratings: rated pictures; their SRCC at every look is logged, and nothing is decided by it.
        resume: go on from the last checkpoint in `out`; from the beginning if there is none.
        device: `cpu` keeps the run off a GPU that is there.

    Raises:
        SettingsError: photographs missing or too few, weights that do not fit, a folder that holds another run.
        ImageError: a photograph that cannot be decoded. WeightsError: weights that cannot be found or read.
        DivergedError: the loss became NaN or infinite; says at which step and in which part.
    """
    if device not in (None, "cpu"):
        raise SettingsError(f"device is {device!r}; expected cpu or none: `accelerate launch` chooses GPUs")
    AcceleratorState._reset_state()  # a process may train twice, and with another precision
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_dir=out,
        # The others wait while the first process looks and builds what it looks at.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would go on in fp32
        raise SettingsError("precision is fp16, which is for a GPU; expected fp32 or bf16 on a CPU")
    _Run(config, pristine, out, seed, exclude, licence, start, ratings, resume, accelerator).go()
    accelerator.end_training()
    return out / MODEL


class _Run:
    """One run of one process; only the main one writes."""

    def __init__(
        self,
        config: Config,
        pristine: Path,
        out: Path,
        seed: int,
        exclude: Path | None,
        licence: str,
        start: Path | None,
        ratings: Ratings | None,
        resume: bool,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.out, self.seed, self.licence, self.ratings = config, out, seed, licence, ratings
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        earlier = [path.name for name in (MODEL, LOG, "checkpoint-*") for path in out.glob(name)]
        if earlier and not resume:
            raise SettingsError(
                f"{out} holds {' and '.join(earlier)} of an earlier run; pass --resume to go on with it, "
                "or choose another folder"
            )
        self.training, validation = self._divide(pristine, exclude)
        if ratings is not None:
            if self.main:
                log.info("opinion scores: %s", ratings)
            for path in ratings.paths:  # what cannot be scored shall stop the run now and not at its first look
                if (side := shorter_side(path, "of --ratings")) < MIN_SIDE:
                    raise ImageError(f"{path} has a side of {side} pixels; expected at least {MIN_SIDE} to be scored")
        accelerator.wait_for_everyone()  # nobody looks for an earlier run after another process has begun this one
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{out} cannot be made ({error.strerror}); choose another folder") from error

        self.aligned = build(config, seed, start)
        self.aligned.anchors = self.aligned.anchors.to(accelerator.device)
        self.averaged = copy.deepcopy(self.aligned.tower).to(accelerator.device).requires_grad_(False)
        parameters = [parameter for parameter in self.aligned.tower.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        self.tower, self.optimiser = accelerator.prepare(self.aligned.tower, optimiser)
        self.progress = Progress(self._digest(pristine))
        accelerator.register_for_checkpointing(self.schedule, self.averaged, self.progress)
        self.finished = False
        self.overflows = 0
        resumed = resume and self._restore()
        if self.main:
            self._sweep()
        if self.finished:
            return
        self.validation = Validation([read_photograph(p) for p in validation], config, seed) if self.main else None
        if self.main:
            accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": self.progress.step + 1}}
            )
            self.journal = (out / LOG).open("ab")
            # To where the checkpoint's log ended; a lost log begins anew.
            self.journal.truncate(min(self.progress.log_bytes, self.journal.tell()))
            self.journal.seek(0, os.SEEK_END)
        if not resumed:
            self._fit()
            self._note(
                seed=seed,
                photographs=len(self.training),
                processes=accelerator.num_processes,
                device=str(accelerator.device),
                config=dataclasses.asdict(config),
                digest=config.digest,
            )

    def _divide(self, pristine: Path, exclude: Path | None) -> tuple[list[Path], list[Path]]:
        """Photographs to train on, `repeat` applied, and to validate on."""
        config, smallest = self.config, self.config.smallest_photograph
        paths = list_photographs(pristine, exclude)
        watched = tqdm(paths, desc="photographs", file=sys.stderr, leave=False, disable=not self.main)
        large = [path for path in watched if shorter_side(path) >= smallest]
        if len(large) < len(paths) and self.main:
            log.warning("%d photographs with a side under %d are left out", len(paths) - len(large), smallest)
        if len(large) < config.validation + config.stacks:
            raise SettingsError(
                f"{pristine} has {len(large)} photographs of at least {smallest} pixels a side; "
                f"expected {config.validation} to validate on and at least {config.stacks} to train on"
            )
        for name in config.repeat:
            if not (pristine / name).exists():
                raise SettingsError(f"repeat names {name!r}, which is not in {pristine}; expected folders of it")
        random.Random(f"split {self.seed}").shuffle(large)
        validation, kept = large[: config.validation], large[config.validation :]
        folders = [path.relative_to(pristine).parts[0] for path in kept]
        times = [int(config.repeat.get(folder, 1)) for folder in folders]
        return [path for path, count in zip(kept, times, strict=True) for _ in range(count)], validation

    def _fit(self) -> None:
        """What a tower knows of undistorted photographs before it learns from degraded ones."""
        towers = self.accelerator.unwrap_model(self.tower), self.averaged
        heads = [module for tower in towers for module in tower.modules() if isinstance(module, RelativeSharpness)]
        if not heads:
            return
        paths = list(dict.fromkeys(self.training))[:FITTED]  # in an order drawn at random
        energies = read_energies(paths, silent=not self.main)
        for head in heads:
            head.fit(detail_and_top(energies).to(head.line.device))

    def _digest(self, pristine: Path) -> str:
        names = [path.relative_to(pristine).as_posix() for path in self.training]
        decisive = [self.config.digest, self.seed, self.aligned.source, self.accelerator.num_processes, names]
        return sha256(json.dumps(decisive).encode()).hexdigest()

    def _rate(self, step: int) -> float:
        rate = min(1.0, (step + 1) / max(1, self.config.warmup))
        return rate * 0.5 * (1 + math.cos(math.pi * step / self.config.steps)) if self.config.cosine else rate

    # ------------------------------------------------------------ checkpoints

    def _restore(self) -> bool:
        found = sorted(self.out.glob("checkpoint-*"))
        expected = self.progress.run
        if not found:
            if (self.out / MODEL).exists():
                _, metadata = weight_files.read(self.out / MODEL)
                if json.loads(metadata.get("training", "{}")).get("run") != expected:
                    raise SettingsError(f"{self.out} holds another run, which is finished; choose another folder")
                self.finished = True
            return False
        if not found[-1].name.endswith(expected[:8]):
            raise SettingsError(
                f"{found[-1]} belongs to another run: configuration, seed, photographs, start or number of processes "
                "differ; repeat its command, or choose another folder"
            )
        self.accelerator.load_state(str(found[-1]))
        return True

    def _checkpoint(self) -> None:
        """The state of all processes, under its name when it is complete; then the one before is deleted."""
        final = self.out / f"checkpoint-{self.progress.step:09d}-{self.progress.run[:8]}"
        partial = self.out / "checkpoint.part"
        if self.main:
            self.progress.log_bytes = self.journal.tell()
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.main:
            partial.replace(final)
            self._delete_checkpoints(but=final)

    def _sweep(self) -> None:
        """Delete what a process that was killed left half written or half deleted."""
        shutil.rmtree(self.out / "checkpoint.part", ignore_errors=True)
        for left in self.out.glob(f"{MODEL}.*.part"):
            left.unlink()

    def _delete_checkpoints(self, but: Path | None = None) -> None:
        for old in self.out.glob("checkpoint-*"):
            if old != but:
                # Renamed first: what bears a checkpoint's name is complete at any moment.
                gone = self.out / "checkpoint.part"
                shutil.rmtree(gone, ignore_errors=True)
                old.replace(gone)
                shutil.rmtree(gone)

    # ------------------------------------------------------------ the loop

    def go(self) -> None:
        if self.finished:
            return
        config, accelerator, progress = self.config, self.accelerator, self.progress
        bar = tqdm(
            total=config.steps, initial=progress.step, desc="steps", file=sys.stderr, disable=not self.main, unit="step"
        )
        batches = self._batches(self.training, progress.step)
        began = time.monotonic() - progress.seconds
        self._mode()
        while progress.step < config.steps:
            loss = self._step(batches)
            progress.seconds = time.monotonic() - began
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if progress.step % config.validate_every == 0 or progress.step == config.steps:
                self._look()
                self._mode()
            if progress.step % config.checkpoint_every == 0 or progress.step == config.steps:
                self._checkpoint()
        bar.close()
        accelerator.wait_for_everyone()
        if self.main:
            self._finish()
            self._delete_checkpoints()

    def _mode(self) -> None:
        self.tower.train(self.config.statistics)

    def _batches(self, paths: list[Path], step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from a step on: all processes together take items 0, 1, 2, ... in turn."""
        config, accelerator = self.config, self.accelerator
        each = accelerator.num_processes * config.accumulate
        numbers = range(step * each + accelerator.process_index, config.steps * each, accelerator.num_processes)
        stacks = Stacks(paths, config, self.seed)
        here = config.degrade_on == "workers"
        loader: DataLoader[Any] = DataLoader(
            Degraded(stacks) if here else stacks,
            batch_size=None,
            sampler=numbers,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            pin_memory=here and accelerator.device.type == "cuda",
        )
        iterator = iter(loader)
        while True:
            asked = time.monotonic()
            with _in_one_line():
                item = next(iterator)
            self.progress.add(waited=time.monotonic() - asked)
            if here:
                yield {name: value.to(accelerator.device, non_blocking=True) for name, value in item.items()}
            else:
                yield batch_of(item, config, accelerator.device)

    def _step(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """One step of the optimiser; returns the loss."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        began = time.monotonic()
        progress.step += 1
        total = 0.0
        for _ in range(config.accumulate):
            batch = next(batches)
            with accelerator.accumulate(self.tower):
                with accelerator.autocast():
                    parts = losses(self.tower, self.aligned, batch, config)
                values = {name: part.item() for name, part in parts.items()}
                self._stop_if_diverged(values)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.tower.parameters(), config.clip or math.inf)
                    self._watch_gradient(float(norm))
                self.optimiser.step()
                self.optimiser.zero_grad()
            progress.add(**{name: value / config.accumulate for name, value in values.items()})
            total += values["loss"] / config.accumulate
        self.schedule.step()
        decay = min(config.average, progress.step / (progress.step + 10))
        with torch.no_grad():
            trained = accelerator.unwrap_model(self.tower).state_dict()
            for old, new in zip(self.averaged.state_dict().values(), trained.values(), strict=True):
                if old.is_floating_point():
                    old.lerp_(new, 1 - decay)
        progress.add(spent=time.monotonic() - began, steps=1)
        return total

    def _stop_if_diverged(self, values: dict[str, float]) -> None:
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            step = self.progress.step
            self._note(step=step, stopped=bad)
            what = "gradient of the loss" if bad == "gradient" else f"{bad} loss"
            raise DivergedError(f"the {what} is {values[bad]} at step {step}; try a lower learning_rate")

    def _watch_gradient(self, norm: float) -> None:
        """With fp16 an overflow is expected now and then, and the scaler leaves the step out; but not for ever."""
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (OVERFLOWS if self.config.precision == "fp16" else 0):
            self._stop_if_diverged({"gradient": norm})

    # ------------------------------------------------------------ looks and the log

    def _look(self) -> None:
        """Log what the averaged weights can do, and the means since the last look."""
        progress, sums = self.progress, self.progress.sums
        count = sums.pop("steps")
        waiting = sums.pop("waited") / sums.pop("spent")
        means = {name: round(value / count, 5) for name, value in sums.items()}
        sums.clear()
        if self.main:
            found = self._judge()
            # The rate of the step that was just done.
            rate = self.config.learning_rate * self._rate(progress.step - 1)
            self._note(step=progress.step, **means, learning_rate=rate, waiting=round(waiting, 3), **found)
            self.accelerator.log(
                {f"loss/{name}": value for name, value in means.items()}
                | {"learning_rate": rate, "waiting": waiting, "accuracy/all": found["accuracy"]}
                | {f"accuracy/{name}": value for name, value in found["types"].items()}
                | ({"srcc": found["srcc"]} if found.get("srcc") is not None else {}),
                step=progress.step,
            )
        self.accelerator.wait_for_everyone()

    def _judge(self) -> dict[str, Any]:
        assert self.validation is not None
        accuracy, falling = self.validation.look(self.averaged, self.aligned)
        found: dict[str, Any] = {
            "accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
            "falling": round(falling, 4),
            "types": {name: round(value, 3) for name, value in accuracy.items()},
        }
        if self.ratings is not None:
            srcc = rated_srcc(self.averaged, self.aligned, self.ratings)
            found["srcc"] = round(srcc, 4) if math.isfinite(srcc) else None  # JSON has no NaN
        return found

    def _note(self, **record: Any) -> None:
        if self.main:
            line = {"seconds": round(self.progress.seconds, 1)} | record
            self.journal.write(json.dumps(line).encode() + b"\n")
            self.journal.flush()

    def _finish(self) -> None:
        """Statistics of the averaged weights, their last look, the model."""
        config = self.config
        if config.recalibrate:
            size = (config.recalibrate_crop,)
            large = Degraded(Stacks(self.training, config, self.seed + 1_000_003, size))
            numbers = range(config.recalibrate)
            loader: DataLoader[Any] = DataLoader(large, batch_size=None, sampler=numbers, num_workers=config.workers)
            with _in_one_line():
                recalibrate(self.averaged, loader, self.accelerator.device)
        self._note(step=self.progress.step, finished=True, **self._judge())
        summary = {
            "run": self.progress.run,
            "seed": self.seed,
            "steps": config.steps,
            "config_sha256": config.digest,
            "photographs": len(self.training),
            "start": self.aligned.source,
        }
        save(self.out / MODEL, self.aligned, self.averaged.state_dict(), summary, self.licence)
        self.journal.close()
