"""Compare `qualiclip-mini`, or models like it, with simple measures: opinion scores, degradations, speed.

    python benchmarks/mini.py --pristine DIR --ratings scores.csv --images DIR [--weights FILE...] [--json FILE.json]

Several weight files, such as those of several seeds, can be compared. Default: the embedded model.

- Agreement with the opinion scores of the table (columns as `qualiclip evaluate` finds them) on all images and on two
  halves: every second image by name from the first ("choice half", used to choose settings) and from the second ("other
  half"). Differences between a model and a baseline are paired bootstraps.
- Baselines: log variance of the Laplacian; "sharpest parts", the 98th percentile of its log energy in cells of 16
  pixels (chosen on the choice half, where its figures are therefore biased), and its residual after regressing on the
  median; natural scene statistics as in NIQE, both fitted to at most 1,000 photographs of --pristine; pyiqa's classical
  metrics that need no download (its `entropy` takes 2 KiB per pixel).
- Types of degradation for which the mean score falls from level to level, on --limit photographs of --pristine that
  are held out: whose `held_out` is 1 in a `manifest.csv` there, which also has a column `file`. Without one, no
  photograph counts as held out and those of all the folder are degraded.
- Images per second on the CPU, with torch's number of threads.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import common
import pyiqa
import torch
from baselines import NaturalScenes, SharpestParts, Sharpness, SharpnessForDetail, classical
from torch import nn

from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.agreement import LEAST, agreement, compare
from qualiclip_pyiqa.evaluation.ladders import score_degraded
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.evaluation.scores import score_images
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.scoring.scorer import Scorer

EMBEDDED = "qualiclip-mini"
LAPLACIAN, SHARPEST, RELATIVE = "log variance of the Laplacian", "sharpest parts", "sharpest parts for the detail"
SCENES = "natural scene statistics"
TIMED = (LAPLACIAN, SCENES, "piqe")  # of the baselines
FITTED = 1000  # photographs, at most
BATCHES, HEIGHT, WIDTH = (1, 8), 384, 512  # what speed is measured on
REPEAT = 9
PARTS = ("all", "choice half", "other half")
Row: TypeAlias = dict[str, Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=100, help="photographs to degrade, at most (default: 100)")
    options = parser.parse_args()
    try:
        rows = measure(options)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join(options.weights) or EMBEDDED)


def measure(options: argparse.Namespace) -> list[Row]:
    ratings = read_ratings(options.ratings, options.images)
    if len(ratings.paths) < 2 * LEAST:
        raise SettingsError(f"{options.ratings} rates {len(ratings.paths)} images; expected {2 * LEAST} or more")
    training, held_out = photographs(options.pristine)
    degraded = spread(held_out or training, 1 if options.quick else options.limit)
    models: dict[str, nn.Module] = {
        name: pyiqa.create_metric(EMBEDDED, device="cpu", weights=name) for name in options.weights
    } or {EMBEDDED: pyiqa.create_metric(EMBEDDED, device="cpu")}
    others, missing = classical()
    for name, reason in missing.items():
        print(f"not run: {name} {reason}")
    fitted = spread(training, FITTED)
    baselines: dict[str, nn.Module] = {
        LAPLACIAN: Sharpness(),
        SHARPEST: SharpestParts(),
        RELATIVE: SharpnessForDetail.fit(fitted),
        SCENES: NaturalScenes.fit(fitted),
    } | others
    metrics = models | baselines

    scored = score_images(Scorer(metrics, device="cpu"), list(dict.fromkeys(ratings.images)))
    if scored.errors:
        raise ImageError(next(iter(scored.errors.values())))
    scores = {name: values.tolist() for name, values in scored.of(ratings.images).items()}
    for name, metric in metrics.items():  # from here on in the direction of the opinion scores
        if bool(metric.lower_better) != ratings.lower_better:
            scores[name] = [-score for score in scores[name]]
    rows = []
    for part, members in halves(ratings).items():
        opinions = [ratings.opinions[k] for k in members]
        taken = {name: [scores[name][k] for k in members] for name in metrics}
        for name in metrics:
            found = agreement(taken[name], opinions)
            rows.append(
                {"measured": f"opinion scores, {part}", "metric": name, "n": found.n, "SRCC": found.srcc}
                | {"95 % interval": interval(found.srcc_ci95), "PLCC": found.plcc, "KRCC": found.krcc}
            )
        for name, baseline in itertools.product(models, baselines):
            difference = compare(taken[name], taken[baseline], opinions)
            if difference is not None:
                what = f"SRCC minus that of {baseline}, {part}"
                row = {"measured": what, "metric": name, "n": len(members), "SRCC": difference.difference}
                rows.append(row | {"95 % interval": interval(difference.ci95)})
    kind = "held out" if held_out else "not held out"
    for name, types in score_degraded(Scorer(models, device="cpu", workers=0), degraded).behaviours.items():
        falling = [kind for kind, each in types.items() if each.falls]
        rows.append(
            {"measured": f"degradations, {len(degraded)} photographs, {kind}", "metric": name}
            | {"types falling": f"{len(falling)} of {len(types)}"}
            | {"not falling": ", ".join(sorted(types.keys() - falling)) or None}
            | {"pairs of levels in order": statistics.mean(each.in_order for each in types.values())}
        )
    return rows + speeds(models, baselines, options.quick)


def photographs(folder: Path) -> tuple[list[str], list[str]]:
    """List the images of a folder that may be trained on, and those held out by its `manifest.csv`."""
    paths = find_images([str(folder)]).paths if folder.is_dir() else []
    names: set[Path] = set()
    if (folder / "manifest.csv").is_file():
        with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
            names = {folder / row["file"] for row in csv.DictReader(file) if row.get("held_out") == "1"}
    held_out = [path for path in paths if Path(path) in names]
    training = [path for path in paths if Path(path) not in names]
    if not training:
        raise SettingsError(f"no photographs in {folder} that are not held out; expected some to fit a baseline to")
    return training, held_out


def spread(paths: list[str], most: int) -> list[str]:
    """Select at most this many paths, evenly spread."""
    count = min(most, len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]


def halves(ratings: Ratings) -> dict[str, list[int]]:
    """Return the indices of the rated images by part."""
    order = sorted(range(len(ratings.paths)), key=lambda k: ratings.paths[k].name)
    return dict(zip(PARTS, (order, order[::2], order[1::2]), strict=True))


@torch.no_grad()
def speeds(models: dict[str, nn.Module], baselines: dict[str, nn.Module], quick: bool) -> list[Row]:
    """Measure images per second by batch size, as medians of runs that take turns."""
    timed = {name: (models | baselines)[name] for name in (*models, *TIMED)}
    rows = []
    for batch in BATCHES:
        x = common.images(batch, *((64, 64) if quick else (HEIGHT, WIDTH)))
        calls = [lambda metric=metric, x=x: metric(x) for metric in timed.values()]
        for name, seconds in zip(timed, common.medians(calls, 1 if quick else REPEAT), strict=True):
            row = {"measured": f"speed, {batch}x{x.shape[2]}x{x.shape[3]}", "metric": name}
            rows.append(row | {"images per second": batch / seconds})
    return rows


def interval(ends: Sequence[float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


if __name__ == "__main__":
    main()
