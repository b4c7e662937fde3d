"""Prompt learning (CoOp): a context of CLIP-IQA+ or QualiCLIP+ from opinion scores, all else of CLIP being frozen.

Since the image tower is frozen, its features of a whole picture are the same at every step: with whole pictures they
are computed once, for both orientations, and only the text side is run in every step. The gradient is that of running
everything. With random crops the tower runs at every step, without a gradient of its own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from ..errors import ImageError, SettingsError, WeightsError
from ..evaluation.agreement import LEAST
from ..evaluation.ratings import Ratings
from ..files import replacing
from ..images.convert import MIN_SIDE, read_size, source_name
from ..images.tensors import load_image
from ..metrics import prompt_iqa as archs
from ..metrics.prompt_iqa import PromptIQA
from ..metrics.registry import metric_spec, with_context

LOSSES = ("mse", "mse+plcc")
THREADS = min(8, os.cpu_count() or 1)  # that decode; batches of crops are made as many ahead

Item = TypeVar("Item")


@dataclass(frozen=True)
class Recipe:
    """How a context is learned.

    Attributes:
        name: of the recipe in `RECIPES` that the values come from.
        optimiser: name of a class of `torch.optim`, with its defaults but for the learning rate.
        learning_rate: at the first epoch.
        epochs: passes over the training pictures. What is left of a pass after its last full batch is left out.
        period: the learning rate falls as half a cosine, which would reach zero after so many times `epochs`.
        batch: pictures of a step; all of them if there are fewer.
        crop: side in pixels of a random square; 0: the whole picture at its own size. Either way half of the pictures
            of an epoch are mirrored (left to right).
        loss: "mse", or "mse+plcc" for MSE + (1 - PLCC of the batch) / 2, of scores and opinion scores in 0..1.
        shared: whether all prompts have one context, (n_ctx, W), or one each, (2P, n_ctx, W).
        context_std: the fresh context is drawn from N(0, context_std); None: as the architecture starts one.
        n_ctx: tokens of a context.
        seed: decides the fresh context, the held-out pictures, the order, the crops and the mirroring.
    """

    name: str
    optimiser: str
    learning_rate: float
    epochs: int
    period: float
    batch: int
    crop: int
    loss: str
    shared: bool
    context_std: float | None
    n_ctx: int
    seed: int

    def __post_init__(self) -> None:
        def need(good: bool, what: str, expected: str) -> None:
            if not good:
                raise SettingsError(f"{what} is {getattr(self, what)!r}; expected {expected}")

        need(0 < self.learning_rate < 1e30, "learning_rate", "a positive number below 1e30")
        need(self.epochs >= 1, "epochs", "at least 1")
        need(self.loss in LOSSES, "loss", " or ".join(LOSSES))
        least = 2 if self.loss == "mse+plcc" else 1
        need(self.batch >= least, "batch", f"at least {least}" + (" for a correlation" if least == 2 else ""))
        need(self.crop == 0 or self.crop >= MIN_SIDE, "crop", f"0 for whole pictures, or at least {MIN_SIDE} pixels")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / (self.epochs * self.period)))


# [S] sourced, [D] derived from what is sourced, [U] our own or unverified.
RECIPES = {
    # CLIP-IQA+ by its authors: clipiqa_coop_koniq.py and coopclipiqa.py of github.com/IceClear/CLIP-IQA.
    "official": Recipe(
        name="official",
        optimiser="SGD",  # [S] without momentum or weight decay
        learning_rate=0.002,  # [S]
        epochs=1450,  # [D] the published context is that of step 80,000 [S]: 55 steps of 128 of KonIQ's 7,058 pictures
        period=3.75,  # [D] the cosine is over 300,000 steps [S], of which 80,000; its floor of 1e-7 [S] is left out
        batch=128,  # [D] 64 on each GPU, and a remark that there are 2 [S]
        crop=0,  # [S] KonIQ-10k at 1024x768, mirrored at random
        loss="mse",  # [S] to MOS / 100
        shared=True,  # [S]
        context_std=0.02,  # [S]
        n_ctx=16,  # [S]
        seed=123,  # [U] theirs sets none
    ),
    # Options of pyiqa for CLIP-IQA+ (options/train/CLIPIQA) and QualiCLIP+ (options/train/QualiCLIP).
    "pyiqa": Recipe(
        name="pyiqa",
        optimiser="Adam",  # [S]
        learning_rate=2e-3,  # [S]
        epochs=50,  # [S]
        period=1.0,  # [S] a step of the cosine after each epoch
        batch=8,  # [S]
        crop=384,  # [S] mirrored at random
        loss="mse+plcc",  # [S] with equal weights
        shared=False,  # [S]
        context_std=None,  # [S] N(0, 0.02) for QualiCLIP+, the embedding of `X` for CLIP-IQA+
        n_ctx=16,  # [S]
        seed=123,  # [S] the number; what is drawn from it differs
    ),
}


def default_recipe(metric: str) -> Recipe:
    """The recipe that a metric's published context was learned by.

    Raises:
        SettingsError: an unknown metric, or one without a learned context.
    """
    if metric_spec(metric).name not in with_context():
        raise SettingsError(
            f"{metric} has fixed prompts, no context to learn; expected one of {', '.join(with_context())}"
        )
    return RECIPES["official" if metric == "clipiqa+" else "pyiqa"]


def fresh_network(metric: str, recipe: Recipe, **options: Any) -> PromptIQA:
    """A metric with a recipe's fresh context; `options` are the architecture's, such as `weights`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net: PromptIQA = getattr(archs, metric_spec(metric).arch)(
            metric, pretrained=False, n_ctx=recipe.n_ctx, prompt_specific_ctx=not recipe.shared, **options
        )
        assert net.prompt_learner is not None
        if recipe.context_std is not None:
            torch.nn.init.normal_(net.prompt_learner.ctx, std=recipe.context_std)
    return net


def tune(
    net: PromptIQA,
    ratings: Ratings,
    out: Path,
    recipe: Recipe,
    validation: float = 0.2,
    mos_range: tuple[float, float] | None = None,
) -> Path:
    """Learn the context of `net` and write it to `out / "params.pth"`, in pyiqa's layout for this metric.

    `out / "log.jsonl"` says first what decides the result and then, after each epoch, the mean loss and SRCC and PLCC
    on the held-out pictures. On one machine with one version of torch and as many threads, the result is decided by
    the network, the ratings and the recipe.

    Args:
        net: with a learned context; it is trained in place, on the device that it is on, and left in eval mode.
        ratings: at least two pictures; opinion scores of any range and direction.
        out: folder; made if it is not there.
        recipe: see `Recipe`.
        validation: share of the pictures that is held out. They are only watched: nothing is chosen by them.
        mos_range: what becomes 0 and 1 (or 1 and 0, where lower is better); None: smallest and largest opinion score
            of the training pictures.

    Raises:
        SettingsError: `params.pth` is there already; ratings, range or share that nothing can be learned from; a loss
            that is no number any more (says at which step). ImageError: a picture that cannot be read or that is
            smaller than the crop. WeightsError: the tower gives features that are no numbers.
    """
    if net.prompt_learner is None:
        raise SettingsError(f"{net.model_type} has fixed prompts; expected a metric with a learned context")
    target = out / "params.pth"
    if target.exists():
        raise SettingsError(f"{target} is there already; choose another folder")
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
        raise SettingsError(f"{out} cannot be made ({error.strerror}); choose another folder") from error

    watched_features = _whole_features(net, watched.paths, "validation pictures")
    source = (_crop_features if recipe.crop else _cached_features)(net, training.paths, recipe)
    net.train()
    optimiser = getattr(torch.optim, recipe.optimiser)(net.parameters(), lr=recipe.learning_rate)
    per_epoch = len(targets) // min(recipe.batch, len(targets))
    with (
        (out / "log.jsonl").open("w", encoding="utf-8") as log,
        tqdm(total=recipe.epochs * per_epoch, desc="tune", unit="step", file=sys.stderr) as bar,
    ):

        def note(**values: object) -> None:
            log.write(json.dumps(values) + "\n")
            log.flush()

        note(
            recipe=dataclasses.asdict(recipe),
            network=net.describe(),
            ratings={"columns": ratings.columns, "lower_better": ratings.lower_better, "because": ratings.because},
            mos_range=[low, high],
            mos_range_from="given" if mos_range else "the training pictures",
            training_pictures=len(training.paths),
            validation_pictures=len(watched.paths),
            validation_use="watched only: they chose neither a step nor a setting",
        )
        sums: dict[str, float] = {}
        for step, (draw, features) in enumerate(zip(_plan(len(targets), recipe), source, strict=True), 1):
            epoch = (step - 1) // per_epoch
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(epoch)
            scores = net.score(features)[:, 0]
            parts = losses(scores, targets[draw.indices].to(scores), recipe.loss)
            if not math.isfinite(loss := float(parts["loss"].detach())):
                note(step=step, epoch=epoch + 1, stopped=f"the loss is {loss}")
                raise _diverged(net, features, f"the loss is {loss} at step {step} (epoch {epoch + 1})")
            optimiser.zero_grad(set_to_none=True)
            parts["loss"].backward()
            optimiser.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / per_epoch
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if step % per_epoch == 0:
                note(
                    epoch=epoch + 1,
                    step=step,
                    learning_rate=recipe.rate(epoch),
                    **sums,
                    **_agreement(net, watched_features, watched),
                )
                sums = {}
    net.eval()
    if not torch.isfinite(net.prompt_features).all():
        raise _diverged(net, net.prompt_features.new_zeros(()), f"nothing is left to score with after step {step}")
    _save(net, target)
    return target


def losses(scores: Tensor, targets: Tensor, loss: str) -> dict[str, Tensor]:
    """Parts of the loss of a batch, and their sum under `loss`.

    Shape:
        scores, targets: (B,) in 0..1 -> scalars: `mse`, and for "mse+plcc" `plcc` = (1 - PLCC) / 2 in 0..1, which is
        1/2 where one of the two is constant.
    """
    parts = {"mse": F.mse_loss(scores, targets)}
    if loss == "mse+plcc":
        centred = (F.normalize(values - values.mean(), dim=0) for values in (scores, targets))
        parts["plcc"] = (1 - torch.dot(*centred)) / 2
    return {**parts, "loss": torch.stack(list(parts.values())).sum()}


class _Draw(NamedTuple):
    """A step's pictures (B,), which of them are mirrored (B,), and where they are cropped: (B, 2) in 0..1, y and x."""

    indices: Tensor
    mirrored: Tensor
    places: Tensor


def _plan(count: int, recipe: Recipe) -> Iterator[_Draw]:
    """Every step of a run; the same at every call."""
    generator = torch.Generator().manual_seed(recipe.seed)
    batch = min(recipe.batch, count)
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        places = torch.rand(count, 2, generator=generator)
        for start in range(0, count - batch + 1, batch):
            part = slice(start, start + batch)
            yield _Draw(order[part], mirrored[part], places[part])


def _split(ratings: Ratings, share: float, seed: int) -> tuple[Ratings, Ratings]:
    """Training and held-out ratings; a picture that is rated twice is in one of them."""
    if not 0 <= share < 1:
        raise SettingsError(f"validation is {share:g}; expected a share from 0 to less than 1")
    names = list(dict.fromkeys(ratings.paths))
    count = round(share * len(names))
    if share and count < LEAST:
        raise SettingsError(
            f"{share:g} of {len(names)} pictures are {count} to validate on; expected at least {LEAST}: "
            "rate more pictures, or hold out a larger share or none (0)"
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
        raise SettingsError(f"{len(training.paths)} rated pictures to learn from; expected at least 2")
    smallest, largest = min(training.opinions), max(training.opinions)
    if smallest == largest:
        raise SettingsError(f"all opinion scores to learn from are {smallest:g}; expected different ones")
    if given and not low < high:
        raise SettingsError(f"the MOS range is {low:g} to {high:g}; expected the lower end first")
    if not low <= smallest <= largest <= high:
        raise SettingsError(
            f"opinion scores are from {smallest:g} to {largest:g}, not within the MOS range {low:g} to {high:g}"
        )


def _check_sizes(paths: Sequence[Path], crop: int) -> None:
    """All pictures are at least as large as the crop, before any work is done; pyiqa stops at the first in mid-run."""
    small = {}
    for path in paths:
        side = min(read_size(path))
        if side < crop:
            small[path] = side
    if small:
        worst = min(small, key=lambda path: small[path])
        raise ImageError(
            f"{len(small)} of {len(paths)} pictures are smaller than the crop of {crop} pixels ({source_name(worst)} "
            f"has a side of {small[worst]}); leave them out, or use a smaller crop, or 0 for whole pictures"
        )


def _ahead(load: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
    """`load` of each item, in order, a few ahead in threads: decoding is mostly done without Python's lock."""
    waiting: deque[Any] = deque()
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
    """Image features (N, D) of whole pictures at their own sizes."""
    device = net.prompt_features.device
    rows = [
        net.features((rgb.flip(-1) if mirror else rgb)[None].to(device))
        for rgb in tqdm(_ahead(load_image, paths), what, len(paths), unit="picture", file=sys.stderr, leave=False)
    ]
    return torch.cat(rows) if rows else torch.empty(0, device=device)


def _cached_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe) -> Iterator[Tensor]:
    """Image features (B, D) of each step's whole pictures, all computed before the first step."""
    plain = _whole_features(net, paths, "training pictures")
    mirrored = _whole_features(net, paths, "mirrored", mirror=True)
    for draw in _plan(len(paths), recipe):
        yield torch.where(draw.mirrored[:, None].to(plain.device), mirrored[draw.indices], plain[draw.indices])


def _crop_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe) -> Iterator[Tensor]:
    """Image features (B, D) of each step's random crops."""

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
        yield features  # not within the block, which would then hold for the caller too


@torch.no_grad()
def _agreement(net: PromptIQA, features: Tensor, watched: Ratings) -> dict[str, float | None]:
    """SRCC and PLCC on the held-out pictures, positive if the two agree; None where there is none."""
    if not watched.paths:
        return {}
    scores = net.score(features)[:, 0].double().cpu().numpy()
    opinions = [-o for o in watched.opinions] if watched.lower_better else watched.opinions
    # Scores that are no numbers are of a context that diverges; the next step says so.
    if not math.isfinite(scores.sum()) or min(scores) == max(scores) or min(opinions) == max(opinions):
        return {"validation_srcc": None, "validation_plcc": None}
    return {
        "validation_srcc": float(stats.spearmanr(scores, opinions)[0]),
        "validation_plcc": float(stats.pearsonr(scores, opinions)[0]),
    }


def _diverged(net: PromptIQA, features: Tensor, what: str) -> SettingsError | WeightsError:
    if not torch.isfinite(features).all():
        return WeightsError(f"{what}, since {net.origin.path} gives image features that are no numbers; check the file")
    return SettingsError(f"{what}, since the learned context has left the numbers; try a lower learning rate")


def _save(net: PromptIQA, target: Path) -> None:
    """Write the context whole or not at all."""
    assert net.prompt_learner is not None
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    # A shared context is written once for each prompt: the scores are the same, and it is the shape that pyiqa's
    # networks have when they are made.
    ctx = state["prompt_learner.ctx"]
    state["prompt_learner.ctx"] = ctx.expand(len(net.prompt_learner.texts), *ctx.shape[-2:]).contiguous()
    content = io.BytesIO()
    torch.save({"params": state}, content)
    try:
        with replacing(target) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        raise SettingsError(f"{target} cannot be written ({error.strerror})") from error
