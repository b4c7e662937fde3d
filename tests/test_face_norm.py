"""The norm of a face embedding: the contract on a small network, and the numbers that its authors' code gave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import by_rule
import pyiqa
import pytest
import torch
import upstream
from contract import MetricContract

from qualiclip_pyiqa import BlindMetric
from qualiclip_pyiqa.archs import FaceNorm
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.export.graph import exportable
from qualiclip_pyiqa.pretrained.layouts import without_training_module
from qualiclip_pyiqa.towers.face import FaceTower, face_tower

GOLDEN = by_rule.golden("qgface")
TOLERANCE = 1e-5  # of a norm: float32 against float64 moves it by 5e-7, RGB in place of BGR by 5e-2
# Widths before the first unit and after each, and where stages start.
SMALL = ([16, 16, 24, 24, 32, 32], {0, 1, 3})
IR_50 = ([64] * 4 + [128] * 4 + [256] * 14 + [512] * 3, {0, 3, 7, 21})


def checkpoint(widths: list[int], starts: set[int], dim: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in FaceTower(widths, starts, dim).state_dict().items()}
    return by_rule.state("qgface", shapes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As AdaFace writes it: the network as `model.*`, and the head of its training."""
    folder = tmp_path_factory.mktemp("face")
    state = checkpoint(*SMALL, dim=8)
    # Random weights in so small a network hardly see the image; a larger last layer makes up for it.
    head = {"head.kernel": torch.zeros(8, 10)}
    torch.save({"epoch": 1, "state_dict": {f"model.{k}": v for k, v in state.items()} | head}, folder / "adaface.ckpt")
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()} | head}, folder / "qgface.ckpt")
    torch.save(state, folder / "plain.pt")
    return folder


class TestFaceNorm(MetricContract):
    @pytest.fixture(autouse=True)
    def weights(self, small: Path) -> Iterator[None]:
        self.path = small / "adaface.ckpt"
        yield

    def build(self, **options: object) -> BlindMetric:
        return FaceNorm(weights=self.path, **options).eval()  # type: ignore[arg-type]

    def spread(self, metric: BlindMetric) -> float:
        return 100.0  # unbounded; these weights' norms are up to some hundreds

    def test_export_is_refused_before_tracing(self, metric: BlindMetric) -> None:
        with pytest.raises(SettingsError, match=r"^mine cannot be exported: its scores have no bounds"):
            exportable(metric, "mine")

    @torch.no_grad()
    def test_all_layouts_are_one_network(self, metric: BlindMetric, small: Path) -> None:
        x = upstream.pictures(2, 112, 112)
        for name in ("qgface.ckpt", "plain.pt"):
            assert torch.equal(FaceNorm(weights=small / name).eval()(x), metric(x))

    @torch.no_grad()
    def test_faces_are_not_resized_and_others_are(self, metric: BlindMetric) -> None:
        seen = []
        metric.tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        face = torch.rand(1, 3, 112, 112)
        metric(face)
        metric(torch.rand(1, 3, 540, 960))
        assert torch.equal(seen[0], face) and seen[1].shape == face.shape
        assert metric.describe()["images"] == "aligned faces" and metric.describe()["embedding"] == 8


def test_what_is_missing_is_one_line(small: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], said: str, path: Path | str) -> None:
        with pytest.raises(kind, match=said) as caught:
            FaceNorm(weights=path)
        assert "\n" not in str(caught.value)

    refused(WeightsError, "face-norm.ckpt is not on this .* get it from the authors of AdaFace", "face-norm")
    state = torch.load(small / "plain.pt", weights_only=True)
    path = tmp_path / "part.pt"
    torch.save({key: value for key, value in state.items() if not key.startswith("body.2.")}, path)
    refused(WeightsError, "no network of face recognition", path)
    torch.save({key: value for key, value in state.items() if not key.startswith("output_layer")}, path)
    refused(WeightsError, "is not of layout face: it lacks output_layer", path)
    torch.save(state | {"body.1.res_layer.2.bias": torch.ones(3)}, path)
    refused(WeightsError, "'body.1.res_layer.2.bias' has shape", path)
    with pytest.raises(SettingsError, match="belongs to RankingAwareIQA"):
        FaceNorm("ranking-aware")
    metric = pyiqa.create_metric("face-norm", weights=small / "qgface.ckpt", device="cpu")
    assert metric(torch.rand(1, 3, 112, 112)).shape == (1, 1) and not metric.lower_better


@torch.no_grad()
def test_golden_numbers() -> None:
    state = checkpoint(*IR_50, dim=512)
    assert len(state) == 467
    tower = face_tower(without_training_module({f"model.{key}": value for key, value in state.items()}), "rule").eval()
    faces = by_rule.pixels(10, 11)
    found = tower(faces)
    mirrored = tower(faces.flip(-1))
    in_rgb = tower(faces.flip(1)).norm(dim=1)
    for k, number in enumerate((10, 11)):
        expected = GOLDEN["pictures"][str(number)]
        assert float(found[k].norm()) == pytest.approx(expected["norm"], rel=TOLERANCE)
        assert float(mirrored[k].norm()) == pytest.approx(expected["norm_flipped"], rel=TOLERANCE)
        fused = float((found[k] + mirrored[k]).norm())
        assert fused == pytest.approx(expected["norm_of_summed_with_flipped"], rel=TOLERANCE)
        first = torch.tensor(expected["embedding_first"])
        assert (torch.nn.functional.normalize(found[k], dim=0)[:5] - first).abs().max() < 1e-6
        assert abs(float(in_rgb[k]) / expected["norm"] - 1) > 100 * TOLERANCE
    del tower.body[0].shortcut_layer
    tower.body[0].shortcut_layer = torch.nn.AvgPool2d(2)  # in place of every second pixel
    assert abs(float(tower(faces[:1]).norm()) / GOLDEN["pictures"]["10"]["norm"] - 1) > 100 * TOLERANCE
