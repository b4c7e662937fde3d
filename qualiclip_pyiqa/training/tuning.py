"""Prompt learning: learn what enters CLIP's transformers beside an image or a text from opinion scores; CLIP is frozen.

The context of CLIP-IQA+ or QualiCLIP+ (CoOp) is part of the input of the text tower; the prompts of CLIP-DQA and
CLIP-AGIQA enter every block of both towers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import SettingsError, WeightsError
from ..evaluation.ratings import Ratings
from ..files import replacing
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from ..metrics.prompt_iqa import PromptIQA
from ..pretrained.deep_prompts import write_prompts
from ..screen import Screen
from .checkpoint import (
    PATTERN,
    Progress,
    State,
    delete_checkpoints,
    delete_partial_files,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from .examples import Draw, Tunable, batches_of, check_sizes, plan
from .held_out import Parts, check_range, hold_out
from .recipes import Recipe
from .trackers import Track, Tracker, check_trackers, tracking
from .watched import Best, Figures, Watched

CONTEXT, PROMPTS, LOG = "params.pth", "prompts.safetensors", "log.jsonl"


def tune(
    net: Tunable,
    ratings: Ratings,
    out: Path,
    recipe: Recipe,
    validation: float = 0.2,
    mos_range: tuple[float, float] | None = None,
    trackers: Sequence[Tracker] = (),
    alignment: Ratings | None = None,
    resume: bool = False,
) -> Path:
    """Learn the prompts of `net`, and write them.

    The first line of `out / "log.jsonl"` holds all settings that determine the result; each epoch adds the mean loss
    and, on the held-out images, SRCC and PLCC. Network, ratings and recipe determine the bytes of the result, for one
    machine, version of torch and number of threads, also if the run was stopped and resumed. After each epoch there is
    a checkpoint, which is deleted at the end.

    Args:
        net: a metric with a learned context or with deep prompts. It is trained in place on its own device, and left in
            eval mode.
        ratings: at least two images; opinion scores of any range and direction, averaged where an image has several.
            Images of one group, or of groups that share an image, are never divided.
        out: folder, created if it does not exist.
        recipe: see `Recipe`.
        validation: share of the images, or of their groups, that is held out. What they decide, `recipe.keep` says.
        mos_range: opinion scores that become 0 and 1 (1 and 0 where lower is better); None: the smallest and largest
            of the training images.
        trackers: of Accelerate ("tensorboard", "wandb", or one's own), that get each epoch's figures, the mean score of
            the held-out images and the quality map of the first of them.
        alignment: for `clip-agiqa`, scores of the alignment of the same images with their texts; `mos_range` is theirs
            too.
        resume: continue from the last checkpoint in `out`, or from the beginning if there is none.

    Returns:
        `out / "params.pth"`, in pyiqa's layout for this metric, or for deep prompts `out / "prompts.safetensors"`.

    Raises:
        SettingsError: the result exists; an earlier run's checkpoint without `resume`, or another run's; ratings, range
            or share from which nothing can be learned; a loss that is not finite (says at which step).
        ImageError: an image that cannot be read or is too small.
        WeightsError: the tower gives features that are not finite, or a damaged checkpoint.
    """
    if net.prompt_learner is None:
        raise SettingsError(f"{net.model_type} has fixed prompts; expected a metric with a learned context")
    _check_alignment(net, alignment)
    chosen = check_trackers(trackers)
    target = out / (PROMPTS if isinstance(net, DeepPromptIQA) else CONTEXT)
    check_folder(out, target.name, resume)
    parts = hold_out(ratings, alignment, validation, recipe.seed)
    targets, ranges = _targets(parts, mos_range)
    check_sizes(net, parts.training.paths, parts.watched.paths, recipe)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be created ({error.strerror}); choose another folder") from error
    delete_partial_files(out, target.name)

    watched = Watched(net, parts.watched)
    first = _settings(net, recipe, parts, ranges, mos_range is not None)
    state, best = _state(net, recipe, first, parts)
    checkpoint = find_checkpoint(out) if resume else None
    steps = recipe.epochs * _steps_per_epoch(targets, recipe)
    if checkpoint is not None:
        read_checkpoint(checkpoint, state, steps)
    batches = batches_of(net, parts.training.paths, recipe, state.progress.step)
    with _open_log(out / LOG, state.progress.log_bytes) as log:
        best.restore(log.readlines())
        if checkpoint is None:
            _log(log, **first)
        with tracking(chosen, out, net, watched.scores, parts.watched.paths, state.progress.step) as track:
            _learn(net, recipe, targets, batches, log, watched, track, state, best, out)
    _save(net, target)
    delete_checkpoints(out)
    return target


def _learn(
    net: Tunable,
    recipe: Recipe,
    targets: Tensor,
    batches: Iterator[Tensor],
    log: BinaryIO,
    watched: Watched,
    track: Track,
    state: State,
    best: Best,
    out: Path,
) -> None:
    """Take the steps of a recipe that remain, with a line of the log and a checkpoint after each epoch."""
    net.train()
    per_epoch, step = _steps_per_epoch(targets, recipe), state.progress.step
    sums: dict[str, float] = {}
    draws = plan(len(targets), recipe, step)
    with tqdm(
        total=recipe.epochs * per_epoch, initial=step, desc="tune", unit="step", file=Screen(), disable=None
    ) as bar:
        while step < recipe.epochs * per_epoch and not best.is_over:
            epoch, step = step // per_epoch, step + 1
            features = next(batches)
            parts = _step(net, recipe, targets, next(draws), features, state.optimiser, epoch)
            if not math.isfinite(loss := parts["loss"]):
                _log(log, step=step, epoch=epoch + 1, stopped=f"the loss is {loss}")
                raise _explained(net, features, f"the loss is {loss} at step {step} (epoch {epoch + 1})", step)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / per_epoch
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if step % per_epoch == 0:
                found: Figures = {"learning_rate": recipe.rate(epoch), **sums, **watched.evaluate()}
                found |= best.add(epoch + 1, found)
                _log(log, epoch=epoch + 1, step=step, **found)
                track(step, found)
                sums = {}
                state.progress.step, state.progress.log_bytes = step, log.tell()
                write_checkpoint(out, state)
    best.load()
    net.eval()
    if not torch.isfinite(net.prompt_features).all():
        raise _explained(net, net.prompt_features.new_zeros(()), f"no score is finite after step {step}", step)


def _step(
    net: Tunable,
    recipe: Recipe,
    targets: Tensor,
    draw: Draw,
    features: Tensor,
    optimiser: torch.optim.Optimizer,
    epoch: int,
) -> dict[str, float]:
    """Take a step, unless its loss is not finite, and return the parts of the loss."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(epoch)
    scores = net.score(features)
    wanted = targets[draw.indices].to(scores)
    parts = rating_losses(scores[:, 0], wanted[:, 0], recipe.loss)
    if wanted.shape[1] > 1:
        parts["alignment"] = F.mse_loss(scores[:, 1], wanted[:, 1])
        parts["loss"] = parts["loss"] + recipe.alignment_weight * parts["alignment"]
    values = {name: float(value.detach()) for name, value in parts.items()}
    if math.isfinite(values["loss"]):
        optimiser.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimiser.step()
    return values


def rating_losses(scores: Tensor, targets: Tensor, loss: str) -> dict[str, Tensor]:
    """Compute the parts of the loss of a batch, and their sum under `loss`.

    Args:
        loss: "mse" or "mse+plcc", see `Recipe`.

    Shape:
        scores, targets: (B,) in 0..1 -> scalars: `mse`, and for "mse+plcc" `plcc` = (1 - PLCC) / 2 in 0..1, which is
        1/2 where one of the two is constant.

    Example:
        >>> scores = torch.tensor([0.2, 0.4, 0.9])
        >>> {name: round(value.item(), 3) for name, value in rating_losses(scores, scores, "mse+plcc").items()}
        {'mse': 0.0, 'plcc': 0.0, 'loss': 0.0}
    """
    parts = {"mse": F.mse_loss(scores, targets)}
    if loss == "mse+plcc":
        centred = (F.normalize(values - values.mean(), dim=0) for values in (scores, targets))
        parts["plcc"] = (1 - torch.dot(*centred)) / 2
    return {**parts, "loss": torch.stack(list(parts.values())).sum()}


def _steps_per_epoch(targets: Tensor, recipe: Recipe) -> int:
    return len(targets) // min(recipe.batch, len(targets))


def _check_alignment(net: Tunable, alignment: Ratings | None) -> None:
    wanted = isinstance(net, DeepPromptIQA) and len(net.attributes) > 1
    if wanted and alignment is None:
        raise SettingsError(
            f"{net.model_type} learns the alignment of image and text too; pass its scores (--alignment-column), "
            "or train clip-dqa, which needs none"
        )
    if alignment is not None and not wanted:
        raise SettingsError(f"{net.model_type} has no alignment score; leave those of alignment out")


def check_folder(out: Path, result: str, resume: bool) -> None:
    """Raise SettingsError if a folder holds a finished run, or a stopped one that is not to be resumed.

    Args:
        out: the folder.
        result: name of the file that the run writes at its end.
        resume: as for `tune`.
    """
    target = out / result
    if target.exists() and resume:
        raise SettingsError(
            f"the run in {out} is finished, so there is nothing to resume: use {target}, or choose another folder"
        )
    if target.exists():
        raise SettingsError(f"{target} exists; choose another folder")
    if not resume and any(out.glob(PATTERN)):
        raise SettingsError(f"{out} holds the checkpoint of an earlier run; pass --resume, or choose another folder")


def _targets(parts: Parts, mos_range: tuple[float, float] | None) -> tuple[Tensor, list[tuple[float, float]]]:
    """Map the opinion scores to learn from to 0..1, higher being better: (n, A), and the range of each column."""
    columns, ranges = [], []
    for rated in (parts.training, *([] if parts.alignment is None else [parts.alignment])):
        low, high = mos_range or (min(rated.opinions), max(rated.opinions))
        check_range(rated, low, high, mos_range is not None)
        scaled = (torch.tensor(rated.opinions, dtype=torch.float64) - low) / (high - low)
        columns.append(1 - scaled if rated.lower_better else scaled)
        ranges.append((low, high))
    return torch.stack(columns, dim=1), ranges


def _settings(
    net: Tunable, recipe: Recipe, parts: Parts, ranges: Sequence[tuple[float, float]], given: bool
) -> dict[str, object]:
    """Describe all settings that determine the result: the first line of the log."""
    rated = parts.training
    kept = recipe.keep == "best" and bool(parts.watched.paths)
    use = "chose the epoch that is kept" if kept else "watched only: decided neither a step nor a setting"
    more: dict[str, object] = {}
    if parts.alignment is not None:
        more = {"alignment_column": parts.alignment.columns, "alignment_range": [*ranges[1]]}
    if parts.groups is not None:
        more |= {"training_groups": parts.groups[0], "validation_groups": parts.groups[1]}
    return {
        "recipe": dataclasses.asdict(recipe),
        "network": net.describe(),
        "ratings": {"columns": rated.columns, "lower_better": rated.lower_better, "because": rated.because},
        "mos_range": [*ranges[0]],
        "mos_range_from": "given" if given else "the training images",
        "training_images": len(rated.paths),
        "validation_images": len(parts.watched.paths),
        "validation_use": use,
        **more,
    }


def _state(net: Tunable, recipe: Recipe, settings: Mapping[str, object], parts: Parts) -> tuple[State, Best]:
    """Prepare what a checkpoint holds: the prompts, those to keep, and the optimiser."""
    assert net.prompt_learner is not None
    decisive = [settings, [(str(path), opinion) for path, opinion in zip(*parts.rows, strict=True)]]
    run = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    optimiser = getattr(torch.optim, recipe.optimiser)(net.prompt_learner.parameters(), lr=recipe.learning_rate)
    best = Best(net.prompt_learner, recipe)
    return State(net.prompt_learner, best.kept, optimiser, None, Progress(run)), best


def _open_log(path: Path, size: int) -> BinaryIO:
    """Open the log at its start, cut to the bytes that it had at the checkpoint; 0: a new one."""
    if size and not (path.is_file() and path.stat().st_size >= size):
        raise SettingsError(f"{path} does not hold what it held at the checkpoint; choose another folder")
    log = path.open("r+b" if size else "w+b")
    log.truncate(size)
    return log


def _log(log: BinaryIO, **values: object) -> None:
    log.write((json.dumps(values) + "\n").encode())
    log.flush()


def _explained(net: Tunable, features: Tensor, what: str, step: int) -> SettingsError | WeightsError:
    """Say which file or setting made a loss infinite; after the first step, features depend on deep prompts."""
    own = not isinstance(net, DeepPromptIQA) or step == 1
    if own and not torch.isfinite(features).all():
        return WeightsError(f"{what}, since {net.origin.path} gives image features that are not finite; check the file")
    return SettingsError(f"{what}, since what was learned is no longer finite; try a lower learning rate")


def _save(net: Tunable, target: Path) -> None:
    """Write what was learned, whole or not at all; equal prompts give equal bytes."""
    assert net.prompt_learner is not None
    try:
        if isinstance(net, DeepPromptIQA):
            state = {name: value.detach().cpu() for name, value in net.prompt_learner.state_dict().items()}
            write_prompts(target, state, net.model_type, net.origin.backbone, net.clip_sha256, net.clip_file)
        else:
            _save_context(net, target)
    except OSError as error:
        raise OSError(
            f"{target} cannot be written ({error.strerror or error}); make room, then pass --resume"
        ) from error


def _save_context(net: PromptIQA, target: Path) -> None:
    assert net.prompt_learner is not None
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    # A shared context is written once per prompt: scores are the same, and pyiqa's networks are created in this shape.
    ctx = state["prompt_learner.ctx"]
    state["prompt_learner.ctx"] = ctx.expand(len(net.prompt_learner.texts), *ctx.shape[-2:]).contiguous()
    content = io.BytesIO()  # not a file, whose name torch would write into it
    torch.save({"params": state}, content)
    with replacing(target) as part:
        part.write_bytes(content.getbuffer())
