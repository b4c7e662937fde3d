"""`qualiclip weights`: list, find, download, check and convert weight files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, SettingsError, WeightsError, counted, did_you_mean
from ..screen import Screen
from . import Commands, check_output, put, say

if TYPE_CHECKING:
    from ..evaluation.ratings import Ratings
    from ..pretrained.manifest import WeightRecord

# Published SRCCs of one metric on one data set differ by about this much between toolboxes and between readings of the
# same files (whole images or resized ones, single or half precision).
SRCC_TOLERANCE = 0.02


def add_parser(commands: Commands) -> None:
    """Add `weights` and its actions to the parser of `qualiclip`."""
    weights = commands.add_parser("weights", help="list, find, download, check and convert weight files")
    actions = weights.add_subparsers(title="actions", required=True, metavar="ACTION")

    action = actions.add_parser(
        "list",
        help="list every weight file, its licence, whether its hash is known, and where it was found",
        description="HASH: `known` where a download is compared with a published sha256, `first use` where none was "
        "published: the first download is trusted and later ones are held against it; `unknown` for a file that is not "
        "downloaded by this package and has no published sha256.",
    )
    action.set_defaults(run=_list)

    name_help = "name of a weight file, or of a metric for all its files"
    action = actions.add_parser("path", help="print where a weight file lies; never downloads")
    action.add_argument("names", metavar="NAME", nargs="+", help=name_help)
    action.set_defaults(run=_path)

    action = actions.add_parser("get", help="find or download a weight file, check it, and print where it lies")
    action.add_argument("names", metavar="NAME", nargs="+", help=name_help)
    action.set_defaults(run=_get)

    action = actions.add_parser(
        "verify",
        help="compare the hashes of the files that are here with the known ones",
        description="Prints for each file `verified` (the published sha256), `first use` (the sha256 of the first "
        "download, which nobody has verified), `unknown` (no hash to compare with) or `WRONG`. With --ratings also "
        "scores the images, as they are stored (without EXIF orientation and ICC profile), and compares the SRCC with "
        "published ones.",
    )
    action.add_argument("names", metavar="NAME", nargs="*", help=f"{name_help} (default: all that are here)")
    group = action.add_argument_group("scores (with the name of at least one metric)")
    group.add_argument("--ratings", type=Path, metavar="CSV", help="opinion scores of the images of --images")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of --ratings")
    group.add_argument("--dataset", metavar="NAME", help='which data set they are, such as "CLIVE"')
    action.set_defaults(run=_verify)

    action = actions.add_parser(
        "convert",
        help="write a weight file of any known layout as safetensors",
        description="Reads QualiCLIP, CLIP (OpenAI's archive or a state dict), learned prompts, CONTRIQUE's encoder or "
        "one of its pickled regressions, Re-IQA's encoders and every other layout that this package knows, without "
        "executing anything, and writes the same tensors as safetensors. The result is accepted wherever FILE is.",
    )
    action.add_argument("file", metavar="FILE", type=Path, help="the weight file")
    action.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="*.safetensors")
    action.add_argument("--force", action="store_true", help="replace OUT if it exists")
    action.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from ..pretrained.convert import convert

    check_output(arguments.output)
    found = convert(arguments.file, arguments.output, arguments.force)
    size = f"{found.bytes / 2**20:.1f} MiB"
    say(f"qualiclip: {arguments.file}: layout {found.layout}, {counted(found.tensors, 'tensor')}, {size}")
    put(arguments.output)
    return 0


def _records(names: Sequence[str]) -> list[WeightRecord]:
    """The records of weight files and of metrics, each once."""
    from ..metrics.registry import METRICS
    from ..pretrained.manifest import manifest

    keys: list[str] = []
    for name in names:
        if name in manifest():
            keys.append(name)
        elif name in METRICS and not METRICS[name].records:
            raise SettingsError(f"{name} has no weight file of its own: it is given yours, made with `qualiclip fit`")
        elif name in METRICS:
            keys += METRICS[name].records
        else:
            raise SettingsError(
                f"no weight file and no metric is called {name!r}; `qualiclip weights list` prints all files"
                f"{did_you_mean(name, [*manifest(), *METRICS])}"
            )
    return [manifest()[key] for key in dict.fromkeys(keys)]


def _list(_: argparse.Namespace) -> int:
    from ..pretrained.find import locate
    from ..pretrained.manifest import manifest

    rows = [("NAME", "FILE", "LICENCE", "COMMERCIAL", "HASH", "WHERE")]
    for record in manifest().values():
        found = locate(record)
        where = f"{found.path} ({found.place})" if found else "not here"
        commercial = "yes" if record.commercial_use else "no"
        published = record.hub_sha256 if record.hf_repo else record.sha256
        known = "known" if published else "unknown" if record.by_hand else "first use"
        rows.append((record.name, record.file, record.licence, commercial, known, where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        put("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _path(arguments: argparse.Namespace) -> int:
    from ..pretrained.find import locate

    status = 0
    for record in _records(arguments.names):
        found = locate(record)
        if found is None:
            say(f"qualiclip: {record.file} is not here; get it with: qualiclip weights get {record.name}")
            status = 1
        else:
            put(found.path)
    return status


def _get(arguments: argparse.Namespace) -> int:
    from ..pretrained.find import check_by_hand, find, locate

    records = _records(arguments.names)
    for record in records:
        if not record.by_hand or locate(record) is not None:
            put(find(record))
    check_by_hand(*records)  # last, so that what can be had is had
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ..pretrained.find import locate
    from ..pretrained.manifest import manifest

    scoring = [arguments.ratings, arguments.images, arguments.dataset]
    if any(scoring) and not all(scoring):
        raise SettingsError("--ratings, --images and --dataset belong together; give all three or none")
    wrong = False
    for record in _records(arguments.names) if arguments.names else manifest().values():
        found = locate(record)
        if found is None:
            put(f"{record.name}: not here")
            wrong |= bool(arguments.names)
            continue
        said, ok = _verdict(record, found.path)
        wrong |= not ok
        put(f"{record.name}: {said}; {found.path}")
    if all(scoring):
        wrong |= _compare_scores(arguments)
    return int(wrong)


def _verdict(record: WeightRecord, path: Path) -> tuple[str, bool]:
    from ..pretrained.verify import WRONG, verdict

    try:
        found = verdict(record, path)
    except WeightsError as error:
        return f"WRONG: {error}", False
    return str(found), found.kind != WRONG


def _compare_scores(arguments: argparse.Namespace) -> bool:
    """Score the user's rated images; return whether an SRCC is far from the one that its source was seen to report."""
    from ..evaluation.agreement import agreement
    from ..evaluation.ratings import read_ratings
    from ..metrics.registry import METRICS
    from ..pretrained.manifest import published

    reported: dict[str, list[dict[str, Any]]] = {}
    for row in published():
        reported.setdefault(row["dataset"], []).append(row)
    dataset = arguments.dataset
    if dataset not in reported:
        raise SettingsError(
            f"no published score on {dataset!r}; expected one of {', '.join(reported)}{did_you_mean(dataset, reported)}"
        )
    rows = [row for row in reported[dataset] if row["metric"] in arguments.names]
    if not rows:
        raise SettingsError(
            f"name a metric with a published score on {dataset}: "
            f"{', '.join(row['metric'] for row in reported[dataset])}"
        )
    ratings = read_ratings(arguments.ratings, arguments.images).averaged()
    far = False
    for row in rows:
        spec = METRICS[row["metric"]]
        found = agreement(
            _scores(spec.name, ratings), ratings.opinions, opposite=spec.lower_better != ratings.lower_better
        )
        if found.srcc is None or found.plcc is None:
            raise SettingsError(f"{row['metric']} on {dataset}: all scores or all opinion scores are equal")
        difference = found.srcc - row["srcc"]
        differs = row["verified"] and abs(difference) > SRCC_TOLERANCE
        far |= differs
        put(
            f"{row['metric']} on {dataset}, {found.n} images: SRCC {found.srcc:.4f} PLCC {found.plcc:.4f}; "
            f"published SRCC {row['srcc']} PLCC {row.get('plcc', '-')} ({row['source']}); "
            f"difference {difference:+.4f}{' DIFFERS' if differs else ''}"
        )
    return far


def _scores(metric: str, ratings: Ratings) -> list[float]:
    """Score every rated image; the first one that cannot be scored is an error.

    As `qualiclip score --ignore-orientation --ignore-profile` does: published figures were made of pixels as they are
    stored.
    """
    from tqdm import tqdm

    from ..scoring.scorer import Scorer

    scores = []
    records = Scorer(metric, ignore_orientation=True, ignore_profile=True).score(ratings.paths)
    for record in tqdm(records, desc=metric, total=len(ratings.paths), unit="image", file=Screen(), disable=None):
        if record.error is not None:
            raise ImageError(record.error)
        scores += record.scores.values()
    return scores
