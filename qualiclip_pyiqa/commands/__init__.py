"""The commands of `qualiclip`, and the option that several of them have."""

from __future__ import annotations

import argparse

DEFAULT_METRIC = "qualiclip-mini"


def add_metric_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--metric", action="append", metavar="METRIC", help=f"any NR metric of pyiqa (default: {DEFAULT_METRIC})"
    )
