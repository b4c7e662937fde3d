"""The heads of an embedded model trained anew on statistics that are computed once: what shapes them, in minutes.

    python benchmarks/mini_heads.py --pristine DIR --ratings scores.csv --images DIR [--weights FILE] [--stacks 400]

Stacks of crops of 384 pixels (not the sharpest ones, at native scale, two fifths with all but the middle out of focus)
go through the model's stages once. Then each variant trains fresh heads on the pooled statistics, with the losses of
`qualiclip train`, 64 stacks a step. Reported are the SRCC with opinion scores on every second rated picture by name
(the "choice half" of benchmarks/mini.py) and the share of ordered pairs of levels that are in order, on 40 stacks that
were not trained on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import versus
from mini import halves
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.degradations.base import GROUP_ORDER
from qualiclip_pyiqa.evaluation.ratings import read_ratings
from qualiclip_pyiqa.pretrained.weights import data_folder
from qualiclip_pyiqa.towers import mini
from qualiclip_pyiqa.training import alignment as towers
from qualiclip_pyiqa.training.config import Config, load_config
from qualiclip_pyiqa.training.run import losses
from qualiclip_pyiqa.training.stacks import Stacks, batch_of, list_photographs, shorter_side
from qualiclip_pyiqa.training.validation import differences

GROUPS = [group for group in GROUP_ORDER if group != "blur"]
DATA = {"stacks": 2, "crops": (384,), "candidates": 1, "native": 1.0, "bokeh": 0.4}
HELD_OUT, BATCH, RATE = 40, 64, 1e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "anew": {"dropout": 0.0, "severity": {}},
    "dropout 0.5": {"dropout": 0.5, "severity": {}},
    **{
        f"dropout 0.5, severity {factor} but for blur": {"dropout": 0.5, "severity": dict.fromkeys(GROUPS, factor)}
        for factor in (0.5, 0.25, 0.0)
    },
    "severity 0.5 but for blur": {"dropout": 0.0, "severity": dict.fromkeys(GROUPS, 0.5)},
}


class Heads(nn.Module):
    """Statistics (M, D) / 255, in the order of the first block, which sees all -> features."""

    def __init__(self, tower: mini.MiniTower) -> None:
        super().__init__()
        self.tower = tower
        widths = [stage[-1].conv2.out_channels for stage in tower.stages]
        sizes = [mini.ENERGIES] + [(2 + len(mini.PERCENTILES)) * width for width in widths]
        self.sizes = dict(zip(tower.blocks[0], sizes, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        seen = dict(zip(self.sizes, (255 * x).split(list(self.sizes.values()), dim=1), strict=True))
        return self.tower.features(seen)


@torch.no_grad()
def statistics(tower: mini.MiniTower, pictures: Tensor) -> Tensor:
    """(M, 3, H, W) in 0..1 -> (M, D): what the first head sees."""
    caught: list[Tensor] = []
    hook = tower.heads[0].register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    tower(pictures)
    hook.remove()
    return caught[0]


def collect(tower: mini.MiniTower, config: Config, pristine: Path, count: int) -> tuple[dict[str, Tensor], list[Any]]:
    paths = [path for path in list_photographs(pristine) if shorter_side(path) >= config.smallest_photograph]
    data, drawn, batches = Stacks(paths, config, seed=77), [], []
    for number in tqdm(range(count // config.stacks), desc="stacks", unit="pair"):
        stacks = data[number]
        batch = batch_of(stacks, config)
        shape = batch["pictures"].shape[:3]
        found = statistics(tower, batch["pictures"].flatten(0, 2).float() / 255)
        batches.append(batch | {"pictures": found.unflatten(0, shape)})
        drawn += [dataclasses.replace(stack, crops=stack.crops[:0]) for stack in stacks]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, drawn


def train(config: Config, data: dict[str, Tensor], steps: int, fitted: nn.ModuleList) -> tuple[Heads, towers.Aligned]:
    aligned = towers.build(config, seed=0)
    assert isinstance(aligned.tower, mini.MiniTower)
    for head, finished in zip(aligned.tower.heads, fitted, strict=True):
        if isinstance(head, mini.RelativeSharpness):
            head.load_state_dict(finished.state_dict())
    heads = Heads(aligned.tower)
    averaged = copy.deepcopy(heads)
    optimiser = torch.optim.AdamW(heads.tower.heads.parameters(), lr=RATE, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randperm(len(data["level"]) - HELD_OUT, generator=generator)[:BATCH]
        batch = {name: values[chosen] for name, values in data.items()}
        optimiser.zero_grad()
        losses(heads, aligned, batch, config)["loss"].backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1)
        optimiser.step()
        with torch.no_grad():
            for old, new in zip(averaged.parameters(), heads.parameters(), strict=True):
                old.lerp_(new, 1 - min(0.99, step / (step + 10)))
    for module in averaged.modules():
        if isinstance(module, mini.Standardise):
            module.momentum = 1
    with torch.no_grad():
        averaged(data["pictures"][:-HELD_OUT].flatten(0, 2) / 255)
    return averaged.eval(), aligned


def report(name: str, heads: Heads, aligned: towers.Aligned, data: dict[str, Tensor], rated: Any) -> None:
    found, opinions = rated
    score = torch.sigmoid(towers.MINI_SCALE * differences(heads, aligned, found)).mean(1)
    held_out = data["pictures"][-HELD_OUT:]
    q = differences(heads, aligned, held_out.flatten(0, 2)).mean(1).unflatten(0, held_out.shape[:3])
    right = q[:, :, None] > q[:, None]
    counted = data["ordered"][-HELD_OUT:] & torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    accuracy = float(right.float().mean(-1)[counted].mean())
    print(f"| {name} | {spearmanr(score, opinions)[0]:.3f} | {accuracy:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="whose stages and anchors (default: the embedded model's)")
    parser.add_argument("--stacks", type=int, default=400)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    config = dataclasses.replace(load_config("mini"), **DATA)
    aligned = towers.build(config, seed=0, start=options.weights or data_folder() / "qualiclip-mini.safetensors")
    tower = aligned.tower.eval()
    assert isinstance(tower, mini.MiniTower)
    ratings = read_ratings(options.ratings, options.images)
    chosen = halves(ratings)["choice_half"]
    opinions = [ratings.opinions[k] for k in chosen]
    found = torch.cat([statistics(tower, load_image(ratings.paths[k])[None]) for k in tqdm(chosen, desc="rated")])
    data, drawn = collect(tower, config, options.pristine, options.stacks)

    print(f"{versus.machine()}, torch {torch.__version__}; {len(drawn)} stacks\n\n| | SRCC | in order |\n|---|---|---|")
    report("as they are", Heads(tower), aligned, data, (found, opinions))
    for name, change in VARIANTS.items():
        variant = dataclasses.replace(config, **change)
        severity = torch.tensor([stack.severity(variant) for stack in drawn])
        heads, fresh = train(variant, data | {"severity": severity}, options.steps, tower.heads)
        report(name, heads, fresh, data, (found, opinions))


if __name__ == "__main__":
    main()
