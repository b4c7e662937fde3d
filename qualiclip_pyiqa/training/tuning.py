"""Prompt learning (CoOp): learn the context of CLIP-IQA+ or QualiCLIP+ from opinion scores, with CLIP frozen.

As the image tower is frozen, features of whole images are computed once for each orientation, and a step runs only
the text side; the gradient is that of the whole network. With random crops the tower runs at every step, without
gradient.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import ImageError, SettingsError, WeightsError
from ..evaluation.agreement import LEAST
from ..evaluation.ratings import Ratings
from ..files import replacing
from ..images.convert import read_size, source_name
from ..images.tensors import load_image
from ..metrics.prompt_iqa import PromptIQA
from ..screen import Screen
from .recipes import Recipe
from .trackers import Track, Tracker, check_trackers, tracking
from .validation import correlations

CONTEXT, LOG = "params.pth", "log.jsonl"
THREADS = min(8, os.cpu_count() or 1)  # that decode images; as many batches of crops are prepared ahead

Item = TypeVar("Item")


def tune(
    net: PromptIQA,
    ratings: Ratings,
    out: Path,
    recipe: Recipe,
    validation: float = 0.2,
    mos_range: tuple[float, float] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Path:
    """Learn the context of `net` and write it to `out / "params.pth"`, in pyiqa's layout for this metric.

    The first line of `out / "log.jsonl"` holds all settings that determine the result; each epoch adds the mean loss
    and, on the held-out images, SRCC and PLCC. Network, ratings and recipe determine the bytes of `params.pth`, for one
    machine, version of torch and number of threads.

    Args:
        net: a metric with a learned context. It is trained in place on its own device, and left in eval mode.
        ratings: at least two images; opinion scores of any range and direction, averaged where an image has several.
        out: folder, created if it does not exist.
        recipe: see `Recipe`.
        validation: share of the images that is held out. They are only watched and decide nothing.
        mos_range: opinion scores that become 0 and 1 (1 and 0 where lower is better); None: the smallest and largest
            of the training images.
        trackers: of Accelerate ("tensorboard", "wandb", or one's own), that get each epoch's figures, the mean score of
            the held-out images and the quality map of the first of them.

    Raises:
        SettingsError: `params.pth` exists; ratings, range or share from which nothing can be learned; a loss that is
            not finite (says at which step).
        ImageError: an image that cannot be read or is smaller than the crop.
        WeightsError: the tower gives features that are not finite.
    """
    if net.prompt_learner is None:
        raise SettingsError(f"{net.model_type} has fixed prompts; expected a metric with a learned context")
    chosen = check_trackers(trackers)
    target = out / CONTEXT
    if target.exists():
        raise SettingsError(f"{target} exists; choose another folder")
    ratings = ratings.averaged()
    training, watched = _split(ratings, validation, recipe.seed)
    low, high = mos_range or (min(training.opinions), max(training.opinions))
    _check_range(training, low, high, mos_range is not None)
    if recipe.crop:
        _check_sizes(training.paths, recipe.crop)
    scaled = (torch.tensor(training.opinions, dtype=torch.float64) - low) / (high - low)
    targets = 1 - scaled if ratings.lower_better else scaled
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{out} cannot be created ({error.strerror}); choose another folder") from error

    watched_features = _whole_features(net, watched.paths, "validation images")
    batches = (_crop_features if recipe.crop else _cached_features)(net, training.paths, recipe)
    with (out / LOG).open("w", encoding="utf-8") as log:
        _log(
            log,
            recipe=dataclasses.asdict(recipe),
            network=net.describe(),
            ratings={"columns": ratings.columns, "lower_better": ratings.lower_better, "because": ratings.because},
            mos_range=[low, high],
            mos_range_from="given" if mos_range else "the training images",
            training_images=len(training.paths),
            validation_images=len(watched.paths),
            validation_use="watched only: decided neither a step nor a setting",
        )
        with tracking(chosen, out, net, watched_features, watched.paths) as track:
            _learn(net, recipe, targets, batches, log, lambda: _agreement(net, watched_features, watched), track)
    _save(net, target)
    return target


def _learn(
    net: PromptIQA,
    recipe: Recipe,
    targets: Tensor,
    batches: Iterator[Tensor],
    log: TextIO,
    evaluate: Callable[[], dict[str, float | None]],
    track: Track,
) -> None:
    """Take all steps of a recipe; `evaluate` returns values to log after each epoch, beside the mean losses.

    The same go to `track` with the number of steps.
    """
    net.train()
    optimiser = getattr(torch.optim, recipe.optimiser)(net.parameters(), lr=recipe.learning_rate)
    per_epoch = len(targets) // min(recipe.batch, len(targets))
    sums: dict[str, float] = {}
    step = 0
    with tqdm(total=recipe.epochs * per_epoch, desc="tune", unit="step", file=Screen(), disable=None) as bar:
        for draw, features in zip(_plan(len(targets), recipe), batches, strict=True):
            epoch, step = step // per_epoch, step + 1
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(epoch)
            scores = net.score(features)[:, 0]
            parts = rating_losses(scores, targets[draw.indices].to(scores), recipe.loss)
            if not math.isfinite(loss := float(parts["loss"].detach())):
                _log(log, step=step, epoch=epoch + 1, stopped=f"the loss is {loss}")
                raise _diverged(net, features, f"the loss is {loss} at step {step} (epoch {epoch + 1})")
            optimiser.zero_grad(set_to_none=True)
            parts["loss"].backward()
            optimiser.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / per_epoch
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if step % per_epoch == 0:
                found: dict[str, float | None] = {"learning_rate": recipe.rate(epoch), **sums, **evaluate()}
                _log(log, epoch=epoch + 1, step=step, **found)
                track(step, found)
                sums = {}
    net.eval()
    if not torch.isfinite(net.prompt_features).all():
        raise _diverged(net, net.prompt_features.new_zeros(()), f"no score is finite after step {step}")


def _log(log: TextIO, **values: object) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()


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


class _Draw(NamedTuple):
    """Images of a step (B,), which of them are mirrored (B,), and where they are cropped: (B, 2) in 0..1, y and x."""

    indices: Tensor
    mirrored: Tensor
    places: Tensor


def _plan(count: int, recipe: Recipe) -> Iterator[_Draw]:
    """Draw the images of every step, determined by the recipe's seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    batch = min(recipe.batch, count)
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        mirrored = torch.rand(count, generator=generator, dtype=torch.float32) < 0.5
        places = torch.rand(count, 2, generator=generator, dtype=torch.float32)
        for start in range(0, count - batch + 1, batch):
            part = slice(start, start + batch)
            yield _Draw(order[part], mirrored[part], places[part])


def _split(ratings: Ratings, share: float, seed: int) -> tuple[Ratings, Ratings]:
    """Divide ratings into those to train on and those held out, with all ratings of an image on one side."""
    if not 0 <= share < 1:
        raise SettingsError(f"validation is {share:g}; expected a share from 0 to less than 1")
    names = list(dict.fromkeys(ratings.paths))
    count = round(share * len(names))
    if share and count < LEAST:
        raise SettingsError(
            f"{share:g} of {len(names)} images are {count} to validate on; expected at least {LEAST}: "
            "rate more images, or hold out a larger share or none (0)"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {names[k] for k in order[:count]}

    def part(of_held_out: bool) -> Ratings:
        rows = [k for k, path in enumerate(ratings.paths) if (path in held_out) == of_held_out]
        return dataclasses.replace(
            ratings, paths=[ratings.paths[k] for k in rows], opinions=[ratings.opinions[k] for k in rows]
        )

    return part(False), part(True)


def _check_range(training: Ratings, low: float, high: float, given: bool) -> None:
    if len(training.paths) < 2:
        raise SettingsError(f"{len(training.paths)} rated images to learn from; expected at least 2")
    smallest, largest = min(training.opinions), max(training.opinions)
    if smallest == largest:
        raise SettingsError(f"all opinion scores to learn from are {smallest:g}; expected at least two values")
    if given and not -math.inf < low < high < math.inf:
        raise SettingsError(f"the MOS range is {low:g} to {high:g}; expected two finite numbers, the lower one first")
    if not low <= smallest <= largest <= high:
        raise SettingsError(
            f"opinion scores are from {smallest:g} to {largest:g}, outside the MOS range {low:g} to {high:g}; "
            "expected a range that holds them all"
        )


def _check_sizes(paths: Sequence[Path], crop: int) -> None:
    """Refuse images smaller than the crop, before any training."""
    small = {}
    for path in paths:
        side = min(read_size(path))
        if side < crop:
            small[path] = side
    if small:
        worst = min(small, key=lambda path: small[path])
        raise ImageError(
            f"{len(small)} of {len(paths)} images are smaller than the crop of {crop} pixels ({source_name(worst)} "
            f"has a side of {small[worst]}); leave them out, or use a smaller crop, or 0 for whole images"
        )


def _ahead(load: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
    """Yield `load` of each item in order, a few ahead in threads: decoding mostly runs without Python's lock."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@torch.no_grad()
def _whole_features(net: PromptIQA, paths: Sequence[Path], what: str, mirror: bool = False) -> Tensor:
    """Compute the image features (N, D) of whole images at their own sizes."""
    device = net.prompt_features.device
    rows = [
        net.features((rgb.flip(-1) if mirror else rgb)[None].to(device))
        for rgb in tqdm(
            _ahead(load_image, paths), what, len(paths), unit="image", file=Screen(), leave=False, disable=None
        )
    ]
    return torch.cat(rows) if rows else torch.empty(0, device=device)


def _cached_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe) -> Iterator[Tensor]:
    """Yield the image features (B, D) of each step's whole images, all computed before the first step."""
    plain = _whole_features(net, paths, "training images")
    mirrored = _whole_features(net, paths, "mirrored", mirror=True)
    for draw in _plan(len(paths), recipe):
        yield torch.where(draw.mirrored[:, None].to(plain.device), mirrored[draw.indices], plain[draw.indices])


def _crop_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe) -> Iterator[Tensor]:
    """Yield the image features (B, D) of each step's random crops."""

    def crops(draw: _Draw) -> Tensor:
        return torch.stack([crop(*view) for view in zip(*draw, strict=True)])

    def crop(index: Tensor, mirrored: Tensor, place: Tensor) -> Tensor:
        rgb = load_image(paths[int(index)])
        top, left = (int(p * (side - recipe.crop + 1)) for p, side in zip(place.tolist(), rgb.shape[1:], strict=True))
        rgb = rgb[:, top : top + recipe.crop, left : left + recipe.crop]
        return rgb.flip(-1) if mirrored else rgb

    for batch in _ahead(crops, _plan(len(paths), recipe)):
        with torch.no_grad():
            features = net.features(batch.to(net.prompt_features.device))
        yield features  # outside of no_grad, which would otherwise apply to the caller too


@torch.no_grad()
def _agreement(net: PromptIQA, features: Tensor, watched: Ratings) -> dict[str, float | None]:
    """Correlate scores of the held-out images with their opinion scores; None where that is undefined."""
    if not watched.paths:
        return {}
    scores = net.score(features)[:, 0].double().tolist()
    # Scores that are not finite come from a context that diverges, which the next step reports.
    srcc, plcc = correlations(scores, watched)
    return {"validation_srcc": srcc, "validation_plcc": plcc}


def _diverged(net: PromptIQA, features: Tensor, what: str) -> SettingsError | WeightsError:
    if not torch.isfinite(features).all():
        return WeightsError(f"{what}, since {net.origin.path} gives image features that are not finite; check the file")
    return SettingsError(f"{what}, since the learned context is no longer finite; try a lower learning rate")


def _save(net: PromptIQA, target: Path) -> None:
    """Write the context, whole or not at all; equal contexts give equal bytes."""
    assert net.prompt_learner is not None
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    # A shared context is written once per prompt: scores are the same, and pyiqa's networks are created in this shape.
    ctx = state["prompt_learner.ctx"]
    state["prompt_learner.ctx"] = ctx.expand(len(net.prompt_learner.texts), *ctx.shape[-2:]).contiguous()
    content = io.BytesIO()  # not a file, whose name torch would write into it
    torch.save({"params": state}, content)
    try:
        with replacing(target) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        raise OSError(f"{target} cannot be written ({error.strerror or error}); make room and repeat") from error
