"""Measure what QualityLoss does to restorers that are trained with it, on photographs that are held out.

    python benchmarks/restoration.py --pristine DIR [--metric qualiclip-mini] [--others FILE ...] [--task sr2]
        [--seeds 2] [--restorers DIR] [--sheets DIR] [--json FILE.json]

The restorers of examples/restoration: for each task and seed one is trained by pixel loss alone, and continued for
each row of `ARMS`, pixel loss alone among them, with the same crops and noise. Photographs are those held out by the
folder's `manifest.csv` (columns `file` and `held_out`).

- Fidelity to the photograph: PSNR, SSIM and FSIM. These, the score of `--metric`, and scores that no training saw:
  `--others` (such as other seeds of the metric; their mean is one column), the other embedded model, PIQE, and natural
  scene statistics, fitted to photographs that may be trained on.
- Means over photographs and seeds; how far the seeds' means are apart; on how many photographs (of all seeds) a
  measure is better than by pixel loss alone.
- With `--restorers` every restorer is kept, and read instead of trained if it is there: an interrupted run continues.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import common
import torch
from baselines import NaturalScenes
from torch import Tensor, nn

from qualiclip_pyiqa import QualityLoss
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "restoration"))

from measures import Measures, means, sheet
from tasks import TASKS, Crops, read_middle
from train import fit, load, restore, save

#: Label, weight of QualityLoss, `relative_to`. The first is what the others are compared with.
ARMS: tuple[tuple[str, float, str | None], ...] = (
    ("pixel loss alone", 0, None),
    ("+ 0.001 score", 0.001, None),
    ("+ 0.003 score", 0.003, None),
    ("+ 0.01 score", 0.01, None),
    ("+ 0.1 score", 0.1, None),
    ("+ 0.01 score, relative to target", 0.01, "target"),
    ("+ 0.1 score, relative to target", 0.1, "target"),
)
STEPS, TUNED = 1000, 250  # of pixel loss alone, then of each arm
RATE, TUNING_RATE = 1e-3, 3e-4
CROP, BATCH, SIDE = 96, 4, 256
TRAINED_ON = 240  # photographs
OTHER = "qualiclip-mini+"
SCENES = "natural scene statistics"
LOWER_BETTER = {"piqe", SCENES}
SHOWN = ("pixel loss alone", "+ 0.01 score", "+ 0.1 score", "+ 0.1 score, relative to target")
CUT = 160  # side of a cell of a sheet
Row: TypeAlias = dict[str, Any]
Found: TypeAlias = dict[str, list[list[dict[str, float]]]]  # measures of each photograph, by arm and seed


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--metric", default="qualiclip-mini", help="of the loss (default: %(default)s)")
    parser.add_argument("--others", nargs="+", default=[], metavar="FILE", help="metrics to measure by, as one column")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=12, help="photographs to measure on (default: %(default)s)")
    parser.add_argument(
        "--restorers", type=Path, metavar="DIR", help="keep the restorers, and use those that are there"
    )
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="write a contact sheet for each task")
    parser.add_argument(
        "--shown", nargs="+", metavar="NAME", help="held-out photographs on the sheets, as the manifest names them"
    )
    options = parser.parse_args()
    options.steps, options.tuned, options.trained_on, options.side = STEPS, TUNED, TRAINED_ON, SIDE
    if options.quick:
        options.limit, options.seeds, options.steps, options.tuned, options.trained_on, options.side = 1, 1, 1, 1, 2, 96
    try:
        rows = measure(options)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join([options.metric, OTHER, *options.others]))


def measure(options: argparse.Namespace) -> list[Row]:
    training, held_out = common.photographs(options.pristine)
    chosen = [Path(path) for path in common.spread(training, options.trained_on)]
    photographs = [read_middle(Path(path), options.side) for path in common.spread(held_out, options.limit)]
    shown = [read_middle(path, CUT) for path in shown_photographs(options, held_out) if options.sheets]
    measures = measures_of(options, chosen)
    crops = Crops(chosen, CROP)
    rows: list[Row] = []
    for name in options.task or TASKS:
        task = TASKS[name]
        found: Found = {label: [] for label, *_ in ARMS}
        drawn: dict[str, list[Tensor]] = {"input": restore(task.network(), task, shown)[0]}
        for seed in range(options.seeds):
            for label, restorer in train_all(options, name, crops, seed):
                images = restore(restorer, task, photographs)[1]
                found[label].append([joined(each) for each in measures.of(images, photographs)])
                if seed == 0 and label in SHOWN:
                    drawn[label] = restore(restorer, task, shown)[1]
        ends = {"input": restore(task.network(), task, photographs)[0], "photograph": photographs}
        for end, images in ends.items():
            values = means([joined(each) for each in measures.of(images, photographs)])
            rows.append({"task": name, "measured": "mean", "loss": end} | values)
        rows += compared(name, found)
        if options.sheets is not None:
            drawn["photograph"] = shown
            lines = [dict(zip(drawn, images, strict=True)) for images in zip(*drawn.values(), strict=True)]
            sheet(lines, options.sheets / f"restored-{name}.jpg")
    return rows


def measures_of(options: argparse.Namespace, photographs: Sequence[Path]) -> Measures:
    """Create the measures by `--metric` and all that is not trained for; scene statistics are fitted to photographs."""
    metrics = {options.metric: options.metric, OTHER: OTHER, "piqe": "piqe", SCENES: NaturalScenes.fit(photographs)}
    return Measures(metrics | {f"other {number}": file for number, file in enumerate(options.others)})


def shown_photographs(options: argparse.Namespace, held_out: Sequence[str]) -> list[Path]:
    """Return the photographs to draw: those named, by default the first.

    Raises:
        SettingsError: a name that is not of a photograph held out.
    """
    paths = {Path(path).relative_to(options.pristine).as_posix(): Path(path) for path in held_out}
    names = options.shown or list(paths)[:1]
    if unknown := [name for name in names if name not in paths]:
        raise SettingsError(f"--shown {unknown[0]} is not held out; expected names such as {next(iter(paths))}")
    return [paths[name] for name in names]


def train_all(options: argparse.Namespace, name: str, crops: Crops, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Train the restorers of one seed, and yield label and restorer of each arm."""
    task = TASKS[name]

    def restorer(arm: str, train: Callable[[], nn.Module]) -> nn.Module:
        if options.restorers is None:
            return train()
        path = options.restorers / f"{name}-{seed}-{arm}.safetensors"
        if not path.exists():
            save(train(), path)
        return load(task, path)

    def pixels_alone() -> nn.Module:
        torch.manual_seed(seed)
        network = task.network()
        fit(network, task, crops, None, steps=options.steps, batch=BATCH, rate=RATE, seed=seed)
        return network

    def tuned(weight: float, relative_to: str | None) -> nn.Module:
        network = task.network()
        network.load_state_dict(base.state_dict())
        quality = QualityLoss(options.metric, weight=weight, relative_to=relative_to) if weight else None
        fit(network, task, crops, quality, steps=options.tuned, batch=BATCH, rate=TUNING_RATE, seed=1000 + seed)
        return network

    base = restorer("base", pixels_alone)
    for label, weight, relative_to in ARMS:
        yield label, restorer(f"{weight:g}-{relative_to or 'alone'}", partial(tuned, weight, relative_to))


def joined(measured: Mapping[str, float]) -> dict[str, float]:
    """Join the columns of `--others` into their mean."""
    others = [value for name, value in measured.items() if name.startswith("other ")]
    kept = {name: value for name, value in measured.items() if not name.startswith("other ")}
    return kept | ({"other seeds": statistics.mean(others)} if others else {})


def compared(task: str, found: Found) -> list[Row]:
    """Summarise all arms: means, differences between seeds, and photographs better than those of the first arm."""
    rows: list[Row] = []
    images = {label: [image for seed in seeds for image in seed] for label, seeds in found.items()}
    for label, each in images.items():
        rows.append({"task": task, "measured": "mean", "loss": label} | means(each))
    for label, seeds in found.items():
        of_seeds = [means(seed) for seed in seeds]
        apart = {
            name: max(each[name] for each in of_seeds) - min(each[name] for each in of_seeds) for name in of_seeds[0]
        }
        rows.append({"task": task, "measured": "seeds apart by", "loss": label} | apart)
    (_, first), *others = images.items()
    for label, each in others:
        better = {
            name: sum(
                ours[name] != theirs[name] and (ours[name] < theirs[name]) == (name in LOWER_BETTER)
                for ours, theirs in zip(each, first, strict=True)
            )
            for name in first[0]
        }
        rows.append({"task": task, "measured": f"better, of {len(first)}", "loss": label} | better)
    return rows


if __name__ == "__main__":
    main()
