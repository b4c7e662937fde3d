"""`qualiclip train`: align a tower with antonym prompts, without opinion scores."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from ..optional import require
from . import RATING_OPTIONS, Commands, a_seed, add_rating_options, put, rated, refuse, say

NEEDED = ("accelerate", "captum", "kornia", "matplotlib", "scipy", "tensorboard")  # the extra `train`


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on pristine photographs, without opinion scores",
        description="Train an image tower by QualiCLIP's strategy: degraded crops are ranked by their similarity to "
        "antonym prompts. Writes model.safetensors, which every command and pyiqa.create_metric('qualiclip', "
        "weights=...) load, log.jsonl and TensorBoard's events to RUN. On several GPUs: `accelerate launch -m "
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
        help="photographs to train on; images that a manifest.csv in it marks as held out are not used",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--seed", type=a_seed, default=0, help="decides all that is drawn at random (default: 0)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in RUN")
    parser.add_argument("--exclude", type=Path, metavar="LIST", help="text file of photographs not to train on")
    parser.add_argument("--start", type=Path, metavar="FILE", help="model of an earlier run to begin from")
    parser.add_argument(
        "--licence", default="not stated", help="licence of the weights, which depends on those of the photographs"
    )
    parser.add_argument(
        "--tracker",
        action="append",
        metavar="NAME",
        help="tensorboard (default) or wandb; repeatable. Trackers get the scores of the validation photographs and a "
        "quality map too",
    )
    parser.add_argument("--device", choices=["cpu"], help="cpu: do not use a GPU")
    parser.add_argument("--ratings", type=Path, metavar="CSV", help="opinion scores; the SRCC is logged, no more")
    add_rating_options(parser)


def run(arguments: argparse.Namespace) -> int:
    for module in NEEDED:
        require(module, "train", "qualiclip train")

    from ..training.checkpoint import how_to_continue
    from ..training.config import load_config
    from ..training.loop import DivergedError
    from ..training.run import train

    if arguments.ratings is None:
        refuse(arguments, RATING_OPTIONS, "without --ratings")
    logging.getLogger("qualiclip_pyiqa").setLevel(logging.INFO)
    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes
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
            trackers=arguments.tracker or ["tensorboard"],
        )
    except DivergedError as error:
        say(f"qualiclip: {error}")
        return 1
    except KeyboardInterrupt:
        if speaks:
            say(f"qualiclip: {how_to_continue(arguments.out)}")
        return 130
    if speaks:
        put(path)
    return 0
