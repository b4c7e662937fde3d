"""`qualiclip train`: align a tower with antonym prompts, without opinion scores."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from . import RATING_OPTIONS, Commands, add_rating_options, rated, refuse


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on pristine photographs, without opinion scores",
        description="Train an image tower by QualiCLIP's strategy: degraded crops are ranked by their similarity to "
        "antonym prompts. RUN receives model.safetensors, which every command and pyiqa.create_metric('qualiclip', "
        "weights=...) take, log.jsonl and TensorBoard's events. Several GPUs: `accelerate launch -m "
        "qualiclip_pyiqa.commands.cli train ...` or `torchrun -m qualiclip_pyiqa.commands.cli train ...`.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a named configuration (toy, mini, paper, ...) or a TOML file"
    )
    parser.add_argument(
        "--pristine",
        required=True,
        type=Path,
        metavar="DIR",
        help="photographs to train on; a manifest.csv in it is respected",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in RUN")
    parser.add_argument("--exclude", type=Path, metavar="LIST", help="text file of photographs not to train on")
    parser.add_argument("--start", type=Path, metavar="FILE", help="model of an earlier run to begin from")
    parser.add_argument("--licence", default="not stated", help="of the weights; the photographs' licences decide")
    parser.add_argument("--device", choices=["cpu"], help="cpu: leave a GPU that is there alone")
    parser.add_argument(
        "--ratings", type=Path, metavar="CSV", help="opinion scores; SRCC with them is logged, nothing more"
    )
    add_rating_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..training.config import load_config
    from ..training.run import DivergedError, train

    if arguments.ratings is None:
        refuse(arguments, RATING_OPTIONS, "without --ratings")
    logging.getLogger("qualiclip_pyiqa").setLevel(logging.INFO)
    try:
        path = train(
            load_config(arguments.config),
            arguments.pristine,
            arguments.out,
            seed=arguments.seed,
            exclude=arguments.exclude,
            licence=arguments.licence,
            start=arguments.start,
            ratings=None if arguments.ratings is None else rated(arguments),
            resume=arguments.resume,
            device=arguments.device,
        )
    except DivergedError as error:
        print(f"qualiclip: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(path)
    return 0
