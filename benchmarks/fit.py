"""Measure `qualiclip fit`: how well fitted metrics agree with opinion scores that they were not fitted to.

    python benchmarks/fit.py --ratings scores.csv --images DIR [--tower qualiclip-mini ...] [--fitted-on 100 300]
        [--group COLUMN] [--test-ratings CSV --test-images DIR] [--splits 10] [--json FILE.json]

For each tower, in repeated random splits: fitted on so many images of the table (0: 80 %), tested on the others; median
and standard deviation. "Tower's own" is the metric that the tower belongs to, where it is one, on the same test images.
With a second set: fitted on all images of the first, tested on all of the second, with a bootstrap interval. Statistics
are cached like those of the command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import common
import numpy as np
from tqdm import tqdm

from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.agreement import LEAST, Floats, agreement
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.evaluation.scores import score_images
from qualiclip_pyiqa.metrics.registry import METRICS
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.tables import Record
from qualiclip_pyiqa.training.features import default_cache
from qualiclip_pyiqa.training.fitting import FitOptions, Rated, choose_tower, cross_validate, fit, rated_statistics
from qualiclip_pyiqa.training.splits import repeated_splits

Row: TypeAlias = dict[str, Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--group")
    parser.add_argument("--tower", nargs="+", default=["qualiclip-mini"])
    parser.add_argument("--fitted-on", type=int, nargs="+", default=[100, 300, 0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--test-ratings", type=Path)
    parser.add_argument("--test-images", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.splits, options.fitted_on = 2, [0]
    try:
        rows = measured(options)
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join(options.tower))


def measured(options: argparse.Namespace) -> list[Row]:
    ratings = read_ratings(options.ratings, options.images, group_column=options.group)
    other = None
    if options.test_ratings is not None:
        other = read_ratings(options.test_ratings, options.test_images)
    rows = []
    for name in options.tower:
        chosen = choose_tower(name)
        found = rated_statistics(chosen, ratings, default_cache(), watch, device="cpu")
        own = own_scores(name, ratings)
        rows += [
            {"tower": name, "tested on": "the others", **within(found, own, count, options.splits)}
            for count in options.fitted_on
        ]
        if other is not None:
            rows.append({"tower": name, "tested on": "the second set", **across(name, ratings, other)})
    return rows


def within(found: Rated, own: Floats | None, count: int, splits: int) -> Row:
    groups = len(set(found.groups.tolist()))
    if count >= groups:
        raise SettingsError(f"--fitted-on {count}: the table has {groups} groups of images; expected fewer")
    settings = FitOptions(splits=splits, test_share=1 - count / groups if count else 0.2)
    figures = cross_validate(found.x, found.y, found.groups, settings).agreement
    row: Row = {"fitted on": count or "80 %"}
    for name in ("srcc", "plcc"):
        row |= {name.upper(): figures[name]["median"], f"{name.upper()} sd": figures[name]["sd"]}
    if own is not None:
        drawn = repeated_splits(found.groups, splits, settings.test_share, settings.seed)
        tests = [agreement(own[split.test], found.y[split.test]).srcc for split in drawn if len(split.test) >= LEAST]
        row["SRCC of the tower's own"] = statistics.median(value for value in tests if value is not None)
    return row


def across(name: str, ratings: Ratings, other: Ratings) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fitted.safetensors"
        model, _ = fit(
            choose_tower(name), ratings, out, FitOptions(splits=1, cache=default_cache()), watch, device="cpu"
        )
        means = other.mean_opinions()
        scores = score_images(Scorer({"fitted": out}, device="cpu"), list(means), watch)
    if scores.errors:
        raise ImageError(next(iter(scores.errors.values())))
    opposite = model.fit.lower_better != other.lower_better
    found = agreement(scores.values["fitted"], list(means.values()), opposite)
    own = own_scores(name, other)
    low, high = found.srcc_ci95 or (None, None)
    return {
        "fitted on": model.fit.images,
        "SRCC": found.srcc,
        "PLCC": found.plcc,
        "SRCC of the tower's own": None if own is None else agreement(own, list(means.values())).srcc,
        "SRCC 95 % from": low,
        "to": high,
    }


def own_scores(name: str, ratings: Ratings) -> Floats | None:
    """Score images by the metric that a tower belongs to, higher being what the opinion scores count as higher."""
    if name not in METRICS:
        return None
    scorer = Scorer({name: name}, device="cpu")
    scores = score_images(scorer, list(ratings.mean_opinions()), watch)
    (values,) = scores.values.values()
    return -values if scorer.lower_better[name] != ratings.lower_better else np.asarray(values)


def watch(records: Iterable[Record], total: int) -> Iterable[Record]:
    return tqdm(records, total=total, unit="image", file=sys.stderr, disable=None)


if __name__ == "__main__":
    main()
