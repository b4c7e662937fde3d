"""`qualiclip weights`: list, find, download and check weight files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, SettingsError, WeightsError
from . import Commands

if TYPE_CHECKING:
    from ..pretrained.weights import WeightRecord

# Published SRCCs of one metric on one data set differ by about this much between toolboxes and between readings of the
# same files (whole pictures or resized ones, single or half precision).
SRCC_TOLERANCE = 0.02


def add_parser(commands: Commands) -> None:
    weights = commands.add_parser("weights", help="list, find, download and check weight files")
    actions = weights.add_subparsers(title="actions", required=True, metavar="ACTION")

    action = actions.add_parser("list", help="every weight file, its licence, and where it was found")
    action.set_defaults(run=_list)

    name_help = "a weight's name, or a metric's for all its files"
    action = actions.add_parser("path", help="where a weight file lies; never downloads")
    action.add_argument("names", metavar="NAME", nargs="+", help=name_help)
    action.set_defaults(run=_path)

    action = actions.add_parser("get", help="find a weight file or download it, check it, and print where it lies")
    action.add_argument("names", metavar="NAME", nargs="+", help=name_help)
    action.set_defaults(run=_get)

    action = actions.add_parser("verify", help="compare the hashes of the files that are here with the known ones")
    action.add_argument("names", metavar="NAME", nargs="*", help=f"{name_help} (default: all that are here)")
    group = action.add_argument_group("scores (with the name of at least one metric)")
    group.add_argument("--ratings", type=Path, metavar="CSV", help="columns `image` (file name) and `mos`")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures of --ratings")
    group.add_argument("--dataset", metavar="NAME", help='which data set they are, such as "CLIVE"')
    action.set_defaults(run=_verify)


def _records(names: Sequence[str]) -> list[WeightRecord]:
    """The records of weights and of metrics, each once."""
    from ..metrics.registry import METRICS
    from ..pretrained import weights

    keys: list[str] = []
    for name in names:
        if name in weights.manifest():
            keys.append(name)
        elif name in METRICS:
            keys += METRICS[name].records
        else:
            import difflib

            known = [*weights.manifest(), *METRICS]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"no weight and no metric is called {name!r}; did you mean {near!r}?")
    return [weights.manifest()[key] for key in dict.fromkeys(keys)]


def _list(_: argparse.Namespace) -> int:
    from ..pretrained import weights

    rows = [("NAME", "FILE", "LICENCE", "COMMERCIAL", "WHERE")]
    for record in weights.manifest().values():
        found = weights.locate(record)
        where = f"{found.path} ({found.place})" if found else "not here"
        rows.append((record.name, record.file, record.licence, "yes" if record.commercial_use else "no", where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _path(arguments: argparse.Namespace) -> int:
    from ..pretrained import weights

    status = 0
    for record in _records(arguments.names):
        found = weights.locate(record)
        if found is None:
            print(
                f"qualiclip: {record.file} is not here; get it with: qualiclip weights get {record.name}",
                file=sys.stderr,
            )
            status = 1
        else:
            print(found.path)
    return status


def _get(arguments: argparse.Namespace) -> int:
    from ..pretrained import weights

    for record in _records(arguments.names):
        print(weights.find(record))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ..pretrained import weights

    scoring = [arguments.ratings, arguments.images, arguments.dataset]
    if any(scoring) and not all(scoring):
        raise SettingsError("--ratings, --images and --dataset belong together; give all three or none")
    wrong = False
    for record in _records(arguments.names) if arguments.names else weights.manifest().values():
        found = weights.locate(record)
        if found is None:
            print(f"{record.name}: not here")
            wrong |= bool(arguments.names)
            continue
        verdict, ok = _verdict(record, found.path)
        wrong |= not ok
        print(f"{record.name}: {verdict}")
    if all(scoring):
        wrong |= _compare_scores(arguments)
    return int(wrong)


def _verdict(record: WeightRecord, path: Path) -> tuple[str, bool]:
    from ..pretrained import weights

    try:
        weights.check_usable(path)
        expected, said_by = weights.expected_sha256(record, path)
    except WeightsError as error:
        return f"WRONG: {error}", False
    digest = weights.file_sha256(path)
    if not expected:
        return f"unknown: no hash to compare with; found sha256 {digest}; {path}", True
    if digest.startswith(expected):
        return f"ok: sha256 {digest} as {said_by} says; {path}", True
    return f"WRONG: expected sha256 {expected} ({said_by}), found {digest}; {path}", False


def _compare_scores(arguments: argparse.Namespace) -> bool:
    """Score the user's rated pictures; whether an SRCC is far from the one that its source was seen to report."""
    from ..metrics.registry import METRICS
    from ..pretrained import weights

    reported: dict[str, list[dict[str, Any]]] = {}
    for row in weights.published():
        reported.setdefault(row["dataset"], []).append(row)
    if arguments.dataset not in reported:
        raise SettingsError(f"no published score on {arguments.dataset!r}; expected one of {', '.join(reported)}")
    rows = [row for row in reported[arguments.dataset] if row["metric"] in arguments.names]
    if not rows:
        raise SettingsError(
            f"name a metric with a published score on {arguments.dataset}: "
            f"{', '.join(row['metric'] for row in reported[arguments.dataset])}"
        )
    files, mos = _ratings(arguments.ratings, arguments.images)
    far = False
    for row in rows:
        srcc, plcc = _correlations(METRICS[row["metric"]].name, files, mos)
        difference = srcc - row["srcc"]
        differs = row["verified"] and abs(difference) > SRCC_TOLERANCE
        far |= differs
        print(
            f"{row['metric']} on {arguments.dataset}, {len(files)} pictures: SRCC {srcc:.4f} PLCC {plcc:.4f}; "
            f"published SRCC {row['srcc']} PLCC {row.get('plcc', '-')} ({row['source']}); "
            f"difference {difference:+.4f}{' DIFFERS' if differs else ''}"
        )
    return far


def _ratings(table: Path, folder: Path) -> tuple[list[Path], list[float]]:
    import csv

    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        files, mos = [folder / row["image"] for row in rows], [float(row["mos"]) for row in rows]
    except OSError as error:
        raise SettingsError(f"{table} cannot be read ({error.strerror}); expected a CSV file") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{table} has no usable columns `image` and `mos` ({error})") from error
    if len(files) < 3:
        raise SettingsError(f"{table} rates {len(files)} pictures; expected at least 3 to correlate")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ImageError(f"{missing} does not exist, which {table} rates")
    return files, mos


def _correlations(name: str, files: Sequence[Path], mos: Sequence[float]) -> tuple[float, float]:
    import pyiqa
    from scipy import stats
    from tqdm import tqdm

    metric = pyiqa.create_metric(name)
    scores = [metric(str(file)).item() for file in tqdm(files, desc=name, unit="picture", file=sys.stderr)]
    return float(stats.spearmanr(scores, mos)[0]), float(stats.pearsonr(scores, mos)[0])
