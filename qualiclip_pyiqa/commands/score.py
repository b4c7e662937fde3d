"""`qualiclip score`: score files, folders and lists into a table."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ImageError, SettingsError, counted
from ..files import UTF16_MARKS
from ..images.convert import source_name
from ..images.parquet import ParquetImages, is_parquet
from ..images.paths import FoundPaths, find_images, fixed_part, is_pattern, matches
from ..metrics.prompts import Pair
from ..metrics.specs import column_belongs
from ..scoring.tables import CsvStream, Record, ScoreTable, check_suffix, read_meta
from ..screen import Screen, loading
from . import (
    Commands,
    add_map_range_option,
    add_metric_option,
    add_read_options,
    check_output,
    chosen_metrics,
    read_options,
    refuse,
    say,
)
from .calibration import add_calibrate_option, check_calibrate, int8_metrics
from .maps import Maps, maps_of
from .references import add_reference_option, references_of
from .summary import Summary

if TYPE_CHECKING:
    from ..scoring.building import MetricLike
    from ..scoring.scorer import Scorer
    from ..scoring.sources import References

# Options of `Scorer`, besides `READ_OPTIONS`.
OPTIONS = ("device", "batch_size", "precision", "compile")
Score: TypeAlias = Callable[[Iterable[str]], Iterator[Record]]


@dataclass(frozen=True)
class Engine:
    """Scores paths, on this machine or a cluster.

    Attributes:
        score: yields one record per path, in order.
        columns: names of the scores.
        lower_better: whether a lower score is better, by column.
        comparatives: what an image with a higher score is, and one with a lower score, by column.
        describe: returns the description of the table.
    """

    score: Score
    columns: tuple[str, ...]
    lower_better: Mapping[str, bool]
    comparatives: Mapping[str, Pair]
    describe: Callable[[], dict[str, Any]]


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score files, folders and lists",
        description="Score images by one or more metrics. Writes one row per image, in order, as soon as it is scored, "
        "and the settings to FILE.meta.json. "
        "Exit status: 0 all were scored, 1 some were not, 2 wrong usage, 130 stopped by Ctrl-C.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="file, folder, pattern such as 'a/**/*.jpg', .parquet file of images, or - for a list on stdin",
    )
    add_metric_option(parser)
    add_reference_option(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=".csv, .jsonl or .parquet (default: stdout)")
    parser.add_argument(
        "--maps",
        type=Path,
        metavar="DIR",
        help="also draw the quality maps of every image to a folder, and maps.csv, which names the map of each path",
    )
    add_map_range_option(parser, "--map-range")
    parser.add_argument("--force", action="store_const", const=True, help="replace maps that exist in DIR")
    parser.add_argument("--resume", action="store_true", help="continue or extend an existing FILE")
    parser.add_argument("-0", "--null", action="store_true", help="names in the list on stdin end with NUL")
    parser.add_argument("--device", help="such as cpu, cuda, or cuda:0,cuda:1 (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="maximum number of images of equal size per batch")
    parser.add_argument("--precision", default="fp32", help="fp32 (default), tf32, bf16, fp16 or int8")
    add_calibrate_option(parser, "--precision int8")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which pays off for many images")
    add_read_options(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: score on a cluster; accepts URLs such as s3://",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        check_suffix(arguments.output)
        check_output(arguments.output)
    elif arguments.resume:
        raise SettingsError("--resume needs the table to continue; pass -o FILE")
    if arguments.maps is None:
        refuse(arguments, ["force", "map_range"], "without --maps DIR")
    elif arguments.engine != "local":
        raise SettingsError(f"--maps has no effect with --engine {arguments.engine}; leave it out")
    if arguments.null and "-" not in arguments.paths:
        raise SettingsError("-0 has no effect without - for a list on standard input; leave it out")
    if arguments.engine != "ray":
        url = next((path for path in arguments.paths if "://" in path and not os.path.lexists(path)), None)
        if url is not None:
            raise SettingsError(f"{url} is a URL; pass --engine ray to score images in an object store")
    check_calibrate(arguments.calibrate, arguments.precision == "int8", "--precision int8")
    metrics = chosen_metrics(arguments)
    if arguments.resume:
        _check_columns(arguments.output, list(metrics))
    unmatched: list[str] = []
    names = _names(arguments.paths, arguments.null, unmatched)
    if arguments.engine == "ray":
        from ..scoring.ray import expand_urls

        names = expand_urls(names)
    found = find_images(names)
    if not found.paths and not found.unreadable:
        if unmatched:
            raise SettingsError(f"no file matches the pattern {source_name(unmatched[0])}")
        counts = {
            counted(found.others, "file that is no image", "files that are no images"): found.others,
            counted(found.hidden, "hidden entry", "hidden entries"): found.hidden,
        }
        skipped = ", ".join(what for what, count in counts.items() if count)
        raise SettingsError(f"no images in {', '.join(arguments.paths)}{f' ({skipped})' if skipped else ''}")
    files = {path: ParquetImages(path) for path in found.paths if is_parquet(path)}
    if files and arguments.engine == "ray":
        raise SettingsError(
            f"{next(iter(files))} is a Parquet file of images; score it without --engine ray, "
            "or with qualiclip_pyiqa.scoring.ray.score_dataset"
        )
    with loading(", ".join(metrics)):
        patterns = [fixed_part(each) for each in arguments.paths if is_pattern(each)]
        references = references_of(arguments, metrics, [*found.folders, *patterns], found.paths, files)
        engine = _engine(arguments, _in_precision(arguments, metrics), files, references)
        maps = None if arguments.maps is None else maps_of(arguments, metrics, partial(_sources, files=files))
    if maps is not None and not arguments.resume:
        maps.check(chain.from_iterable(files[path].names if path in files else [path] for path in found.paths))
    summary = Summary(engine.columns, engine.lower_better, engine.comparatives)
    try:
        with _table(arguments, engine) as table:
            _fill(table, found, unmatched, files, engine.score, summary, maps)
    except KeyboardInterrupt:
        kept = _how_to_resume(arguments.output, summary)
        say(f"qualiclip: stopped after {counted(summary.rows, 'row')}{kept}")
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"{error}{_how_to_resume(arguments.output, summary)}") from error
    for line in summary.lines(found.others, found.hidden):
        say(line)
    if maps is not None:
        say(f"{counted(maps.written, 'image')} mapped to {source_name(arguments.maps)}, {maps.failed} with an error")
    return int(summary.errors > 0 or (maps is not None and maps.failed > 0))


def _check_columns(table: Path, metrics: Sequence[str]) -> None:
    """Refuse to resume a table of other metrics before they are built; `ScoreTable` checks the rest."""
    meta = read_meta(table) if table.is_file() and table.stat().st_size else None
    if meta is None:
        return

    columns = list(meta["columns"])
    known = all(any(column_belongs(column, metric) for metric in metrics) for column in columns)
    if not known or not all(any(column_belongs(column, metric) for column in columns) for metric in metrics):
        raise SettingsError(
            f"{table} has the scores {', '.join(columns)}, not {', '.join(metrics)}; "
            "resume with the same metrics, or choose another name"
        )


def _table(arguments: argparse.Namespace, engine: Engine) -> ScoreTable | CsvStream:
    if arguments.output is None:
        return CsvStream(sys.stdout.buffer, engine.columns)
    return ScoreTable(arguments.output, engine.columns, arguments.resume, engine.describe())


def _fill(
    table: ScoreTable | CsvStream,
    found: FoundPaths,
    unmatched: Iterable[str],
    files: Mapping[str, ParquetImages],
    score: Score,
    summary: Summary,
    maps: Maps | None,
) -> None:
    """Score the images that the table lacks, each once; patterns that match nothing become rows with an error."""
    from tqdm import tqdm

    done = set()
    unmapped = []  # rows of an earlier run
    for record in table.rows():
        done.add(table.key(record.path))
        summary.add(record)
        if maps is not None and maps.wants(record):
            unmapped.append(record.path or "")

    errors = {
        folder: f"{source_name(folder)} cannot be listed ({why}); expected a folder that can be read"
        for folder, why in found.unreadable.items()
    } | {pattern: f"no file matches the pattern {source_name(pattern)}" for pattern in unmatched}
    failed = [Record(path, error=error) for path, error in errors.items() if table.key(path) not in done]
    todo = []
    listed = set()
    summary.repeated = found.repeated
    for name in chain.from_iterable(files[path].names if path in files else [path] for path in found.paths):
        key = table.key(name)
        if key in listed:
            summary.repeated += 1
        elif key not in done:
            todo.append(name)
        listed.add(key)
    if maps is not None:
        maps.check(todo)
    total = summary.rows + len(failed) + len(todo)
    with tqdm(total=total, initial=summary.rows, unit="image", file=Screen(), disable=None) as bar:
        for record in chain(failed, score(todo) if todo else ()):
            table.write([record])
            summary.add(record)
            if maps is not None and maps.wants(record):
                maps.write(record.path or "")
            bar.update()
    for name in unmapped:
        assert maps is not None
        maps.complete(name)


def _scored(
    scorer: Scorer, files: Mapping[str, ParquetImages], references: References | None, names: Iterable[str]
) -> Iterator[Record]:
    """Score images by name, including those inside Parquet files."""
    if not files:
        yield from scorer.score(names, references)
        return
    names = list(names)
    for name, record in zip(names, scorer.score(_sources(names, files), references), strict=True):
        if record.path == name:
            yield record
        else:
            yield replace(record, path=name, error=record.error and f"{source_name(name)}: {record.error}")


def _sources(names: Iterable[str], files: Mapping[str, ParquetImages]) -> Iterator[str | bytes | ImageError]:
    """Yield paths of files, and the encoded images that names `FILE#ROW` refer to."""

    def file_of(name: str) -> str:
        path = name.rpartition("#")[0]
        return path if path in files else ""

    for path, group in groupby(names, file_of):
        if path:
            yield from files[path].read(int(name.rpartition("#")[2]) for name in group)
        else:
            yield from group


def _how_to_resume(output: Path | None, summary: Summary) -> str:
    return f"; the rows in {output} are kept, --resume continues" if output and summary.rows else ""


def _names(arguments: Iterable[str], null: bool, unmatched: list[str]) -> Iterator[str]:
    """Yield the paths of the arguments, after expanding patterns, and `-` to the list on standard input.

    Patterns that match nothing are added to `unmatched` instead.
    """
    for argument in arguments:
        if argument == "-":
            yield from _listed(_standard_input(), null)
            continue
        names = matches(argument)
        is_name = "://" in argument or not is_pattern(argument)
        if names == [argument] and not is_name:
            unmatched.append(argument)
        else:
            yield from names


def _standard_input() -> bytes:
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        why = "it is closed" if error.errno == errno.EBADF else error.strerror or error
        raise OSError(f"standard input cannot be read ({why})") from error
    if not data:
        raise SettingsError("the list on standard input is empty; expected names of images")
    return data


def _listed(data: bytes, null: bool) -> list[str]:
    """Split a list into names: terminated by NUL, or one per line, also in the UTF-16 of PowerShell.

    Raises:
        SettingsError: lines with NUL characters, or invalid UTF-16.
    """
    if null:
        return [os.fsdecode(name) for name in data.split(b"\0") if name]
    try:
        # Without a NUL, a byte order mark is the beginning of a file name that is not UTF-8.
        text = data.decode("utf-16") if data.startswith(UTF16_MARKS) and b"\0" in data else None
    except UnicodeDecodeError as error:
        raise SettingsError(f"the list on standard input is not valid UTF-16 ({error.reason})") from error
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")) if text is None else text
    if "\0" in lines:
        raise SettingsError(
            "the list on standard input contains NUL characters; pass -0 if they terminate the names, "
            "else write it in UTF-8, or in UTF-16 with a byte order mark"
        )
    names = [name.removesuffix("\r") for name in lines.split("\n")]
    return [name for name in names if name and not name.isspace()]


def _in_precision(arguments: argparse.Namespace, metrics: Mapping[str, MetricLike]) -> Mapping[str, MetricLike]:
    """Return the metrics that run: quantised ones for int8, which is a precision of exported files only."""
    if arguments.precision != "int8":
        return metrics
    arguments.precision = "fp32"  # of what is not quantised
    return int8_metrics(metrics, arguments.calibrate)


def _engine(
    arguments: argparse.Namespace,
    metrics: Mapping[str, MetricLike],
    files: Mapping[str, ParquetImages],
    references: References | None,
) -> Engine:
    options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    options |= read_options(arguments)
    if arguments.engine == "ray":
        from ..scoring.ray import RayScorer

        cluster = RayScorer(metrics, **options)
        return Engine(cluster.score, cluster.columns, cluster.lower_better, cluster.comparatives, cluster.describe)
    from ..scoring.scorer import Scorer

    scorer = Scorer(metrics, **options)
    return Engine(
        partial(_scored, scorer, files, references),
        scorer.columns,
        scorer.lower_better,
        scorer.comparatives,
        partial(scorer.describe, references),
    )
