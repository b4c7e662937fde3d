"""`qualiclip tune`: learn prompts from opinion scores."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..metrics.registry import METRICS, DeepPromptSpec, with_context, with_deep_prompts
from ..metrics.specs import refuse_prompts
from ..optional import require
from . import Commands, a_number, a_seed, add_rating_options, put, rated, refuse, say

if TYPE_CHECKING:
    from ..training.examples import Tunable
    from ..training.recipes import Recipe

# Options that decide the network of only one of the two kinds of metric.
CONTEXT_OPTIONS = ("recipe", "shared", "crop")
PROMPT_OPTIONS = ("start", "alignment_column")


def add_parser(commands: Commands) -> None:
    metrics = ", ".join([*with_context(), *with_deep_prompts()])
    parser = commands.add_parser(
        "tune",
        help="learn prompts from opinion scores",
        description="Learn a metric's prompts from rated images, with CLIP frozen. Writes log.jsonl to RUN, and "
        "params.pth, which pyiqa.create_metric(METRIC, pretrained='RUN/params.pth') loads, or for "
        f"{' and '.join(with_deep_prompts())} prompts.safetensors, which "
        "pyiqa.create_metric(METRIC, weights='RUN/prompts.safetensors') loads.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("-m", "--metric", required=True, metavar="METRIC", help=f"one of {metrics}")
    parser.add_argument("--ratings", required=True, type=Path, metavar="CSV", help="opinion scores of the images")
    add_rating_options(parser)
    parser.add_argument(
        "--alignment-column",
        metavar="NAME",
        help="clip-agiqa: column of how well an image fits the text it was made from",
    )
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="images with one value of this column, such as a scene or a text, are all held out or all learned from",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--mos-range",
        nargs=2,
        type=a_number,
        metavar=("LOW", "HIGH"),
        help="opinion scores that become 0 and 1 (default: the range of the training images)",
    )
    parser.add_argument(
        "--validation",
        type=a_number,
        default=0.2,
        metavar="SHARE",
        help="share of the images, or of their groups, that is held out; 0 holds out none (default: 0.2)",
    )
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped, from its last epoch")
    parser.add_argument(
        "--recipe",
        choices=("official", "pyiqa"),
        help="default: official for clipiqa+, pyiqa for other metrics with a context; "
        f"{' and '.join(with_deep_prompts())} have their own",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="prompts to start from in place of fresh ones: of an earlier run, or of the authors' code "
        f"({', '.join(with_deep_prompts())})",
    )
    parser.add_argument(
        "--tracker",
        action="append",
        metavar="NAME",
        help="tensorboard or wandb; repeatable. Trackers get the log's figures, the mean score of the held-out images "
        "and a quality map of one of them (default: none)",
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--backbone", metavar="NAME", help="tower in place of the metric's own: OpenAI's or open_clip's name"
    )
    parser.add_argument(
        "--backbone-weights",
        type=Path,
        metavar="PATH",
        help="weights in place of the metric's own: a file, or a folder in the layout of Hugging Face transformers",
    )
    own = parser.add_argument_group("settings in place of the recipe's")
    own.add_argument("--learning-rate", type=a_number, metavar="X")
    own.add_argument("--loss", choices=("mse", "mse+plcc"))
    own.add_argument("--crop", type=int, metavar="N", help="side of random crops in pixels; 0: whole images")
    own.add_argument("--context-length", type=int, dest="n_ctx", metavar="N", help="tokens of a context or a prompt")
    contexts = own.add_mutually_exclusive_group()
    contexts.add_argument("--shared", action="store_const", const=True, help="one context for all prompts")
    contexts.add_argument(
        "--separate", dest="shared", action="store_const", const=False, help="a context for each prompt"
    )
    own.add_argument("--epochs", type=int, metavar="N")
    own.add_argument("--batch", type=int, metavar="N")
    own.add_argument("--seed", type=a_seed, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    require("scipy", "train", "qualiclip tune")
    refuse_prompts(arguments.metric, "here: `qualiclip tune` learns a context for the metric's own prompts")
    deep = arguments.metric in with_deep_prompts()
    refuse(arguments, CONTEXT_OPTIONS if deep else PROMPT_OPTIONS, f"on {arguments.metric}")
    _check_alignment(arguments)
    ratings = rated(arguments, arguments.group)  # before anything that takes time
    say(f"qualiclip: {ratings}")
    alignment = None
    if arguments.alignment_column is not None:
        alignment = rated(argparse.Namespace(**{**vars(arguments), "mos_column": arguments.alignment_column}))
        say(f"qualiclip: alignment: {alignment}")

    import torch

    from ..training.trackers import check_trackers

    trackers = check_trackers(arguments.tracker or ())

    from ..training.checkpoint import find_checkpoint, how_to_continue
    from ..training.recipes import RECIPES, default_recipe
    from ..training.tuning import CONTEXT, LOG, PROMPTS, check_folder, tune
    from ..training.watched import KeptEpoch

    check_folder(arguments.out, PROMPTS if deep else CONTEXT, arguments.resume)
    recipe = default_recipe(arguments.metric)
    if arguments.recipe is not None:
        recipe = RECIPES[arguments.recipe]
    names = ("learning_rate", "loss", "crop", "n_ctx", "shared", "epochs", "batch", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    recipe = dataclasses.replace(recipe, **given)
    net = _network(arguments, recipe, deep)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:  # torch says in its first line what is missing
        raise SettingsError(f"device {device!r} cannot be used ({str(error).splitlines()[0]})") from error
    if arguments.resume and find_checkpoint(arguments.out) is None:
        say(f"qualiclip: {arguments.out} holds no checkpoint to resume from; the run starts at its first epoch")
    try:
        path = tune(
            net,
            ratings,
            arguments.out,
            recipe,
            validation=arguments.validation,
            mos_range=None if arguments.mos_range is None else tuple(arguments.mos_range),
            trackers=trackers,
            alignment=alignment,
            resume=arguments.resume,
        )
    except KeyboardInterrupt:
        say(f"qualiclip: {how_to_continue(arguments.out)}")
        return 130
    say(f"qualiclip: {KeptEpoch.of(arguments.out / LOG)}")
    put(path)
    return 0


def _check_alignment(arguments: argparse.Namespace) -> None:
    """Raise SettingsError if a metric by deep prompts lacks --alignment-column, or has no use for it."""
    spec = METRICS.get(arguments.metric)
    if not isinstance(spec, DeepPromptSpec):
        return
    if len(spec.learners) == 1:
        refuse(arguments, ("alignment_column",), f"on {spec.name}, which has no alignment score")
    elif arguments.alignment_column is None:
        raise SettingsError(
            f"{spec.name} learns the alignment of image and text too; pass its scores (--alignment-column), or train "
            "clip-dqa, which needs none"
        )


def _network(arguments: argparse.Namespace, recipe: Recipe, deep: bool) -> Tunable:
    """Create the metric whose prompts are to be learned."""
    from ..training.recipes import fresh_deep_network, fresh_network

    backbone, weights = arguments.backbone, arguments.backbone_weights
    if deep:
        options = {"backbone": backbone, "backbone_weights": weights}
        if arguments.start is not None:
            options["n_ctx"] = arguments.n_ctx
        return fresh_deep_network(arguments.metric, recipe, arguments.start, **options)
    return fresh_network(arguments.metric, recipe, backbone=backbone, weights=weights)
