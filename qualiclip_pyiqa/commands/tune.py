"""`qualiclip tune`: learn a prompt context from opinion scores."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from ..errors import SettingsError
from ..metrics.registry import with_context
from . import Commands, add_rating_options, rated


def add_parser(commands: Commands) -> None:
    metrics = ", ".join(with_context())
    parser = commands.add_parser(
        "tune",
        help="learn a prompt context from opinion scores",
        description="Learn the prompt context of a metric from rated pictures, all else of CLIP being frozen. RUN gets "
        "params.pth, which pyiqa.create_metric(METRIC, pretrained='RUN/params.pth') takes, and log.jsonl.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-m", "--metric", required=True, metavar="METRIC", help=f"one of {metrics}")
    parser.add_argument("--ratings", required=True, type=Path, metavar="CSV", help="opinion scores of the pictures")
    add_rating_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder for params.pth and log.jsonl")
    parser.add_argument(
        "--mos-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="what becomes 0 and 1 (default: as trained on)",
    )
    parser.add_argument(
        "--validation", type=float, default=0.2, metavar="SHARE", help="held out and watched (default: 0.2; 0: none)"
    )
    parser.add_argument(
        "--recipe", choices=("official", "pyiqa"), help="default: official for clipiqa+, pyiqa for the others"
    )
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="this and what follows: instead of the recipe's"
    )
    parser.add_argument("--loss", choices=("mse", "mse+plcc"))
    parser.add_argument("--crop", type=int, metavar="N", help="side of the random crops; 0: whole pictures")
    parser.add_argument("--context-length", type=int, dest="n_ctx", metavar="N", help="tokens of a context")
    contexts = parser.add_mutually_exclusive_group()
    contexts.add_argument("--shared", action="store_const", const=True, help="one context for all prompts")
    contexts.add_argument("--separate", dest="shared", action="store_const", const=False, help="one for each prompt")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch", type=int, metavar="N")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE", help="instead of the metric's own tower")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")


def run(arguments: argparse.Namespace) -> int:
    ratings = rated(arguments)  # before anything that takes time
    print(f"qualiclip: {ratings}", file=sys.stderr)

    import torch

    from ..training.tuning import RECIPES, default_recipe, fresh_network, tune

    recipe = default_recipe(arguments.metric)
    if arguments.recipe is not None:
        recipe = RECIPES[arguments.recipe]
    names = ("learning_rate", "loss", "crop", "n_ctx", "shared", "epochs", "batch", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    recipe = dataclasses.replace(recipe, **given)
    net = fresh_network(arguments.metric, recipe, weights=arguments.backbone_weights)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:  # torch says in its first line what is missing
        raise SettingsError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from error
    path = tune(
        net,
        ratings,
        arguments.out,
        recipe,
        validation=arguments.validation,
        mos_range=None if arguments.mos_range is None else tuple(arguments.mos_range),
    )
    print(path)
    return 0
