"""CONTRIQUE and Re-IQA: against the numbers of their authors' code, by the contract, from files to commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import by_rule
import contrastive_files as files
import pyiqa
import pytest
import torch
import torch.nn.functional as F
import upstream
from contract import MetricContract, scores
from PIL import Image
from torch import Tensor

from qualiclip_pyiqa import BlindMetric, ContriqueIQA, FittedIQA, ReIQA, Scorer
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.export.graph import exportable
from qualiclip_pyiqa.pretrained.contrastive import load_encoders
from qualiclip_pyiqa.towers import contrastive
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.contrastive import TwoScaleTower
from qualiclip_pyiqa.training.fitting import choose_tower

CONTRIQUE, RE_IQA = by_rule.golden("contrique"), by_rule.golden("re-iqa")
NUMBERS = range(6)
HALVES = ((0, "first_full"), (2048, "first_half"))  # of a branch's features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' files with shallow encoders, in which `shallow` lets the package believe."""
    path = tmp_path_factory.mktemp("contrastive")
    files.write_contrique(path)
    files.write_re_iqa(path)
    (path / "ridge.save").write_bytes(files.pickled_ridge(files.rule_regression(), 50.0))
    return path


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Towers with one bottleneck in each layer, whose files are in the look-up path."""
    monkeypatch.setattr(contrastive, "DEPTHS", files.SHALLOW)
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(folder))
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The authors' files with whole ResNet-50s."""
    path = tmp_path_factory.mktemp("whole")
    files.write_contrique(path, contrastive.DEPTHS)
    files.write_re_iqa(path, contrastive.DEPTHS)
    (path / "ridge.save").write_bytes(files.pickled_ridge(files.rule_regression(), 50.0))
    yield path
    for file in path.iterdir():
        file.unlink()


# Numbers of the authors' code


def largest(found: Tensor, expected: list[float]) -> float:
    return float((found[: len(expected)].double() - torch.tensor(expected, dtype=torch.float64)).abs().max())


@pytest.fixture(scope="module")
def contrique(encoders: Path) -> BlindMetric:
    weights = encoders / "CONTRIQUE_checkpoint25.tar"
    return ContriqueIQA("contrique", weights=weights, regression=encoders / "ridge.save").eval()


def test_the_file_s_layout_is_the_authors_own() -> None:
    state = files.contrique_state()
    trained = [key for key in state if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert (len(state), len(trained)) == (CONTRIQUE["keys"], CONTRIQUE["parameter_tensors"])
    assert sum(state[key].numel() for key in trained) == CONTRIQUE["parameters"]
    model = files.re_iqa_checkpoint("quality")["model"]
    assert isinstance(model, dict) and len(model) == RE_IQA["keys_per_branch"]


@torch.no_grad()
def test_contrique_is_the_authors_own(contrique: BlindMetric) -> None:
    tolerance = CONTRIQUE["tolerance"]
    for number in NUMBERS:
        expected, x = CONTRIQUE["pictures"][str(number)], by_rule.pixels(number)
        features = contrique.features(x)
        assert largest(features[0], expected["features_first_full"]) < tolerance["features"]
        assert largest(features[0, 2048:], expected["features_first_half"]) < tolerance["features"]
        assert abs(float(features.double().sum()) - expected["feature_sum"]) < 4096 * tolerance["features"]
        assert int((features > 0).sum()) == expected["features_positive"]
        assert abs(contrique(x).item() - expected["score_rule_regressor"]) < tolerance["score"]


def bicubic(rgb: Tensor) -> Tensor:
    """What a tensor's resize makes: the same filter without rounding."""
    size = rgb.shape[2] // 2, rgb.shape[3] // 2
    return F.interpolate(rgb, size=size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def test_contrique_without_its_halving_or_lengths_is_not(
    contrique: BlindMetric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least visible mistakes move scores beyond the tolerance, by as much as they moved the authors' own."""
    x, expected = by_rule.pixels(0), CONTRIQUE["pictures"]["0"]["score_rule_regressor"]
    tower = contrique.tower
    assert isinstance(tower, TwoScaleTower)
    controls = CONTRIQUE["controls"]
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "halved", bicubic)
        off = abs(contrique(x).item() - expected)
        assert (
            CONTRIQUE["tolerance"]["score"]
            < off
            <= 1.1 * controls["half size by tensor bicubic, antialiased"]["rule_regressor"]
        )
    with monkeypatch.context() as patch:
        patch.setattr(tower, "unit_length", False)
        assert abs(contrique(x).item() - expected) > 10
    with monkeypatch.context() as patch:
        encoder = tower.get_submodule("encoder")
        patch.setattr(encoder, "mean", torch.tensor(contrastive.IMAGENET_MEAN).view(1, 3, 1, 1))
        patch.setattr(encoder, "std", torch.tensor(contrastive.IMAGENET_STD).view(1, 3, 1, 1))
        assert 0.01 < abs(contrique(x).item() - expected) <= 1.1 * controls["ImageNet mean and std"]["rule_regressor"]


@pytest.mark.parametrize("order", contrastive.ORDERS)
@torch.no_grad()
def test_re_iqa_s_features_are_the_authors_own_in_both_orders(encoders: Path, order: str) -> None:
    tower = freeze(load_encoders("re-iqa", encoders, {"order": order}).image_tower(pos_embedding=False))
    coefficients = by_rule.unit("re-iqa-regressor/coef", (8192,), factor=0.5).double()
    numbers = NUMBERS if order == contrastive.DEFAULT_ORDER else (4,)
    for number in numbers:
        expected = RE_IQA["pictures"][str(number)]
        features = tower(by_rule.pixels(number))[0]
        for branch, own in zip(contrastive.ORDERS[order], features.split(4096), strict=True):
            limit = RE_IQA["tolerance"]["features"] * float(own.max())
            assert largest(own, expected[branch]["first_full"]) < limit
            assert largest(own[2048:], expected[branch]["first_half"]) < limit
            assert abs(float(own.double().sum()) - expected[branch]["sum"]) < 4096 * limit
        score = float(features.double() @ coefficients)
        assert (
            abs(score - expected[f"rule_regressor_{order.replace('-', '_')}"]) < RE_IQA["tolerance"]["rule_regressor"]
        )


@torch.no_grad()
def test_re_iqa_without_its_parts_is_not(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = freeze(load_encoders("re-iqa", encoders).image_tower(pos_embedding=False))
    x, expected = by_rule.pixels(0), RE_IQA["pictures"]["0"]

    def off(branch: str) -> float:
        features = dict(zip(contrastive.ORDERS[contrastive.DEFAULT_ORDER], tower(x)[0].split(4096), strict=True))[
            branch
        ]
        found = [
            largest(features[start:], expected[branch][name])
            for start, name in ((0, "first_full"), (2048, "first_half"))
        ]
        return max(found) / float(features.max())

    assert max(off("quality"), off("content")) < RE_IQA["tolerance"]["features"]
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "halved", bicubic)
        assert off("content") > RE_IQA["tolerance"]["features"]
    quality, content = (tower.get_submodule(name) for name in ("quality", "content"))
    mean, std = content.mean, content.std
    monkeypatch.setattr(content, "mean", quality.mean)
    monkeypatch.setattr(content, "std", quality.std)
    assert off("content") > 0.01
    monkeypatch.setattr(quality, "mean", mean)
    monkeypatch.setattr(quality, "std", std)
    assert off("quality") > 0.01


# The metrics


def build(shallow: Path, name: str = "contrique", **options: Any) -> ContriqueIQA:
    return ContriqueIQA(name, regression=shallow / "ridge.save", **options).eval()


TWICE_AS_LARGE = ((2, 160, 128), (3, 201, 179))  # so that half an image has several rows in the end


class TestContrique(MetricContract):
    COMPILED = TWICE_AS_LARGE

    @pytest.fixture(autouse=True)
    def _files(self, shallow: Path) -> None:
        self.folder = shallow

    def build(self, **options: object) -> BlindMetric:
        return build(self.folder, **options)


class TestReIQA(MetricContract):
    COMPILED = TWICE_AS_LARGE

    @pytest.fixture(autouse=True)
    def _file(self, fitted: Path, shallow: Path) -> None:
        self.file = fitted

    def build(self, **options: Any) -> BlindMetric:
        return ReIQA(weights=self.file, **options).eval()


def test_names_directions_and_ranges(shallow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    expected = {
        "contrique": (False, "0, 100", "Koniq"),
        "contrique-clive": (False, "0, 100", "CLIVE"),
        "contrique-live": (True, "0, 100", "LIVE"),
        "contrique-csiq": (True, "0, 1", "CSIQ"),
    }
    x, found = upstream.pictures(1, 48, 64), {}
    for number, (name, (lower, span, stem)) in enumerate(expected.items()):
        file = shallow / f"{stem}.save"
        file.write_bytes(files.pickled_ridge(files.rule_regression() * (number + 1) / 100, 0.5))
        metric = pyiqa.create_metric(name, device="cpu")
        assert (metric.lower_better, metric.net.score_range) == (lower, span)
        assert metric.net.describe()["regression"]["file"] == file.name
        found[name] = metric(x).item()
        file.unlink()
    first = found["contrique"] - 0.5
    assert [score - 0.5 for score in found.values()] == pytest.approx([first * k for k in (1, 2, 3, 4)], rel=1e-4)
    with pytest.raises(SettingsError, match="belongs to ReIQA"):
        ContriqueIQA("reiqa")
    with pytest.raises(SettingsError, match="takes no prompts"):
        ContriqueIQA("contrique", prompts="look")


def test_missing_files_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        pyiqa.create_metric("contrique", device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in (
        "CONTRIQUE_checkpoint25.tar from the authors' links",
        "Koniq.save from the folder models",
        "https://github.com/pavancm/CONTRIQUE",
        "QUALICLIP_PYIQA_WEIGHTS",
    ):
        assert word in message
    monkeypatch.setattr(contrastive, "DEPTHS", files.SHALLOW)
    with pytest.raises(WeightsError, match=r"Koniq\.save is not on this machine .* get it from .*CONTRIQUE"):
        pyiqa.create_metric("contrique", weights=folder / "CONTRIQUE_checkpoint25.tar", device="cpu")
    with pytest.raises(WeightsError, match=r"^quality_aware_r50\.pth and content_aware_r50\.pth are not on .*ReIQA"):
        choose_tower("reiqa")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        WeightsError, match=r"does not hold quality_aware_r50\.pth and content_aware_r50\.pth; expected"
    ):
        choose_tower("reiqa", tmp_path / "folder")


def test_weights_get_prints_what_is_here_and_names_all_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path))
    assert cli.main(["weights", "get", "contrique", "qualiclip-mini"]) == 1
    said = capsys.readouterr()
    assert said.out.endswith("qualiclip-mini.safetensors\n")
    (line,) = said.err.splitlines()
    assert line.startswith("qualiclip: CONTRIQUE_checkpoint25.tar and Koniq.save are not on this machine")
    encoder = tmp_path / "CONTRIQUE_checkpoint25.tar"
    encoder.symlink_to(folder / encoder.name)
    assert cli.main(["weights", "get", "contrique"]) == 1
    said = capsys.readouterr()
    assert said.out == f"{encoder}\n" and said.err.startswith("qualiclip: Koniq.save is not on this machine")
    encoder.unlink()
    assert cli.main(["score", "examples/photos", "-m", "contrique"]) == 1
    assert "CONTRIQUE_checkpoint25.tar and Koniq.save are not" in capsys.readouterr().err


def test_reiqa_without_a_regression_says_so_in_one_line(shallow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        pyiqa.create_metric("reiqa", device="cpu")
    assert "\n" not in str(caught.value)
    for words in ("published none", "qualiclip fit -m reiqa", "weights=FILE"):
        assert words in str(caught.value)
    assert cli.main(["score", "examples/photos", "-m", "reiqa"]) == 2
    assert "qualiclip fit -m reiqa" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="of layout re-iqa"):
        load_encoders("re-iqa", swapped(shallow))
    with pytest.raises(WeightsError, match="not a folder; Re-IQA has two files"):
        load_encoders("re-iqa", shallow / "quality_aware_r50.pth")
    twins = shallow / "twins"
    twins.mkdir(exist_ok=True)
    for name in ("quality", "content"):
        (twins / f"{name}_aware_r50.pth").write_bytes((shallow / "quality_aware_r50.pth").read_bytes())
    with pytest.raises(WeightsError, match=r"quality_aware_r50\.pth and .*content_aware_r50\.pth hold the same"):
        load_encoders("re-iqa", twins)


def swapped(folder: Path) -> Path:
    """A folder with CONTRIQUE's file under the names of Re-IQA's."""
    path = folder / "swapped"
    path.mkdir(exist_ok=True)
    for name in ("quality", "content"):
        (path / f"{name}_aware_r50.pth").write_bytes((folder / "CONTRIQUE_checkpoint25.tar").read_bytes())
    return path


def test_maps_without_local_scores_are_by_occlusion(
    shallow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    for module in ("captum", "jinja2", "matplotlib"):
        pytest.importorskip(module)
    (shallow / "Koniq.save").write_bytes((shallow / "ridge.save").read_bytes())
    photo, table, maps = tmp_path / "a.png", tmp_path / "s.csv", tmp_path / "maps"
    Image.fromarray((upstream.pictures(1, 48, 48)[0].movedim(0, -1) * 255).byte().numpy()).save(photo)
    common = [str(photo), "-m", "contrique", "--device", "cpu"]
    try:
        assert cli.main(["score", *common, "-o", str(table), "--maps", str(maps), "--workers", "0"]) == 0
        assert "1 image mapped" in capsys.readouterr().err and len(list(maps.glob("*.png"))) == 1
        assert cli.main(["explain", *common, "-o", str(tmp_path / "map.png")]) == 0
        capsys.readouterr()
        # A page is drawn without maps that take long, and says so.
        page = tmp_path / "page.html"
        assert cli.main(["report", str(table), "-o", str(page)]) == 0
        said = capsys.readouterr().err
        assert "no maps for contrique, whose maps are by occlusion" in said and page.is_file()
    finally:
        (shallow / "Koniq.save").unlink()


def test_export_is_refused_before_tracing(shallow: Path) -> None:
    with pytest.raises(SettingsError, match=r"^mine cannot be exported: its tower scores the image and its half"):
        exportable(build(shallow), "mine")


def test_regressions_on_one_encoder_share_its_pass(shallow: Path) -> None:
    first, second = build(shallow), build(shallow, "contrique-live")
    assert second.lower_better
    scorer = Scorer({"first": first, "second": second}, device="cpu", workers=0)
    assert len(scorer.networks[0].towers) == 1
    images = list(upstream.pictures(3, 64, 80))
    expected = scores(first, torch.stack(images))[:, 0].tolist()
    for record, score in zip(scorer.score(images), expected, strict=True):
        assert record.error is None
        assert list(record.scores.values()) == pytest.approx([score, score], abs=1e-4)


def test_half_precision_is_for_the_tower_only(shallow: Path) -> None:
    metric = build(shallow)
    before = metric.coefficients
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(metric.to(dtype).coefficients, before)
    assert metric.double().coefficients.dtype == torch.float64


@pytest.mark.parametrize("size", [(97, 131), (128, 96), (65, 64), (193, 80)])
@torch.no_grad()
def test_large_images_go_in_strips(size: tuple[int, int], shallow: Path, cut_small_pictures: Any) -> None:
    metric = build(shallow)
    x = upstream.pictures(2, *size)
    whole = metric.features(x)
    cut_small_pictures()
    assert (metric.features(x) - whole).abs().max() < 1e-6
    scorer = Scorer(metric, device="cpu", workers=0)  # with oneDNN's kernels
    found = [record.scores["contrique"] for record in scorer.score(list(x))]
    assert found == pytest.approx(metric.score(whole)[:, 0].tolist(), abs=1e-4)


MEMORY = """
import resource, sys, torch
from qualiclip_pyiqa.towers import contrastive
from qualiclip_pyiqa.towers.base import freeze

contrastive.DEPTHS = (1, 1, 1, 1)
tower = freeze(contrastive.contrique_tower())
image = torch.rand(1, 3, 2160, 1920)
tower(image[:, :, :64, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    tower(image)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (image.numel() * 4))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_of_half_of_4k_is_a_few_images() -> None:
    """A feature map of the whole image would be worth six images, and there are several; measured with strips: 5."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 10


# `qualiclip fit`


def write_rated(folder: Path, count: int = 24) -> None:
    folder.mkdir()
    rows = ["image,mos"]
    for number, x in enumerate(upstream.pictures(count, 48, 64, seed=3)):
        sharpness = number % 6
        blurred = F.avg_pool2d(x[None], 2 * sharpness + 1, 1, sharpness)[0]
        Image.fromarray((blurred.movedim(0, -1) * 255).round().byte().numpy()).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{90 - 14 * sharpness + number % 3}")
    (folder / "scores.csv").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rated") / "images"
    write_rated(path)
    return path


def run_fit(name: str, rated: Path, out: Path, *more: str) -> int:
    ratings = ["--ratings", str(rated / "scores.csv"), "--images", str(rated)]
    return cli.main(
        ["fit", "-m", name, *ratings, "-o", str(out), "--splits", "2", "--no-cache", "--device", "cpu", *more]
    )


@pytest.fixture(scope="module")
def fitted(rated: Path, folder: Path) -> Iterator[Path]:
    """A metric of `qualiclip fit -m reiqa`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "DEPTHS", files.SHALLOW)
        patch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(folder))
        out = folder / "reiqa.safetensors"
        assert run_fit("reiqa", rated, out) == 0
        yield out


def test_fit_makes_re_iqa_score(fitted: Path, shallow: Path, rated: Path, tmp_path: Path) -> None:
    metric = pyiqa.create_metric("reiqa", weights=fitted, device="cpu")
    assert (metric.lower_better, metric.net.score_range) == (False, "22.0, 90.0")
    sharp, blurred = (metric(str(rated / f"{number}.png")).item() for number in (0, 5))
    assert sharp > blurred + 20
    said = metric.net.describe()
    assert said["order"] == contrastive.DEFAULT_ORDER and said["statistics"] == 8192
    assert said["fit"]["tower_file"] == "quality_aware_r50.pth + content_aware_r50.pth"
    assert said["weights"]["licence"].startswith("none stated")
    # The file needs nothing else, and is a metric by its path.
    own = FittedIQA(weights=fitted).eval()
    x = upstream.pictures(2, 48, 64)
    assert torch.equal(scores(own, x), scores(metric.net, x))
    moved = tmp_path / "mine.safetensors"
    moved.write_bytes(fitted.read_bytes())
    assert Scorer(str(moved), device="cpu", workers=0).columns == (str(moved),)


def test_fit_takes_contrique_s_features(shallow: Path, rated: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.safetensors"
    assert run_fit("contrique", rated, out) == 0
    metric = pyiqa.create_metric("fitted", weights=out, device="cpu")
    assert metric(str(rated / "0.png")).item() > metric(str(rated / "5.png")).item() + 20
    assert metric.net.describe()["statistics"] == 4096 and metric.net.describe()["backbone"] == "contrique"
    assert torch.equal(
        metric.net.features(upstream.pictures(1, 48, 64)), build(shallow).features(upstream.pictures(1, 48, 64))
    )
    with pytest.raises(
        WeightsError, match=r"was fitted on the tower contrique; expected a file of `qualiclip fit -m reiqa`"
    ):
        ReIQA(weights=out)
    again = tmp_path / "again.safetensors"  # on the tower of that file
    assert run_fit(str(out), rated, again) == 0
    assert run_fit("reiqa", rated, tmp_path / "folder.safetensors", "--backbone-weights", str(shallow)) == 0
