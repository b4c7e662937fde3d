"""The commands of `qualiclip`, and the options and the screen that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import SettingsError
from ..screen import Screen

if TYPE_CHECKING:
    from ..evaluation.ratings import Ratings

#: What `add_parser` of a command adds its parser to.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEFAULT_METRIC = "qualiclip-mini"
RATING_OPTIONS = ("images", "image_column", "mos_column", "lower_better")
READ_OPTIONS = ("ignore_orientation", "ignore_profile", "allow_truncated", "max_pixels", "decode_timeout")


def say(line: str) -> None:
    """Print a message on standard error."""
    screen = Screen()
    screen.write(f"{line}\n")
    screen.flush()


def add_metric_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--metric",
        action="append",
        metavar="METRIC",
        help=f"any NR metric of pyiqa, or a model.safetensors of `qualiclip train` (default: {DEFAULT_METRIC})",
    )


def add_rating_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the images and columns of `--ratings CSV` are."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the rated images")
    parser.add_argument("--image-column", metavar="NAME", help="column of image names (default: found by its name)")
    parser.add_argument("--mos-column", metavar="NAME", help="column of opinion scores (default: found by its name)")
    parser.add_argument(
        "--lower-better",
        action=argparse.BooleanOptionalAction,
        help="lower opinion scores are better (default: if the column is called dmos; KADID-10k's dmos is not)",
    )


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Scorer` that say how image files become pixels; each is None unless it is given."""
    parser.add_argument(
        "--ignore-orientation",
        action="store_const",
        const=True,
        help="take pixels as they are stored, not as EXIF orientation turns them: as published figures were made",
    )
    parser.add_argument(
        "--ignore-profile",
        action="store_const",
        const=True,
        help="do not convert to sRGB through embedded ICC profiles: as published figures were made",
    )
    parser.add_argument(
        "--allow-truncated",
        action="store_const",
        const=True,
        help="score images whose data end early",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 89 million)")
    parser.add_argument(
        "--decode-timeout", type=float, metavar="SECONDS", help="give up on an image after this time (default: 60)"
    )


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return those of `READ_OPTIONS` that were given, by name."""
    return {name: getattr(arguments, name) for name in READ_OPTIONS if getattr(arguments, name) is not None}


def refuse(arguments: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Raise SettingsError for the first of these options that was given although it has no effect `where`."""
    given = next((name for name in names if getattr(arguments, name) is not None), None)
    if given is not None:
        option = "-m" if given == "metric" else f"--{given.replace('_', '-')}"
        raise SettingsError(f"{option} does nothing {where}; leave it out")


def rated(arguments: argparse.Namespace, group: str | None = None, among: Sequence[str] | None = None) -> Ratings:
    """Read what `--ratings` and the options of `add_rating_options` name; `group`, `among`: see `read_ratings`."""
    from ..evaluation.ratings import read_ratings

    if arguments.images is None and among is None:
        raise SettingsError("--ratings needs the folder of its images: --images DIR")
    return read_ratings(
        arguments.ratings,
        arguments.images,
        arguments.image_column,
        arguments.mos_column,
        group,
        arguments.lower_better,
        among,
    )
