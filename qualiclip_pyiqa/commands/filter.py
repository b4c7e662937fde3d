"""`qualiclip filter`: list, keep or copy what is good enough, by a table of scores."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ImageError, SettingsError
from ..files import replacing
from ..images.convert import source_name
from ..metrics.registry import lower_is_better
from ..scoring.tables import Record, check_suffix, read_table, write_table, writing


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "filter",
        help="list, keep or copy what is good enough",
        description="Pick pictures by a table that `qualiclip score` wrote, and list their paths, or keep their rows "
        "(-o) or the pictures themselves (--copy). Pictures without a score are never picked.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("table", type=Path, metavar="TABLE", help=".csv, .jsonl or .parquet")
    parser.add_argument("-m", "--metric", metavar="METRIC", help="the score to pick by, if the table has several")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--above", type=float, metavar="X", help="scores of at least X")
    rule.add_argument("--below", type=float, metavar="X", help="scores of at most X")
    rule.add_argument("--best", type=float, metavar="SHARE", help="the best share, 0..1, in the metric's own direction")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write their rows, do not list")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy the pictures, do not list")
    parser.add_argument("-0", "--null", action="store_true", help="end listed paths with NUL, for xargs -0")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        check_suffix(arguments.output)
        if arguments.output.exists():
            raise SettingsError(f"{arguments.output} is there already; choose another name")
    columns, rows = read_table(arguments.table)
    records = list(rows)
    metric = _metric(arguments, columns or ())
    scored = [record for record in records if metric in record.scores]
    kept = _pick(scored, metric, arguments)
    print(
        f"{len(kept)} of {len(scored)} scored pictures kept; {len(records) - len(scored)} without a score left out",
        file=sys.stderr,
    )
    if arguments.output is not None:
        write_table(arguments.output, columns or (), kept)
    if arguments.copy is not None:
        _copy(kept, arguments.copy)
    if arguments.output is None and arguments.copy is None:
        end = b"\0" if arguments.null else b"\n"
        with writing("standard output"):
            sys.stdout.buffer.write(b"".join(os.fsencode(record.path or "") + end for record in kept))
            sys.stdout.buffer.flush()
    return 0


def _metric(arguments: argparse.Namespace, columns: Sequence[str]) -> str:
    if arguments.metric is None:
        if len(columns) == 1:
            return columns[0]
        raise SettingsError(f"{arguments.table} has the scores {', '.join(columns) or '(none)'}; choose one with -m")
    if arguments.metric not in columns:
        raise SettingsError(f"{arguments.table} has no score {arguments.metric!r}; expected {', '.join(columns)}")
    return arguments.metric


def _pick(scored: list[Record], metric: str, arguments: argparse.Namespace) -> list[Record]:
    """In the table's order; of equal scores at the edge of the best share, the earlier rows."""
    if arguments.above is not None:
        return [record for record in scored if record.scores[metric] >= arguments.above]
    if arguments.below is not None:
        return [record for record in scored if record.scores[metric] <= arguments.below]
    if not 0 <= arguments.best <= 1:
        raise SettingsError(f"--best is {arguments.best:g}; expected a share in 0..1, such as 0.2 for a fifth")
    sign = 1 if lower_is_better(metric) else -1
    ranked = sorted(range(len(scored)), key=lambda k: sign * scored[k].scores[metric])
    # A share is meant in decimals: 0.07 of 100 is 7, though it is a little more in binary.
    count = math.ceil(round(arguments.best * len(scored), 9))
    return [scored[k] for k in sorted(ranked[:count])]


def _copy(kept: Sequence[Record], folder: Path) -> None:
    """Copy under the path below what all have in common; nothing is overwritten and no copy is partial."""
    paths = [Path(record.path) for record in kept if record.path]
    if not paths:
        return
    parents = [os.path.normpath(Path.cwd() / path.parent) for path in paths]
    common = os.path.commonpath(parents)
    for path, parent in zip(paths, parents, strict=True):
        target = folder / os.path.relpath(parent, common) / path.name
        if target.exists():
            raise SettingsError(f"{source_name(target)} is there already; choose an empty folder")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as part:
                shutil.copy2(path, part)
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"{source_name(path)} cannot be copied to {source_name(folder)} ({reason})") from error
