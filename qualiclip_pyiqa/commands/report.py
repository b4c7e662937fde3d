"""`qualiclip report`: one page about the scores of a folder or a table, or about what changed between two."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import counted
from ..metrics.registry import LOOK_METRIC
from ..screen import Screen, loading
from . import (
    Commands,
    add_force_option,
    add_metric_option,
    add_read_options,
    check_different,
    check_new,
    chosen_metrics,
    put,
    read_options,
    refuse,
    say,
)

if TYPE_CHECKING:
    from tqdm import tqdm


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make a page about the scores of a folder or a table",
        description="Write one HTML page, which needs no network: the distribution of every score, the images from "
        "worst to best, each one's profile and quality maps, outliers, near-duplicates and errors. With a second "
        "folder or table, what changed between the two. "
        "Exit status: 0 success, 1 some images of a folder could not be scored, 2 wrong usage.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", type=Path, metavar="FOLDER|TABLE", help="a folder to score, or a table of scores")
    parser.add_argument("second", type=Path, nargs="?", metavar="SECOND", help="a folder or table to compare with")
    add_metric_option(parser, LOOK_METRIC)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, *.html")
    parser.add_argument(
        "--maps",
        action=argparse.BooleanOptionalAction,
        help="quality maps of every image (default: for at most 500 images scored by a metric of this package)",
    )
    parser.add_argument(
        "--thumbnails",
        choices=("inside", "beside"),
        help="pictures inside the page, or in NAME_files beside it (default: beside for more than 5000 images)",
    )
    parser.add_argument("--title", help="heading of the page (default: name of the folder or table)")
    parser.add_argument("--device", help="such as cpu or cuda, for a folder (default: cuda if there is one)")
    add_read_options(parser)
    add_force_option(parser)


def run(arguments: argparse.Namespace) -> int:
    check_new(arguments.output, arguments.force)
    sources = [each for each in (arguments.source, arguments.second) if each is not None]
    options = read_options(arguments)
    if arguments.device is not None:
        options["device"] = arguments.device
    scored = any(source.is_dir() for source in sources)
    if not scored:
        refuse(arguments, ("prompts", *options), "on a table of scores")
        check_different("-m", arguments.metric or ())
    metrics = chosen_metrics(arguments, default=LOOK_METRIC) if scored else arguments.metric or ()

    with loading(", ".join(metrics) or "the page's parts") as loaded, _Bars(loaded) as bars:
        from ..report.page import write_report

        report = write_report(
            arguments.source,
            arguments.output,
            arguments.second,
            metrics=metrics,
            options=options,
            maps=arguments.maps,
            thumbnails=arguments.thumbnails,
            force=arguments.force,
            title=arguments.title,
            watch=bars,
        )
    for note in report.notes:
        say(note)
    beside = f", pictures in {report.folder}" if report.folder else ""
    say(f"{counted(report.images, 'image')}, {report.errors} with an error{beside}")
    put(report.path)
    return int(report.unscored > 0)


class _Bars:
    """Progress bars on standard error, one for each step; `started` is called with the first."""

    def __init__(self, started: Callable[[], None]) -> None:
        self._started = started
        self._bar: tqdm | None = None
        self._step = ""

    def __enter__(self) -> _Bars:
        return self

    def __call__(self, step: str, done: int, total: int) -> None:
        from tqdm import tqdm

        self._started()
        if self._bar is None or step != self._step or done <= self._bar.n:
            self.close()
            self._bar, self._step = tqdm(total=total, desc=step, unit="image", file=Screen(), disable=None), step
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
