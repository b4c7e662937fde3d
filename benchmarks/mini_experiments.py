"""Short trainings of the embedded model's tower, each with one change: what docs/training.md tells of them.

    python benchmarks/mini_experiments.py --pristine DIR --ratings scores.csv --images DIR --out DIR
        [--only NAME...] [--seeds 0 1] [--jobs 2] [--steps 500]

Every run is `qualiclip train --config mini` with `SHORT` and the change of its variant, on one thread. Reported are the
SRCC of the result with opinion scores on every second rated picture by name (the "choice half" of benchmarks/mini.py)
and how well degradations of photographs that were not trained on are ranked. A line of OUT/results.jsonl is a run; runs
that have one are not repeated. What is no setting of the package is changed from outside, here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
import versus
from mini import halves
from torch import Tensor, nn

from qualiclip_pyiqa.degradations.base import GROUP_ORDER
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.towers import mini
from qualiclip_pyiqa.training import alignment as towers
from qualiclip_pyiqa.training import losses, stacks
from qualiclip_pyiqa.training import run as training
from qualiclip_pyiqa.training.config import load_config
from qualiclip_pyiqa.training.run import LOG, train
from qualiclip_pyiqa.training.validation import rated_srcc

SHORT: dict[str, Any] = {
    "stacks": 6,
    "crops": (96, 128),
    "warmup": 50,
    "average": 0.99,
    "workers": 0,
    "recalibrate": 20,
    "validation": 12,
    "checkpoint_every": 1_000_000,
}


class Attentive(mini.MiniTower):
    """Learned softmax weightings of a stage's cells, as many as there were percentiles, in place of these."""

    QUERIES = len(mini.PERCENTILES)

    def __init__(self, widths: Sequence[int], *arguments: Any) -> None:
        super().__init__(widths, *arguments)
        self.queries = nn.ModuleList(nn.Conv2d(width, self.QUERIES, 1) for width in widths)

    def forward(self, rgb: Tensor) -> Tensor:
        # `queries` has one for each stage in turn, and _pooled is called for each stage in turn.
        queries = iter(self.queries)

        def pooled(x: Tensor, cell: int) -> Tensor:
            cells = F.avg_pool2d(x, cell, ceil_mode=True)
            weights = next(queries)(cells).flatten(2).softmax(-1)  # (N, Q, S)
            looked_at = torch.einsum("nqs,ncs->nqc", weights, cells.flatten(2)).flatten(1)
            flat = x.flatten(2)
            return torch.cat([flat.mean(-1), mini._std(flat).log(), looked_at], dim=1)

        with patch.object(mini, "_pooled", pooled):
            return super().forward(rgb)


class FromTimm(mini.MiniTower):
    """The stages are those of a network of timm, not pretrained; heads, energies and pooling stay."""

    NAME = "resnet10t"

    def __init__(self, widths: Sequence[int], *arguments: Any) -> None:
        network = timm.create_model(self.NAME, features_only=True, out_indices=(0, 1, 2, 3))
        super().__init__(network.feature_info.channels(), *arguments)
        self.stem, self.stages, self.network = nn.Identity(), nn.ModuleList(), network

    def forward(self, rgb: Tensor) -> Tensor:
        with torch.autocast(rgb.device.type, enabled=False):
            seen = {"energies": mini.log_energies(rgb.float())}
        features = self.network(((rgb - 0.45) * 4).contiguous(memory_format=torch.channels_last))
        with torch.autocast(rgb.device.type, enabled=False):
            for number, x in enumerate(features, 1):
                seen[f"stage{number}"] = mini._pooled(x.float(), max(1, mini.CELL >> number))
            return self.features(seen)


class Picking(mini.Head):
    """Sees some of the statistics only."""

    columns: Tensor

    def __init__(self, columns: Sequence[int], hidden: int, dim: int) -> None:
        super().__init__(len(columns), hidden, dim)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, self.columns])


Q = len(mini.PERCENTILES)
TONES = range(3 * mini.SCALES, mini.UNRANKED)  # of `log_energies`
# Spread of the log energy, and its highest two percentiles, by octave.
SHARPEST = [3 * k + 2 for k in range(mini.SCALES)] + [mini.UNRANKED + Q * k - j for k in range(1, 5) for j in (2, 1)]


class Tones(mini.MiniTower):
    """The sixth pair sees exposure and colour only, and learns from changes of these only."""

    BLOCKS = (*mini.BLOCKS[:5], ("energies",), mini.BLOCKS[6])
    GROUPS = (
        *stacks.PAIR_GROUPS[:5],
        frozenset({"color distortion", "brightness change", "sharpness and contrast"}),
        stacks.PAIR_GROUPS[6],
    )

    def __init__(self, widths: Sequence[int], depths: Sequence[int], hidden: int, dim: int, blocks: Any) -> None:
        super().__init__(widths, depths, hidden, dim, blocks)
        self.heads[5] = Picking(TONES, hidden, dim)


class Tops(mini.MiniTower):
    """Pairs that see energies or one stage alone see the highest two percentiles only."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], hidden: int, dim: int, blocks: Any) -> None:
        super().__init__(widths, depths, hidden, dim, blocks)
        for number, block in enumerate(blocks):
            if block == ("energies",):
                self.heads[number] = Picking(SHARPEST, hidden, dim)
            elif len(block) == 1 and block[0].startswith("stage"):
                width = widths[int(block[0][-1]) - 1]
                self.heads[number] = Picking(range(Q * width, (2 + Q) * width), hidden, dim)


TONE_PAIR = ((towers, "BLOCKS", Tones.BLOCKS), (stacks, "PAIR_GROUPS", Tones.GROUPS))


class TonesAndTops(Tops):
    def __init__(self, widths: Sequence[int], depths: Sequence[int], hidden: int, dim: int, blocks: Any) -> None:
        super().__init__(widths, depths, hidden, dim, blocks)
        self.heads[5] = Picking(TONES, hidden, dim)


def pristine_alike(weight: float) -> Callable[..., Tensor]:
    """Ranking across photographs, and undistorted photographs are equally good: the variance of their differences."""

    def loss(quality: Tensor, severity: Tensor, *arguments: Any) -> Tensor:
        pristine = (severity == 0).all(1)
        return losses.across_loss(quality, severity, *arguments) + weight * quality[pristine].var(0).mean()

    return loss


def opposite_anchors(tower: mini.MiniTower, seed: int) -> Tensor:
    """The negative anchor of a pair is the positive one with the other sign, not at a right angle to it."""
    anchors = towers_block_anchors(tower, seed)
    anchors[1::2] = -anchors[::2]
    return anchors


def three_pairs(tower: mini.MiniTower, seed: int) -> Tensor:
    """Three pairs of random directions in every block, next to each other."""
    drawn = [towers_block_anchors(tower, seed + 1000 * k).unflatten(0, (-1, 2)) for k in range(3)]
    return torch.stack(drawn, dim=1).flatten(0, 2)


towers_block_anchors = towers.block_anchors
LEARNED = tuple(("stage1",) if block == ("sharpness",) else block for block in mini.BLOCKS)
# The pairs that saw one early stage alone see energies, too, alone.
MORE_ENERGIES = tuple(("energies",) if block in (("stage1",), ("stage2",)) else block for block in LEARNED)
ENERGIES_ONLY = (("energies",),) * len(mini.BLOCKS)


# What cheap cameras do to a photograph, in place of what hardly happens to one: noise, then sharpening and compression.
SNAPSHOTS = {
    "gaussian_blur": 2,
    "lens_blur": 2,
    "motion_blur": 2,
    "jpeg": 4,
    "jpeg2000": 0.5,
    "white_noise": 3,
    "white_noise_color": 2,
    "multiplicative_noise": 2,
    "high_sharpen": 4,
    "nonlinear_contrast": 3,
    "darken": 3,
    "brighten": 2,
    "color_saturation_1": 2,
    "color_block": 0.3,
    "patch_displacement": 0.3,
    "impulse_noise": 0.3,
    "jitter": 0.5,
    "pixelate": 0.5,
}


HALVED = {group: 0.5 for group in GROUP_ORDER if group != "blur"}


@dataclass(frozen=True)
class Variant:
    """One change: settings of the configuration, and names of modules that stand for something else meanwhile."""

    settings: dict[str, Any] = field(default_factory=dict)
    replaced: tuple[tuple[Any, str, Any], ...] = ()


VARIANTS = {
    "none": Variant(),
    # Towers
    "wider": Variant({"widths": (48, 96, 144, 192)}),
    "narrower": Variant({"widths": (16, 32, 48, 64)}),
    "timm": Variant({}, ((towers, "MiniTower", FromTimm),)),
    # What heads see
    "all pairs learned": Variant({}, ((towers, "BLOCKS", LEARNED),)),
    "hidden 16": Variant({"hidden": 16}),
    "dropout": Variant({"dropout": 0.5}),
    "attention": Variant({}, ((towers, "MiniTower", Attentive),)),
    "more energies": Variant({}, ((towers, "BLOCKS", MORE_ENERGIES),)),
    "cells of 32": Variant({}, ((mini, "CELL", 32),)),
    "energies only": Variant({}, ((towers, "BLOCKS", ENERGIES_ONLY),)),
    # Anchors
    "opposite anchors": Variant({}, ((towers, "block_anchors", opposite_anchors),)),
    "three pairs a block": Variant(
        {},
        (
            (towers, "block_anchors", three_pairs),
            (stacks, "PAIR_GROUPS", tuple(groups for groups in stacks.PAIR_GROUPS for _ in range(3))),
        ),
    ),
    # Data
    "native": Variant({"native": 1.0}),
    "more types": Variant({"types": (0.4, 0.3, 0.3)}),
    "no bokeh": Variant({"bokeh": 0.0}),
    "any crop, not the sharpest of four": Variant({"candidates": 1}),
    "snapshots": Variant({"type_weights": SNAPSHOTS, "types": (0.5, 0.3, 0.2)}),
    # Aspects
    "tones": Variant({}, ((towers, "MiniTower", Tones), *TONE_PAIR)),
    "tops": Variant({}, ((towers, "MiniTower", Tops),)),
    "tones and tops": Variant({}, ((towers, "MiniTower", TonesAndTops), *TONE_PAIR)),
    # Losses
    "severity": Variant({"severity": HALVED}),
    "severity and dropout": Variant({"severity": HALVED, "dropout": 0.5}),
    "pristine alike": Variant({}, ((training, "across_loss", pristine_alike(1.0)),)),
    "pristine alike, 4": Variant({}, ((training, "across_loss", pristine_alike(4.0)),)),
    "across weighs twice as much": Variant({"weight_across": 3.0}),
}


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, value in variant.replaced:
            stack.enter_context(patch.object(module, name, value))
        yield


def run(name: str, seed: int, steps: int, pristine: Path, ratings: Ratings, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    variant = VARIANTS[name]
    settings = SHORT | {"steps": steps} | variant.settings
    config = dataclasses.replace(load_config("mini"), **settings, validate_every=1_000_000)
    folder = Path(tempfile.mkdtemp(dir=out, prefix=f"{name.replace(' ', '-')}-{seed}-"))
    began = time.monotonic()
    with changed(variant):
        model = train(config, pristine, folder, seed=seed, device="cpu")
        aligned = towers.build(config, seed, start=model)
        srcc = rated_srcc(aligned.tower, aligned, ratings)
    last = json.loads((folder / LOG).read_text(encoding="utf-8").splitlines()[-1])
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "choice_half_srcc": round(srcc, 4),
        "accuracy": last["accuracy"],
        "falling": last["falling"],
        "seconds": round(time.monotonic() - began),
        "bytes": model.stat().st_size,
        "folder": folder.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rated = read_ratings(options.ratings, options.images)
    chosen = halves(rated)["choice_half"]
    half = Ratings([rated.paths[k] for k in chosen], [rated.opinions[k] for k in chosen], rated.lower_better)
    results = options.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(each["variant"], each["seed"], each["steps"]) for each in done}
    wanted = [(name, seed) for seed in options.seeds for name in options.only]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(run, name, seed, options.steps, options.pristine, half, options.out)
            for name, seed in wanted
            if (name, seed, options.steps) not in known
        ]
        for each in as_completed(running):
            done.append(each.result())
            with results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    show([each for each in done if each["steps"] == options.steps])


def show(done: Sequence[dict[str, Any]]) -> None:
    print(f"{versus.machine()}, torch {torch.__version__}\n")
    print("| change | SRCC by seed | mean | ranking accuracy | types that fall | seconds | bytes |")
    print("|---|---|---|---|---|---|---|")
    for name in VARIANTS:
        rows = sorted((each for each in done if each["variant"] == name), key=lambda each: each["seed"])
        if not rows:
            continue

        def mean(what: str, rows: Sequence[dict[str, Any]] = rows) -> float:
            return statistics.mean(each[what] for each in rows)

        seeds = ", ".join(f"{each['choice_half_srcc']:.3f}" for each in rows)
        print(
            f"| {name} | {seeds} | {mean('choice_half_srcc'):.3f} | {mean('accuracy'):.3f} | "
            f"{24 * mean('falling'):.1f} | {mean('seconds'):.0f} | {rows[0]['bytes']:,} |"
        )


if __name__ == "__main__":
    main()
