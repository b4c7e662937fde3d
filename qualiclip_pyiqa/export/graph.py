"""Trace a metric to a graph for images of any number and size, from pixels to scores."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ..errors import SettingsError, reason
from ..images.convert import MIN_SIDE
from ..metrics.base import BlindMetric
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from ..metrics.export_card import ExportCard, is_range, licence_of
from ..metrics.exported import ExportedIQA
from ..towers.contrastive import TwoScaleTower
from ..towers.resnet import FoldedConv
from ..towers.streaming import LARGE_PIXELS
from .attention import replace_attention

#: Side of the windows in which images of more than `LARGE_PIXELS` pixels are scored.
WINDOW = 1024
# Traced with two images of unequal sides: a size of 1, or two equal sizes, would be taken for constants.
_EXAMPLE = (2, 96, 112)
_MAX_BATCH, _MAX_SIDE = 2**16, 2**15


class Graph(nn.Module):
    """The function that is exported: pixels of any number and size of images -> scores.

    Args:
        metric: on the CPU in float32 and eval mode.
        kind: key of `INPUTS`.
    """

    def __init__(self, metric: BlindMetric, kind: str) -> None:
        super().__init__()
        self.metric, self.kind = metric, kind

    def forward(self, image: Tensor) -> Tensor:
        if self.kind == "uint8":
            # In this order of memory, as another ties the graph to some sizes.
            image = image.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).float() / 255
        return self.metric.rate(self.metric.encode(image))

    def example(self) -> tuple[Tensor, dict[int, Any]]:
        """Return an input to trace with, and its dimensions that are free."""
        batch, height, width = _EXAMPLE
        sides = [Dim(name, min=MIN_SIDE, max=_MAX_SIDE) for name in ("height", "width")]
        free = Dim("batch", min=1, max=_MAX_BATCH)
        if self.kind == "uint8":
            return torch.zeros(batch, height, width, 3, dtype=torch.uint8), {0: free, 1: sides[0], 2: sides[1]}
        return torch.full((batch, 3, height, width), 0.5), {0: free, 2: sides[0], 3: sides[1]}


def exportable(metric: BlindMetric | None, name: str) -> BlindMetric:
    """Copy a metric for export: without fused kernels, with attention that can be traced, in float32 on the CPU.

    Args:
        metric: the network; None for another package's metric.
        name: what the user called it, for error messages.

    Raises:
        SettingsError: the metric cannot be exported.
    """
    if metric is None:
        raise SettingsError(f"{name} is another package's metric; expected one of this package, such as clipiqa")
    if isinstance(metric, ExportedIQA):
        raise SettingsError(f"{name} is exported already; expected the metric that it was exported from")
    if metric.tile is not None:
        raise SettingsError(f"{name} scores windows (tile={metric.tile}), which a graph does not hold; leave tile out")
    why = _no_graph(metric)
    if why:
        raise SettingsError(f"{name} cannot be exported: {why}; score with the metric itself")
    own = copy.deepcopy(metric).cpu().float().eval()
    for module in own.modules():
        if isinstance(module, FoldedConv):
            module.kernel = None
    replace_attention(own)
    # The order of weights decides that of activations, which restricts a graph to some sizes.
    return own.to(memory_format=torch.contiguous_format)


def _no_graph(metric: BlindMetric) -> str:
    """Return why a metric has no graph for images of any size, which shows without tracing; "" if nothing is known."""
    if isinstance(metric.tower, TwoScaleTower):
        return "its tower scores the image and its half, whose sizes a graph for any size does not hold"
    if isinstance(metric, DeepPromptIQA):
        return "it averages over windows, of which a graph for any size does not hold the number"
    if not is_range(metric.score_range):
        return f"its scores have no bounds (score_range is {metric.score_range!r}), which an exported file must state"
    return ""


def trace(metric: BlindMetric, name: str, kind: str) -> ExportedProgram:
    """Trace a copy from `exportable`.

    Args:
        metric: the copy.
        name: what the user called it, for error messages.
        kind: key of `INPUTS`.

    Raises:
        SettingsError: the network's operations depend on the size in a way that a graph cannot hold.
    """
    graph = Graph(metric, kind).eval()
    image, free = graph.example()
    try:
        with torch.no_grad(), _sizes_of_one_are_free(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, (image,), dynamic_shapes=({**free},), strict=False)
    except Exception as error:
        raise SettingsError(
            f"{name} cannot be exported: its network, {type(metric.tower).__name__}, has no graph for images of any "
            f"size ({reason(error, 200)})"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths on this machine, which an archive would keep
    return program


def card_of(metric: BlindMetric, kind: str) -> ExportCard:
    """Describe an fp32 graph of a metric; the writer adds the opset."""
    description = {key: _without_paths(value) for key, value in metric.describe().items()}
    return ExportCard(
        metric=metric.model_type,
        attributes=metric.attributes,
        lower_better=metric.lower_better,
        score_range=metric.score_range,
        paper=metric.paper,
        licence=licence_of(description),
        input=kind,
        largest=LARGE_PIXELS,
        window=WINDOW,
        precision="fp32",
        quantisation={},
        opset=0,
        description=description,
        version=version("qualiclip-pyiqa"),
        torch=str(torch.__version__),
    )


def _without_paths(value: Any) -> Any:
    """Leave out where weight files were on this machine."""
    return {key: each for key, each in value.items() if key != "path"} if isinstance(value, dict) else value


@contextmanager
def _sizes_of_one_are_free() -> Iterator[None]:
    """Let a traced size stand for one pixel too, which is the smallest size behind five halvings of 32 pixels.

    The switch is private to PyTorch, whose ONNX exporter uses it alike. Without it the smallest image has 64 pixels a
    side, and `trace` fails.
    """
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield
