"""`qualiclip export`: write a metric to one file that other programs run."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from . import Commands, add_force_option, add_prompts_option, check_new, chosen_metrics, put
from .calibration import add_calibrate_option, check_calibrate, measuring


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a metric to an ONNX file or a .pt2 archive",
        description="Write a metric to one file, from pixels to scores, for images of any number and size. "
        "`qualiclip score -m FILE` runs it, as do ONNX Runtime, OpenVINO and PyTorch without this package.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("metric", metavar="METRIC", help="metric of this package, as for `score -m`")
    add_prompts_option(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="*.onnx or *.pt2")
    parser.add_argument(
        "--input",
        choices=("float", "uint8"),
        default="float",
        help="what the file takes: float32 (N, 3, H, W) in 0..1 (default), or uint8 (N, H, W, 3)",
    )
    parser.add_argument("--int8", action="store_true", help="quantise convolutions to 8 bits where scores allow it")
    add_calibrate_option(parser, "--int8")
    add_force_option(parser)


def run(arguments: argparse.Namespace) -> int:
    check_new(arguments.output, arguments.force)
    check_calibrate(arguments.calibrate, arguments.int8, "--int8")
    metrics = chosen_metrics(arguments, [arguments.metric])
    import pyiqa
    import torch

    from ..export.graph import exportable
    from ..export.write import export_metric
    from ..metrics.registry import METRICS
    from ..scoring.building import blind_metric, build_metrics, named_metrics

    if arguments.metric in set(pyiqa.list_models()) - METRICS.keys():
        exportable(None, arguments.metric)  # refused before its weights are downloaded
    built = build_metrics(named_metrics(metrics), torch.device("cpu"))[arguments.metric]
    bar = measuring() if arguments.int8 else nullcontext(lambda *_: None)
    with bar as tick:
        card = export_metric(
            blind_metric(built), arguments.output, arguments.metric, arguments.input, arguments.calibrate, tick
        )
    size = arguments.output.stat().st_size / 2**20
    put(f"{arguments.output}: {card.metric}, {', '.join(card.attributes)}, {size:.1f} MiB, licence {card.licence}")
    if card.quantisation:
        put("\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in card.quantisation.items()))
    return 0
