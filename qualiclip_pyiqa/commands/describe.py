"""`qualiclip describe`: every attribute of images, what it means, and how usual it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ImageError, SettingsError, counted
from ..images.convert import source_name
from ..metrics.registry import LOOK_METRIC
from ..screen import loading
from . import (
    Commands,
    add_force_option,
    add_metric_option,
    add_read_options,
    check_new,
    chosen_metrics,
    put,
    read_options,
    say,
)

if TYPE_CHECKING:
    from ..report.profile import Profile, Profiler, Trait


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "describe",
        help="profile of images: quality and attributes, and how usual they are",
        description="Print every score of images with what it means and its percentile: how many images of a reference "
        "have a lower score (for metrics without prompts: a worse one). "
        "Exit status: 0 all were scored, 1 some were not, 2 wrong usage.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="image file")
    add_metric_option(parser, LOOK_METRIC)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="TABLE",
        help="reference: a table of `qualiclip score` with the same metrics (default: for the embedded models, the "
        "photographs of their training set)",
    )
    parser.add_argument("--json", action="store_true", help="print the profiles as JSON")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="draw the profiles: .png, .svg, .pdf, .jpg, .webp"
    )
    add_force_option(parser)
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    add_read_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.force and arguments.output is None:
        raise SettingsError("--force has no effect without -o FILE; leave it out")
    metrics = chosen_metrics(arguments, default=LOOK_METRIC)
    if arguments.output is not None:
        from ..figures import check_figure
        from ..report.bars import MOST

        check_new(arguments.output, arguments.force)
        check_figure(arguments.output)
        if len(arguments.pictures) > MOST:
            raise SettingsError(f"{len(arguments.pictures)} images; -o draws at most {MOST}, so draw them in parts")
    with loading(", ".join(metrics)):
        from ..report.profile import Profiler

        profiler = Profiler(metrics, arguments.against, device=arguments.device, **read_options(arguments))
    whole: list[Profile] = []
    found: list[Profile] = []
    for profile in profiler.profiles(arguments.pictures):
        found.append(profile)
        if profile.error is None:
            whole.append(profile)
        else:
            say(f"qualiclip: {profile.error}")
        if profile.traits and not arguments.json:
            put("\n".join(_lines(profile)))
    if arguments.json:
        put(json.dumps([profile.as_dict() for profile in found], indent=1))
    elif profiler.reference is None and whole:
        put("no percentiles: no reference is known for these metrics; pass --against TABLE of `qualiclip score`")
    elif whole:
        reference = source_name(profiler.reference or "")
        put(f"percentile: how many of {reference} have a lower score (equal ones count half)")
    if arguments.output is not None:
        _draw(arguments.output, profiler, whole, len(found))
    return int(len(whole) < len(found))


def _draw(path: Path, profiler: Profiler, profiles: Sequence[Profile], count: int) -> None:
    from ..figures import save_figure
    from ..report.bars import draw_profiles

    if not profiles:
        raise ImageError(f"{path} was not drawn: none of {counted(count, 'image')} could be scored")
    pictures = [profile.path for profile in profiles]
    save_figure(draw_profiles(profiles, pictures, asdict(profiler.scorer.rules)), path)


def _lines(profile: Profile) -> Iterator[str]:
    """Format a profile as text."""
    size = "" if profile.width is None else f", {profile.width}x{profile.height}"
    yield f"{source_name(profile.path or 'image')}{size}"
    metric = None
    wide = 2 + max(len(source_name(trait.attribute.name)) for trait in profile.traits)
    for trait in profile.traits:
        if trait.attribute.metric != metric:
            metric = trait.attribute.metric
            percentiles = "  percentile" if profile.reference is not None else ""
            yield f"  {source_name(metric)}"
            yield f"  {'':{wide}}  {'score':>8}{percentiles}  high / low"
        yield f"    {_row(trait, wide - 2, profile.reference is not None)}"
    if profile.reference is not None:
        yield f"  unusual: {source_name(', '.join(profile.unusual)) or 'nothing'}"
    if profile.note is not None:
        yield f"  {profile.note}"
    yield ""


def _row(trait: Trait, wide: int, percentiles: bool) -> str:
    from ..report.profile import percent

    cells = [f"{source_name(trait.attribute.name):{wide}}", f"{trait.score:8.4g}"]
    if percentiles:
        cells.append(f"{'-' if trait.percentile is None else percent(trait.percentile):>10}")
    return "  ".join([*cells, f"{source_name(trait.attribute.high)} / {source_name(trait.attribute.low)}"])
