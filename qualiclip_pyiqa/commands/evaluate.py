"""`qualiclip evaluate`: agreement with opinion scores, behaviour under degradation, gMAD competitions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, SettingsError
from ..files import replacing
from ..images.convert import source_name
from ..metrics.registry import lower_is_better
from . import DEFAULT_METRIC, RATING_OPTIONS, Commands, add_metric_option, add_rating_options, rated, refuse

if TYPE_CHECKING:
    from ..evaluation.agreement import Agreement
    from ..evaluation.ratings import Ratings

# Options that would do nothing, by what is evaluated.
USELESS: dict[str, tuple[str, ...]] = {
    "ratings": ("levels", "limit"),
    "dataset": (*(name for name in RATING_OPTIONS if name != "images"), "group", "levels", "limit"),
    "degradations": (*RATING_OPTIONS, "group", "levels"),
    "gmad": ("metric", *RATING_OPTIONS, "group", "limit", "seed"),
}
Draw = Callable[[Path], None]


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="how well metrics agree with people, and what degradations do to them",
        description="With --ratings or --dataset: SRCC, PLCC, KRCC and RMSE with opinion scores, with bootstrap "
        "intervals; positive is agreement, whatever the directions (PLCC after a fitted logistic has no sign). "
        "With --degradations: mean score by distortion level. With --gmad: the pairs of a gMAD competition.",
    )
    parser.set_defaults(run=run)
    add_metric_option(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ratings", type=Path, metavar="CSV", help="opinion scores of the pictures of --images")
    what.add_argument("--dataset", metavar="NAME", help="a data set that pyiqa knows, such as livec, below --images")
    what.add_argument("--degradations", type=Path, metavar="DIR", help="pristine photographs, to be degraded")
    what.add_argument("--gmad", nargs=3, metavar=("A", "B", "DIR"), help="two metrics compete on these pictures")
    add_rating_options(parser)
    parser.add_argument("--group", metavar="COLUMN", help="also for each value of this column alone")
    parser.add_argument("--levels", type=int, metavar="N", help="--gmad: pairs per defender (default: 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="--degradations: at most so many photographs")
    parser.add_argument("--seed", type=int, metavar="N", help="of the bootstrap or the degradations (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, such as plot.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")


def run(arguments: argparse.Namespace) -> int:
    what = next(name for name in USELESS if getattr(arguments, name) is not None)
    refuse(arguments, USELESS[what], f"with --{what}")
    for name in ("levels", "limit"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise SettingsError(f"--{name} is {number}; expected at least 1")
    # What can be known to fail fails before hours of scoring.
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.parent.is_dir():
            raise SettingsError(f"{path} cannot be written: {path.parent} is no folder")
    if arguments.plot is not None:
        from ..evaluation import plots

        plots.check(arguments.plot)
    arguments.seed = arguments.seed or 0
    metrics = arguments.metric or [DEFAULT_METRIC]
    if what == "gmad":
        numbers, draw = _gmad(arguments, *arguments.gmad)
    elif what == "degradations":
        numbers, draw = _degradations(arguments, metrics)
    else:
        numbers, draw = _opinions(arguments, metrics)
    if arguments.json is not None:
        try:
            with replacing(arguments.json) as part:
                part.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"{arguments.json} cannot be written ({error.strerror or error})") from error
    if arguments.plot is not None:
        draw(arguments.plot)
    return 0


def scored(paths: Sequence[Path], metrics: Any, device: str | None) -> dict[str, list[float]]:
    """Score of every picture by column; the first one that cannot be scored is an error."""
    from tqdm import tqdm

    from ..scoring.scorer import Scorer

    scorer = Scorer(metrics, device=device)
    columns: dict[str, list[float]] = {column: [] for column in scorer.columns}
    for record in tqdm(scorer.score(paths), total=len(paths), unit="picture", file=sys.stderr):
        if record.error is not None:
            raise ImageError(record.error)
        for column, score in record.scores.items():
            columns[column].append(score)
    return columns


def _opinions(arguments: argparse.Namespace, metrics: list[str]) -> tuple[dict[str, Any], Draw]:
    from ..evaluation.agreement import agreement, compare

    ratings = _ratings(arguments)
    scores = scored(ratings.paths, metrics, arguments.device)
    print(f"{ratings}\n")
    opposite = {name: lower_is_better(name) != ratings.lower_better for name in scores}
    found = {
        name: agreement(values, ratings.opinions, opposite[name], arguments.seed) for name, values in scores.items()
    }
    _print_agreements(found)
    numbers: dict[str, Any] = {name: each.as_dict() for name, each in found.items()}

    names = list(scores)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            one, other = ([-v for v in scores[n]] if opposite[n] else scores[n] for n in (first, second))
            difference = compare(one, other, ratings.opinions, arguments.seed)
            if difference is None:
                continue
            low, high = difference.ci95
            print(
                f"\nSRCC of {first} minus that of {second}: {difference.difference:+.4f} "
                f"(95 % interval {low:+.4f} to {high:+.4f}, p = {difference.p:.3g}, paired bootstrap)"
            )
            numbers[first].setdefault("versus", {})[second] = {
                "srcc_difference": difference.difference,
                "ci95": [low, high],
                "p": difference.p,
            }
    for group in dict.fromkeys(ratings.groups):
        members = [k for k, each in enumerate(ratings.groups) if each == group]
        print(f"\n{arguments.group} = {group or '(empty)'}, {len(members)} pictures")
        if len(members) < 3:
            print("too few to correlate")
            continue
        part = {
            name: agreement(
                [values[k] for k in members], [ratings.opinions[k] for k in members], opposite[name], arguments.seed
            )
            for name, values in scores.items()
        }
        _print_agreements(part)
        for name, each in part.items():
            numbers[name].setdefault("groups", {})[group] = each.as_dict()

    def draw(path: Path) -> None:
        from ..evaluation import plots

        notes = {name: f"SRCC {_number(each.srcc)}, n = {each.n}" for name, each in found.items()}
        plots.scatter(path, scores, ratings.opinions, notes)

    return numbers, draw


def _ratings(arguments: argparse.Namespace) -> Ratings:
    from ..evaluation.ratings import pyiqa_ratings

    if arguments.dataset is not None:
        return pyiqa_ratings(arguments.dataset, arguments.images)
    return rated(arguments, arguments.group)


def _print_agreements(found: Mapping[str, Agreement]) -> None:
    print("| metric | n | SRCC | 95 % interval | PLCC | PLCC after logistic | KRCC | RMSE after logistic |")
    print("|---|---|---|---|---|---|---|---|")
    for name, each in found.items():
        interval = "-" if each.srcc_ci95 is None else f"{each.srcc_ci95[0]:.4f} to {each.srcc_ci95[1]:.4f}"
        cells = [_number(each.srcc), interval, *map(_number, (each.plcc, each.plcc_logistic, each.krcc, each.rmse))]
        print(f"| {name} | {each.n} | " + " | ".join(cells) + " |")
        if each.srcc is None:
            print(f"{name}: all scores or all opinion scores are the same, so there is no correlation")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _degradations(arguments: argparse.Namespace, metrics: list[str]) -> tuple[dict[str, Any], Draw]:
    """Mean score by level for every type, as QualiCLIP's first figure shows it."""
    from ..degradations.bank import DEGRADATIONS
    from ..evaluation.ladders import score_degraded
    from ..images.paths import find_pictures

    paths = find_pictures([str(arguments.degradations)]).paths
    if arguments.limit is not None:
        paths = paths[:: max(1, len(paths) // arguments.limit)][: arguments.limit]
    if not paths:
        raise SettingsError(f"no pictures in {arguments.degradations}")

    numbers: dict[str, Any] = {}
    for column, found in score_degraded(paths, metrics, arguments.device, arguments.seed).items():
        types = {
            name: asdict(each) | {"monotone_by_design": DEGRADATIONS[name].monotone} for name, each in found.items()
        }
        falling = sum(each.falls for each in found.values())
        numbers[column] = {"photographs": len(paths), "types_falling": falling, "types": types}
        print(f"\n{column}, {len(paths)} photographs: worse at every level for {falling} of {len(types)} types")
        print("in order: pairs of levels of one photograph, pristine included, as far as one is known to be worse")
        print("\n| type | pristine | 1 | 2 | 3 | 4 | 5 | falls | in order |\n|---|---|---|---|---|---|---|---|---|")
        for name, each in found.items():
            cells = " | ".join(f"{mean:.3f}" for mean in each.means)
            print(f"| {name} | {cells} | {'yes' if each.falls else 'no'} | {each.in_order:.3f} |")

    def draw(path: Path) -> None:
        from ..evaluation import plots

        plots.levels(
            path,
            {c: {n: t["means"] for n, t in each["types"].items()} for c, each in numbers.items()},
            {c: {n: t["falls"] for n, t in each["types"].items()} for c, each in numbers.items()},
        )

    return numbers, draw


def _gmad(arguments: argparse.Namespace, first: str, second: str, folder: str) -> tuple[dict[str, Any], Draw]:
    from ..evaluation.agreement import gmad
    from ..images.paths import find_pictures

    paths = [Path(path) for path in find_pictures([folder]).paths]
    scores = scored(paths, [first, second], arguments.device)
    found = gmad(scores, {name: lower_is_better(name) for name in scores}, arguments.levels or 4)
    print("| defender | at | attacker | finds better | and worse | attacker's gap | defender's gap |")
    print("|---|---|---|---|---|---|---|")
    for duel in found:
        print(
            f"| {duel.defender} | {duel.level:.4f} | {duel.attacker} | {source_name(paths[duel.better])} | "
            f"{source_name(paths[duel.worse])} | {duel.attacker_gap:.4f} | {duel.defender_gap:.4f} |"
        )

    def draw(path: Path) -> None:
        from ..evaluation import plots

        plots.duels(
            path,
            [
                (
                    f"defender {d.defender}: alike, {d.level:.3f} (gap {d.defender_gap:.3f})",
                    paths[d.better],
                    paths[d.worse],
                    f"attacker {d.attacker}: gap {d.attacker_gap:.3f}",
                )
                for d in found
            ],
        )

    pairs = [{**asdict(d), "better": str(paths[d.better]), "worse": str(paths[d.worse])} for d in found]
    return {"pairs": pairs}, draw
