"""`qualiclip filter`: list, keep or copy the images that are good enough, by a table of scores."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import ImageError, SettingsError, counted
from ..files import replacing, writing
from ..images.convert import source_name
from ..images.identity import image_key
from ..metrics.registry import guess_lower_better
from ..scoring.tables import Record, Table, check_suffix, read_table, write_table
from ..scoring.tables.cells import shown
from . import Commands, a_number, check_output, refuse, say

_COPY_ERRORS = 5  # errors printed


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "filter",
        help="list, keep or copy the images that are good enough",
        description="Select images by a table of `qualiclip score`. List their paths, write their rows (-o), or copy "
        "the images (--copy). Images without a score are never selected. "
        "Exit status: 0 success, 1 some images could not be copied, 2 wrong usage.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("table", type=Path, metavar="TABLE", help=".csv, .jsonl or .parquet")
    parser.add_argument("-m", "--metric", metavar="METRIC", help="the score to select by, if the table has several")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--above", type=a_number, metavar="X", help="scores of at least X; a negative one as --above=-1")
    rule.add_argument("--below", type=a_number, metavar="X", help="scores of at most X")
    rule.add_argument("--best", type=a_number, metavar="SHARE", help="the best share, 0..1, in the score's direction")
    parser.add_argument(
        "--lower-better",
        action=argparse.BooleanOptionalAction,
        help="for --best: lower scores are better (default: as in TABLE.meta.json, else guessed by the metric's name)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the rows instead of listing paths")
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy the images instead of listing paths")
    parser.add_argument("-0", "--null", action="store_true", help="end listed paths with NUL, for xargs -0")


def run(arguments: argparse.Namespace) -> int:
    if arguments.best is None:
        refuse(arguments, ["lower_better"], "without --best")
    if arguments.output is not None:
        check_suffix(arguments.output)
        check_output(arguments.output)
        if arguments.output.exists():
            raise SettingsError(f"{arguments.output} exists already; choose another name")
    if arguments.copy is not None:
        _check_folder(arguments.copy)
    table = read_table(arguments.table)
    metric = _metric(arguments, table)
    records = list(table)
    scored = [record for record in records if metric in record.scores]
    _check_repeated(scored, metric, table)
    kept = _pick(scored, metric, arguments, table)
    if arguments.output is not None:
        write_table(arguments.output, table.columns, kept, table.meta)
    without = len(records) - len(scored)
    say(f"{len(kept)} of {counted(len(scored), 'scored image')} kept; {without} without a score left out")
    lost = [name for name, why in table.others.items() if why != "an index"]
    if arguments.output is not None and lost:
        say(f"columns that are not scores were not written to {arguments.output}: {', '.join(lost)}")
    if arguments.output is None and arguments.copy is None:
        end = b"\0" if arguments.null else b"\n"
        with writing("standard output"):
            sys.stdout.buffer.write(b"".join(os.fsencode(path) + end for path in _paths(kept)))
            sys.stdout.buffer.flush()
    return 0 if arguments.copy is None else _copy(kept, arguments.copy)


def _metric(arguments: argparse.Namespace, table: Table) -> str:
    name = arguments.metric
    if name is None:
        described = [column for column in table.columns if table.lower_better(column) is not None]
        for columns in (table.columns, described):
            if len(columns) == 1:
                return columns[0]
        if not table.columns:
            raise SettingsError(f"{table.path} has no column of scores{_why_not(table)}")
        raise SettingsError(f"{table.path} has the scores {_listed(table)}; choose one with -m{_why_not(table)}")
    if name in table.others:
        raise SettingsError(f"{table.path} has no scores in column {name!r} ({table.others[name]})")
    if name not in table.columns:
        raise SettingsError(f"{table.path} has no score {name!r}; expected one of {_listed(table)}")
    return name


def _why_not(table: Table) -> str:
    """Return why other columns hold no scores, since one cell is enough."""
    others = [f"{name!r}: {why}" for name, why in table.others.items() if why != "an index"]
    return f" (not scores: {shown('; '.join(others), 300)})" if others else ""


def _listed(table: Table) -> str:
    return ", ".join(table.columns) or "(none)"


def _check_repeated(scored: Sequence[Record], metric: str, table: Table) -> None:
    """Raise SettingsError if an image has two scores: then it may be good enough and not."""
    scores: dict[str, float] = {}
    for record in scored:
        if record.path and scores.setdefault(image_key(record.path), record.scores[metric]) != record.scores[metric]:
            raise SettingsError(
                f"{table.path} has two rows of {source_name(record.path)} with different scores; expected one per image"
            )


def _paths(records: Sequence[Record]) -> list[str]:
    """Return the path of each image, once, as its first row spells it."""
    paths: dict[str, str] = {}
    for record in records:
        if record.path:
            paths.setdefault(image_key(record.path), record.path)
    return list(paths.values())


def _pick(scored: list[Record], metric: str, arguments: argparse.Namespace, table: Table) -> list[Record]:
    """Select rows in table order; of equal scores at the limit of the best share, select the first."""
    if arguments.above is not None:
        return [record for record in scored if record.scores[metric] >= arguments.above]
    if arguments.below is not None:
        return [record for record in scored if record.scores[metric] <= arguments.below]
    if not 0 <= arguments.best <= 1:
        raise SettingsError(f"--best is {arguments.best:g}; expected a share in 0..1, such as 0.2 for a fifth")
    sign = 1 if _lower_better(metric, arguments, table) else -1
    ranked = sorted(range(len(scored)), key=lambda k: sign * scored[k].scores[metric])
    # 0.07 of 100 is 7, although the product is slightly more in binary.
    count = math.ceil(round(arguments.best * len(scored), 9))
    return [scored[k] for k in sorted(ranked[:count])]


def _lower_better(metric: str, arguments: argparse.Namespace, table: Table) -> bool:
    """Return the direction by the option, else by the table, else by the metric's name, with a warning."""
    wanted, known = arguments.lower_better, table.lower_better(metric)
    if wanted is not None:
        if known is not None and known != wanted:
            say(f"{table.path} states that {_direction(known)} scores of {metric} are better; the option overrides it")
        return wanted
    if known is None:
        known = guess_lower_better(metric)
        say(
            f"{table.path} does not state the direction of {metric}; by its name, {_direction(known)} is better "
            "(override with --lower-better or --no-lower-better)"
        )
    return known


def _direction(lower_better: bool) -> str:
    return "lower" if lower_better else "higher"


def _check_folder(folder: Path) -> None:
    """Raise SettingsError if no folder can be made here because of a file."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path) or path == path.parent)
    if not there.is_dir():
        raise SettingsError(f"{source_name(there)} is not a folder; expected one for the copies")


def _copy(kept: Sequence[Record], folder: Path) -> int:
    """Copy each image once, keeping its path below the images' common folder.

    Nothing is overwritten, and no copy is partial. Errors are printed at the end, and make the exit status 1.
    """
    paths = [Path(path) for path in _paths(kept)]
    if not paths:
        return 0
    parents = [os.path.normpath(Path.cwd() / path.parent) for path in paths]
    common = os.path.commonpath(parents)
    targets = [
        folder / os.path.relpath(parent, common) / path.name for path, parent in zip(paths, parents, strict=True)
    ]
    # Paths that pass through links may give two images the same name.
    taken = next((target for target, count in Counter(targets).items() if count > 1 or target.exists()), None)
    if taken is not None:
        raise SettingsError(f"{source_name(taken)} exists already; choose an empty folder")
    errors = []
    for path, target in zip(paths, targets, strict=True):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as part:
                shutil.copy2(path, part)
        except OSError as error:
            errors.append(f"{source_name(path)} cannot be copied to {source_name(folder)} ({error.strerror or error})")
    for line in errors[:_COPY_ERRORS]:
        say(f"qualiclip: {line}")
    if errors:
        raise ImageError(f"{len(errors)} of {counted(len(paths), 'image')} not copied")
    return 0
