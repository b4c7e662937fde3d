"""Train a small tower from scratch, without opinion scores, by QualiCLIP's strategy (arXiv:2403.11176).

    python -m qualiclip_pyiqa.training --config mini --pristine DIR --out RUN [--seed N] [--exclude LIST]

Stacks of equally degraded pairs of crops are ranked by their similarity to fixed antonym anchors: away from the
positive one and towards the negative one as the level rises, alike for the two crops of a level. RUN receives
`model.safetensors` (the layout of `weights/qualiclip-mini.safetensors`) and `log.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import ImageError, SettingsError
from ..mini import BLOCKS, MiniTower, Standardise
from ..prompts import QUALITY_SETS
from .config import Config, load_config
from .losses import across_loss, centre_loss, consistency_loss, ranking_loss
from .stacks import Stacks, list_photographs, read_photograph
from .validation import Validation, quality, similarities

log = logging.getLogger(__name__)

PROMPTS = QUALITY_SETS["qualiclip"]
PRISTINE_SCORE = 0.7  # what the mean pristine crop scores; decides the logit scale and nothing of the order


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def make_anchors(tower: MiniTower, seed: int) -> Tensor:
    """Fixed antonym anchors (2P, D), unit length, positive/negative alternating.

    Pair p is zero outside block p of the feature, so the P softmaxes judge P different blocks. Within the block its
    two directions are random and orthogonal: the frozen text encoder's part in QualiCLIP.
    """
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.zeros(2 * len(tower.blocks), tower.feature_dim)
    for p in range(len(tower.blocks)):
        directions, _ = torch.linalg.qr(torch.randn(tower.dim, 2, generator=generator))
        anchors[2 * p : 2 * p + 2, p * tower.dim : (p + 1) * tower.dim] = directions.T
    return anchors


def losses(tower: nn.Module, anchors: Tensor, batch: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """All parts of the loss of one step, and their weighted sum under `loss`."""
    pictures, level = batch["pictures"], batch["level"]
    b, n_levels, k = pictures.shape[:3]
    rgb = pictures.flatten(0, 2).float().div(255)
    with torch.autocast(rgb.device.type, torch.bfloat16, enabled=config.half):
        features = tower(rgb)
    c = similarities(features.float(), anchors)
    stacked = c.unflatten(0, (b, n_levels, k))
    positive, negative = stacked[..., 0], stacked[..., 1]
    difference = c[..., 0] - c[..., 1]
    each = level[:, :, None].expand(-1, -1, k).flatten()
    # Where levels are not ordered, only "worse than pristine" is known.
    known = batch["ordered"].any(2).sum(1).ge(n_levels - 1)[:, None].expand(-1, n_levels * k).flatten() | (each == 0)
    number = torch.arange(b, device=level.device)[:, None].expand(-1, n_levels * k).flatten()
    about = batch["about"][:, None].expand(-1, n_levels * k, -1).flatten(0, 1)
    parts = {
        "consistency": consistency_loss(stacked.flatten(3), config.margin_consistency),
        "positive": ranking_loss(positive, config.margin_rank, batch["ordered"], batch["about"]),
        "negative": ranking_loss(-negative, config.margin_rank, batch["ordered"], batch["about"]),
        "across": across_loss(
            difference[known], each[known], number[known], config.margin_across, config.gap_across, about[known]
        ),
        "centre": centre_loss(difference),
    }
    parts["loss"] = (
        config.weight_consistency * parts["consistency"]
        + parts["positive"]
        + parts["negative"]
        + config.weight_across * parts["across"]
        + config.weight_centre * parts["centre"]
    )
    return parts


def choose_logit_scale(differences: Tensor, pairs: int) -> float:
    """Natural log of the scale at which the mean score of pristine pictures (M, P) is PRISTINE_SCORE.

    Scores use the unit-length feature, whose similarities are sqrt(P) times smaller than a block's own.
    """
    low, high = 0.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        score = torch.sigmoid(math.exp(middle) / math.sqrt(pairs) * differences).mean()
        low, high = (middle, high) if score < PRISTINE_SCORE else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def recalibrate(tower: MiniTower, batches: DataLoader[dict[str, Tensor]], half: bool) -> None:
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
        rgb = batch["pictures"].flatten(0, 2).float().div(255)
        with torch.autocast(rgb.device.type, torch.bfloat16, enabled=half):
            tower(rgb)
    tower.eval()


def save(
    path: Path,
    tower: MiniTower,
    anchors: Tensor,
    logit_scale: float,
    config: Config,
    summary: dict[str, object],
    licence: str,
) -> None:
    """Write a model in the package's own layout, whole or not at all."""
    tensors = {f"visual.{key}": value.contiguous() for key, value in tower.state_dict().items()}
    tensors |= {"prompts_features": anchors.contiguous(), "logit_scale": torch.tensor(logit_scale)}
    keywords = {
        "widths": config.widths,
        "depths": config.depths,
        "hidden": config.hidden,
        "dim": config.dim,
        "blocks": tower.blocks,
    }
    metadata = {
        "format": "qualiclip-pyiqa/1",
        "backbone": "mini",
        "tower": json.dumps(keywords),
        "prompts": json.dumps(PROMPTS),
        "temperature": "1",
        "licence": licence,
        "source": "trained with qualiclip_pyiqa.training; see weights/PROVENANCE.md",
        "training": json.dumps(summary),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(serialise(tensors, metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, tower: MiniTower) -> Tensor:
    """Fill the tower from a model that `save` wrote, and return its anchors.

    Raises:
        SettingsError: no such file, or one with another tower.
    """
    try:
        state = load_file(path)
        tower.load_state_dict({key[7:]: value for key, value in state.items() if key.startswith("visual.")})
        return state["prompts_features"]
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        cause = str(error).splitlines()[0]
        raise SettingsError(f"--start {path} does not fit ({cause}); expected a model of the same tower") from None


def train(
    config: Config,
    pristine: Path,
    out: Path,
    seed: int = 0,
    exclude: Path | None = None,
    licence: str = "not stated",
    start: Path | None = None,
) -> Path:
    """Run a training and return the path of its model; `licence` goes into the file as it is.

    With `start`, tower and anchors begin as those of an earlier run's model, whose tower must be alike.

    The result is decided by configuration, photographs and seed (on one machine with one version of torch and as many
    threads).

    Raises:
        SettingsError: photographs missing or too few. ImageError: one cannot be decoded.
        DivergedError: the loss became NaN or infinite; says at which step and in which part.
    """
    started = time.monotonic()
    smallest = max(*config.crops, config.recalibrate_crop, 32)
    paths = list_photographs(pristine, exclude)
    photographs = [read_photograph(p) for p in tqdm(paths, desc="photographs", file=sys.stderr, leave=False)]
    folders = [path.relative_to(pristine).parts[0] for path in paths]
    large = [(p, f) for p, f in zip(photographs, folders, strict=True) if min(p.shape[1:]) >= smallest]
    if len(large) < len(photographs):
        log.warning("%d photographs with a side under %d are left out", len(photographs) - len(large), smallest)
    if len(large) < config.validation + config.stacks:
        raise SettingsError(
            f"{pristine} has {len(large)} photographs of at least {smallest} pixels a side; "
            f"expected {config.validation} to validate on and at least {config.stacks} to train on"
        )
    out.mkdir(parents=True, exist_ok=True)
    random.Random(f"split {seed}").shuffle(large)
    validation = Validation([p for p, _ in large[: config.validation]], config, seed)
    kept = large[config.validation :]
    training = [p for p, folder in kept for _ in range(int(config.repeat.get(folder, 1)))]

    torch.manual_seed(seed)
    tower = MiniTower(config.widths, config.depths, config.hidden, config.dim, BLOCKS).to(
        memory_format=torch.channels_last
    )
    anchors = make_anchors(tower, seed)
    if start is not None:
        anchors = load(start, tower)
    averaged = copy.deepcopy(tower)
    decayed = [p for p in tower.parameters() if p.dim() > 1]
    others = [p for p in tower.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / max(1, config.warmup)) * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    batches = DataLoader(
        Stacks(training, config, seed, config.steps),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    sums: dict[str, float] = {}
    with (out / "log.jsonl").open("w", encoding="utf-8") as journal:

        def note(**record: object) -> None:
            journal.write(json.dumps({"seconds": round(time.monotonic() - started, 1)} | record) + "\n")
            journal.flush()

        note(seed=seed, photographs=len(kept), config=dataclasses.asdict(config), digest=config.digest)
        tower.train()
        for step, batch in enumerate(tqdm(batches, desc="steps", file=sys.stderr), 1):
            parts = losses(tower, anchors, batch, config)
            if not torch.isfinite(parts["loss"]):
                cause = next((name for name, value in parts.items() if not torch.isfinite(value)), "loss")
                note(step=step, stopped=cause)
                raise DivergedError(
                    f"the {cause} loss is {parts[cause].item()} at step {step}; try a lower learning_rate"
                )
            optimiser.zero_grad(set_to_none=True)
            parts["loss"].backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            decay = min(config.average, step / (step + 10))
            with torch.no_grad():
                for old, new in zip(averaged.state_dict().values(), tower.state_dict().values(), strict=True):
                    if old.is_floating_point():
                        old.lerp_(new, 1 - decay)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            if step % config.validate_every == 0 or step == config.steps:
                accuracy, falling = validation.look(averaged, anchors, config.half)
                means = {name: round(value / min(config.validate_every, step), 4) for name, value in sums.items()}
                mean = sum(accuracy.values()) / len(accuracy)
                note(
                    step=step,
                    **means,
                    accuracy=round(mean, 4),
                    falling=falling,
                    types={k: round(v, 3) for k, v in accuracy.items()},
                )
                sums.clear()

        large_crops = Stacks(training, config, seed + 1_000_003, config.recalibrate, (config.recalibrate_crop,))
        recalibrate(averaged, DataLoader(large_crops, batch_size=None, num_workers=config.workers), config.half)
        accuracy, falling = validation.look(averaged, anchors, config.half)
        logit_scale = choose_logit_scale(
            quality(averaged, anchors, validation.pristine, config.half), len(averaged.blocks)
        )
        mean = sum(accuracy.values()) / len(accuracy)
        note(
            recalibrated=True,
            accuracy=round(mean, 4),
            falling=falling,
            logit_scale=logit_scale,
            types={k: round(v, 3) for k, v in accuracy.items()},
        )
        summary = {
            "seed": seed,
            "steps": config.steps,
            "config_sha256": config.digest,
            "photographs": len(kept),
            "start": start and sha256(start.read_bytes()).hexdigest(),
        }
        save(out / "model.safetensors", averaged, anchors, logit_scale, config, summary, licence)
    return out / "model.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qualiclip_pyiqa.training", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="`mini`, `toy` or a TOML file")
    parser.add_argument(
        "--pristine", required=True, type=Path, help="folder of photographs (manifest.csv is respected)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for model.safetensors and log.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", type=Path, help="text file of further photographs not to train on, one per line")
    parser.add_argument("--start", type=Path, help="model of an earlier run to begin from")
    parser.add_argument("--licence", default="not stated", help="of the weights; the photographs' licences decide")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        path = train(
            load_config(options.config),
            options.pristine,
            options.out,
            seed=options.seed,
            exclude=options.exclude,
            licence=options.licence,
            start=options.start,
        )
    except (SettingsError, ImageError, DivergedError) as error:
        log.error("%s", error)
        return 1
    log.info("wrote %s", path)
    return 0
