"""Exported graphs of every kind of tower agree with the metric at sizes that were not traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import upstream
from export_files import CLOSE, Regressed, farthest
from test_archs import build

from qualiclip_pyiqa import BlindMetric, OpenQualiCLIP
from qualiclip_pyiqa.export.graph import exportable, trace
from qualiclip_pyiqa.export.write import export_metric
from qualiclip_pyiqa.metrics.exported import ExportedIQA
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.mini import MiniTower


def mini() -> BlindMetric:
    torch.manual_seed(0)
    tower = MiniTower(widths=(4, 6, 8, 8), depths=(1, 1, 1, 1), hidden=8, dim=4)
    with torch.no_grad():
        for _ in range(20):
            tower.train()(upstream.pictures(4, 64, 64))
    return Regressed(freeze(tower)).eval()


# Converting the embedded model takes most of this file's time.
METRICS: dict[str, Callable[[Path], BlindMetric]] = {
    "embedded": lambda _: OpenQualiCLIP("qualiclip-mini+", prompts="look").eval(),
    "ResNet statistics and table": lambda folder: Regressed(build("tiny-resnet-pos", folder).tower).eval(),
    "ViT table": lambda folder: build("tiny-vit-pos", folder),
}


@pytest.mark.parametrize("kind", METRICS)
def test_engines_agree_with_the_metric(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    metric = METRICS[kind](tiny_folder)
    export_metric(metric, tmp_path / "model.onnx", kind)
    for engine in ("onnxruntime", "openvino"):
        assert farthest(metric, ExportedIQA(tmp_path / "model.onnx", engine)) < CLOSE


@pytest.mark.parametrize("kind", ["mini", "tiny-context", "tiny-clipa"])
def test_graphs_agree_with_the_metric(kind: str, families_folder: Path) -> None:
    metric = mini() if kind == "mini" else build(kind, families_folder)
    graph = trace(exportable(metric, kind), kind, "float").module()
    assert farthest(metric, graph) < CLOSE
