"""The commands of `qualiclip`, and the options that several of them have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..evaluation.ratings import Ratings

DEFAULT_METRIC = "qualiclip-mini"
RATING_OPTIONS = ("images", "image_column", "mos_column", "lower_better")


def add_metric_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--metric",
        action="append",
        metavar="METRIC",
        help=f"any NR metric of pyiqa, or a model.safetensors of `qualiclip train` (default: {DEFAULT_METRIC})",
    )


def add_rating_options(parser: argparse.ArgumentParser) -> None:
    """How the pictures and columns of a command's `--ratings CSV` are found."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the rated pictures")
    parser.add_argument("--image-column", metavar="NAME", help="column of the picture names (default: found)")
    parser.add_argument("--mos-column", metavar="NAME", help="column of the opinion scores (default: found)")
    parser.add_argument(
        "--lower-better",
        action=argparse.BooleanOptionalAction,
        help="lower opinion scores are better (default: if the column is called dmos; not so in KADID-10k's own)",
    )


def refuse(arguments: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """An error for the first of these options that was given: `where`, it would do nothing."""
    given = next((name for name in names if getattr(arguments, name) is not None), None)
    if given is not None:
        option = "-m" if given == "metric" else f"--{given.replace('_', '-')}"
        raise SettingsError(f"{option} does nothing {where}; leave it out")


def rated(arguments: argparse.Namespace, group: str | None = None) -> Ratings:
    """What `--ratings` and the options above name."""
    from ..evaluation.ratings import read_ratings

    if arguments.images is None:
        raise SettingsError("--ratings needs the folder of its pictures: --images DIR")
    return read_ratings(
        arguments.ratings,
        arguments.images,
        arguments.image_column,
        arguments.mos_column,
        group,
        arguments.lower_better,
    )
