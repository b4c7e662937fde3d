"""`qualiclip evaluate`: agreement with opinion scores, behaviour under degradation, gMAD competitions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, SettingsError, counted
from ..files import replacing, writing
from ..images.convert import source_name
from ..screen import Screen
from . import (
    RATING_OPTIONS,
    READ_OPTIONS,
    Commands,
    a_seed,
    add_metric_option,
    add_rating_options,
    add_read_options,
    check_different,
    check_output,
    chosen_metrics,
    put,
    rated,
    read_options,
    refuse,
    say,
)

if TYPE_CHECKING:
    from ..evaluation.opinions import OpinionReport
    from ..evaluation.ratings import Ratings
    from ..evaluation.scores import Scores
    from ..scoring.scorer import Scorer
    from ..scoring.tables import Record

# Options without effect, by kind of evaluation.
USELESS: dict[str, tuple[str, ...]] = {
    "ratings": ("levels", "limit", "bank"),
    "dataset": (*(name for name in RATING_OPTIONS if name != "images"), "group", "levels", "limit", "bank"),
    # Photographs to degrade are decoded in this process.
    "degradations": (*RATING_OPTIONS, "group", "levels", "scores", "decode_timeout", "workers"),
    "gmad": ("metric", *RATING_OPTIONS, "group", "limit", "bank", "seed", "scores"),
}
SHOWN = 10  # errors printed; all are in the JSON


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure agreement with opinion scores and behaviour under degradation",
        description="With --ratings or --dataset: SRCC, PLCC, KRCC and RMSE with opinion scores, with bootstrap "
        "intervals; positive is agreement, whatever the directions (PLCC after a fitted logistic has no sign). "
        "With --degradations: mean score by distortion level. With --gmad: the pairs of a gMAD competition. "
        "Exit status: 0 all images were scored, 1 some were left out, 2 wrong usage, 130 stopped by Ctrl-C.",
    )
    parser.set_defaults(run=run)
    add_metric_option(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ratings", type=Path, metavar="CSV", help="opinion scores of the images of --images")
    what.add_argument("--dataset", metavar="NAME", help="data set of pyiqa, such as livec, below --images")
    what.add_argument("--degradations", type=Path, metavar="DIR", help="pristine photographs to degrade")
    what.add_argument("--gmad", nargs=3, metavar=("A", "B", "DIR"), help="metrics A and B compete on the images in DIR")
    add_rating_options(parser)
    parser.add_argument(
        "--scores", type=Path, metavar="TABLE", help="read scores from a table of `qualiclip score`; -m selects columns"
    )
    parser.add_argument("--group", metavar="COLUMN", help="also evaluate each value of this column separately")
    parser.add_argument("--levels", type=int, metavar="N", help="--gmad: pairs per defender (default: 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="--degradations: maximum number of photographs")
    parser.add_argument("--bank", metavar="NAME", help="--degradations: kadid (default) or camera")
    parser.add_argument("--seed", type=a_seed, metavar="N", help="seed of bootstrap or degradations (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the results to a file, such as plot.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    add_read_options(parser)


@dataclass
class Result:
    """The result of an evaluation.

    Attributes:
        numbers: JSON-ready.
        lines: the same as text.
        draw: plots it to a file.
        images: number of images.
        errors: one line for each image that was left out of some result, by path.
    """

    numbers: dict[str, Any]
    lines: list[str]
    draw: Callable[[Path], None]
    images: int
    errors: Mapping[str, str] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    what = next(name for name in USELESS if getattr(arguments, name) is not None)
    refuse(arguments, USELESS[what], f"with --{what}")
    if arguments.scores is not None:
        refuse(arguments, ("device", "prompts", *READ_OPTIONS), "with --scores")
    _check(arguments)
    arguments.seed = arguments.seed or 0
    evaluate = {"gmad": _gmad, "degradations": _degradations}.get(what, _opinions)
    return _deliver(evaluate(arguments), arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Check options and output files before hours of scoring."""
    for name in ("levels", "limit"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise SettingsError(f"--{name} is {number}; expected at least 1")
    check_different("-m", arguments.metric or ())
    if arguments.gmad is not None:
        check_different("--gmad", arguments.gmad[:2])
    for path in (arguments.json, arguments.plot):
        if path is not None:
            check_output(path)
    if arguments.plot is not None:
        from ..figures import check_figure

        check_figure(arguments.plot)


def _deliver(result: Result, arguments: argparse.Namespace) -> int:
    """Write every output even if another one fails, files first; return the exit status."""
    failures: list[Exception] = []
    outputs = ((arguments.json, lambda path: _write_json(path, result.numbers)), (arguments.plot, result.draw))
    for path, write in outputs:
        if path is not None:
            try:
                write(path)
            except Exception as failure:  # noqa: BLE001 - raised below
                failures.append(failure)
    put("\n".join(result.lines))
    if result.errors:
        say(f"qualiclip: {len(result.errors)} of {counted(result.images, 'image')} left out:")
        for error in list(result.errors.values())[:SHOWN]:
            say(f"  {error}")
        if len(result.errors) > SHOWN:
            say(f"  ... and {len(result.errors) - SHOWN} more; --json FILE lists all")
    # A failure that is not one of an output keeps its traceback.
    failures.sort(key=lambda failure: not isinstance(failure, OSError | SettingsError))
    for each in failures[:-1]:
        say(f"qualiclip: {each}")
    if failures:
        raise failures[-1]
    return int(bool(result.errors))


def _write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    with writing(path), replacing(path) as part:
        part.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _scorer(arguments: argparse.Namespace, metrics: Sequence[str] | None = None) -> Scorer:
    from ..scoring.building import blind_only
    from ..scoring.scorer import Scorer

    rated = arguments.ratings is not None or arguments.dataset is not None
    where = "to score here, or --scores TABLE with full-reference scores" if rated else "to score here"
    chosen = blind_only(chosen_metrics(arguments, metrics), where)
    return Scorer(chosen, device=arguments.device, **read_options(arguments))


def _bar(records: Iterable[Record], total: int) -> Iterator[Record]:
    from tqdm import tqdm

    return iter(tqdm(records, total=total, unit="image", file=Screen(), disable=None))


def _settings(settings: Mapping[str, Any] | None, errors: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of the JSON that all evaluations share."""
    from ..evaluation import text

    return {
        "settings": settings,
        **{name: text.read_rule(settings, name) for name in ("ignore_orientation", "ignore_profile")},
        "left_out": dict(errors),
    }


# ---------------------------------------------------------------- opinion scores


def _opinions(arguments: argparse.Namespace) -> Result:
    import numpy as np

    from ..evaluation import text
    from ..evaluation.agreement import LEAST
    from ..evaluation.fitted_images import fit_warnings
    from ..evaluation.opinions import report_opinions
    from ..evaluation.scores import read_scores, score_images
    from ..optional import require

    require("scipy.stats", "eval", "a correlation")
    table = None if arguments.scores is None else read_scores(arguments.scores, arguments.metric)
    ratings = _ratings(arguments, table)
    images = list(dict.fromkeys(ratings.images))
    if len(images) < LEAST:
        raise SettingsError(f"{ratings}; expected at least {LEAST} images")
    if table is not None:
        scores, used = table, _used(table.settings, list(table.values), images)
    else:
        scorer = _scorer(arguments)
        used = _used(scorer.describe(), scorer.columns, images)  # warns before hours of scoring
        scores = score_images(scorer, images, _bar)
    errors = {path: scores.errors[path] for path in map(str, images) if path in scores.errors}
    if not any(np.isfinite(values).any() for values in scores.of(images).values()):
        raise ImageError(f"none of {len(images)} images could be scored; the first: {next(iter(errors.values()))}")
    report = report_opinions(scores, ratings, arguments.seed)
    numbers = {
        "ratings": {
            "rows": len(ratings.paths),
            "images": len(images),
            "columns": ratings.columns,
            "lower_better": ratings.lower_better,
            "because": ratings.because,
        },
        "directions": scores.directions,
        **_settings(scores.settings, errors),
        "metrics": {
            name: {
                "lower_better": scores.lower_better[name],
                **({"used_to_fit": used[name]} if name in used else {}),
                **each,
            }
            for name, each in report.as_dict().items()
        },
    }
    lines = [str(ratings), text.reading(scores.settings)]
    if table is not None:
        lines.append(f"scores: {arguments.scores}; their directions: {scores.directions}")
    return Result(
        numbers,
        [*lines, "", *text.opinions(report, ratings, arguments.group, fit_warnings(used, len(images)).values())],
        lambda path: _draw_scatter(path, scores, ratings, report),
        len(images),
        errors,
    )


def _used(
    settings: Mapping[str, Any] | None, columns: Sequence[str], images: Sequence[Path]
) -> dict[str, list[str] | None]:
    """Find the images that metrics of `qualiclip fit` were fitted on, and warn of them."""
    from ..evaluation.fitted_images import fit_warnings, used_to_fit

    used = used_to_fit(settings, columns, images)
    for warning in fit_warnings(used, len(images)).values():
        say(f"qualiclip: WARNING: {warning}")
    return used


def _ratings(arguments: argparse.Namespace, table: Scores | None) -> Ratings:
    from ..evaluation.datasets import pyiqa_ratings

    if arguments.dataset is None:
        return rated(arguments, arguments.group, None if table is None else table.paths)
    ratings = pyiqa_ratings(arguments.dataset, arguments.images)
    return ratings if table is None else table.known(ratings)


def _draw_scatter(path: Path, scores: Scores, ratings: Ratings, report: OpinionReport) -> None:
    from ..evaluation import plots, text

    opinions = ratings.mean_opinions()
    notes = {name: f"SRCC {text.number(each.srcc)}, n = {each.n}" for name, each in report.agreements.items()}
    plots.scatter(path, scores.of(opinions), list(opinions.values()), notes)


# ---------------------------------------------------------------- degradations


def _degradations(arguments: argparse.Namespace) -> Result:
    from ..degradations.banks import bank_of
    from ..evaluation import text
    from ..evaluation.ladders import score_degraded
    from ..optional import require

    require("kornia", "eval", "--degradations")
    name = arguments.bank or "kadid"
    bank = bank_of([name])
    paths, errors = _images(arguments.degradations)
    if arguments.limit is not None:
        paths = paths[:: max(1, len(paths) // arguments.limit)][: arguments.limit]
    scorer = _scorer(arguments)
    report = score_degraded(scorer, paths, arguments.seed, _bar, bank)
    settings = scorer.describe()

    def draw(path: Path) -> None:
        from ..evaluation import plots

        plots.levels(
            path,
            {c: {name: each.means for name, each in found.items()} for c, found in report.behaviours.items()},
            {c: {name: each.falls for name, each in found.items()} for c, found in report.behaviours.items()},
        )

    errors |= report.errors
    numbers = {**_settings(settings, errors), "bank": name, "metrics": report.as_dict(bank)}
    return Result(numbers, [text.reading(settings), *text.ladders(report)], draw, len(paths), errors)


def _images(folder: Path) -> tuple[list[str], dict[str, str]]:
    """List the images below a folder; also return errors of folders that could not be listed."""
    from ..images.paths import find_images

    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; expected one with images")
    found = find_images([str(folder)])
    if not found.paths and not found.unreadable:
        raise SettingsError(f"no images in {folder}")
    return found.paths, {
        path: f"{source_name(path)} cannot be listed ({why}); expected a folder that can be read"
        for path, why in found.unreadable.items()
    }


# ---------------------------------------------------------------- gMAD


def _gmad(arguments: argparse.Namespace) -> Result:
    import numpy as np

    from ..evaluation import text
    from ..evaluation.gmad import gmad, images_needed
    from ..evaluation.scores import score_images

    first, second, folder = arguments.gmad
    levels = arguments.levels or 4
    paths, errors = _images(Path(folder))
    if len(paths) < images_needed(levels):
        raise SettingsError(
            f"{counted(len(paths), 'image')} in {folder}; a gMAD competition at {levels} levels needs at least "
            f"{images_needed(levels)}"
        )
    scorer = _scorer(arguments, [first, second])
    if len(scorer.columns) != 2:
        raise SettingsError(f"a gMAD competition needs two scores, not {', '.join(scorer.columns)}")
    scores = score_images(scorer, paths, _bar)
    errors |= scores.errors
    both = np.flatnonzero(np.isfinite(np.stack(list(scores.values.values()))).all(axis=0))
    kept = [Path(paths[number]) for number in both]
    if len(kept) < images_needed(levels):
        reason = next(iter(errors.values()))
        raise ImageError(
            f"{len(kept)} of {len(paths)} images could be scored; a gMAD competition at {levels} levels needs at least "
            f"{images_needed(levels)}; the first error: {reason}"
        )
    found = gmad({name: values[both].tolist() for name, values in scores.values.items()}, scores.lower_better, levels)

    def draw(path: Path) -> None:
        from ..evaluation import plots

        pairs = [
            plots.Pair(
                kept[duel.better],
                kept[duel.worse],
                f"defender {source_name(duel.defender)}: alike, {duel.level:.3f} (gap {duel.defender_gap:.3f})",
                f"attacker {source_name(duel.attacker)}: gap {duel.attacker_gap:.3f}",
            )
            for duel in found
        ]
        plots.duels(path, pairs, scorer.rules)

    pairs = [{**asdict(duel), "better": str(kept[duel.better]), "worse": str(kept[duel.worse])} for duel in found]
    numbers = {
        **_settings(scores.settings, errors),
        "lower_better": scores.lower_better,
        "pairs": pairs,
    }
    lines = [text.reading(scores.settings), "", *text.duels(found, kept)]
    return Result(numbers, lines, draw, len(paths), errors)
