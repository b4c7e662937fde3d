"""The `qualiclip` command.

    qualiclip score PATH... -m METRIC -o TABLE       score files, folders and lists
    qualiclip filter TABLE --above X | --best SHARE  keep or list what is good enough
    qualiclip evaluate -m METRIC --ratings CSV ...   agreement with opinion scores, degradations, gMAD competitions
    qualiclip train --config NAME --pristine DIR ... train a model without opinion scores
    qualiclip tune -m METRIC --ratings CSV ...       learn a prompt context from opinion scores
    qualiclip weights list                           every weight file, its licence, and where it was found
    qualiclip weights path NAME...                   where it lies; NAME is a weight's or a metric's
    qualiclip weights get NAME...                    find it, or download it
    qualiclip weights verify [NAME...]               hashes of what is here; with --ratings also published scores

Exit status: 0 all is well, 1 something is missing or wrong, 2 the command line makes no sense, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from ..errors import ImageError, PromptError, SettingsError, WeightsError
from ..scoring.allocator import keep_freed_memory
from ..scoring.tables import writing
from . import evaluate, filter, score, train, tune, weights


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` is the command line without the program's name. Returns the exit status."""
    logging.basicConfig(format="qualiclip: %(levelname)s: %(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    keep_freed_memory()
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        with writing("standard output"):
            sys.stdout.flush()
        return status
    except (SettingsError, PromptError) as error:
        print(f"qualiclip: {error}", file=sys.stderr)
        return 2
    except (ImageError, WeightsError) as error:
        print(f"qualiclip: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever read our output has enough, such as `head`
            print(f"qualiclip: {error}", file=sys.stderr)
        _forget_output()
        return 1
    except KeyboardInterrupt:
        print("qualiclip: stopped", file=sys.stderr)
        return 130


def _forget_output() -> None:
    """Drop what standard output does not take, which Python would try, and complain of, once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qualiclip", description="Blind image quality by CLIP-IQA and QualiCLIP.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (score, filter, evaluate, train, tune, weights):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
