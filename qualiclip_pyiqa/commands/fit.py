"""`qualiclip fit`: fit a metric to opinion scores, on a tower that stays as it is."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import counted
from ..metrics.specs import refuse_prompts
from ..optional import require
from ..screen import Screen
from . import (
    Commands,
    a_number,
    a_seed,
    add_rating_options,
    add_read_options,
    check_output,
    put,
    rated,
    read_options,
    say,
)

if TYPE_CHECKING:
    from ..pretrained.fitted import Fit
    from ..scoring.tables import Record
    from ..training.fitting import CrossValidation

FEW_TESTED = 20  # images in a test part, below which its figures are mostly chance


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit a metric to opinion scores",
        description="Fit a ridge regression on statistics of an image tower to the opinion scores of a few hundred "
        "images, in about a minute on a CPU, and measure it by repeated splits. The file is a metric: qualiclip score "
        "-m FILE, or pyiqa.create_metric('fitted', weights=FILE).",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-m",
        "--metric",
        required=True,
        metavar="TOWER",
        help="whose tower: a metric of this package, such as qualiclip-mini, a backbone of open_clip, such as RN50, or "
        "a file of `qualiclip train` or `qualiclip fit`",
    )
    parser.add_argument(
        "--backbone-weights",
        type=Path,
        metavar="PATH",
        help="weights in place of the tower's own: a file, or a folder in the layout of Hugging Face transformers",
    )
    parser.add_argument("--ratings", required=True, type=Path, metavar="CSV", help="opinion scores of the images")
    add_rating_options(parser)
    parser.add_argument(
        "--group", metavar="COLUMN", help="images with one value of this column, such as a scene, are never divided"
    )
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="*.safetensors")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--splits", type=int, default=10, metavar="N", help="number of repeated splits (default: 10)")
    parser.add_argument(
        "--test",
        type=a_number,
        default=0.2,
        metavar="SHARE",
        help="share of images to test on in a split (default: 0.2)",
    )
    parser.add_argument("--seed", type=a_seed, default=0, metavar="N", help="seed of the splits (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write the cache of statistics")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    add_read_options(parser)


def run(arguments: argparse.Namespace) -> int:
    require("scipy.stats", "fit", "qualiclip fit")
    refuse_prompts(arguments.metric, "here: `qualiclip fit` takes the tower alone")
    check_output(arguments.output)
    ratings = rated(arguments, arguments.group)  # before anything that takes time
    say(f"qualiclip: {ratings}")

    from ..training.features import default_cache
    from ..training.fitting import FitOptions, check_ratings, check_target, choose_tower, fit

    check_target(arguments.output, arguments.force)
    check_ratings(ratings)
    tower = choose_tower(arguments.metric, arguments.backbone_weights)
    options = FitOptions(
        splits=arguments.splits,
        test_share=arguments.test,
        seed=arguments.seed,
        cache=None if arguments.no_cache else default_cache(),
        force=arguments.force,
    )
    reading = read_options(arguments) | {"device": arguments.device}
    model, found = fit(tower, ratings, arguments.output, options, _bar, **reading)
    for line in _lines(model.fit):
        say(line)
    for warning in warnings(model.fit, found):
        say(f"qualiclip: WARNING: {warning}")
    put(arguments.output)
    return 0


def _bar(records: Iterable[Record], total: int) -> Iterator[Record]:
    from tqdm import tqdm

    return iter(tqdm(records, total=total, desc="statistics", unit="image", file=Screen(), disable=None))


def _lines(fit: Fit) -> Iterator[str]:
    from ..evaluation import text

    share = round(100 * (1 - fit.test_share))
    yield (
        f"qualiclip: {fit.splits} random splits, {share} % to fit and {100 - share} % to test, {fit.images} images in "
        f"{counted(fit.groups, 'group')}; median (standard deviation, lowest..highest):"
    )
    for name, each in fit.agreement.items():
        yield (
            f"  {name.upper()} {text.number(each['median'])} ({text.number(each['sd'])}, {text.number(each['min'])}.."
            f"{text.number(each['max'])})"
        )
    yield f"qualiclip: fitted on all {fit.images} images with strength {fit.strength:.3g}"


def warnings(fit: Fit, found: CrossValidation) -> Iterator[str]:
    """Yield what keeps a fit's figures, or the fit itself, from meaning much; one line each."""
    if fit.at_edge:
        yield (
            "that is the weakest or strongest penalty that was tried; with so few or such ratings the tower's "
            "statistics hold little about them, or nothing keeps the regression from fitting them"
        )
    median = fit.agreement["srcc"]["median"]
    if median is None:
        yield (
            "no split has an SRCC, since its test part is too small or its scores or opinion scores are all equal, so "
            "nothing is known about the metric; rate more images, or pass a larger --test"
        )
    elif found.measured < fit.splits:
        yield (
            f"the SRCC is that of {found.measured} of {fit.splits} splits; in the others the test part is too small, "
            "or scores or opinion scores are all equal"
        )
    if median is not None and median < 0:
        yield (
            f"the median SRCC is negative ({median:.4f}): on new images the metric orders quality no better than "
            "chance; do not use it without more ratings, or another tower"
        )
    typical = statistics.median_low(found.tests)
    if median is not None and typical < FEW_TESTED:
        least, most = min(found.tests), max(found.tests)
        size = str(least) if least == most else f"{least} to {most}"
        chance = 1 / math.sqrt(max(typical - 1, 1))
        yield (
            f"test parts hold {size} images, where chance alone moves an SRCC by {chance:.2f} (standard deviation), "
            f"so the figures say little; expected {FEW_TESTED} or more: rate more images, such as 100"
        )
