"""The training loop: steps of the optimiser, validation, logs and checkpoints of one process."""

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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import ImageError, counted, decimals
from ..evaluation.ratings import Ratings
from ..screen import Screen
from ..towers.mini import RelativeSharpness
from ..towers.statistics import detail_and_top
from .alignment import Aligned, save
from .checkpoint import (
    Progress,
    State,
    delete_checkpoints,
    delete_partial_files,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .config import Config
from .ema import recalibrate, update_ema, warmed_decay
from .losses import alignment_losses
from .photographs import read_energies, read_photograph
from .stacks import Degraded, Stacks, batch_of
from .trackers import AlignedMetric, log_image, show_scores, start_trackers
from .validation import Validation, rated_srcc

log = logging.getLogger(__name__)

MODEL, LOG = "model.safetensors", "log.jsonl"
# Consecutive fp16 overflows allowed: each halves the gradient scale, from 2^16 at the start to 2^-16.
OVERFLOWS = 32
# Largest number of photographs that the mini tower's `RelativeSharpness` is fitted to.
FITTED = 500


class DivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


@contextmanager
def _worker_errors_on_one_line() -> Iterator[None]:
    """Reduce the error of a loader's worker, which contains its traceback, to the original message."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).strip().splitlines()[-1].rpartition("ImageError: ")[2]) from None


@dataclass
class Run:
    """A training run in one process. Only the main process writes files."""

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
        """Train to the end, from the last checkpoint if `resume`, and write the model."""
        checkpoint = find_checkpoint(self.out) if resume else None
        if checkpoint is not None:
            read_checkpoint(checkpoint, self.state, self.config.steps)
        elif resume and self.main:
            log.info("%s holds no checkpoint to resume from; the run starts at its first step", self.out)
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
        """Fit `RelativeSharpness` to pristine photographs, before the first step."""
        towers = self.state.tower, self.state.ema
        heads = [module for tower in towers for module in tower.modules() if isinstance(module, RelativeSharpness)]
        if not heads:
            return
        paths = list(dict.fromkeys(self.training))[:FITTED]  # a random sample: `split_photographs` shuffles
        energies = read_energies(paths, silent=not self.main)
        for head in heads:
            head.fit(detail_and_top(energies).to(head.line.device))

    def _train(self) -> None:
        config, progress = self.config, self.progress
        bar = tqdm(
            total=config.steps,
            initial=progress.step,
            desc="steps",
            file=Screen(),
            disable=not self.main or None,
            unit="step",
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
        """Yield this process's numbered batches from a step on; all processes together cover 0, 1, 2, ..."""
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
            requested = time.monotonic()
            with _worker_errors_on_one_line():
                item = next(iterator)
            self.progress.add(waited=time.monotonic() - requested)
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

    def _validate(self) -> None:
        """Log the EMA's ranking accuracy, and the mean losses since the last validation."""
        progress, sums = self.progress, self.progress.sums
        count = sums.pop("steps")
        waiting = sums.pop("waited") / sums.pop("spent")
        means = {name: round(value / count, 5) for name, value in sums.items()}
        sums.clear()
        if self.main:
            found = self._evaluate()
            rate = learning_rate(self.config, progress.step - 1)  # of the last step
            self._log(step=progress.step, **means, learning_rate=rate, waiting=round(waiting, 3), **found)
            self.accelerator.log(
                {f"loss/{name}": value for name, value in means.items()}
                | {"learning_rate": rate, "waiting": waiting, "accuracy/all": found["accuracy"]}
                | {f"accuracy/{name}": value for name, value in found["types"].items()}
                | ({"srcc": found["srcc"]} if found.get("srcc") is not None else {}),
                step=progress.step,
            )
            if self.accelerator.trackers:
                self._show_scores()
        self.accelerator.wait_for_everyone()

    def _show_scores(self) -> None:
        """Give the trackers what the validation photographs score, and a map."""
        metric = AlignedMetric(self.state.ema, self.aligned)
        means, image = show_scores(metric, self.validation.pristine)
        self.accelerator.log(means, step=self.progress.step)
        log_image(self.accelerator, "map/quality", image, self.progress.step)

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
        """Prepare the validation images, and truncate both logs to the checkpoint."""
        delete_partial_files(self.out, MODEL)
        self.validation = Validation([read_photograph(path) for path in self.validation_paths], self.config, self.seed)
        start_trackers(self.accelerator, self.out, self.progress.step)
        self.journal = (self.out / LOG).open("ab")
        self.journal.truncate(min(self.progress.log_bytes, self.journal.tell()))  # a lost log starts empty
        self.journal.seek(0, os.SEEK_END)

    def _log(self, **record: Any) -> None:
        if self.main:
            line = {"seconds": round(self.progress.seconds, 1)} | record
            self.journal.write(json.dumps(line).encode() + b"\n")
            self.journal.flush()

    def _finish(self) -> None:
        """Recalibrate the EMA's normalisation statistics, evaluate it and write the model."""
        config = self.config
        if config.recalibrate:
            size = (config.recalibrate_crop,)
            large = Degraded(Stacks(self.training, config, self.seed + 1_000_003, size))
            numbers = range(config.recalibrate)
            loader: DataLoader[Any] = DataLoader(large, batch_size=None, sampler=numbers, num_workers=config.workers)
            with _worker_errors_on_one_line():
                recalibrate(self.state.ema, loader, self.accelerator.device)
        found = self._evaluate()
        self._log(step=self.progress.step, finished=True, **found)
        log.info(
            "%d steps; on %s ranking accuracy %.4f, %.4f of the degradation types fall%s",
            self.progress.step,
            counted(len(self.validation_paths), "validation photograph"),
            found["accuracy"],
            found["falling"],
            "" if found.get("srcc") is None else f"; SRCC with the opinion scores {decimals(found['srcc'])}",
        )
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
    """Return the learning rate of a step, counted from 0: a linear warm-up, times half a cosine if `config.cosine`."""
    factor = min(1.0, (step + 1) / max(1, config.warmup))
    if config.cosine:
        factor = factor * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * factor


def is_lost(norm: float, progress: Progress, precision: str) -> bool:
    """Count consecutive overflows of the gradient in `progress`, and return whether there are too many.

    fp16 gradients overflow now and then, for which the scaler skips the step and halves its scale. With any other
    precision a single overflow is too many.
    """
    progress.overflows = 0 if math.isfinite(norm) else progress.overflows + 1
    return progress.overflows > (OVERFLOWS if precision == "fp16" else 0)
