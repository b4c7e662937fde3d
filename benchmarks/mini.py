"""`qualiclip-mini`, or models like it, beside simple measures: opinion scores, degradations, speed.

    python benchmarks/mini.py --pristine DIR --ratings scores.csv --images DIR [--weights FILE...] [--output FILE.json]

Several weight files, such as those of several seeds, are reported each and together. Default: the embedded model.

- Agreement with the opinion scores of the table (columns as `qualiclip evaluate` finds them) for all pictures and for
  two halves, every second picture by name from the first ("choice half": what settings may be chosen by) and from the
  second ("other half"). Differences between a model and a baseline are of paired bootstraps.
- Baselines: log variance of the Laplacian; "sharpest parts", the 98th percentile of its log energy in cells of 16
  pixels (found on the choice half, which therefore says little of it), and what is left of it when the median is
  regressed out; natural scene statistics as in NIQE, both fitted to at most 1,000 photographs of --pristine; pyiqa's
  classical metrics as far as they need no download (its `entropy` takes 2 KiB for every pixel).
- Types of degradation for which the mean score falls from level to level, on --limit photographs of --pristine that
  are held out: whose `held_out` is 1 in a `manifest.csv` there, which also has a column `file`. Without one, no
  photograph counts as held out and those of all the folder are degraded.
- Pictures per second on the CPU, with torch's number of threads.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import scipy
import torch
import versus
from mini_baselines import NaturalScenes, SharpestParts, Sharpness, SharpnessForDetail, classical
from speed import medians
from torch import nn

from qualiclip_pyiqa.commands.evaluate import scored
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.agreement import LEAST, agreement, compare
from qualiclip_pyiqa.evaluation.ladders import score_degraded
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.files import replacing
from qualiclip_pyiqa.images.paths import find_pictures
from qualiclip_pyiqa.pretrained.weights import file_sha256

EMBEDDED = "qualiclip-mini"
LAPLACIAN, SHARPEST, RELATIVE = "log variance of the Laplacian", "sharpest parts", "sharpest parts for the detail"
SCENES = "natural scene statistics"
TIMED = (LAPLACIAN, SCENES, "piqe")  # of the baselines
FITTED = 1000  # photographs, at most
BATCHES, HEIGHT, WIDTH = (1, 8), 384, 512  # what speed is measured on
REPEAT = 9
PARTS = {"all": "all", "choice_half": "choice half", "other_half": "other half"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=[])
    parser.add_argument("--limit", type=int, default=100, help="photographs to degrade, at most (default: 100)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    try:
        result = measure(options)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    show(result)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(options.output) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    ratings = read_ratings(options.ratings, options.images)
    if len(ratings.paths) < 2 * LEAST:
        raise SettingsError(f"{options.ratings} rates {len(ratings.paths)} pictures; expected {2 * LEAST} or more")
    training, held_out = photographs(options.pristine)
    degraded = spread(held_out or training, options.limit)
    models: dict[str, nn.Module] = {
        name: pyiqa.create_metric(EMBEDDED, device="cpu", weights=name) for name in options.weights
    } or {EMBEDDED: pyiqa.create_metric(EMBEDDED, device="cpu")}
    others, missing = classical()
    fitted = spread(training, FITTED)
    baselines: dict[str, nn.Module] = {
        LAPLACIAN: Sharpness(),
        SHARPEST: SharpestParts(),
        RELATIVE: SharpnessForDetail.fit(fitted),
        SCENES: NaturalScenes.fit(fitted),
    } | others

    scores = scored(ratings.paths, models | baselines, "cpu")
    for name, metric in (models | baselines).items():  # from here on, as the opinion scores
        if bool(metric.lower_better) != ratings.lower_better:
            scores[name] = [-score for score in scores[name]]
    parts = halves(ratings)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": versus.machine(),
        "versions": {each.__name__: each.__version__ for each in (torch, pyiqa, np, scipy)}
        | {"python": platform.python_version()},
        "rated": {part: len(members) for part, members in parts.items()},
        "pristine": {
            "photographs": len(training) + len(held_out),
            "held_out": len(held_out),
            "fitted": len(fitted),
            "degraded": len(degraded),
        },
        "models": {},
        "baselines": {},
        "not_run": missing,
    }
    for name, metric in baselines.items():
        result["baselines"][name] = {"lower_better": bool(metric.lower_better)} | agreements(
            name, scores, parts, ratings
        )
    falling = degradations(degraded, models)
    for name, metric in models.items():
        path = metric.net.origin.path
        result["models"][name] = (
            {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            | agreements(name, scores, parts, ratings, against=list(baselines))
            | {"degradations": falling[name]}
        )
    if len(models) > 1:
        result["models_together"] = together(list(result["models"].values()))
    result["pictures_per_second"] = speeds(models, baselines)
    return result


def photographs(folder: Path) -> tuple[list[str], list[str]]:
    """Pictures of a folder that may be trained on, and those that are held out by its `manifest.csv`."""
    paths = find_pictures([str(folder)]).paths if folder.is_dir() else []
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
    """At most so many, evenly spread."""
    count = min(most, len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]


def halves(ratings: Ratings) -> dict[str, list[int]]:
    """Numbers of the rated pictures by part."""
    order = sorted(range(len(ratings.paths)), key=lambda k: ratings.paths[k].name)
    return dict(zip(PARTS, (order, order[::2], order[1::2]), strict=True))


def agreements(
    name: str,
    scores: Mapping[str, Sequence[float]],
    parts: Mapping[str, Sequence[int]],
    ratings: Ratings,
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """Correlations by part, and paired differences of SRCC to other scores."""
    found = {}
    for part, members in parts.items():
        opinions = [ratings.opinions[k] for k in members]
        taken = {each: [scores[each][k] for k in members] for each in (name, *against)}
        found[part] = agreement(taken[name], opinions).as_dict()
        for each in against:
            difference = compare(taken[name], taken[each], opinions)
            if difference is not None:
                found[part].setdefault("versus", {})[each] = {
                    "srcc_difference": difference.difference,
                    "ci95": list(difference.ci95),
                    "p": difference.p,
                }
    return found


def degradations(paths: Sequence[str], models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What `qualiclip evaluate --degradations` finds on these photographs, and the types by whether they fall."""
    out = {}
    for name, types in score_degraded(paths, models, "cpu").items():
        monotone = [each for kind, each in types.items() if DEGRADATIONS[kind].monotone]
        out[name] = {
            "types_falling": sum(each.falls for each in types.values()),
            "types": len(types),
            "monotone_types_falling": sum(each.falls for each in monotone),
            "monotone_types": len(monotone),
            "in_order": statistics.mean(each.in_order for each in types.values()),
            "not_falling": [kind for kind, each in types.items() if not each.falls],
            "means": {kind: each.means for kind, each in types.items()},
        }
    return out


def together(models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over weight files."""
    columns = {
        f"{part} {what}": [each[part][what] for each in models] for part in PARTS for what in ("srcc", "plcc", "krcc")
    }
    for what in ("types_falling", "monotone_types_falling"):
        columns[what] = [each["degradations"][what] for each in models]
    return {
        what: {"mean": statistics.mean(values), "std": statistics.stdev(values)}
        for what, values in columns.items()
        if None not in values
    }


@torch.no_grad()
def speeds(models: dict[str, nn.Module], baselines: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Pictures per second by batch, medians of runs that take turns; of models with towers alike, the first one's."""
    firsts: dict[str, str] = {}
    for name, metric in models.items():
        origin = metric.net.origin
        firsts.setdefault(f"{origin.backbone} {origin.tower_options}", name)
    timed = {name: (models | baselines)[name] for name in (*firsts.values(), *TIMED)}
    out: dict[str, dict[str, float]] = {name: {} for name in timed}
    for batch in BATCHES:
        x = versus.pictures(batch, HEIGHT, WIDTH)
        seconds = medians([lambda metric=metric, x=x: metric(x) for metric in timed.values()], REPEAT)
        for name, each in zip(timed, seconds, strict=True):
            out[name][f"{batch}x{HEIGHT}x{WIDTH}"] = batch / each
    return out


def show(result: Mapping[str, Any]) -> None:
    models, baselines = result["models"], result["baselines"]
    print(f"{result['date']}, {result['machine']}, torch {torch.__version__}, pyiqa {pyiqa.__version__}\n")
    for part, title in PARTS.items():
        print(f"Opinion scores, {title}: {result['rated'][part]} pictures\n")
        print("| | SRCC | 95 % interval | PLCC | KRCC |\n|---|---|---|---|---|")
        for name, each in (models | baselines).items():
            row = each[part]
            print(
                f"| {name} | {cell(row['srcc'])} | {interval(row['srcc_ci95'])} | {cell(row['plcc'])} | "
                f"{cell(row['krcc'])} |"
            )
        if "models_together" in result:
            rows = [result["models_together"].get(f"{part} {what}") for what in ("srcc", "plcc", "krcc")]
            srcc, plcc, krcc = ("-" if row is None else f"{row['mean']:.4f} ± {row['std']:.4f}" for row in rows)
            print(f"| {len(models)} models | {srcc} | mean ± standard deviation | {plcc} | {krcc} |")
        print()
    print("SRCC of a model minus that of a baseline, 95 % interval of paired bootstraps\n")
    print("| model | baseline | " + " | ".join(PARTS.values()) + " |\n|---|---|" + "---|" * len(PARTS))
    for name, each in models.items():
        for other in baselines:
            rows = [each[part].get("versus", {}).get(other) for part in PARTS]
            cells = ["-" if row is None else f"{row['srcc_difference']:+.4f} ({interval(row['ci95'])})" for row in rows]
            print(f"| {name} | {other} | " + " | ".join(cells) + " |")
    for name, reason in result["not_run"].items():
        print(f"\nnot run: {name} {reason}", end="")
    pristine = result["pristine"]
    kind = "held-out" if pristine["held_out"] else "not held out"
    print(f"\n\nTypes of degradation that fall from level 1 to 5, {pristine['degraded']} photographs ({kind})\n")
    print("| model | all | monotone ones | not falling | pairs of levels in order |\n|---|---|---|---|---|")
    for name, each in models.items():
        row = each["degradations"]
        print(
            f"| {name} | {row['types_falling']} of {row['types']} | {row['monotone_types_falling']} of "
            f"{row['monotone_types']} | {', '.join(row['not_falling']) or 'none'} | {row['in_order']:.3f} |"
        )
    speed = result["pictures_per_second"]
    sizes = list(next(iter(speed.values())))
    print(f"\nPictures per second\n\n| | {' | '.join(sizes)} |\n|---|" + "---|" * len(sizes))
    for name, row in speed.items():
        print(f"| {name} | " + " | ".join(f"{row[size]:.1f}" for size in sizes) + " |")


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


if __name__ == "__main__":
    main()
