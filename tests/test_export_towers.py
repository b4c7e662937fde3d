"""Exported graphs of every kind of tower agree with the metric at sizes that were not traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import upstream
from export_files import CLOSE, Regressed, farthest
from mobile_files import random_tower
from test_archs import build

from qualiclip_pyiqa import BlindMetric, OpenQualiCLIP
from qualiclip_pyiqa.export.write import export_metric
from qualiclip_pyiqa.metrics.exported import ExportedIQA
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.mini import MiniTower


def mini(_: Path) -> BlindMetric:
    torch.manual_seed(0)
    tower = MiniTower(widths=(4, 6, 8, 8), depths=(1, 1, 1, 1), hidden=8, dim=4)
    with torch.no_grad():
        for _ in range(20):
            tower.train()(upstream.pictures(4, 64, 64))
    return Regressed(freeze(tower)).eval()


METRICS: dict[str, Callable[[Path], BlindMetric]] = {
    "embedded": lambda _: OpenQualiCLIP("qualiclip-mini+", prompts="look").eval(),
    "mobile statistics": lambda _: Regressed(freeze(random_tower())).eval(),
    "mini statistics": mini,
    "ResNet statistics": lambda folder: Regressed(build("tiny-resnet", folder).tower).eval(),
    "ResNet table": lambda folder: build("tiny-resnet-pos", folder),
    "ResNet context": lambda folder: build("tiny-context", folder),
    "ViT": lambda folder: build("tiny-vit", folder),
    "ViT table": lambda folder: build("tiny-vit-pos", folder),
}


@pytest.mark.parametrize("kind", METRICS)
def test_engines_agree_with_the_metric(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    metric = METRICS[kind](tiny_folder)
    export_metric(metric, tmp_path / "model.onnx", kind)
    for engine in ("onnxruntime", "openvino"):
        assert farthest(metric, ExportedIQA(tmp_path / "model.onnx", engine)) < CLOSE
