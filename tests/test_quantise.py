"""Convolutions in 8 bits: scores stay near those in float32, what does not allow it is refused, and it is done once."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from unittest import mock

import onnx
import pytest
import upstream
from export_files import farthest, rewritten
from onnx import TensorProto
from test_archs import build
from torchvision.transforms.functional import to_pil_image

from qualiclip_pyiqa import ExportedIQA, Scorer
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.export import quantise
from qualiclip_pyiqa.export.write import export_metric
from qualiclip_pyiqa.metrics.prompt_iqa import PromptIQA


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def metric(tiny_folder: Path) -> PromptIQA:
    return build(
        "tiny-resnet",
        tiny_folder,
        prompts={"light": ("Bright photo.", "Dark photo."), "sharp": ("Sharp.", "Blurry.")},
        temperature=3,
    )


@pytest.fixture(scope="module")
def file(metric: PromptIQA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_metric(metric, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number, image in enumerate(upstream.pictures(34, 48, 40)):
        to_pil_image(image).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def int8(metric: PromptIQA, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "int8.onnx"
    # A random network is noisier than a trained one.
    wide = partial(quantise.quantise, limits=quantise.Difference(0.1, 0.5))
    with mock.patch("qualiclip_pyiqa.export.write.quantise", wide):
        export_metric(metric, path, int8=photographs)
    return path


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_int8_is_near_and_holds_integers(metric: PromptIQA, int8: Path, engine: str) -> None:
    exported = ExportedIQA(int8, engine)
    said = exported.card.quantisation
    far = farthest(metric, exported)
    assert 1e-5 < far < 2 * said["largest_difference"] + 0.02
    assert (exported.card.precision, said["photographs"]) == ("int8", 34)
    model = onnx.load(str(int8))
    whole = [each for each in model.graph.initializer if each.data_type == TensorProto.INT8 and len(each.dims) == 4]
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert len(whole) == said["convolutions"] == convolutions - said["convolutions_in_fp32"]
    first, last = (node for node in [n for n in model.graph.node if n.op_type == "Conv"][:: convolutions - 1])
    assert not {first.input[1], last.input[1]} & {
        node.output[0] for node in model.graph.node if "Dequan" in node.op_type
    }


def test_what_int8_changes_too_much_is_refused(file: Path, metric: PromptIQA, photographs: Path) -> None:
    model, card = onnx.load(str(file)), ExportedIQA(file).card
    with mock.patch.object(quantise, "_ALONE", 2), pytest.raises(SettingsError, match="does not allow int8") as caught:
        quantise.quantise(model, card, photographs, limits=quantise.Difference(1e-9, 0.5))
    assert "\n" not in str(caught.value)


def test_worst_convolutions_stay_in_float(file: Path, photographs: Path) -> None:
    model, card = onnx.load(str(file)), ExportedIQA(file).card
    far, near = quantise.Difference(1, 0), quantise.Difference(0, 1)
    ticks: list[tuple[int, int]] = []
    found = iter([far, far, near, near, far])  # the last two: of each engine
    with mock.patch.object(quantise, "_ALONE", 2), mock.patch.object(quantise, "difference", lambda *_: next(found)):
        _, said = quantise.quantise(model, card, photographs, lambda *progress: ticks.append(progress))
    assert said["convolutions_in_fp32"] == 2 + 2
    total = said["convolutions"] + 2
    assert ticks == [(k + 1, total) for k in range(total)]  # each convolution was measured alone, once
    assert said["engines"] == ["onnxruntime"]


def test_an_engine_that_scores_otherwise_is_refused(int8: Path, tmp_path: Path) -> None:
    def only_one(model: onnx.ModelProto) -> None:
        (entry,) = model.metadata_props
        card = json.loads(entry.value)
        card["quantisation"]["engines"] = ["onnxruntime"]
        entry.value = json.dumps(card)

    path = rewritten(int8, tmp_path / "one.onnx", only_one)
    ExportedIQA(path)
    with pytest.raises(SettingsError, match="alike on openvino"):
        ExportedIQA(path, "openvino")


def test_int8_options_go_together(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    out = tmp_path / "new.onnx"
    for words, said in (
        (["export", "qualiclip-mini", "-o", out, "--int8"], "--calibrate DIR"),
        (["export", "qualiclip-mini", "-o", out, "--calibrate", photographs], "no effect"),
        (["export", "qualiclip-mini", "-o", out.with_suffix(".pt2"), "--int8", "--calibrate", photographs], "ONNX"),
        (["score", photographs, "--precision", "int8"], "--calibrate DIR"),
        (["score", photographs, "--calibrate", photographs], "no effect"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    with pytest.raises(SettingsError, match="at least 32"):
        quantise.central_parts(Path("examples/photos"))
    with pytest.raises(SettingsError, match="export --int8"):
        Scorer(str(file), device="cpu", workers=0, precision="int8")


def test_score_quantises_once(
    metric: PromptIQA,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    int8: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("qualiclip_pyiqa.scoring.building.build_metrics", lambda *_: {"mine": copy.deepcopy(metric)})
    made = []

    def export(_: object, path: Path, *__: object, **___: object) -> None:
        made.append(path)
        path.write_bytes(int8.read_bytes())

    monkeypatch.setattr("qualiclip_pyiqa.export.int8_cache.export_metric", export)
    for name in ("one", "two"):
        words = [
            "-m",
            "mine",
            "--precision",
            "int8",
            "--calibrate",
            photographs,
            "--workers",
            0,
            "-o",
            tmp_path / f"{name}.csv",
        ]
        assert run("score", photographs / "00.png", *words) == 0
    assert len(made) == 1
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    meta = json.loads((tmp_path / "one.csv.meta.json").read_text())["columns"]
    assert meta["mine.light"]["exported"]["precision"] == "int8"
    (photographs / "new.png").write_bytes((photographs / "00.png").read_bytes())
    assert run("score", photographs / "00.png", *words, "-o", tmp_path / "three.csv") == 0
    (photographs / "new.png").unlink()
    assert len(made) == 2
