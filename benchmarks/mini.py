"""Compare the embedded models with simple measures: opinion scores, degradations, speed, memory.

    python benchmarks/mini.py --pristine DIR [--rated NAME scores.csv DIR ...] [--seeds NAME FILE... ...]
        [--trained-on NAME RATED] [--before FILE] [--json FILE.json]

Each `--seeds` names a model and the files of its seeds, with mean and standard deviation over them. Default: the
embedded models. `--before` is the file of an earlier model, which is measured like the others.

- Agreement with the opinion scores of every `--rated` set (columns as `qualiclip evaluate` finds them), with bootstrap
  intervals. Differences to a measure of sharpness are paired bootstraps. `--trained-on` marks the rows of a model on a
  set that it was trained on, which say nothing about other images.
- Baselines: two definitions of sharpness (log of the Laplacian's mean energy, log of its variance); "sharpest parts",
  the 98th percentile of its log energy in cells of 16 pixels; natural scene statistics as in NIQE, fitted to
  photographs of --pristine; pyiqa's classical metrics that need no download (its `entropy` takes 2 KiB per pixel).
- Types of both degradation banks for which the mean score falls from level to level, and pairs of levels in order, on
  whole photographs of --pristine that are held out by its `manifest.csv` (columns `file` and `held_out`).
- Images per second on the CPU, with torch's number of threads; models take turns.
- By how much one image raises the peak memory of a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import common
import torch
from baselines import LaplacianEnergy, NaturalScenes, SharpestParts, Sharpness, classical
from torch import nn

from qualiclip_pyiqa.degradations.banks import BANKS
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.agreement import LEAST, agreement, compare
from qualiclip_pyiqa.evaluation.ladders import score_degraded
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.evaluation.scores import score_images
from qualiclip_pyiqa.scoring.scorer import Scorer

EMBEDDED = ("qualiclip-mini", "qualiclip-mini+")
BEFORE = "the model before"
SHARPNESS: dict[str, nn.Module] = {
    "log energy of the Laplacian": LaplacianEnergy(),
    "log variance of the Laplacian": Sharpness(),
    "sharpest parts": SharpestParts(),
}
SCENES = "natural scene statistics"
TIMED = ((1, 384, 512), (8, 384, 512), (1, 1080, 1920))  # batch, height, width
LARGE = ((1080, 1920), (2160, 3840))
REPEAT = 9
AVERAGED = ("SRCC", "PLCC", "KRCC", "types falling", "pairs in order")  # over seeds
Row: TypeAlias = dict[str, Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--rated", nargs=3, action="append", default=[], metavar=("NAME", "CSV", "DIR"))
    parser.add_argument("--seeds", nargs="+", action="append", default=[], metavar=("NAME", "FILE"))
    parser.add_argument("--trained-on", nargs=2, action="append", default=[], metavar=("NAME", "RATED"))
    parser.add_argument("--before", metavar="FILE")
    parser.add_argument("--limit", type=int, default=12, help="photographs to degrade (default: 12; 0: none)")
    parser.add_argument("--fitted", type=int, default=200, help="photographs of the scene statistics (default: 200)")
    options = parser.parse_args()
    if options.quick:
        options.limit = 1
    try:
        groups = models_of(options)
        rows = measure(options, groups)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    used = ", ".join(f"{column}: {model}" for group in groups.values() for column, model in group.items())
    common.report(options, rows, weights=used)


def models_of(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the models to measure: by group (the seeds of one model), the column and the file or name of each."""
    groups: dict[str, dict[str, str]] = {}
    for name, *files in options.seeds:
        if not files or name in groups:
            raise SettingsError(f"--seeds {name} has {len(files)} files; expected a name, once, and its files")
        several = len(files) > 1
        groups[name] = {f"{name}, seed {number}" if several else name: file for number, file in enumerate(files)}
    groups = groups or {name: {name: name} for name in EMBEDDED}
    if options.before is not None:
        groups[BEFORE] = {BEFORE: options.before}
    sets = [name for name, *_ in options.rated]
    if len(set(sets)) < len(sets):
        raise SettingsError(f"--rated sets are {', '.join(sets)}; expected each name once")
    for name, rated in options.trained_on:
        if name not in groups or rated not in sets:
            known = f"one of {', '.join(groups)} and one of {', '.join(sets)}"
            raise SettingsError(f"--trained-on {name} {rated} is not among what is measured; expected {known}")
    return groups


def measure(options: argparse.Namespace, groups: Mapping[str, Mapping[str, str]]) -> list[Row]:
    training, held_out = common.photographs(options.pristine)
    rated = {name: rated_set(Path(table), Path(folder)) for name, table, folder in options.rated}
    files = {column: model for group in groups.values() for column, model in group.items()}
    models: dict[str, nn.Module] = {column: common.load(model) for column, model in files.items()}
    others, missing = classical()
    for name, reason in missing.items():
        print(f"not run: {name} {reason}")
    baselines = SHARPNESS | others
    if rated:
        baselines[SCENES] = NaturalScenes.fit(common.spread(training, options.fitted))
    rows: list[Row] = []
    for name, ratings in rated.items():
        trained = {column for model, on in options.trained_on if on == name for column in groups[model]}
        rows += agreements(name, ratings, models, baselines, groups, trained)
    if options.limit:
        rows += ladders(models, common.spread(held_out, options.limit), groups)
    first = {group: next(iter(columns)) for group, columns in groups.items()}
    timed = {group: models[column] for group, column in first.items()} | SHARPNESS
    rows += speeds(timed, options.quick)
    for (height, width), (group, column) in itertools.product([(64, 64)] if options.quick else LARGE, first.items()):
        fresh = not options.quick or group == next(iter(groups))
        mib = common.peak_memory(partial(common.load, files[column]), height, width, fresh)
        rows.append({"measured": f"extra memory, 1x{height}x{width}", "metric": group, "MiB": mib})
    return rows


def rated_set(table: Path, folder: Path) -> Ratings:
    ratings = read_ratings(table, folder).averaged()
    if len(ratings.paths) < LEAST:
        raise SettingsError(f"{table} rates {len(ratings.paths)} images; expected {LEAST} or more")
    return ratings


def agreements(
    name: str,
    ratings: Ratings,
    models: Mapping[str, nn.Module],
    baselines: Mapping[str, nn.Module],
    groups: Mapping[str, Mapping[str, str]],
    trained: set[str],
) -> list[Row]:
    """Correlate all scores with the opinion scores of one set; `trained` are the models trained on it."""
    scored = score_images(Scorer({**models, **baselines}, device="cpu"), ratings.paths)
    if scored.errors:
        raise ImageError(next(iter(scored.errors.values())))
    opposite = {column: lower != ratings.lower_better for column, lower in scored.lower_better.items()}
    scores = {column: -values if opposite[column] else values for column, values in scored.values.items()}
    rows: list[Row] = []
    for column, values in scores.items():
        found = agreement(values, ratings.opinions)
        rows.append(
            {"measured": f"opinion scores, {name}", "metric": column, "n": found.n, "SRCC": found.srcc}
            | {"95 % interval": interval(found.srcc_ci95), "PLCC": found.plcc, "KRCC": found.krcc}
        )
    blocks = [rows]
    for baseline in SHARPNESS:
        block: list[Row] = []
        for column in models:
            difference = compare(scores[column], scores[baseline], ratings.opinions)
            if difference is not None:
                what = f"SRCC minus that of {baseline}, {name}"
                row = {"measured": what, "metric": column, "n": len(ratings.paths), "SRCC": difference.difference}
                block.append(row | {"95 % interval": interval(difference.ci95)})
        blocks.append(block)
    for row in itertools.chain(*blocks):
        if row["metric"] in trained:
            row["note"] = "trained on these images"
    return [row for block in blocks for row in over_seeds(block, groups)]


def ladders(models: dict[str, nn.Module], paths: Sequence[str], groups: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Degrade photographs by every type and level of each bank."""
    rows = []
    for bank_name, bank in BANKS.items():
        found = score_degraded(Scorer(models, device="cpu", workers=0), paths, bank=bank)
        block: list[Row] = []
        for column, types in found.behaviours.items():
            falling = [name for name, each in types.items() if each.falls]
            block.append(
                {"measured": f"degradations of bank {bank_name}, {len(paths)} photographs", "metric": column}
                | {"types falling": len(falling), "of": len(types)}
                | {"pairs in order": statistics.mean(each.in_order for each in types.values())}
                | {"not falling": ", ".join(name for name in types if name not in falling) or None}
            )
        rows += over_seeds(block, groups)
    return rows


def over_seeds(rows: Sequence[Row], groups: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Add mean and standard deviation over the seeds of each model to the rows of one measurement."""
    added: list[Row] = []
    for name, columns in groups.items():
        own = [row for row in rows if row["metric"] in columns]
        if len(own) < 2:
            continue
        for what, summarise in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            keys = [key for key in AVERAGED if all(row.get(key) is not None for row in own)]
            row = {"measured": own[0]["measured"], "metric": f"{name}, {what} of {len(own)} seeds"}
            row |= {key: float(summarise([row[key] for row in own])) for key in keys}
            added.append(row | {key: own[0][key] for key in ("n", "of", "note") if key in own[0]})
    return [*rows, *added]


@torch.no_grad()
def speeds(timed: Mapping[str, nn.Module], quick: bool) -> list[Row]:
    """Measure images per second by size, as medians of runs that take turns."""
    rows: list[Row] = []
    for batch, height, width in [(1, 64, 64)] if quick else TIMED:
        x = common.images(batch, height, width)
        calls = [lambda metric=metric, x=x: metric(x) for metric in timed.values()]
        found = dict(zip(timed, common.medians(calls, 1 if quick else REPEAT), strict=True))
        for name, seconds in found.items():
            row: Row = {"measured": f"speed, {batch}x{height}x{width}", "metric": name}
            row["images per second"] = batch / seconds
            if BEFORE in found:
                row["of the model before"] = found[BEFORE] / seconds
            rows.append(row)
    return rows


def interval(ends: Sequence[float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


if __name__ == "__main__":
    main()
