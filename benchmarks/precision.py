"""Measure engines and precisions: time, memory, and how far scores are from those in fp32.

    python benchmarks/precision.py --photographs DIR --calibrate DIR [--weights DIR] [--count 60] [--repeat 9]
        [--model NAME|FILE...]

The embedded models, and qualiclip's ResNet50 tower with random weights whose BatchNorm statistics are those of random
images (unless --weights): its times are those of the real one, but its scores hardly differ between photographs, so
that its rank correlations are lower than those of a trained one would be. `int8` has all convolutions but the first and
last in 8 bits, whatever the scores; a second row has as many as `qualiclip export --int8` allows, if it allows any.
Variants take turns in one process, and medians are compared. pyiqa is measured for the ResNet50 only. Memory is that of
one image of 4K in a fresh process. Calibrate with photographs that are not among those scored.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from qualiclip_pyiqa import BlindMetric, ExportedIQA, load_image
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.export.graph import card_of, exportable, trace
from qualiclip_pyiqa.export.quantise import LIMITS, Difference, quantise
from qualiclip_pyiqa.export.write import opset_of, to_onnx, write_onnx
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.towers.onednn import use_onednn

MODELS = ("qualiclip-mini+", "qualiclip-mini+:look", "qualiclip")
SIZES = ((1, 512, 512), (1, 768, 1024))
LARGE = (2160, 3840)


def built(model: str) -> BlindMetric:
    name, _, prompts = model.partition(":")
    return common.load(name, prompts or None)


def fused(model: str) -> BlindMetric:
    """As a `Scorer` has it."""
    net = built(model)
    use_onednn(net.tower)
    return net


def files(model: str, calibrate: Path, folder: Path, quick: bool) -> dict[str, Path]:
    """Export a model in fp32 and, if its convolutions can be, in int8: file by precision."""
    net = exportable(built(model), model)
    onnx_model = to_onnx(trace(net, model, "float"), model)
    card = replace(card_of(net, "float"), opset=opset_of(onnx_model))
    made = {"fp32": folder / "fp32.onnx"}
    write_onnx(onnx_model, card, made["fp32"])
    tried = [("int8", Difference(np.inf, -1)), ("int8, within limits", LIMITS)]
    for precision, limits in tried[:1] if quick else tried:
        try:
            whole, said = quantise(onnx_model, card, calibrate, limits=limits)
        except SettingsError as error:
            print(error)
            continue
        precision = precision if "limits" not in precision else f"int8, {said['convolutions_in_fp32']} in fp32"
        made[precision] = folder / f"{len(made)}.onnx"
        write_onnx(whole, replace(card, precision="int8", quantisation=said), made[precision])
    return made


def variants(model: str, exported: dict[str, Path]) -> dict[tuple[str, str], Callable[[], BlindMetric]]:
    """Return what makes the metric, by engine and precision; the first is the one to compare with."""
    made: dict[tuple[str, str], Callable[[], BlindMetric]] = {
        ("torch, fused", "fp32"): partial(fused, model),
        ("torch", "bf16"): lambda: copy.deepcopy(built(model)).bfloat16(),
    }
    for precision, path in exported.items():
        made["ONNX Runtime", precision] = partial(ExportedIQA, path, "onnxruntime")
        made["OpenVINO", precision] = partial(ExportedIQA, path, "openvino")
    made["OpenVINO", "bf16"] = partial(ExportedIQA, exported["fp32"], "openvino-bf16")
    return made


@torch.no_grad()
def rows_of(model: str, options: Any, folder: Path, weights: Path | None) -> list[dict[str, Any]]:
    exported = files(model, options.calibrate, folder, options.quick)
    repeat, count = (1, 4) if options.quick else (options.repeat, options.count)
    paths = common.spread(find_images([str(options.photographs)]).paths, count)
    images = [load_image(path)[None] for path in paths]
    nets: dict[tuple[str, str], BlindMetric] = {}
    for key, make in variants(model, exported).items():
        with suppress(SettingsError):  # an engine that is not installed, or a CPU without bfloat16
            nets[key] = make()
    first = next(iter(nets))
    scores = {key: np.concatenate([net(image).float().numpy() for image in images]) for key, net in nets.items()}
    rows = [
        {
            "metric": model,
            "engine": engine,
            "precision": precision,
            "SRCC with fp32": srcc(scores[engine, precision], scores[first]),
            "largest difference": float(np.abs(scores[engine, precision] - scores[first]).max()),
            "images": len(images),
        }
        for engine, precision in nets
    ]
    pyiqa = common.oracle(model, weights) if model == "qualiclip" and weights else None
    for size in SIZES[:1] if options.quick else SIZES:
        x = common.images(*size)
        calls: list[Callable[[], object]] = [partial(_call, net, x) for net in nets.values()]
        taken = common.medians(calls if pyiqa is None else [*calls, partial(pyiqa, x)], repeat)
        name = "x".join(map(str, size))
        for row, seconds in zip(rows, taken, strict=False):
            row[f"{name}, seconds"] = seconds
            row[f"{name}, times fp32"] = taken[0] / seconds
            row[f"{name}, times pyiqa"] = None if pyiqa is None else taken[-1] / seconds
    if not options.quick:
        for row, make in zip(rows, (variants(model, exported)[key] for key in nets), strict=True):
            if row["precision"] in ("fp32", "int8"):  # the others are alike, or cannot be sent to a process
                row["4K, MiB"] = common.peak_memory(make, *LARGE)
    return rows


def _call(net: BlindMetric, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def srcc(scores: np.ndarray, reference: np.ndarray) -> float:
    """Return the lowest rank correlation of an attribute."""
    return min(float(stats.spearmanr(scores[:, k], reference[:, k]).statistic) for k in range(scores.shape[1]))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--photographs", type=Path, required=True, metavar="DIR", help="images to score")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="DIR", help="at least 32 photographs")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="of QualiCLIP.pth and RN50.pt")
    parser.add_argument("--count", type=int, default=60, help="of images to score at most")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--model", action="append", help=f"{', '.join(MODELS)}, or the file of a trained model")
    options = parser.parse_args()
    models = options.model or MODELS
    rows: list[dict[str, Any]] = []
    with common.weights(options.weights) if "qualiclip" in models else nullcontext() as weights:
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                rows += rows_of(model, options, Path(folder), weights)
    common.report(options, rows, weights=options.weights and options.weights.name)


if __name__ == "__main__":
    main()
