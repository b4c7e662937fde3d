"""The commands of `qualiclip`, and the options and output that they share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import SettingsError, visible
from ..files import writing
from ..metrics.registry import DEFAULT_METRIC
from ..screen import Screen

if TYPE_CHECKING:
    from ..evaluation.ratings import Ratings
    from ..scoring.building import MetricLike

#: Passed to every command's `add_parser`.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_SEEDS = 2**32  # number of seeds; more fit into 64 bits, but seeds are added to
RATING_OPTIONS = ("images", "image_column", "mos_column", "lower_better")
READ_RULES = ("ignore_orientation", "ignore_profile", "allow_truncated", "max_pixels")
READ_OPTIONS = (*READ_RULES, "decode_timeout", "workers")


def say(line: str) -> None:
    """Print a message on standard error, on one line whatever names it contains."""
    screen = Screen()
    screen.write(f"{visible(line)}\n")
    screen.flush()


def put(line: object) -> None:
    """Print a result on standard output."""
    with writing("standard output"):
        print(line)


def a_number(text: str) -> float:
    """Parse the number of an option: any but NaN, with which every comparison is false."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def a_seed(text: str) -> int:
    """Parse the seed of an option: an integer that torch and NumPy take."""
    if not text.isascii() or not text.isdigit() or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; expected an integer from 0 to 2**32 - 1")
    return int(text)


def add_metric_option(parser: argparse.ArgumentParser, default: str = DEFAULT_METRIC) -> None:
    """Add `-m METRIC` and `--prompts FILE`, which `chosen_metrics` reads."""
    parser.add_argument(
        "-m",
        "--metric",
        action="append",
        metavar="METRIC",
        help="NR metric of pyiqa, a .safetensors file of `qualiclip train` or `qualiclip fit`, or an .onnx file of "
        "`qualiclip export` (FILE.onnx:openvino runs on OpenVINO); metrics of this "
        "package take other prompts after a colon: a set (clipiqa:look) or a pair "
        "('clipiqa:Clear photo./Foggy photo.') "
        f"(default: {default})",
    )
    add_prompts_option(parser)


def add_prompts_option(parser: argparse.ArgumentParser) -> None:
    """Add `--prompts FILE`, which `chosen_metrics` reads."""
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="TOML file of prompt sets, to be named after a metric's colon"
    )


def chosen_metrics(
    arguments: argparse.Namespace, names: Sequence[str] | None = None, default: str = DEFAULT_METRIC
) -> dict[str, MetricLike]:
    """Return the metrics of `add_metric_option` by name, with the prompts of `--prompts FILE`.

    Args:
        arguments: parsed ones.
        names: metric specs from elsewhere than `-m`.
        default: metric if `-m` was not given.

    Raises:
        SettingsError: a metric given twice, one that takes no prompts, or a file none of whose sets is used.
        PromptError: invalid prompts.
    """
    from ..metrics.prompts import read_prompt_file
    from ..metrics.specs import parse_spec, split_spec

    if names is None:
        names = arguments.metric or [default]
        check_different("-m", names)
    sets = {} if arguments.prompts is None else read_prompt_file(arguments.prompts)
    chosen: dict[str, MetricLike] = {name: parse_spec(name, sets) for name in names}
    if sets and not any(split_spec(name)[1] in sets for name in names):
        raise SettingsError(
            f"--prompts {arguments.prompts} has no effect: no metric uses a set of it ({', '.join(sets)}); "
            f"name one, such as -m clipiqa:{next(iter(sets))}"
        )
    return chosen


def add_rating_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the images and columns of `--ratings CSV`."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the rated images")
    parser.add_argument("--image-column", metavar="NAME", help="column of image names (default: by usual names)")
    parser.add_argument("--mos-column", metavar="NAME", help="column of opinion scores (default: by usual names)")
    parser.add_argument(
        "--lower-better",
        action=argparse.BooleanOptionalAction,
        help="lower opinion scores are better (default: only if the column is named dmos; wrong for KADID-10k)",
    )


def add_map_range_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the option of one colour scale for all maps: a pair of numbers."""
    parser.add_argument(
        name,
        nargs=2,
        type=a_number,
        metavar=("LOW", "HIGH"),
        help="ends of the colour scale of all maps, so that drawings can be compared (default: those of each map's own "
        "values)",
    )


def add_read_options(parser: argparse.ArgumentParser, timeout: int = 60, pixels: int = 89) -> None:
    """Add the options of `Scorer` for reading images; each is None unless it is given.

    Args:
        parser: of the command.
        timeout: default seconds, for the help.
        pixels: default limit in millions, for the help.
    """
    add_read_rules(parser, pixels)
    parser.add_argument(
        "--decode-timeout",
        type=a_number,
        metavar="SECONDS",
        help=f"give up on an image after this time (default: {timeout})",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="number of decoding processes; 0: none (default: by the CPU cores)"
    )


def add_read_rules(parser: argparse.ArgumentParser, pixels: int = 89) -> None:
    """Add the options of `load_image`; each is None unless it is given."""
    parser.add_argument(
        "--ignore-orientation",
        action="store_const",
        const=True,
        help="do not apply EXIF orientation, as published figures did not",
    )
    parser.add_argument(
        "--ignore-profile",
        action="store_const",
        const=True,
        help="do not convert embedded ICC profiles to sRGB, as published figures did not",
    )
    parser.add_argument(
        "--allow-truncated",
        action="store_const",
        const=True,
        help="score images with truncated data",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help=f"refuse larger images (default: {pixels} million)")


def read_options(arguments: argparse.Namespace, names: Sequence[str] = READ_OPTIONS) -> dict[str, Any]:
    """Return the options of reading that were given, by name: all, or only `READ_RULES`."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def check_output(path: Path) -> None:
    """Raise SettingsError if a file cannot be written for want of its folder, or since it is a folder itself."""
    if not path.parent.is_dir():
        raise SettingsError(f"{path} cannot be written: {path.parent} is not a folder")
    if path.is_dir():
        raise SettingsError(f"{path} cannot be written: it is a folder")


def add_force_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def check_new(path: Path, force: bool) -> None:
    """Raise SettingsError if a file cannot be written, or exists and `force` is false."""
    check_output(path)
    if path.exists() and not force:
        raise SettingsError(f"{path} exists already; pass --force to replace it, or choose another name")


def check_different(option: str, names: Sequence[str]) -> None:
    """Raise SettingsError if an option names the same metric twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"{option} {twice} is given twice; expected different metrics")


def refuse(arguments: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Raise SettingsError if one of these options was given, because it has no effect `where`."""
    given = next((name for name in names if getattr(arguments, name) is not None), None)
    if given is not None:
        option = "-m" if given == "metric" else f"--{given.replace('_', '-')}"
        raise SettingsError(f"{option} has no effect {where}; leave it out")


def rated(arguments: argparse.Namespace, group: str | None = None, among: Sequence[str] | None = None) -> Ratings:
    """Read the ratings chosen by `--ratings` and `add_rating_options`; `group`, `among`: see `read_ratings`."""
    from ..evaluation.ratings import read_ratings

    if arguments.images is None and among is None:
        raise SettingsError("--ratings needs the folder of its images; pass --images DIR")
    return read_ratings(
        arguments.ratings,
        arguments.images,
        arguments.image_column,
        arguments.mos_column,
        group,
        arguments.lower_better,
        among,
    )
