"""`qualiclip export`: what the file scores, what it says, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pyiqa
import pytest
import torch
from export_files import CLOSE, farthest, images, rewritten
from onnx import TensorProto, helper
from test_archs import build

import qualiclip_pyiqa
from qualiclip_pyiqa import ExportedIQA, QualityLoss, Scorer
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.export.write import export_metric
from qualiclip_pyiqa.metrics.export_card import IMAGE, KEY, SCORES, ExportCard
from qualiclip_pyiqa.metrics.prompt_iqa import PromptIQA

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
PROMPTS = {"light": ("Bright photo.", "Dark photo."), "sharp": ("Sharp photo.", "Blurry photo.")}


@pytest.fixture(scope="module")
def metric(tiny_folder: Path) -> PromptIQA:
    return build("tiny-resnet", tiny_folder, prompts=PROMPTS, temperature=3)


@pytest.fixture(scope="module")
def file(metric: PromptIQA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_metric(metric, path)
    return path


@pytest.fixture(scope="module")
def archive(metric: PromptIQA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    export_metric(metric, path, input="uint8")
    return path


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_agree_with_the_metric_at_other_sizes(metric: PromptIQA, file: Path, engine: str) -> None:
    assert farthest(metric, ExportedIQA(file, engine)) < CLOSE


def test_archive_of_bytes_agrees_with_the_metric(metric: PromptIQA, archive: Path) -> None:
    assert farthest(metric, ExportedIQA(archive, trusted=True)) < CLOSE


def test_other_programs_need_nothing_of_this_package(metric: PromptIQA, file: Path) -> None:
    import onnxruntime

    onnx.checker.check_model(onnx.load(str(file)), full_check=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = images(1, 40, 56)
    (scores,) = session.run(None, {"image": x.numpy()})
    assert np.allclose(scores, metric(x).detach().numpy(), atol=CLOSE)


def test_files_hold_no_paths_of_this_machine(file: Path, archive: Path) -> None:
    package = Path(qualiclip_pyiqa.__file__).parent
    folders = [str(folder).encode() for folder in (package, Path(torch.__file__).parent, file.parent)]
    with zipfile.ZipFile(archive) as opened:
        contents = [opened.read(name) for name in opened.namelist()]
    assert not any(folder in content for folder in folders for content in (file.read_bytes(), *contents))


def test_large_images_have_the_mean_of_windows(metric: PromptIQA, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = ExportedIQA(file)
    for name, value in (("largest", 64 * 64), ("window", 64)):
        object.__setattr__(exported.card, name, value)
    tiled = copy.deepcopy(metric)
    tiled.tile = 64
    x = images(1, 100, 150)
    with torch.no_grad():
        assert torch.allclose(exported(x), tiled(x), atol=CLOSE)
        assert not torch.allclose(exported(x), metric(x), atol=CLOSE)
        assert torch.allclose(exported(x[..., :64, :64]), metric(x[..., :64, :64]), atol=CLOSE)


def test_dtypes_copies_and_pickles(file: Path) -> None:
    exported = ExportedIQA(file)
    x = images(2, 48, 40)
    expected = exported(x)
    for other in (copy.deepcopy(exported), pickle.loads(pickle.dumps(exported))):
        assert torch.equal(other(x), expected)
    assert exported.double()(x.double()).dtype == torch.float64
    assert exported.float()(x[:, :1].half()).shape == (2, 2)


def test_it_has_no_gradient(file: Path) -> None:
    with pytest.raises(SettingsError, match="has no gradient"):
        ExportedIQA(file)(images(1, 32, 32).requires_grad_())
    with pytest.raises(SettingsError):
        QualityLoss(ExportedIQA(file))(images(1, 64, 64).requires_grad_())


# ---------------------------------------------------------------- what it says


def test_file_describes_itself(metric: PromptIQA, file: Path) -> None:
    card = json.loads({each.key: each.value for each in onnx.load(str(file)).metadata_props}[KEY])
    assert card["attributes"] == ["light", "sharp"]
    assert card["description"]["weights"]["sha256"] == metric.describe()["weights"]["sha256"]
    assert card["opset"] >= 18
    assert str(Path.home()) not in file.read_bytes().decode("latin-1")
    assert str(metric.origin.path.parent) not in file.read_bytes().decode("latin-1")
    said = ExportedIQA(file).describe()
    assert said["prompts"] == metric.describe()["prompts"]
    assert (said["architecture"], said["exported"]["engine"]) == ("ExportedIQA", "onnxruntime")
    assert (said["lower_better"], said["score_range"]) == (False, "0, 1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "qualiclip-pyiqa-export/2"),
        ("attributes", ["quality", "quality"]),
        ("attributes", []),
        ("lower_better", 0),
        ("score_range", "0, nan"),
        ("input", "bgr"),
        ("window", 2**20),
        ("largest", True),
        ("precision", "int4"),
        ("description", []),
        ("licence", None),
    ],
)
def test_wrong_metadata_is_one_line(file: Path, key: str, value: object) -> None:
    card = json.loads(ExportedIQA(file).card.to_json()) | {key: value}
    with pytest.raises(WeightsError) as caught:
        ExportCard.from_json(json.dumps(card), "model.onnx")
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


# ---------------------------------------------------------------- what is refused


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_in_a_subgraph(model: onnx.ModelProto) -> None:
    value = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="../secret")
    inner = helper.make_graph([], "inner", [], [], initializer=[value])
    model.graph.node.add().CopyFrom(helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))


def foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.evil"


def a_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="")


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "pixels"


def input_of_bytes(model: onnx.ModelProto) -> None:
    (card,) = (each for each in model.metadata_props if each.key == KEY)
    card.value = json.dumps({**json.loads(card.value), "input": "uint8"})


def prompts_of_others(model: onnx.ModelProto) -> None:
    (card,) = (each for each in model.metadata_props if each.key == KEY)
    values = json.loads(card.value)
    values["description"]["prompts"]["light"] = [["Bright photo.", "Bright photo."]]
    card.value = json.dumps(values)


def no_metadata(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (external, "another file"),
        (external_in_a_subgraph, "another file"),
        (foreign_operator, "com.evil"),
        (a_function, "not ONNX's own"),
        (other_input, "inputs"),
        (input_of_bytes, "takes another input"),
        (prompts_of_others, "the metadata is damaged"),
        (no_metadata, "not written by `qualiclip export`"),
    ],
)
def test_unsafe_files_are_refused_before_an_engine_sees_them(
    file: Path, tmp_path: Path, change: object, words: str
) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        ExportedIQA(rewritten(file, tmp_path / "hostile.onnx", change))
    assert "\n" not in str(caught.value)


def wrong_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Conway"


def no_output(model: onnx.ModelProto) -> None:
    """Return the image instead of scores."""
    model.graph.node.add().CopyFrom(helper.make_node("Identity", [IMAGE], [SCORES]))
    last = next(node for node in model.graph.node if SCORES in node.output)
    last.output[list(last.output).index(SCORES)] = "unused"
    model.graph.output[0].type.tensor_type.ClearField("shape")


def far_too_large(model: onnx.ModelProto) -> None:
    """Add a tensor of 400 GB to the scores."""
    last = next(node for node in model.graph.node if SCORES in node.output)
    last.output[list(last.output).index(SCORES)] = "before"
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    size = helper.make_tensor("size", TensorProto.INT64, [1], [10**11])
    shape = helper.make_node("ConstantOfShape", ["size"], ["huge"], value=zero)
    total = helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0)
    # The size depends on the image, so that no engine folds it into a constant.
    dimension = helper.make_node("Shape", [IMAGE], ["dimension"], start=0, end=1)
    model.graph.initializer.append(size)
    shape.input[0] = "many"
    many = helper.make_node("Mul", ["dimension", "size"], ["many"])
    for node in (dimension, many, shape, total, helper.make_node("Add", ["before", "sum"], [SCORES])):
        model.graph.node.add().CopyFrom(node)


@pytest.mark.parametrize(
    ("change", "engine", "words"),
    [
        (wrong_operator, "onnxruntime", "cannot be loaded"),
        (wrong_operator, "openvino", "cannot be loaded"),
        (no_output, "onnxruntime", "the file is damaged"),
        (no_output, "openvino", "the file is damaged"),
        (far_too_large, "onnxruntime", "out of memory"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_anything_is_written(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: object, engine: str, words: str
) -> None:
    broken = rewritten(file, tmp_path / "broken.onnx", change)
    with pytest.raises(WeightsError, match=words) as caught:
        Scorer(f"{broken}:{engine}", device="cpu", workers=0)
    assert "\n" not in str(caught.value)
    assert cli.main(["score", str(PHOTOS), "-m", f"{broken}:{engine}", "-o", str(tmp_path / "scores.csv")]) == 1
    said = capfd.readouterr()
    assert words in said.err and "Traceback" not in said.err and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_an_image_too_large_for_an_engine_is_an_error_of_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_only(image: np.ndarray) -> np.ndarray:
        if image[0].size > 3 * 40 * 40:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
        return np.zeros((len(image), 2), np.float32)

    monkeypatch.setattr("qualiclip_pyiqa.metrics.exported.run_by", lambda *_: small_only)
    scorer = Scorer(str(file), device="cpu", workers=0)
    small, large = scorer.score([np.zeros((40, 40, 3), np.uint8), np.zeros((80, 80, 3), np.uint8)])
    assert small.error is None and len(small.scores) == 2
    assert large.error == "80x80 pixels do not fit into the memory of cpu"


def test_words_of_attributes_are_those_of_the_metric(metric: PromptIQA, file: Path) -> None:
    exported = ExportedIQA(file)
    assert exported.prompts == metric.prompts
    own, other = (Scorer({"m": each}, device="cpu", workers=0).comparatives for each in (metric, exported))
    assert own == other and own["m.light"][0] == "brighter"


def test_damaged_and_missing_files_are_one_line(file: Path, archive: Path, tmp_path: Path) -> None:
    for path, data in ((tmp_path / "cut.onnx", file.read_bytes()[:5000]), (tmp_path / "no.onnx", b"hello")):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"damaged|not written by"):
            ExportedIQA(path)
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged"):
        ExportedIQA(cut, trusted=True)
    with pytest.raises(SettingsError, match="does not exist"):
        Scorer(str(tmp_path / "none.onnx"))


def test_an_archive_is_opened_only_if_it_is_trusted(archive: Path) -> None:
    with pytest.raises(SettingsError, match="trusted=True"):
        Scorer(str(archive))


def test_what_cannot_be_exported_is_one_line(tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.onnx"
    tiled = build("tiny-resnet", tiny_folder, tile=64)
    for metric, words in (
        (None, "another package's"),
        (tiled, "tile=64"),
        (ExportedIQA(file), "exported already"),
    ):
        with pytest.raises(SettingsError, match=words):
            export_metric(metric, out)
    with pytest.raises(SettingsError, match="suffix"):
        export_metric(tiled, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_settings_without_effect_are_refused(file: Path) -> None:
    for options, words in (({"precision": "bf16"}, "bf16"), ({"compile": True}, "compile")):
        with pytest.raises(SettingsError, match=words):
            Scorer(str(file), device="cpu", workers=0, **options)
    with pytest.raises(SettingsError, match="engine"):
        Scorer(f"{file}:tensorrt", device="cpu", workers=0)


# ---------------------------------------------------------------- the commands


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_command_writes_a_file_that_scores(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr(pyiqa, "list_models", lambda: ["niqe", "clipiqa"])
    monkeypatch.setattr(pyiqa, "create_metric", lambda *_, **__: build("tiny-resnet", tiny_folder))
    out = tmp_path / "mine.onnx"
    assert run("export", "clipiqa", "-o", out, "--input", "uint8") == 0
    assert "clipiqa, quality" in capsys.readouterr().out
    assert run("export", "clipiqa", "-o", out) == 2
    assert "--force" in capsys.readouterr().err
    table = tmp_path / "scores.csv"
    photo = "examples/photos/hats.jpg"
    assert run("score", photo, "-m", f"{file}", "-m", f"{out}:openvino", "-o", table, "--workers", 0) == 0
    meta = json.loads(Path(f"{table}.meta.json").read_text())["columns"]
    assert list(meta) == [f"{file}.light", f"{file}.sharp", f"{out}:openvino"]
    assert [each["exported"]["engine"] for each in meta.values()] == ["onnxruntime", "onnxruntime", "openvino"]
    assert run("explain", photo, "-m", file, "-o", tmp_path / "map.png") == 2
    assert "has no maps" in capsys.readouterr().err
    record = next(Scorer(str(out), device="cpu", workers=0).score([photo]))
    score = float(table.read_text().splitlines()[1].split(",")[-2])
    assert record.scores[str(out)] == pytest.approx(score, abs=CLOSE)


def test_other_packages_metrics_are_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pyiqa, "create_metric", lambda *_, **__: pytest.fail("it was built"))
    assert cli.main(["export", "niqe", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "niqe" in capfd.readouterr().err
