"""Write a traced metric to an ONNX file or a .pt2 archive, whole or not at all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from ..errors import SettingsError, reason
from ..files import replacing, writing
from ..metrics.base import BlindMetric
from ..metrics.export_card import IMAGE, INPUTS, KEY, SCORES, ExportCard
from ..metrics.specs import EXPORTED_SUFFIXES
from ..optional import require
from .graph import card_of, exportable, trace
from .quantise import quantise

if TYPE_CHECKING:
    import onnx

_MOST_BYTES = 2**31 - 1  # of an ONNX file, a limit of Protocol Buffers


def export_metric(
    metric: BlindMetric | None,
    path: Path,
    name: str = "the metric",
    input: str = "float",
    int8: Path | None = None,
    tick: Callable[[int, int], object] = lambda *_: None,
) -> ExportCard:
    """Write a metric to one file, from pixels to scores, for any number and size of images.

    Args:
        metric: a network of this package; `scoring.building.blind_metric` finds it in a metric of pyiqa.
        path: ends in `.onnx` or `.pt2`; replaced if it exists.
        name: what the user calls the metric, for error messages.
        input: `float` or `uint8`, see `INPUTS`.
        int8: folder of photographs by which convolutions are quantised to 8 bits, see `quantise`; None: float32.
        tick: called while that is measured, see `quantise`.

    Returns:
        What the file says about itself.

    Raises:
        SettingsError: the metric cannot be exported or quantised, a package is missing, or the file would be too large.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    if path.suffix not in EXPORTED_SUFFIXES:
        raise SettingsError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(EXPORTED_SUFFIXES)}")
    if input not in INPUTS:
        raise SettingsError(f"input is {input!r}; expected one of {', '.join(INPUTS)}")
    if int8 is not None and path.suffix != ".onnx":
        raise SettingsError(f"{path} cannot hold 8-bit convolutions; expected an ONNX file")
    if path.suffix == ".onnx":
        for module in ("onnx", "onnxscript"):
            require(module, "onnx", "an ONNX file")
    own = exportable(metric, name)
    program = trace(own, name, input)
    card = card_of(own, input)
    if path.suffix == ".pt2":
        with writing(path), replacing(path) as part, part.open("wb") as file:
            torch.export.save(program, file, extra_files={KEY: card.to_json()})
        return card
    model = to_onnx(program, name)
    card = replace(card, opset=opset_of(model))
    if int8 is not None:
        model, measured = quantise(model, card, int8, tick)
        card = replace(card, precision="int8", quantisation=measured)
    write_onnx(model, card, path)
    return card


def to_onnx(program: ExportedProgram, name: str) -> onnx.ModelProto:
    """Convert a traced metric to an ONNX model.

    Raises:
        SettingsError: an operation has no counterpart in ONNX.
    """
    from onnxscript import optimizer

    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                optimize=False,
                verbose=False,
                input_names=[IMAGE],
                output_names=[SCORES],
            )
    except Exception as error:
        raise SettingsError(f"{name} cannot be converted to ONNX ({reason(error, 200)}); export to .pt2") from error
    finally:
        exporter.setLevel(level)
    assert made is not None
    # The exporter's own optimisation searches for patterns for longer than it takes to convert; engines have theirs.
    optimizer.fold_constants(made.model)
    optimizer.remove_unused_nodes(made.model)
    model: onnx.ModelProto = made.model_proto
    return model


def opset_of(model: onnx.ModelProto) -> int:
    return next(int(each.version) for each in model.opset_import if not each.domain)


def write_onnx(model: onnx.ModelProto, card: ExportCard, path: Path) -> None:
    """Check a model, add its metadata and write it.

    Raises:
        SettingsError: the model has more than 2 GB.
    """
    import onnx

    model.producer_name, model.producer_version = "qualiclip-pyiqa", card.version
    model.doc_string = f"{card.metric}: {INPUTS[card.input]} -> {', '.join(card.attributes)}"
    _tidy(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: card.to_json()})
    size = model.ByteSize()
    if size > _MOST_BYTES:
        raise SettingsError(f"{path} would have {size / 2**30:.1f} GB, but an ONNX file has at most 2; export to .pt2")
    onnx.checker.check_model(model, full_check=True)
    with writing(path), replacing(path) as part:
        part.write_bytes(model.SerializeToString())


def _tidy(model: onnx.ModelProto) -> None:
    """Leave out what the exporter notes about each node: lines of source, with paths of this machine."""
    graph: Any = model.graph
    for each in (*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output, graph):
        del each.metadata_props[:]
        each.doc_string = ""
