"""`qualiclip fit`: what is fitted scores like any metric, groups are never divided, nothing is half done."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import logging
import re
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
import upstream
from contract import MetricContract, scores
from forks import Fork
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from synthetic import synthetic_photograph
from torch import nn
from torchvision.transforms.functional import to_pil_image

from qualiclip_pyiqa import BlindMetric, FittedIQA, OpenQualiCLIP, QualityLoss, Scorer
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.commands.fit import warnings
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.metrics.fitted import bounded, standardised
from qualiclip_pyiqa.pretrained.fitted import FIGURES, load_fitted, write_fitted
from qualiclip_pyiqa.pretrained.model import load_model
from qualiclip_pyiqa.scoring.tables import Record
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.training import features
from qualiclip_pyiqa.training.features import compute_statistics
from qualiclip_pyiqa.training.fitting import ChosenTower, CrossValidation, FitOptions, choose_tower, cross_validate, fit
from qualiclip_pyiqa.training.ridge import STRENGTHS, choose_strength, fit_ridge
from qualiclip_pyiqa.training.splits import folds, repeated_splits, united

COUNT, SCENES = 30, 10
QUICK = FitOptions(splits=3)


def draw(number: int, level: float) -> Image.Image:
    """A picture, the more blurred and noisy the higher the level in 0..1."""
    rng = np.random.default_rng(number)
    sharp = to_pil_image(synthetic_photograph(number, 48 + 4 * (number % 3), 48 + 8 * (number % 2)))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(4 * level)), float)
    return Image.fromarray((blurred + rng.normal(0, 30 * level, blurred.shape)).clip(0, 255).astype(np.uint8))


def write_rows(path: Path, rows: Iterable[Iterable[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="session")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with `scores.csv`: MOS from 20 to 80, three images of each scene."""
    folder = tmp_path_factory.mktemp("rated")
    rows: list[list[object]] = [["image", "mos", "scene"]]
    for number in range(COUNT):
        level = (number * 7 % COUNT) / (COUNT - 1)
        draw(number, level).save(folder / f"{number}.png")
        rows.append([f"{number}.png", 80 - 60 * level, f"scene {number % SCENES}"])
    write_rows(folder / "scores.csv", rows)
    return folder


@pytest.fixture
def ratings(rated: Path) -> Ratings:
    return read_ratings(rated / "scores.csv", rated)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qualiclip_pyiqa" / "statistics"


def unwatched(records: Iterable[Record], _: int) -> Iterable[Record]:
    return records


def quick_fit(
    tower: ChosenTower, ratings: Ratings, out: Path, options: FitOptions = QUICK, **reading: Any
) -> dict[str, Any]:
    fit(tower, ratings, out, options, unwatched, **{"device": "cpu", "workers": 0} | reading)
    said: dict[str, Any] = FittedIQA(weights=out).describe()["fit"]
    return said


@pytest.fixture(scope="session")
def fitted(rated: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fitted metric by tower."""
    folder = tmp_path_factory.mktemp("fitted")
    found = read_ratings(rated / "scores.csv", rated)
    towers = {
        "mini": choose_tower("qualiclip-mini"),
        **{name: choose_tower(name, tiny_folder / f"{name}.pt") for name in ("tiny-resnet", "tiny-vit")},
    }
    for name, tower in towers.items():
        quick_fit(tower, found, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in towers}


# ---------------------------------------------------------------- the metric


class FittedContract(MetricContract):
    tower = ""

    @pytest.fixture(autouse=True)
    def _file(self, fitted: dict[str, Path]) -> None:
        self.file = fitted[self.tower]

    def build(self, **options: Any) -> BlindMetric:
        return FittedIQA(weights=self.file, **options).eval()


class TestMini(FittedContract):
    tower = "mini"
    COMPILED = ()  # takes long: tests/test_archs.py compiles this tower, and below are other ones with this head


class TestResNet(FittedContract):
    tower = "tiny-resnet"


class TestViT(FittedContract):
    tower = "tiny-vit"


def test_score_is_the_bounded_regression(fitted: dict[str, Path]) -> None:
    model = load_fitted(fitted["tiny-resnet"])
    metric = FittedIQA(weights=fitted["tiny-resnet"]).eval()
    x = upstream.pictures(4, 64, 80)
    mean, scale, weight = model.regression.double()
    expected = 3 * ((metric.features(x).double() - mean) / scale / 3).tanh() @ weight + model.fit.intercept
    expected = bounded(expected, model.fit.low, model.fit.high)
    assert (scores(metric, x)[:, 0] - expected).abs().max() < 1e-4


def test_half_precision_is_for_the_tower_only(fitted: dict[str, Path]) -> None:
    metric = FittedIQA(weights=fitted["mini"])
    kept = metric.regression.clone()
    for change in (lambda m: m.half(), lambda m: nn.Sequential(m).to(torch.bfloat16)[0], lambda m: m.double().half()):
        assert torch.equal(change(metric).regression.float(), kept)
        assert metric.tower.trunk.stem.weight.dtype in (torch.float16, torch.bfloat16)


def test_bounded_keeps_order_gradient_and_middle() -> None:
    x = torch.linspace(-400, 500, 2001, dtype=torch.float64, requires_grad=True)
    y = bounded(x, 20, 80)
    assert (y.detach().diff() > 0).all() and y.min() > 20 and y.max() < 80
    middle = (x >= 23) & (x <= 77)
    assert torch.equal(y[middle], x[middle])
    y.sum().backward()
    assert x.grad is not None and (x.grad > 0).all() and x.grad.max() <= 1


def test_metrics_on_one_tower_share_its_pass(
    fitted: dict[str, Path], rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.safetensors"
    found = read_ratings(rated / "scores.csv", rated)
    quick_fit(choose_tower(str(fitted["mini"])), found, other, FitOptions(splits=1, seed=5))
    scorer = Scorer({"one": fitted["mini"], "two": other, "prompts": "qualiclip-mini"}, device="cpu", workers=0)
    (network,) = scorer.networks
    assert [index for *_, index in network.heads] == [0, 0, 1]
    assert len({id(net.tower) for _, net, _ in network.heads}) == 1
    x = load_image(rated / "3.png")
    (record,) = scorer.score([x])
    assert record.scores["one"] == pytest.approx(float(scores(FittedIQA(weights=fitted["mini"]).eval(), x[None])))


def test_create_metric_has_range_and_direction_of_the_file(rated: Path, tmp_path: Path) -> None:
    worse = read_ratings(rated / "scores.csv", rated, lower_better=True)
    quick_fit(choose_tower("qualiclip-mini"), worse, tmp_path / "dmos.safetensors")
    metric = pyiqa.create_metric("fitted", weights=str(tmp_path / "dmos.safetensors"), device="cpu")
    assert metric.lower_better is True and metric.score_range == "20.0, 80.0"
    scorer = Scorer(tmp_path / "dmos.safetensors", device="cpu", workers=0)
    assert list(scorer.lower_better.values()) == [True]
    x = load_image(rated / "3.png")[None]
    assert float(QualityLoss(metric)(x)) == pytest.approx((float(metric(x)) - 20) / 60, abs=1e-5)
    assert pyiqa.create_metric("qualiclip-mini", device="cpu").score_range == "0, 1"
    with pytest.raises(SettingsError, match=r"pass weights=FILE .*, made with `qualiclip fit -m TOWER"):
        pyiqa.create_metric("fitted", device="cpu")
    with pytest.raises(SettingsError, match=r"dmos.safetensors is a metric of `qualiclip fit`, which takes no prompts"):
        pyiqa.create_metric("fitted", device="cpu", weights=str(tmp_path / "dmos.safetensors"), prompts="look")


# ---------------------------------------------------------------- towers


@pytest.mark.parametrize(
    "name", ["tiny-resnet", "tiny-vit", "tiny-convnext", "tiny-siglip", "tiny-eva", "tiny-clipa", "tiny-coca"]
)
@torch.no_grad()
def test_statistics_of_every_layout(name: str, families_folder: Path) -> None:
    tower: Any = freeze(load_model(families_folder / f"{name}.pt", name).image_tower(pos_embedding=False))
    x = upstream.pictures(2, 64, 96)
    found = tower.forward_features(x)
    if found.dim() == 3:
        places = found[:, 1:].transpose(1, 2)
        assert places.shape[2] in (4 * 6, 64 // 14 * (96 // 14))  # patches of 16 or 14 pixels, no class token
    else:
        places = found.flatten(2)
    expected = torch.cat([places.mean(2), (places.var(2, correction=0) + 1e-5).sqrt(), tower(x)], dim=1)
    statistics = tower.statistics(x)
    assert statistics.dtype == torch.float32
    assert (statistics - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_channels_may_be_last(families_folder: Path) -> None:
    tower: Any = freeze(load_model(families_folder / "tiny-convnext.pt", "tiny-convnext").image_tower(False))
    features = torch.rand(2, 5, 7, 11)
    assert torch.equal(tower.places(features), features.flatten(2))
    tower.trunk.output_fmt = "NHWC"  # as Swin has it
    assert torch.equal(tower.places(features), features.permute(0, 3, 1, 2).flatten(2))


@pytest.mark.parametrize("name", ["mini", "tiny-resnet"])
@torch.no_grad()
def test_large_images_go_in_strips(name: str, fitted: dict[str, Path], cut_small_pictures: Callable[..., None]) -> None:
    metric = FittedIQA(weights=fitted[name]).eval()
    x = upstream.pictures(2, 200, 150)
    whole = metric.features(x)
    cut_small_pictures()
    assert (metric.features(x) - whole).abs().max() < 1e-4 * whole.abs().max()


# ---------------------------------------------------------------- the command


def run(*words: object) -> int:
    return cli.main(["fit", *map(str, words)])


def test_command_fits_a_metric_that_orders_new_images(
    rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my.safetensors"
    words = ["-m", "qualiclip-mini", "--ratings", rated / "scores.csv", "--images", rated, "--group", "scene"]
    words += ["-o", out, "--device", "cpu", "--workers", 1, "--splits", 4]
    assert run(*words) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out)]
    assert "4 random splits, 80 % to fit and 20 % to test, 30 images in 10 groups" in said.err
    first = out.read_bytes()
    levels = np.tile(np.linspace(0, 1, 6), 4)
    for number, level in enumerate(levels):
        draw(100 + number // 6, float(level)).save(tmp_path / f"new{number:02}.png")
    assert cli.main(["score", str(tmp_path), "-m", str(out), "-o", str(tmp_path / "t.csv"), "--device", "cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    values = [float(row[str(out)]) for row in sorted(rows, key=lambda row: row["path"])]
    assert float(stats.spearmanr(values, -levels)[0]) > 0.7 and all(20 < value < 80 for value in values)
    meta = json.loads((tmp_path / "t.csv.meta.json").read_text())["columns"][str(out)]
    assert meta["score_range"] == "20.0, 80.0" and meta["fit"]["images"] == COUNT and meta["fit"]["groups"] == SCENES
    assert meta["weights"]["licence"] == "CC-BY-SA-4.0" and meta["fit"]["tower_name"] == "qualiclip-mini"

    assert run(*words) == 2  # it exists
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qualiclip: {out} exists; pass --force to replace it, or choose another name"
    )
    assert run(*words, "--force") == 0 and out.read_bytes() == first
    assert run(*words, "--force", "--no-cache") == 0 and out.read_bytes() == first
    assert run(*words, "--force", "--seed", 1) == 0 and out.read_bytes() != first


def test_file_keeps_what_it_was_fitted_on(fitted: dict[str, Path], rated: Path) -> None:
    import hashlib

    model = load_fitted(fitted["mini"])
    found = sorted(hashlib.sha256((rated / f"{number}.png").read_bytes()).hexdigest() for number in range(COUNT))
    assert [bytes(row.tolist()).hex() for row in model.images] == found
    assert set(model.fit.agreement) == set(FIGURES)
    assert model.fit.agreement["srcc"]["median"] > 0.7  # type: ignore[operator]


def test_half_precision_is_stored_where_it_loses_nothing(rated: Path, tiny_folder: Path, tmp_path: Path) -> None:
    state = torch.load(tiny_folder / "tiny-vit.pt")
    rounded = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    rounded["visual.proj"] = state["visual.proj"].float() + 1e-6
    torch.save(
        {key: value.float() if value.is_floating_point() else value for key, value in rounded.items()},
        tmp_path / "r.pt",
    )
    out = tmp_path / "out.safetensors"
    quick_fit(choose_tower("tiny-vit", tmp_path / "r.pt"), read_ratings(rated / "scores.csv", rated), out)
    stored = load_file(out)
    kinds = {key: value.dtype for key, value in stored.items() if key.startswith("visual.")}
    assert kinds.pop("visual.proj") == torch.float32 and set(kinds.values()) == {torch.float16}
    for key in kinds:
        assert torch.equal(stored[key], rounded[key])


def test_direction_is_kept(rated: Path, tmp_path: Path) -> None:
    rows = list(csv.reader((rated / "scores.csv").open()))
    table = write_rows(
        tmp_path / "d.csv", [["image", "dmos"], *([name, 100 - float(mos)] for name, mos, _ in rows[1:])]
    )
    said = quick_fit(choose_tower("qualiclip-mini"), read_ratings(table, rated), tmp_path / "d.safetensors")
    assert said["lower_better"] is True and said["agreement"]["srcc"]["median"] > 0.7
    metric = FittedIQA(weights=tmp_path / "d.safetensors").eval()
    good, bad = (
        np.mean([float(scores(metric, load_image(draw(number, level))[None])) for number in range(100, 106)])
        for level in (0.0, 0.9)
    )
    assert metric.lower_better and good < bad - 10


def test_every_tower_has_a_name(
    fitted: dict[str, Path], upstream_weights: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    assert choose_tower("qualiclip").model.backbone == "RN50"
    assert choose_tower("clipiqa+_rn50_512").pos_embedding
    assert choose_tower("RN50").model.activation == "QuickGELU"
    again = choose_tower(str(fitted["tiny-vit"]))
    assert again.model.backbone == "tiny-vit"
    for name, weights, said in (
        ("psnr", None, "psnr is another package's metric and needs a reference image; expected"),
        ("niqe", None, "niqe is another package's metric; expected"),
        ("fitted", None, "fitted has no tower of its own"),
        ("qualiclip-mimi", None, "unknown tower 'qualiclip-mimi'; did you mean 'qualiclip-mini'?"),
        ("none.safetensors", None, "none.safetensors does not exist"),
        ("convnext_base", None, "pass --backbone-weights FILE"),
        (str(fitted["mini"]), tmp_path, "leave --backbone-weights out"),
        (str(tiny_folder / "tiny-vit.pt"), None, "does not name its backbone"),
    ):
        with pytest.raises(SettingsError, match=said.replace("?", r"\?").replace("+", r"\+")) as caught:
            choose_tower(name, weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"few": 5}, 2, "5 rated images; expected at least 20, better 100 or more"),
        ({"mos": "3"}, 2, "all opinion scores are 3; there is nothing to fit"),
        ({"others": 4}, 2, "26 of 30 images have the opinion score 3; expected at least 5 images with another one"),
        (
            {"scaled": (1e37, 0)},
            2,
            "8e+38 are beyond float32, in which metrics score; expected numbers of at most 1e+20",
        ),
        ({"scaled": (1e-37, 0)}, 2, "are beyond float32"),
        ({"scaled": (1e-3, 1e6)}, 2, "opinion scores from 1000000.02 to 1000000.08 are beyond float32"),
        ({"nan": True}, 2, "mos is 'nan'; expected a finite number"),
        ({"name": "none.png"}, 2, "none.png not found; expected an image below"),
        ({"scene": "one"}, 2, "30 images in 1 group, never divided; expected at least 3 groups"),
        ({"scene": ""}, 2, "has no group; expected one for every image"),
        ({"group": "scenes"}, 2, "has no column 'scenes'; did you mean 'scene'?"),
        ({"output": "none/my.safetensors"}, 2, "none is not a folder"),
        ({"output": "my.pth"}, 2, "expected a name that ends with .safetensors"),
        ({"metric": "psnr"}, 2, "psnr is another package's metric and needs a reference image"),
        ({"ratings": "none.csv"}, 2, "none.csv cannot be read"),
        ({"images": "none"}, 2, "none is not a folder"),
        ({"splits": 0}, 2, "0 splits with a share of 0.2 to test on; expected at least 1, and a share between 0 and 1"),
        ({"test": 1}, 2, "10 splits with a share of 1.0 to test on"),
        ({"damaged": True}, 1, "1 of 30 images cannot be used: "),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(
    change: dict[str, Any],
    status: int,
    said: str,
    rated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    header, *rows = csv.reader((rated / "scores.csv").open())
    for row in rows:
        row[1], row[2] = change.get("mos", row[1]), change.get("scene", row[2])
    if "scaled" in change:
        scale, offset = change["scaled"]
        for row in rows:
            row[1] = str(float(row[1]) * scale + offset)
    for row in rows[change.get("others", COUNT) :]:
        row[1] = "3"
    rows[3][0] = change.get("name", rows[3][0])
    rows[4][1] = "nan" if "nan" in change else rows[4][1]
    images = rated
    if "damaged" in change:
        images = tmp_path / "images"
        images.mkdir()
        for row in rows:
            (images / row[0]).write_bytes((rated / row[0]).read_bytes())
        (images / rows[5][0]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    write_rows(tmp_path / "scores.csv", [header, *rows[: change.get("few", COUNT)]])
    words: dict[str, Any] = {"metric": "qualiclip-mini", "ratings": "scores.csv", "images": images, "group": "scene"}
    words |= {"output": "my.safetensors", "device": "cpu", "workers": 0}
    words |= {key: value for key, value in change.items() if key in (*words, "splits", "test", "seed")}
    before = set(tmp_path.iterdir())
    assert run(*(word for key, value in words.items() for word in (f"--{key}", value))) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qualiclip: ") and said in last and "Traceback" not in last
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"cache"}


# ---------------------------------------------------------------- groups


labels_of_images = st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=3, max_size=40)


@given(labels=labels_of_images, seed=st.integers(0, 5), share=st.sampled_from([0.1, 0.2, 0.5]))
@settings(max_examples=60, deadline=None)
def test_groups_are_never_divided(labels: list[list[int]], seed: int, share: float) -> None:
    groups = united(labels)
    assert groups.shape == (len(labels),)
    for one, first in enumerate(labels):
        for other, second in enumerate(labels[:one]):
            if set(first) & set(second):
                assert groups[one] == groups[other]
    # No larger than need be: merging by shared labels until nothing changes gives as many.
    merged = [({number}, set(each)) for number, each in enumerate(labels)]
    changed = True
    while changed:
        changed = False
        for a in range(len(merged)):
            for b in range(a):
                if merged[a][1] & merged[b][1]:
                    merged[b] = (merged[b][0] | merged[a][0], merged[b][1] | merged[a][1])
                    del merged[a]
                    changed = True
                    break
            if changed:
                break
    assert len(set(groups.tolist())) == len(merged)
    if len(merged) < 2:
        return
    everything = np.arange(len(labels))
    for split in repeated_splits(groups, 4, share, seed):
        assert not set(groups[split.training]) & set(groups[split.test])
        assert len(split.training) and len(split.test)
        assert np.array_equal(np.sort(np.concatenate(split)), everything)
        inside = groups[split.training]
        if len(set(inside)) < 2:
            continue
        parts = folds(inside, 5, [seed, 0])
        assert 2 <= len(parts) <= 5
        assert np.array_equal(np.sort(np.concatenate([part.test for part in parts])), np.arange(len(inside)))
        for part in parts:
            assert len(part.test) and not set(inside[part.training]) & set(inside[part.test])


def test_copies_of_an_image_and_repeated_ratings_are_one_group(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chained: 0 and 1 by scene, 1 and its copy by content; a row more for image 2 also names another scene."""
    for path in rated.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "copy.png").write_bytes((rated / "1.png").read_bytes())
    rows: list[list[object]] = [
        ["image", "mos", "scene"],
        ["copy.png", 50, "c"],
        ["2.png", 41, "x"],
        ["3.png", 30, "x"],
    ]
    rows += [[f"{n}.png", 2 * n + 1, "0" if n < 2 else f"s{n}"] for n in range(COUNT)]
    found = read_ratings(write_rows(tmp_path / "s.csv", rows), tmp_path, group_column="scene")
    seen: dict[str, Any] = {}

    def noted(x: Any, y: Any, groups: Any, options: FitOptions) -> CrossValidation:
        seen.update(y=y, groups=groups)
        return cross_validate(x, y, groups, options)

    monkeypatch.setattr("qualiclip_pyiqa.training.fitting.cross_validate", noted)
    quick_fit(choose_tower("qualiclip-mini"), found, tmp_path / "my.safetensors")
    names = [path.name for path in found.mean_opinions()]
    group = dict(zip(names, seen["groups"].tolist(), strict=True))
    assert len(names) == COUNT + 1
    assert group["copy.png"] == group["1.png"] == group["0.png"] != group["2.png"] == group["3.png"]
    assert len(set(group.values())) == COUNT + 1 - 2 - 1
    assert seen["y"][names.index("2.png")] == (41 + 5) / 2


def test_nothing_of_the_test_part_decides_its_scores() -> None:
    """Opinion scores of test images can be anything: what was learned from the others stays as it is."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 60)), rng.normal(size=40)
    groups = np.arange(40)
    (split,) = repeated_splits(groups, 1, 0.2, 0)
    changed = y.copy()
    changed[split.test] += 100
    inner = folds(groups[split.training], 5, [0, 0])
    one, other = (choose_strength(x[split.training], each[split.training], inner) for each in (y, changed))
    assert one == other
    # From noise nothing can be learned: an agreement would have leaked.
    found = cross_validate(x, y, groups, FitOptions(splits=40)).agreement
    assert abs(found["srcc"]["median"]) < 0.35  # type: ignore[arg-type]


# ---------------------------------------------------------------- ridge


@pytest.mark.parametrize("size", [(30, 80), (80, 12)])
def test_ridge_is_scikit_learn_s(size: tuple[int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = rng.normal(3, 5, size=size)
    x[:, 4] = 7.3  # constant but for rounding
    x[::2, 4] += 1e-7
    y = x[:, 0] - x[:, 1] + rng.normal(size=size[0])
    strengths = (0.01, 1.0, 100.0)
    z = 3 * np.tanh((x - x.mean(0)) / x.std(0) / 3)
    z[:, 4] = 0
    found = fit_ridge(x, y, strengths)
    for number, strength in enumerate(strengths):
        expected = linear_model.Ridge(alpha=strength * len(x)).fit(z, y)
        assert found.weights[:, number] == pytest.approx(expected.coef_, abs=1e-9)
        assert found.intercepts[number] == pytest.approx(expected.intercept_, abs=1e-9)
        scores = bounded(torch.from_numpy(expected.predict(z)), y.min(), y.max())
        assert found.scores(x)[:, number] == pytest.approx(scores.numpy(), abs=1e-8)
    assert (found.weights[4] == 0).all() and found.scale[4] == 1
    assert (fit_ridge(x, np.ones(len(x)), strengths).scores(x) == 1).all()


def test_no_statistic_decides_a_score_alone() -> None:
    far = torch.tensor([[-1e6, 0.0, 3.0, 1e6]])
    z = standardised(far, torch.zeros(4), torch.ones(4))
    assert z[0, 1] == 0 and -3 <= z.min() < -2.9 and 2.9 < z.max() <= 3


def test_strength_at_the_edge_is_said(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 20)), rng.normal(size=60)
    inner = folds(np.arange(60), 5, [0])
    z = np.column_stack([3 * np.tanh((x - x.mean(0)) / x.std(0) / 3), np.ones(60)])
    unrelated = noise - z @ np.linalg.lstsq(z, noise)[0]
    assert choose_strength(x, unrelated, inner) == len(STRENGTHS) - 1
    assert choose_strength(x, x @ np.ones(20), inner) == 0  # nothing but signal
    assert 0 < choose_strength(x, x @ np.ones(20) + 3 * noise, inner) < len(STRENGTHS) - 1
    rows = list(csv.reader((rated / "scores.csv").open()))
    drawn = [[name, rng.normal()] for name, *_ in rows[1:]]
    table = write_rows(tmp_path / "noise.csv", [["image", "mos"], *drawn])
    out = tmp_path / "my.safetensors"
    assert run("-m", "qualiclip-mini", "--ratings", table, "--images", rated, "-o", out, "--workers", 0) == 0
    assert ("WARNING: that is the weakest" in capsys.readouterr().err) == load_fitted(out).fit.at_edge


def test_what_makes_figures_worthless_is_said(rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Test parts of six images; a single one each; opinion scores of which few differ."""
    rows = list(csv.reader((rated / "scores.csv").open()))[1:]
    tables = {
        "good": [[name, mos] for name, mos, _ in rows],
        "few": [[name, 50 + 10 * number if number < 5 else 20] for number, (name, *_) in enumerate(rows)],
    }
    said = {}
    for name, test in (("good", 0.2), ("good", 0.01), ("few", 0.1)):
        table = write_rows(tmp_path / "t.csv", [["image", "mos"], *tables[name]])
        words = ["-m", "qualiclip-mini", "--ratings", table, "--images", rated, "-o", tmp_path / "my.safetensors"]
        assert run(*words, "--workers", 0, "--device", "cpu", "--test", test, "--force") == 0
        said[name, test] = capsys.readouterr().err
        FittedIQA(weights=tmp_path / "my.safetensors")
    assert (
        "WARNING: test parts hold 6 images, where chance alone moves an SRCC by 0.45 (standard deviation), so the "
        "figures say little; expected 20 or more"
    ) in said["good", 0.2]
    assert "no split has an SRCC" not in said["good", 0.2] and "is negative" not in said["good", 0.2]
    assert "WARNING: no split has an SRCC" in said["good", 0.01] and "chance" not in said["good", 0.01]
    assert re.search(r"WARNING: the SRCC is that of \d of 10 splits", said["few", 0.1])


def test_warnings_depend_on_the_figures(fitted: dict[str, Path]) -> None:
    stored = load_fitted(fitted["mini"]).fit
    spread = {"median": -0.1, "sd": 0.0, "min": -0.1, "max": -0.1}
    bad = dataclasses.replace(stored, at_edge=False, agreement=dict.fromkeys(FIGURES, spread))
    (line,) = warnings(bad, CrossValidation({}, [20, 20, 20], 3))
    assert line.startswith("the median SRCC is negative (-0.1000)")
    good = dataclasses.replace(bad, agreement=dict.fromkeys(FIGURES, spread | {"median": 0.9}))
    assert list(warnings(good, CrossValidation({}, [20, 20, 20], 3))) == []
    assert len(list(warnings(good, CrossValidation({}, [1, 4, 9], 3)))) == 1


@pytest.mark.parametrize("offset", [0, 400])
def test_figures_are_those_of_the_metric_that_is_written(
    offset: float, rated: Path, ratings: Ratings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores that agreement is computed from are, bit for bit, those of a file with the same regression."""
    ratings.opinions = [opinion / 10 + offset for opinion in ratings.opinions]
    out = tmp_path / "my.safetensors"
    seen = {}

    def noted(x: Any, y: Any, groups: Any, options: FitOptions) -> CrossValidation:
        seen["x"], seen["y"] = x, y
        return cross_validate(x, y, groups, options)

    monkeypatch.setattr("qualiclip_pyiqa.training.fitting.cross_validate", noted)
    quick_fit(choose_tower("qualiclip-mini"), ratings, out)
    metric = FittedIQA(weights=out).eval()
    found = fit_ridge(seen["x"], seen["y"], [metric.fit.strength]).stored_scores(seen["x"])
    expected = [float(scores(metric, load_image(path)[None])) for path in ratings.mean_opinions()]
    assert found == pytest.approx(expected, abs=2e-3 if offset else 1e-5)
    rated_by = metric.rate(torch.from_numpy(seen["x"].astype(np.float32)))[:, 0].double().numpy()
    assert np.array_equal(found, rated_by)


def test_file_that_cannot_be_loaded_is_not_written(
    ratings: Ratings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(path: Path, model: Any, *words: str) -> None:
        fit = dataclasses.replace(model.fit, intercept=float("inf"))
        write_fitted(path, dataclasses.replace(model, fit=fit), *words)

    monkeypatch.setattr("qualiclip_pyiqa.training.fitting.write_fitted", spoiled)
    out = tmp_path / "my.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(
        WeightsError, match=r"my.safetensors is not written, since .*: it: metadata 'fit.intercept' is inf"
    ):
        quick_fit(choose_tower("qualiclip-mini"), ratings, out, dataclasses.replace(QUICK, force=True))
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.glob("my.*")] == [out.name]


def test_statistic_that_float32_cannot_scale_is_constant() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    x[:, 1] *= 1e-44
    found = fit_ridge(x, rng.normal(size=30), [1.0])
    assert found.weights[1, 0] == 0 and bool((found.stored()[1] > 0).all())


# ---------------------------------------------------------------- cache


class Counted:
    """Counts the images that are computed."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, records: Iterable[Record], total: int) -> Iterable[Record]:
        self.total += total
        return records


@pytest.fixture
def compute(own_cache: Path, ratings: Ratings) -> Callable[..., tuple[np.ndarray, int]]:
    """Statistics of the first images, and how many of them were computed."""

    def call(count: int = 4, tower: Any = None, cache: Path | None = own_cache, **options: Any) -> tuple[Any, int]:
        counted = Counted()
        paths = ratings.paths[:count]
        chosen = tower or freeze(choose_tower("qualiclip-mini").model.image_tower(False))
        found = compute_statistics(chosen, {}, paths, cache, counted, **{"device": "cpu", "workers": 0} | options)
        return found.values, counted.total

    return call


def test_cache_is_hit_once_filled_and_missed_for_anything_else(
    compute: Callable[..., tuple[np.ndarray, int]], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    first, computed = compute(4)
    assert computed == 4
    again, computed = compute(6)
    assert computed == 2 and np.array_equal(again[:4], first)
    assert np.array_equal(compute(4, cache=None)[0], first)
    assert compute(4)[1] == 0
    tower: Any = freeze(choose_tower("qualiclip-mini").model.image_tower(False))
    tower.trunk.stem.weight.mul_(1.5)
    assert compute(4, tower=tower)[1] == 4
    assert compute(4, ignore_profile=True)[1] == 4
    monkeypatch.setattr(features, "STATISTICS_VERSION", 2)
    assert compute(4)[1] == 4
    assert not list(own_cache.rglob("*.part"))


@pytest.mark.parametrize("damage", [b"", b"x" * 500, None], ids=["empty", "other", "one bit"])
def test_damaged_entry_is_computed_again(
    damage: bytes | None,
    compute: Callable[..., tuple[np.ndarray, int]],
    own_cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, _ = compute(3)
    path = next(path for path in own_cache.rglob("*") if path.is_file())
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        again, computed = compute(3)
    assert computed == 1 and np.array_equal(again, first)
    assert "is damaged; its image is computed again" in caplog.text
    assert path.read_bytes() == content
    # An entry of another image, under this one's name, is no entry of this one.
    files = [path for path in own_cache.rglob("*") if path.is_file()]
    files[0].write_bytes(files[1].read_bytes())
    assert np.array_equal(compute(3)[0], first)


def test_cache_that_cannot_be_used_is_one_line(compute: Callable[..., Any], own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file")
    with pytest.raises(OSError, match=r"cannot be created \(.*\); delete it, or pass --no-cache"):
        compute(3)
    own_cache.unlink()
    compute(3)
    path = next(path for path in own_cache.rglob("*") if path.is_file())
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot be read \(Is a directory\); delete it, or pass --no-cache"):
        compute(3)


def test_bad_images_are_reported_and_the_others_cached(
    compute: Callable[..., Any], ratings: Ratings, tmp_path: Path, own_cache: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    gone = tmp_path / "gone.png"
    ratings.paths[1:3] = [broken, gone]
    with pytest.raises(ImageError, match=r"2 of 4 images cannot be used: .*gone.png cannot be read") as caught:
        compute(4)
    assert "\n" not in str(caught.value)
    assert len([path for path in own_cache.rglob("*") if path.is_file()]) == 2


def test_statistics_that_are_not_finite_are_an_image_s_error(compute: Callable[..., Any]) -> None:
    tower: Any = freeze(choose_tower("qualiclip-mini").model.image_tower(False))
    tower.trunk.stem.weight.fill_(float("nan"))
    with pytest.raises(ImageError, match=r"4 of 4 images cannot be used: .*0.png has statistics that are not finite"):
        compute(4, tower=tower)


# ---------------------------------------------------------------- files


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path, rated: Path) -> None:
    """SIGKILL in the middle of the file's write: what was there stays whole, and no file has its name by half."""
    out = tmp_path / "my.safetensors"
    out.write_bytes(b"old")
    before = """
import os, signal
from qualiclip_pyiqa.pretrained import write
def killed(tensor):
    os.kill(os.getpid(), signal.SIGKILL)
write._little_endian = killed
"""
    words = ["fit", "-m", "qualiclip-mini", "--ratings", rated / "scores.csv", "--images", rated]
    words += ["-o", out, "--force", "--splits", 1, "--workers", 0, "--device", "cpu"]
    said = tmp_path / "said"
    assert Fork([*map(str, words)], before=before, stderr=said).wait() == -signal.SIGKILL, said.read_text()
    assert out.read_bytes() == b"old"


def test_full_disk_is_one_line_and_leaves_nothing(
    rated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensor: torch.Tensor) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qualiclip_pyiqa.pretrained.write._little_endian", full)
    out = tmp_path / "my.safetensors"
    words = ["--ratings", rated / "scores.csv", "--images", rated, "-o", out, "--workers", 0, "--splits", 1]
    assert run("-m", "qualiclip-mini", *words) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qualiclip: {out} cannot be written (No space left on device); make room and repeat"
    )
    assert not list(tmp_path.glob("my.*"))


def hostile(path: Path, tmp_path: Path, fit: Any = None, **metadata: str) -> Path:
    """The file with other metadata; `fit` replaces keys, or the whole text."""
    with safe_open(path, framework="pt") as file:
        stored = dict(file.metadata())
    if isinstance(fit, dict):
        stored["fit"] = json.dumps(json.loads(stored["fit"]) | fit)
    elif fit is not None:
        stored["fit"] = fit
    save_file(load_file(path), tmp_path / "hostile.safetensors", stored | metadata)
    return tmp_path / "hostile.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fit": "[" * 100_000}, "metadata 'fit' is not JSON"),
        ({"fit": "[]"}, "expected pos_embedding, regressor"),
        ({"fit": {"new": 1}}, "expected pos_embedding, regressor"),
        ({"fit": {"pos_embedding": 1}}, "metadata 'fit.pos_embedding' is 1; expected true or false"),
        ({"fit": {"regressor": "svr"}}, "for a newer file update qualiclip-pyiqa"),
        ({"fit": {"intercept": float("nan")}}, "metadata 'fit.intercept' is nan; expected a finite number"),
        ({"fit": {"low": 1e300}}, "metadata 'fit.low' is 1e[+]300; expected a finite number"),
        ({"fit": {"low": 90}}, "has the range 90..80.0; expected low < high"),
        ({"fit": {"images": 10**30}}, "metadata 'fit.images' is 1000"),
        ({"fit": {"images": 3}}, r"'images' is torch.uint8 of shape \(30, 32\); expected \(3, 32\)"),
        ({"fit": {"agreement": {"srcc": 1}}}, "metadata 'fit.agreement' is"),
        ({"fit": {"tower_name": "x" * 5000}}, "metadata 'fit.tower_name' is"),
        ({"tower": '{"pairs": 4096}'}, "metadata 'tower.pairs' is"),
        ({"backbone": "hf-hub:evil/model", "tower": "{}"}, "unknown backbone 'hf-hub:evil/model'"),
        ({"format": "qualiclip-pyiqa-fitted/2"}, "expected 'qualiclip-pyiqa-fitted/1': for a newer file update"),
        ({"format": "qualiclip-pyiqa/1"}, "it lacks prompts_features"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_hostile_metadata_is_refused_in_one_line(
    change: dict[str, Any], said: str, fitted: dict[str, Path], tmp_path: Path
) -> None:
    path = hostile(fitted["mini"], tmp_path, **change)
    with pytest.raises(WeightsError, match=said) as caught:
        Scorer(path, device="cpu", workers=0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[:2], "'regression' is torch.float32 of shape"),
        (lambda r: r.double(), "'regression' is torch.float64"),
        (lambda r: r * float("inf"), "finite float32"),
        (lambda r: -r, "with scales above 0 in the second row"),
        (lambda r: r[:, :7], "its regression takes 7 statistics, but its tower has"),
    ],
)
def test_hostile_regression_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], said: str, fitted: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(fitted["mini"])
    with safe_open(fitted["mini"], framework="pt") as file:
        metadata = file.metadata()
    tensors["regression"] = change(tensors["regression"]).contiguous()
    save_file(tensors, tmp_path / "h.safetensors", metadata)
    with pytest.raises(WeightsError, match=said):
        FittedIQA(weights=tmp_path / "h.safetensors")


def test_other_classes_and_files_are_refused(fitted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a metric of `qualiclip fit`, without prompts"):
        OpenQualiCLIP("qualiclip", weights=fitted["mini"])
    mini = load_model("qualiclip-mini", "mobile").path
    with pytest.raises(WeightsError, match="is not a metric of `qualiclip fit`"):
        FittedIQA(weights=mini)
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="damaged or not a weight file"):
        Scorer(tmp_path / "x.safetensors", device="cpu", workers=0)
    assert cli.main(["weights", "path", "fitted"]) == 2


# ---------------------------------------------------------------- evaluated on the images of the fit


def test_an_evaluation_on_images_of_the_fit_says_so(
    fitted: dict[str, Path], rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under whatever names, from the metric and from a table; other images and other metrics raise no warning."""
    file, folder, out = fitted["mini"], tmp_path / "images", tmp_path / "e.json"
    folder.mkdir()
    rows: list[list[object]] = [["image", "mos"]]
    for number in range(4):
        shutil.copy(rated / f"{number}.png", folder / f"copy{number}.png")
        draw(500 + number, number / 4).save(folder / f"new{number}.png")
        rows += [[f"copy{number}.png", number], [f"new{number}.png", 4.5 - number]]
    mixed = write_rows(tmp_path / "mixed.csv", rows)
    new = write_rows(tmp_path / "new.csv", [rows[0], *(row for row in rows if str(row[0]).startswith("new"))])
    images = ["--images", folder, "--json", out]

    def evaluate(*words: object) -> tuple[Any, str, str]:
        assert cli.main(["evaluate", *map(str, words)]) == 0
        said = capsys.readouterr()
        return json.loads(out.read_text())["metrics"], said.out, said.err

    live = ["--device", "cpu", "--workers", 0]
    warning = f"4 of these 8 images were used to fit {file}: its figures are not of new images"
    copies = [str(folder / f"copy{number}.png") for number in range(4)]
    found, said, warned = evaluate("-m", file, "-m", "qualiclip-mini", "--ratings", mixed, *images, *live)
    assert f"qualiclip: WARNING: {warning}" in warned and warning in said
    assert sorted(found[str(file)]["used_to_fit"]) == copies and "used_to_fit" not in found["qualiclip-mini"]
    found, said, warned = evaluate("-m", file, "--ratings", new, *images, *live)
    assert found[str(file)]["used_to_fit"] == [] and "used to fit" not in said + warned

    moved, table = tmp_path / "moved.safetensors", tmp_path / "scores.csv"
    shutil.copy(file, moved)
    assert cli.main(["score", str(folder), "-m", str(moved), "-o", str(table), "--device", "cpu"]) == 0
    capsys.readouterr()
    found, said, warned = evaluate("--scores", table, "--ratings", mixed, *images)
    assert sorted(found[str(moved)]["used_to_fit"]) == copies and "WARNING: 4 of these 8 images" in warned
    shutil.copy(fitted["tiny-vit"], moved)
    found, said, warned = evaluate("--scores", table, "--ratings", mixed, *images)
    assert found[str(moved)]["used_to_fit"] is None and "is not known, since the file" in warned and "is not" in said
