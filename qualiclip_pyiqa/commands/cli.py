"""The `qualiclip` command.

    qualiclip score PATH... -m METRIC -o TABLE       score files, folders and lists
    qualiclip describe PICTURE...                    quality and attributes of images, and how usual they are
    qualiclip explain IMAGE... -m METRIC -o map.png  draw which places of an image are good or bad
    qualiclip filter TABLE --above X | --best SHARE  list or keep the images that are good enough
    qualiclip report FOLDER|TABLE -o PAGE.html       a page about the scores: distributions, images, profiles, maps
    qualiclip serve METRIC...                        score images over HTTP, and on a page in the browser
    qualiclip evaluate -m METRIC --ratings CSV ...   agreement with opinion scores, degradations, gMAD competitions
    qualiclip train --config NAME --pristine DIR ... train a model without opinion scores
    qualiclip tune -m METRIC --ratings CSV ...       learn a prompt context from opinion scores
    qualiclip fit -m TOWER --ratings CSV ... -o FILE fit a metric to opinion scores, in a minute
    qualiclip export METRIC -o FILE.onnx             write a metric to one file that other programs run
    qualiclip weights list                           every weight file, its licence, and where it was found
    qualiclip weights path NAME...                   path of a weight file, or of all files of a metric
    qualiclip weights get NAME...                    the same, downloading missing files
    qualiclip weights verify [NAME...]               check local files; with --ratings, also published scores
    qualiclip --version                              versions of the package, pyiqa and torch

Exit status: 0 success; 1 some images could not be scored, weights are missing, or a file could not be read or written
to its end; 2 wrong usage, such as an unknown option or metric, or a file or folder that does not exist; 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ImageError, PromptError, SettingsError, WeightsError, visible
from ..files import writing
from ..scoring.allocator import keep_freed_memory
from ..screen import drop_output, replace_closed_streams
from . import describe, evaluate, explain, export, filter, fit, put, report, say, score, serve, train, tune, weights

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

# Commands that run networks.
_KEEP_FREED_MEMORY = ("score", "describe", "explain", "report", "evaluate", "train", "tune", "fit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `argv` is the command line without the program's name."""
    replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack a file name's characters
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("qualiclip: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        try:
            arguments = _parser().parse_args(argv)
        except SystemExit:  # after --help, --version or wrong usage
            _flush()
            raise
        if arguments.command in _KEEP_FREED_MEMORY:
            keep_freed_memory()
        run: Callable[[argparse.Namespace], int] = arguments.run
        status = run(arguments)
        _flush()
        return status
    except (SettingsError, PromptError) as error:
        say(f"qualiclip: {error}")
        return 2
    except (ImageError, WeightsError) as error:
        say(f"qualiclip: {error}")
        return 1
    except MemoryError as error:
        say(f"qualiclip: out of memory{f' ({error})' if str(error) else ''}")
        return 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader closed the pipe, for example `head`
            say(f"qualiclip: {error}")
        drop_output(sys.stdout)
        return 1
    except KeyboardInterrupt:
        say("qualiclip: stopped")
        return 130


def _flush() -> None:
    with writing("standard output"):
        sys.stdout.flush()


class _Formatter(logging.Formatter):
    """Writes each message on one line, with names as `visible` shows them."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        return visible(super().formatMessage(record))


class _Parser(argparse.ArgumentParser):
    """A parser, and through it those of the commands, whose help is an error if it cannot be written."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        with writing("standard output"):
            print(self.format_help(), end="", file=file)


class _Version(argparse.Action):
    """The option `--version`, which looks up versions only when used."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the versions of the package, pyiqa and torch")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        others = ", ".join(f"{name} {_version(name)}" for name in ("pyiqa", "torch"))
        put(f"qualiclip-pyiqa {_version('qualiclip-pyiqa')} ({others}, Python {sys.version.split()[0]})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="qualiclip", description="Blind image quality by CLIP-IQA and QualiCLIP."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in (score, describe, explain, filter, report, serve, evaluate, train, tune, fit, export, weights):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
