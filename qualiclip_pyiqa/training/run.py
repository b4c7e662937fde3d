"""Training by QualiCLIP's strategy (arXiv:2403.11176): align an image tower with prompts, without opinion scores.

Pairs of equally degraded crops, in stacks of ascending distortion level, are ranked by their similarity to frozen
antonym anchors: with the level it falls to the positive one and rises to the negative one, and both crops of a level
agree.

The folder of a run holds `log.jsonl`, TensorBoard's events, the last checkpoint while it runs, and `model.safetensors`
when it is done. Seed and batch number determine all random draws (see `stacks`), dropout included, so a resumed run
gives the same model, bit for bit, as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import InitProcessGroupKwargs

from ..errors import ImageError, SettingsError, WeightsError, one_line
from ..evaluation.ratings import Ratings
from ..images.convert import MIN_SIDE
from ..pretrained.read import read
from .alignment import build
from .checkpoint import PATTERN, delete_partial_files, find_checkpoint
from .config import Config
from .loop import LOG, MODEL, Run
from .photographs import shorter_side, split_photographs
from .trackers import Tracker, check_trackers

log = logging.getLogger(__name__)


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
    trackers: Sequence[Tracker] = ("tensorboard",),
) -> Path:
    """Train a model and return its path.

    Configuration, photographs, seed and number of processes determine the bytes of the model file, for one machine,
    version of torch and number of threads, whether the run was interrupted or not.

    Args:
        pristine: folder of photographs; see `photographs.list_photographs`.
        out: folder of the run.
        exclude: text file that lists photographs not to train on.
        licence: licence of the model, written into its file.
        start: model whose tower and anchors the run starts from.
        ratings: rated images; the SRCC with their opinion scores is logged at every validation, for information only.
        resume: continue from the last checkpoint in `out`, or from the beginning if there is none.
        device: `cpu` to ignore a GPU; None: chosen by Accelerate.
        trackers: of Accelerate, that get the log's figures, the scores of the validation photographs and a quality map
            at every validation: "tensorboard", "wandb", or objects of your own. They decide nothing.

    Raises:
        SettingsError: an unknown tracker, photographs missing or too few, weights that do not fit, a folder that holds
            another run.
        ImageError: a photograph that cannot be decoded.
        WeightsError: weights or a checkpoint that cannot be found or read.
        DivergedError: the loss became NaN or infinite; the message names the step and the part.
    """
    if torch.get_default_dtype() != torch.float32:
        raise SettingsError(f"torch's default dtype is {torch.get_default_dtype()}; expected torch.float32 to train")
    accelerator = create_accelerator(config, out, device, trackers)
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
    accelerator.wait_for_everyone()  # before one process writes files that another would take for an earlier run's
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be created ({error.strerror}); choose another folder") from error
    # The caller's random state is unaffected by the run.
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        aligned = build(config, seed, start)
        names = [path.relative_to(pristine).as_posix() for path in training]
        decisive = [config.digest, seed, aligned.source, accelerator.num_processes, names]
        digest = sha256(json.dumps(decisive).encode()).hexdigest()
        if not (resume and _is_finished(out, digest)):
            Run(config, accelerator, aligned, training, validation, out, seed, licence, ratings, digest).go(resume)
        elif not quiet:
            log.info("the run in %s is finished; nothing is trained", out)
            delete_partial_files(out, MODEL)
    accelerator.end_training()
    return out / MODEL


def create_accelerator(
    config: Config, out: Path, device: str | None, trackers: Sequence[Tracker] = ("tensorboard",)
) -> Accelerator:
    """Create an Accelerator, independently of earlier runs in this process.

    Raises:
        SettingsError: an unavailable device, precision or tracker.
    """
    chosen = check_trackers(trackers)
    if device not in (None, "cpu"):
        raise SettingsError(f"device is {device!r}; expected cpu or none: `accelerate launch` chooses GPUs")
    # Accelerate stores device and precision for the whole process and has no public reset. If the private one is gone,
    # a run with other settings is refused below.
    reset = getattr(AcceleratorState, "_reset_state", None)
    if is_initialized() and reset is not None:
        reset(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            gradient_accumulation_steps=config.accumulate,
            log_with=chosen or None,
            project_dir=out / "tensorboard",
            # The other processes wait while the main process validates.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
    except ValueError as error:
        raise SettingsError(f"precision {config.precision} or the device cannot be used ({one_line(error)})") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would silently use fp32
        raise SettingsError("precision is fp16, which needs a GPU; expected fp32 or bf16 on a CPU")
    return accelerator


def _check_rated(ratings: Ratings) -> None:
    """Refuse images too small to be scored before the run starts, not at its first validation."""
    for path in ratings.paths:
        if (side := shorter_side(path, "leave it out of --ratings")) < MIN_SIDE:
            raise ImageError(f"{path} has a side of {side} pixels; expected at least {MIN_SIDE} to be scored")


def _is_finished(out: Path, digest: str) -> bool:
    """Whether a folder holds this run's finished model and no checkpoint.

    Raises:
        SettingsError: another run's model. WeightsError: a model that does not name its run.
    """
    path = out / MODEL
    if find_checkpoint(out) is not None or not path.exists():
        return False
    metadata = read(path).metadata
    try:
        run = json.loads(metadata.get("training", "{}")).get("run")
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} does not name its run ({error}); choose another folder") from error
    if run != digest:
        raise SettingsError(f"{out} holds another run, which is finished; choose another folder")
    return True
