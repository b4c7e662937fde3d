"""`qualiclip score`: files, folders and lists into a table of scores."""

from __future__ import annotations

import argparse
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import SettingsError
from ..images.convert import source_name
from ..images.paths import FoundPaths, find_pictures, matches
from ..metrics.registry import lower_is_better
from ..scoring.tables import CsvStream, Record, ScoreTable, check_suffix
from . import DEFAULT_METRIC, add_metric_option

Engine: TypeAlias = Callable[[Iterable[str]], Iterator[Record]]

EXTREMES = 5  # worst and best pictures of the summary
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="score files, folders and lists",
        description="Score pictures by one or more metrics: one row per picture, in order, written as it comes. "
        "Exit status: 0 all were scored, 1 some were not, 2 the command line makes no sense, 130 stopped by Ctrl-C.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="file, folder, pattern such as 'a/**/*.jpg', or - for a list on stdin"
    )
    add_metric_option(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=".csv, .jsonl or .parquet (default: stdout)")
    parser.add_argument("--resume", action="store_true", help="go on with a FILE whose run was stopped")
    parser.add_argument("-0", "--null", action="store_true", help="the list on stdin ends its names with NUL")
    parser.add_argument("--device", help="such as cpu, cuda, or cuda:0,cuda:1 (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures of equal size scored together, at most")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode")
    parser.add_argument("--precision", default="fp32", help="fp32 (default), tf32, bf16 or fp16")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which pays for many pictures")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger pictures (default: 89 million)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: on a cluster; also takes s3:// and the like"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        check_suffix(arguments.output)
    elif arguments.resume:
        raise SettingsError("--resume goes on with a table; name it with -o FILE")
    names = _named(arguments.paths, b"\0" if arguments.null else b"\n")
    if arguments.engine == "ray":
        from ..scoring.ray import expand_urls

        names = expand_urls(names)
    found = find_pictures(names)
    if not found.paths and not found.unreadable:
        others = f" ({found.others} files are none)" if found.others else ""
        raise SettingsError(f"no pictures in {', '.join(arguments.paths)}{others}")
    columns, engine = _engine(arguments, arguments.metric or [DEFAULT_METRIC])
    summary = _Summary(columns)
    try:
        with _table(arguments, columns) as table:
            _fill(table, found, engine, summary)
    except KeyboardInterrupt:
        kept = _how_to_go_on(arguments.output, summary)
        print(f"qualiclip: stopped after {summary.rows} rows{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{error}{_how_to_go_on(arguments.output, summary)}") from error
    summary.print(found.others)
    return int(summary.errors > 0)


def _table(arguments: argparse.Namespace, columns: Sequence[str]) -> ScoreTable | CsvStream:
    if arguments.output is None:
        return CsvStream(sys.stdout.buffer, columns)
    return ScoreTable(arguments.output, columns, arguments.resume)


def _fill(table: ScoreTable | CsvStream, found: FoundPaths, engine: Engine, summary: _Summary) -> None:
    from tqdm import tqdm

    done = set()
    for record in table.rows():
        done.add(table.key(record.path))
        summary.add(record)
    failed = [
        Record(folder, error=f"{source_name(folder)} cannot be listed ({why}); expected a folder that can be read")
        for folder, why in found.unreadable.items()
        if table.key(folder) not in done
    ]
    todo = [path for path in found.paths if table.key(path) not in done]
    total = summary.rows + len(failed) + len(todo)
    with tqdm(total=total, initial=summary.rows, unit="picture", file=sys.stderr) as bar:
        for record in chain(failed, engine(todo) if todo else ()):
            table.write([record])
            summary.add(record)
            bar.update()


def _how_to_go_on(output: Path | None, summary: _Summary) -> str:
    return f"; what is in {output} is kept, --resume goes on" if output and summary.rows else ""


def _named(arguments: Iterable[str], separator: bytes) -> Iterator[str]:
    for argument in arguments:
        if argument == "-":
            names = sys.stdin.buffer.read().split(separator)
            if separator == b"\n":
                names = [name.removesuffix(b"\r") for name in names if not name.isspace()]
            yield from (os.fsdecode(name) for name in names if name)
        else:
            yield from matches(argument)


def _engine(arguments: argparse.Namespace, metrics: list[str]) -> tuple[tuple[str, ...], Engine]:
    """The names of the scores, and what turns paths into records."""
    names = ("device", "batch_size", "workers", "precision", "compile", "max_pixels")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.engine == "ray":
        from ..scoring.ray import score_paths

        return score_paths(metrics, **options)
    from ..scoring.scorer import Scorer

    scorer = Scorer(metrics, **options)
    return scorer.columns, scorer.score


class _Summary:
    """What is said at the end: per metric count, mean, quantiles, and the pictures at both ends."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.rows = 0
        self.errors = 0
        self.first_errors: list[str] = []
        self.scores = {column: array("d") for column in columns}
        self.paths: dict[str, list[str]] = {column: [] for column in columns}

    def add(self, record: Record) -> None:
        self.rows += 1
        if record.error is not None:
            self.errors += 1
            if len(self.first_errors) < EXTREMES:
                self.first_errors.append(record.error)
        for column, score in record.scores.items():
            self.scores[column].append(score)
            self.paths[column].append(record.path or "")

    def print(self, others: int) -> None:
        def say(line: str) -> None:
            print(line, file=sys.stderr)

        say(f"{self.rows} pictures: {self.rows - self.errors} scored, {self.errors} with an error")
        for error in self.first_errors:
            say(f"  {error}")
        if self.errors > len(self.first_errors):
            say(f"  ... and {self.errors - len(self.first_errors)} more: see the column `error`")
        if others:
            say(f"files passed over, since their suffix is no picture's: {others}")
        for column, scores in self.scores.items():
            if not scores:
                continue
            better = "lower" if lower_is_better(column) else "higher"
            marks = " ".join(f"{q:.0%} {v:.4f}" for q, v in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True))
            say(f"{column} ({better} is better): count {len(scores)}, mean {np.mean(scores):.4f}; quantiles {marks}")
            ranked = sorted(zip(scores, self.paths[column], strict=True), reverse=better == "lower")
            for what, rows in (("worst", ranked[:EXTREMES]), ("best", ranked[::-1][:EXTREMES])):
                say(f"  {what}: " + ", ".join(f"{score:.4f} {source_name(path)}" for score, path in rows))
