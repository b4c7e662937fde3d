"""Show reward hacking: change pixels by the gradient of a score, and see what other measures say of the result.

    python benchmarks/hacking.py --pristine DIR [--metric qualiclip-mini] [--ensemble FILE ...] [--others FILE ...]
        [--steps 40] [--limit 4] [--sheet FILE] [--json FILE.json]

Nothing is trained: Adam moves every pixel by about half a grey level a step, and values are clamped to 0..1. It starts
from photographs with noise, and in one row from the photographs themselves. Photographs are those held out by the
folder's `manifest.csv` (columns `file` and `held_out`).

- Ways to hold it back: several scales, random crops, other seeds of the metric (`--ensemble`), pixels that stay near
  the start, and no reward for what is better than the photograph (`relative_to="target"`).
- Steps until the score is 0.99 (`-` where it never is), the score at the end, and measures that were not optimised:
  `--others` (such as a seed that is not in the ensemble; their mean is one column), the other embedded model, PIQE,
  natural scene statistics, PSNR and FSIM with the photograph, PSNR with the start.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import common
import torch
import torch.nn.functional as F
from restoration import OTHER, TRAINED_ON, joined, measures_of, shown_photographs
from torch import Tensor
from tqdm import tqdm

from qualiclip_pyiqa import QualityLoss
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError

from measures import means, sheet  # isort: skip  (restoration puts their folder on the path)
from tasks import SIGMA, add_noise, read_middle

RATE = 0.5 / 255
NEAR = 0.01  # weight of the score beside the mean absolute difference from the start
SIDE = 256
REACHED = 0.99
ALONE = "score alone"
RELATIVE = "relative to the photograph"
NOISY = f"noise of {SIGMA}"
SHOWN = (
    "photographs",
    f"{ALONE}, from photographs",
    NOISY,
    *(f"{label}, from {NOISY}" for label in (ALONE, f"{NEAR} score + distance from the start", RELATIVE)),
)
DRAWN, CUT = 2, 192  # photographs on the sheet, and the side of a cell
Row: TypeAlias = dict[str, Any]
#: From images, their start and the photographs to the loss.
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--metric", default="qualiclip-mini", help="that is optimised (default: %(default)s)")
    parser.add_argument("--ensemble", nargs="+", default=[], metavar="FILE", help="metrics optimised together with it")
    parser.add_argument("--others", nargs="+", default=[], metavar="FILE", help="metrics to measure by, as one column")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=4, help="photographs (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write what became of the photographs")
    parser.add_argument(
        "--shown", nargs="+", metavar="NAME", help="photographs to begin with, as the manifest names them"
    )
    options = parser.parse_args()
    options.side = SIDE
    if options.quick:
        options.limit, options.steps, options.side = 1, 2, 96
    try:
        rows = measure(options)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join([options.metric, OTHER, *options.ensemble, *options.others]))


def measure(options: argparse.Namespace) -> list[Row]:
    training, held_out = common.photographs(options.pristine)
    fitted = [Path(path) for path in common.spread(training, 2 if options.quick else TRAINED_ON)]
    paths = [Path(path) for path in common.spread(held_out, options.limit)]
    if options.sheet is not None:
        paths = list(dict.fromkeys([*shown_photographs(options, held_out), *paths]))[: options.limit]
    photographs = torch.cat([read_middle(path, options.side) for path in paths])  # in one batch
    noisy = add_noise(photographs, torch.Generator().manual_seed(0))
    score = QualityLoss(options.metric, reduction="none")
    losses = ways(options)
    measures = measures_of(options, fitted)
    rows: list[Row] = []
    shown: dict[str, Tensor] = {"photographs": photographs, NOISY: noisy}

    def row(label: str, start: str, images: Tensor, begun: Tensor, reached: list[int | None]) -> None:
        values = means([joined(each) for each in measures.of(images.split(1), photographs.split(1))])
        moved = (images - begun).abs().mean().item() * 255
        steps = None if None in reached else max(filter(None, reached), default=0)
        rows.append({"way": label, "start": start, "steps to 0.99": steps, "grey levels moved": moved} | values)

    row("none", "photographs", photographs, photographs, [None])
    row("none", NOISY, noisy, noisy, [None])
    for start, begun, labels in (("photographs", photographs, [ALONE]), (NOISY, noisy, losses)):
        for label in labels:
            torch.manual_seed(0)  # of the crops
            images, reached = climb(losses[label], score, begun, photographs, options.steps)
            row(label, start, images, begun, reached)
            shown[f"{label}, from {start}"] = images
    if options.sheet is not None:
        cells = {heading: shown[heading] for heading in SHOWN}
        lines = range(min(DRAWN, len(photographs)))
        sheet(
            [{name: middle(images[line : line + 1]) for name, images in cells.items()} for line in lines], options.sheet
        )
    return rows


def ways(options: argparse.Namespace) -> dict[str, Loss]:
    """Return losses to descend, by name."""
    alone = QualityLoss(options.metric)
    scales = QualityLoss(options.metric, scales=(1.0, 0.5))
    crops = QualityLoss(options.metric, crops=(4, options.side // 2))
    relative = QualityLoss(options.metric, relative_to="target")
    several = [alone, *map(QualityLoss, options.ensemble)]
    both = [QualityLoss(each, relative_to="target") for each in (options.metric, *options.ensemble)]

    def together(losses: Sequence[QualityLoss]) -> Loss:
        return lambda x, start, target: torch.stack([loss(x, target) for loss in losses]).mean()

    made: dict[str, Loss] = {
        ALONE: together([alone]),
        "scales 1 and 1/2": together([scales]),
        f"4 random crops of {options.side // 2} px": together([crops]),
    }
    if options.ensemble:
        made[f"mean of {len(several)} seeds"] = together(several)
    made[f"{NEAR} score + distance from the start"] = lambda x, start, target: NEAR * alone(x) + F.l1_loss(x, start)
    made[RELATIVE] = together([relative])
    if options.ensemble:
        made[f"{RELATIVE}, mean of {len(several)} seeds"] = together(both)
    return made


def middle(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top, left = max(0, height - CUT) // 2, max(0, width - CUT) // 2
    return images[..., top : top + CUT, left : left + CUT]


def climb(loss: Loss, score: QualityLoss, start: Tensor, target: Tensor, steps: int) -> tuple[Tensor, list[int | None]]:
    """Descend a loss in the pixels of images (N, 3, H, W) -> images, and the step at which each scored 0.99."""
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], RATE)
    reached: list[int | None] = [None] * len(images)
    for step in tqdm(range(1, steps + 1), unit="step", disable=None):
        optimizer.zero_grad()
        loss(images, start, target).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
            for k, distance in enumerate(score(images)):
                if reached[k] is None and distance <= 1 - REACHED:
                    reached[k] = step
    return images.detach(), reached


if __name__ == "__main__":
    main()
