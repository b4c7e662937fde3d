"""CONTRIQUE and Re-IQA: against the numbers of their authors' code, by the contract, from files to commands."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import by_rule
import contrastive_files as files
import numpy as np
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
from qualiclip_pyiqa.pretrained.contrastive import load_encoders, load_regression
from qualiclip_pyiqa.towers import contrastive
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.contrastive import TwoScaleTower
from qualiclip_pyiqa.towers.halving import halved
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


# Halving


@pytest.mark.parametrize("number", NUMBERS)
def test_half_images_are_those_of_the_authors_code(number: int) -> None:
    expected = CONTRIQUE["pictures"][str(number)]
    half = (halved(by_rule.pixels(number))[0] * 255).movedim(0, -1)
    assert list(half.shape[:2]) == expected["half_size_hw"]
    assert half.equal(half.round())
    levels = np.ascontiguousarray(half.byte().numpy())
    assert hashlib.sha256(levels.tobytes()).hexdigest() == expected["half_picture_sha256"]


def by_pillow(pixels: np.ndarray) -> Tensor:
    """Halve an image (H, W, 3), rows before columns: Pillow's own order but for tall images in Pillow 13."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    if height <= 2 * width:
        half = image.resize((width // 2, height // 2))
    else:
        half = image.resize((width // 2, height)).resize((width // 2, height // 2))
    return torch.from_numpy(np.array(half)).movedim(-1, 0)[None]


def test_8_bit_images_are_halved_exactly_as_by_pillow() -> None:
    random = np.random.default_rng(0)
    for height, width in [*((side, 33 + side % 7) for side in range(32, 70)), (301, 235), (100, 37), (36, 1999)]:
        levels = random.integers(0, 256, (height, width, 3), np.uint8)
        for pixels in (levels, (levels // 128) * np.uint8(255)):  # black and white overshoots everywhere
            rgb = torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255
            expected = by_pillow(pixels)
            assert torch.equal(halved(rgb), expected.float() / 255), (height, width)
            assert torch.equal((halved(rgb.double()) * 255).round().byte(), expected)
            assert (halved(rgb).sum() - halved(rgb.contiguous(memory_format=torch.channels_last)).sum()) == 0


def test_other_images_are_halved_without_rounding() -> None:
    """Each image of a batch by its own rule; the rule of 8 bits is a level away, and has the gradient of the other."""
    image = by_rule.pixels(2)
    other = (image + 0.3 / 255).clamp(0, 1)
    both = halved(torch.cat([image, other]))
    assert torch.equal(both[:1], halved(image)) and torch.equal(both[1:], halved(other))
    assert not (both[1:] * 255).round().allclose(both[1:] * 255, atol=0.1)
    # 0.3 levels of the image, half a level of rounding rows, as much of columns.
    assert (both[1:] - both[:1]).abs().max() * 255 < 0.3 + 0.5 * 1.2 + 0.5
    gradients = []
    for x in (image, image + 1e-4):
        x = x.clone().requires_grad_()
        (halved(x) * by_rule.unit("weights", (1, 3, 128, 160))).sum().backward()
        gradients.append(x.grad)
    inside = (image > 0.1) & (image < 0.9)
    assert gradients[0] is not None and gradients[1] is not None
    assert (gradients[0] - gradients[1])[inside].abs().quantile(0.99) < 1e-5


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


# Pickled regressions


def test_the_pickle_of_the_tests_is_the_authors_own_but_for_its_numbers() -> None:
    import pickletools

    expected = CONTRIQUE["pickle"]
    content = files.pickled_ridge(files.rule_regression(), 50.0)
    found = list(pickletools.genops(content))
    assert [opcode.name for opcode, _, _ in found] == expected["opcodes"]
    assert len(content) == expected["bytes"]
    start = expected["coef_offset"]
    assert content[start : start + 4 * 4096] == files.rule_regression().numpy().astype("<f4").tobytes()
    assert content[expected["intercept_offset"] :][:4] == struct.pack("<f", 50.0)


@pytest.mark.parametrize("name", CONTRIQUE["pickle"]["files"])
def test_intercepts_of_the_authors_regressions(name: str, tmp_path: Path) -> None:
    """In full-reference mode an image compared with itself has no difference, and its score is the intercept."""
    expected = CONTRIQUE["pickle"]["files"][name]
    (intercept,) = struct.unpack("<f", bytes.fromhex(expected["intercept_float32_hex"]))
    file = tmp_path / "mine.save"
    file.write_bytes(files.pickled_ridge(files.rule_regression(), intercept, alpha=expected["alpha"]))
    found = load_regression(file)
    assert found.intercept == expected["intercept"]
    assert torch.equal(found.coefficients, files.rule_regression())
    stem = name.removesuffix(".save")
    itself = float(torch.zeros(4096) @ found.coefficients) + found.intercept
    assert itself == CONTRIQUE["of_an_image_with_itself"].get(stem, found.intercept)


def hostile() -> dict[str, bytes]:
    good = files.pickled_ridge(files.rule_regression(), 50.0)
    whole, half = good[:-1], len(good) // 2
    infinite = files.rule_regression().clone()
    infinite[7] = float("inf")
    return {
        "another class": good.replace(b"_ridge\nRidge\n", b"_ridge\nRidgeCV\n"),
        "another function": good.replace(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nfromstring\n"),
        "code before the regression": good[:37] + b"cos\nsystem\n(X\x04\x00\x00\x00truetR0" + good[37:],
        "code after the regression": whole + b"cos\nsystem\n(X\x04\x00\x00\x00truetR0.",
        "another memo": good.replace(b"q\x05", b"q\x06", 1),
        "an attribute more": whole[:-1] + b"}b.",
        "bytes after its end": good + b"\x80\x03N.",
        "cut off": good[:half],
        "too long": good + bytes(9000),
        "fewer features": files.pickled_ridge(files.rule_regression()[:512], 50.0),
        "infinite coefficient": files.pickled_ridge(infinite, 50.0),
        "infinite intercept": files.pickled_ridge(files.rule_regression(), float("inf")),
        "negative alpha": files.pickled_ridge(files.rule_regression(), 50.0, alpha=-1.0),
    }


@pytest.mark.parametrize("kind", hostile())
def test_any_other_pickle_is_refused_in_one_line_and_not_executed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import pickle

    def executed(*_: object, **__: object) -> None:
        raise AssertionError("executed")

    for module, name in ((os, "system"), (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, executed)
    file = tmp_path / "mine.save"
    content = hostile()[kind]
    assert content != files.pickled_ridge(files.rule_regression(), 50.0)
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_regression(file)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message and "refused without executing any of it" in message


def test_files_under_the_authors_names_must_be_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUALICLIP_PYIQA_VERIFY", raising=False)
    file = tmp_path / "Koniq.save"
    file.write_bytes(files.pickled_ridge(files.rule_regression(), 50.0))
    with pytest.raises(WeightsError, match=CONTRIQUE["pickle"]["files"]["Koniq.save"]["sha256"]):
        load_regression(file)


# The metrics


def build(shallow: Path, name: str = "contrique", **options: Any) -> ContriqueIQA:
    return ContriqueIQA(name, regression=shallow / "ridge.save", **options).eval()


TWICE_AS_LARGE = ((2, 160, 128), (3, 201, 179), (2, 33, 101))  # so that half an image has several rows in the end


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
    for word in ("CONTRIQUE_checkpoint25.tar", "https://github.com/pavancm/CONTRIQUE", "QUALICLIP_PYIQA_WEIGHTS"):
        assert word in message
    monkeypatch.setattr(contrastive, "DEPTHS", files.SHALLOW)
    with pytest.raises(WeightsError, match=r"Koniq\.save is not on this machine .* get it from .*CONTRIQUE"):
        pyiqa.create_metric("contrique", weights=folder / "CONTRIQUE_checkpoint25.tar", device="cpu")
    with pytest.raises(WeightsError, match=r"quality_aware_r50\.pth is not on this machine .*ReIQA"):
        choose_tower("reiqa")


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


def swapped(folder: Path) -> Path:
    """A folder with CONTRIQUE's file under the names of Re-IQA's."""
    path = folder / "swapped"
    path.mkdir(exist_ok=True)
    for name in ("quality", "content"):
        (path / f"{name}_aware_r50.pth").write_bytes((folder / "CONTRIQUE_checkpoint25.tar").read_bytes())
    return path


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
