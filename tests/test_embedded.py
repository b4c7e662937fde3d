"""Training of the embedded models: end to end in small, and each of its steps."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
import upstream
from mobile_files import random_tower, write_tower, write_trunk
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from synthetic import synthetic_photograph
from torch import Tensor

from qualiclip_pyiqa.degradations.bank import DEGRADATIONS
from qualiclip_pyiqa.degradations.base import LEVELS
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.metrics.prompts import LOOK
from qualiclip_pyiqa.towers.mobile import LAYOUT
from qualiclip_pyiqa.training.alignment import build
from qualiclip_pyiqa.training.alignment import save as save_aligned
from qualiclip_pyiqa.training.config import load_config
from qualiclip_pyiqa.training.embedded import __main__ as command
from qualiclip_pyiqa.training.embedded import attributes, crops, windows
from qualiclip_pyiqa.training.embedded.attributes import ATTRIBUTES, Ladder, change, fit_attributes
from qualiclip_pyiqa.training.embedded.crops import LEFT_OUT, VERSIONS, Crops, draw_crops
from qualiclip_pyiqa.training.embedded.frozen import EARLY, FROZEN, Passed, pass_frozen, same_size, statistics
from qualiclip_pyiqa.training.embedded.heads import fit_head, ridge, set_head
from qualiclip_pyiqa.training.embedded.opinions import EXTREMES, Rated, fit_opinions, logits_of

RATED = 20  # images, of which 16 are a step's batch and 80 %
SMALL = 64  # side of a crop, for speed


@pytest.fixture(scope="module", autouse=True)
def small_crops() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (command, crops, attributes):
            patch.setattr(module, "SIDE", SMALL)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, a judge, photographs and rated images."""
    path = tmp_path_factory.mktemp("embedded")
    write_trunk(path / "trunk.safetensors")
    write_judge(path / "judge.safetensors")
    for name in ("pristine", "rated", "out"):
        (path / name).mkdir()
    for number in range(3):
        save(path / "pristine" / f"{number}.png", synthetic_photograph(number, SMALL + 8, SMALL + 4 + 4 * number))
    save(path / "pristine" / "small.png", synthetic_photograph(9, SMALL - 6, 300))  # left out
    with (path / "mos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mos"])
        for number in range(RATED):
            save(path / "rated" / f"{number}.png", synthetic_photograph(100 + number, 64, 72))
            writer.writerow([f"{number}.png", 20 + 3 * number])
    return path


def write_judge(path: Path) -> None:
    """Write a model such as `qualiclip train --config mini` writes, with random weights."""
    torch.manual_seed(1)
    aligned = build(dataclasses.replace(load_config("mini"), widths=(8, 8, 8, 8), hidden=16, dim=8), 1, None)
    save_aligned(path, aligned, aligned.tower.state_dict(), {}, "CC0-1.0")


def save(path: Path, rgb: Tensor) -> None:
    Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def words(folder: Path, **more: object) -> list[str]:
    options = {
        "trunk": folder / "trunk.safetensors",
        "pristine": folder / "pristine",
        "judge": folder / "judge.safetensors",
        "out": folder / "out",
        "photographs": 3,
        "ladders": 2,
    } | more
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    rated = {"ratings": folder / "mos.csv", "images": folder / "rated"}
    assert command.main(words(folder, out=out, licence="CC0-1.0", **rated)) == 0
    return out


def test_both_models_are_written_and_are_metrics(folder: Path, trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "qualiclip-mini+.safetensors",
        "qualiclip-mini.safetensors",
    ]
    x, trunk = upstream.pictures(2, 64, 80), load_file(folder / "trunk.safetensors")
    plain, plus = (load_file(trained / f"{name}.safetensors") for name in ("qualiclip-mini", "qualiclip-mini+"))
    changed = {name.removesuffix(".weight") for name in plain if not torch.equal(plain[name], plus[name])}
    assert {f"visual.trunk.block{number}.project" for number in range(FROZEN, len(LAYOUT))} <= changed
    assert not any(
        f"visual.trunk.{name}." in "".join(changed) for name in ("stem", *map("block{}".format, range(FROZEN)))
    )
    for name, value in trunk.items():
        assert torch.equal(plain[f"visual.trunk.{name}"], value.half())
    for name in (
        "visual.head_mean",
        "visual.head_std",
        "visual.head_weight",
        "visual.head_bias",
    ):  # attributes' heads are shared
        assert plain[name].dtype == torch.float32 and torch.equal(plus[name][1:], plain[name][1:])
        assert not torch.equal(plus[name][0], plain[name][0])
    assert plain["visual.head_weight"][1:, :EARLY].any() and not plain["visual.head_weight"][1:, EARLY:].any()
    for name in ("qualiclip-mini", "qualiclip-mini+"):
        file = trained / f"{name}.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["licence"] == "CC0-1.0" and json.loads(metadata["prompts"]) == [list(p) for p in LOOK.values()]
        summary = {"seed": 0, "crops": 3 * (1 + VERSIONS), "ladders": 2} | ({"rated": RATED} if "+" in name else {})
        assert json.loads(metadata["training"]) == summary
        found = pyiqa.create_metric("qualiclip-mini", device="cpu", weights=str(file), prompts="look")(x)
        assert found.shape == (2, len(LOOK)) and torch.isfinite(found).all()


def test_the_same_command_writes_the_same_bytes_and_another_seed_others(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    name, out = "qualiclip-mini.safetensors", tmp_path / "new" / "models"  # folders that are made
    assert command.main(words(folder, out=out, licence="CC0-1.0")) == 0
    assert [path.name for path in out.iterdir()] == [name]
    again = (out / name).read_bytes()
    assert again == (trained / name).read_bytes()
    assert command.main(words(folder, out=out, licence="CC0-1.0", seed=1)) == 0
    assert (out / name).read_bytes() != again


@pytest.fixture
def with_windows(folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both models with window heads, fitted to crops of a size of their own."""
    monkeypatch.setattr(windows, "SIDE", 192)
    (tmp_path / "pristine").mkdir()
    for number in range(3):
        save(tmp_path / "pristine" / f"{number}.png", synthetic_photograph(number, 200, 192 + number))
    assert windows.main(window_words(tmp_path, sorted(map(str, trained.iterdir())))) == 0
    return tmp_path / "heads"


def window_words(folder: Path, models: list[str]) -> list[str]:
    return [*models, "--pristine", str(folder / "pristine"), "--out", str(folder / "heads")]


@torch.no_grad()
def test_window_heads_are_added_and_nothing_else_changes(with_windows: Path, trained: Path) -> None:
    x = upstream.pictures(1, 96, 128)
    added = {}
    for before in trained.iterdir():
        after = with_windows / before.name
        old, new = load_file(before), load_file(after)
        added[before.name] = {name: new.pop(name) for name in ("visual.window_heads", "visual.window_bias")}
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        plain, more = (
            pyiqa.create_metric("qualiclip-mini", device="cpu", weights=str(path), prompts="look")
            for path in (before, after)
        )
        assert torch.equal(plain(x), more(x))
        with safe_open(after, "pt") as opened:
            metadata = opened.metadata()
        assert json.loads(metadata["training"])["windows"] == {"seed": 0, "photographs": 3}
        assert json.loads(metadata["tower"]) == {"pairs": 7, "window_heads": [6, EARLY]}
    one, other = added.values()
    assert one["visual.window_heads"].shape == (3, 6, EARLY)
    assert all(torch.equal(one[name], other[name]) for name in one)  # as both models share the blocks they read


def test_the_same_command_adds_the_same_window_heads(with_windows: Path, trained: Path) -> None:
    first = {path.name: path.read_bytes() for path in with_windows.iterdir()}
    # Of models that have window heads, these are replaced.
    assert windows.main(window_words(with_windows.parent, [str(with_windows / name) for name in first])) == 0
    assert {path.name: path.read_bytes() for path in with_windows.iterdir()} == first


def test_window_heads_find_what_changed_within_an_image() -> None:
    """Of windows whose first statistic differs between images and whose second is the blur, the second is found."""
    rng = np.random.default_rng(0)
    versions = []
    for _ in range(40):
        region = windows.Region((0, 0, 256, 256), "gaussian_blur", 4.0)
        share = region.shares(windows.SIDE)
        found = torch.from_numpy(rng.normal(size=(len(share), 4))).float()
        found[:, 0] = 3 * float(rng.normal())
        found[:, 1] += 4 * share
        versions.append(windows.Version([region], found))
    heads = windows.fit_window_heads(versions)
    weight = heads["sharpness"].weight
    assert weight[1] < -0.3 and weight[[0, 2, 3]].abs().max() < 0.1
    assert heads["noisiness"].weight.abs().max() < 1e-6  # blur is not its own: it is to change by nothing
    untouched = torch.cat([each.statistics[each.regions[0].shares(windows.SIDE) == 0] for each in versions])
    assert heads["sharpness"](untouched).mean() == pytest.approx(ATTRIBUTES["sharpness"].pristine, abs=1e-3)


def test_regions_are_of_all_attributes_and_one_in_each_quarter() -> None:
    drawn = windows.draw_regions(random.Random(0))
    assert drawn == windows.draw_regions(random.Random(0)) != windows.draw_regions(random.Random(1))
    regions = [region for version in drawn for region in version]
    for attribute in ATTRIBUTES:
        own = [region for region in regions if region.name in windows.own_types(attribute)]
        assert len(own) == 2 and all(windows.target(attribute, region) for region in own)
    for version in drawn:
        corners = {(box[0] // 256, box[1] // 256) for box in (region.box for region in version)}
        assert len(corners) == 4
        for region in version:
            last = (region.box[0] + region.box[2] - 1) // 256, (region.box[1] + region.box[3] - 1) // 256
            assert last == (region.box[0] // 256, region.box[1] // 256) and windows.LOWEST <= region.level <= LEVELS
    region = windows.Region((64, 0, 64, 96), "jpeg", 3.0)
    assert region.shares(128).tolist() == [0, 0, 0, 0.5, 0.5, 0.25, 1, 1, 0.5]
    assert windows.target("colorfulness", region) == 0 and windows.target("compression", region) < 0
    assert windows.target("compression", dataclasses.replace(region, name="pixelate")) is None
    assert windows.target("sharpness", dataclasses.replace(region, name="pixelate")) < 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("none", "--photographs is 0; expected an integer of at least 1"),
        ("small", "has no photographs of at least 512 pixels a side; expected some"),
        ("judge", "judge.safetensors is not an embedded model; expected one of"),
        ("twice", "two of the models are named alike"),
        ("trunk", "other.safetensors has another trunk than"),
        ("garbage", "garbage.safetensors"),
    ],
)
def test_errors_of_window_heads_are_one_line(
    change: str, said: str, folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "pristine", tmp_path / "pristine")
    models = [str(trained / "qualiclip-mini.safetensors")]
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 99)
    more = {
        "judge": [str(folder / "judge.safetensors")],
        "twice": models,
        "trunk": [str(write_tower(tmp_path / "other.safetensors", seed=1))],
        "garbage": [str(tmp_path / "garbage.safetensors")],
    }
    options = ["--photographs", "0"] if change == "none" else []
    assert windows.main(window_words(tmp_path, models + more.get(change, [])) + options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not (tmp_path / "heads").exists()


def test_splits_print_a_table_and_write_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = {"ratings": folder / "mos.csv", "images": folder / "rated", "splits": 2}
    assert command.main(words(folder, out=tmp_path, photographs=1, **rated)) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["split", "epochs", "SRCC"]
    assert [row[:2] for row in rows[1:]] == [
        *([str(s), e] for s in (0, 1) for e in "04"),
        *(["median", e] for e in "04"),
    ]
    assert all(-1 <= float(row[2]) <= 1 for row in rows[1:]) and not list(tmp_path.iterdir())


def _wrong(folder: Path, tmp_path: Path) -> list[tuple[dict[str, object], str]]:
    garbage, other = tmp_path / "garbage.safetensors", tmp_path / "other.safetensors"
    garbage.write_bytes(b"garbage" * 99)
    write_tower(other)
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    shutil.copy(folder / "pristine" / "0.png", tmp_path / "few")
    (tmp_path / "small").mkdir()
    shutil.copy(folder / "pristine" / "small.png", tmp_path / "small")
    (tmp_path / "file").touch()
    (tmp_path / "flat.csv").write_text("image,mos\n0.png,3\n1.png,3\n")
    (tmp_path / "one.csv").write_text("image,mos\n0.png,3\n")
    images = {"images": folder / "rated"}
    return [
        ({"trunk": tmp_path / "none.safetensors"}, "none.safetensors"),
        ({"trunk": garbage}, "garbage.safetensors cannot be read"),
        ({"trunk": other}, "other.safetensors lacks 102 tensors"),
        ({"judge": tmp_path / "none.safetensors"}, "none.safetensors"),
        ({"judge": garbage}, "garbage.safetensors"),
        ({"judge": other}, "other.safetensors is an embedded model; expected one of `qualiclip train --config mini`"),
        ({"pristine": tmp_path / "none"}, "none"),
        ({"pristine": tmp_path / "empty"}, "empty has no images to train on"),
        ({"pristine": tmp_path / "small"}, "small has 0 photographs of at least 64 pixels a side; expected"),
        ({"photographs": 0}, "--photographs is 0; expected an integer of at least 1"),
        ({"ladders": 1}, "--ladders is 1; expected an integer of at least 2"),
        ({"pristine": tmp_path / "few"}, "few has 1 photographs of at least 64 pixels a side; expected"),
        ({"ratings": tmp_path / "none.csv", **images}, "none.csv"),
        ({"ratings": folder / "mos.csv", "images": tmp_path / "none"}, "none is not a folder"),
        ({"ratings": tmp_path / "flat.csv", **images}, "flat.csv"),
        ({"ratings": tmp_path / "one.csv", **images}, "one.csv"),
        ({"out": tmp_path / "file"}, "file is not a folder"),
        ({"out": tmp_path / "file" / "new"}, "file is not a folder"),
        ({"trunk": garbage, "out": tmp_path / "new" / "models"}, "garbage.safetensors cannot be read"),
        ({"judge": garbage, "out": tmp_path / "new" / "models"}, "garbage.safetensors"),
        ({"pristine": tmp_path / "empty", "out": tmp_path / "new" / "models"}, "has no images to train on"),
        ({"ratings": folder / "mos.csv", **images, "splits": -1}, "--splits is -1; expected"),
    ]


@pytest.mark.parametrize("index", range(22))
def test_errors_are_one_line(index: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, said = _wrong(folder, tmp_path)[index]
    assert command.main(words(folder, **options)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not list((folder / "out").iterdir()) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("more", [{"ratings": "mos.csv"}, {"images": "rated"}, {"splits": 3}])
def test_options_that_belong_together(
    more: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(words(folder, **more))
    assert "--ratings and --images belong together, and --splits needs them" in capsys.readouterr().err


# Steps


def test_crops_are_of_8_bits_the_pristine_one_first_and_decided_by_the_seed() -> None:
    photograph = synthetic_photograph(0, 100, 90)
    first, again, other = (draw_crops(photograph, random.Random(seed)) for seed in (0, 0, 1))
    assert first.shape == (1 + VERSIONS, 3, SMALL, SMALL) and torch.equal(first, again)
    assert not torch.equal(first, other)
    levels = first * 255
    assert torch.equal(levels, levels.round()) and first.min() >= 0 and first.max() <= 1
    assert all(not torch.equal(version, first[0]) for version in first[1:])
    # As small as may be, the crop is the photograph itself.
    whole = (synthetic_photograph(2, SMALL, SMALL) * 255).round() / 255
    assert torch.equal(draw_crops(whole, random.Random(3))[0], whole)
    assert set(LEFT_OUT) < set(DEGRADATIONS)


def test_the_frozen_half_and_the_rest_are_the_tower() -> None:
    tower = random_tower()
    images = [*upstream.pictures(3, 64, 64), *upstream.pictures(2, 48, 96)]
    passed = pass_frozen(tower, images)
    assert len(passed) == 5 and passed.early.shape == (5, EARLY)
    assert passed.activations[0].dtype == torch.float16 and passed.activations[0].shape[1:] == (8, 8)
    found = statistics(tower, passed, batch=2)
    expected = torch.cat([tower.statistics(image[None]) for image in images])
    spread = tower.head_std[0]
    assert ((found - expected) / spread).abs().median() < 0.1  # bfloat16
    assert torch.equal(statistics(tower, passed, batch=2), found)


def test_batches_are_of_equal_size() -> None:
    sizes = [4, 8, 4, 4, 8, 4]
    passed = Passed([torch.zeros(1, side, side) for side in sizes], torch.zeros(6, 1))
    assert list(same_size(passed, range(6), 2)) == [[0, 2], [1, 4], [3, 5]]
    assert list(same_size(passed, [5, 1, 0, 2, 3], 2)) == [[5, 0], [2, 3], [1]]
    assert list(same_size(passed, [5, 1, 0, 2, 3], 2, whole=True)) == [[5, 0], [2, 3]]


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_scikit_learns(shape: tuple[int, int], intercept: bool) -> None:
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(1, 2, shape), rng.normal(3, 1, shape[0]), rng.uniform(0.1, 2, shape[0])
    found, bias = ridge(x, y, 3.0, weights, intercept)
    model = Ridge(alpha=3.0, fit_intercept=intercept).fit(x, y, sample_weight=weights)
    assert np.allclose(found.numpy(), model.coef_, atol=1e-6)
    assert bias == pytest.approx(float(model.intercept_), abs=1e-9)


def test_a_head_in_a_tower_is_the_fitted_one() -> None:
    rng = torch.Generator().manual_seed(0)
    tower = random_tower()
    size = tower.head_mean.shape[1]
    first, second = (torch.randn(count, size, generator=rng) for count in (30, 20))
    for width in (size, EARLY):
        parts = [(first[:, :width], first[:, 0], 1.0), (second[:, :width], second[:, 0], 0.5)]
        head = fit_head(parts, 1.0)
        assert spearmanr(head(first[:, :width]), first[:, 0]).statistic > 0.9
        set_head(tower, 2, head)
        assert torch.allclose(tower.logits(second)[:, 2], head(second[:, :width]), atol=1e-4)
        scaled = head.scaled(2.0, -1.0)
        assert torch.allclose(scaled(second[:, :width]), 2 * head(second[:, :width]) - 1, atol=1e-4)


def test_attributes_follow_their_own_types() -> None:
    """On ladders in which each type moves a statistic of its own."""
    rng = torch.Generator().manual_seed(0)
    names = list(DEGRADATIONS)
    levels = list(range(1, LEVELS + 1))
    ladders = []
    for _ in range(12):
        pristine = torch.randn(EARLY, generator=rng)
        degraded = {}
        for place, name in enumerate(names):
            found = pristine.repeat(len(levels), 1)
            found[:, place] += 0.4 * torch.tensor(levels)
            degraded[name] = (levels, found)
        ladders.append(Ladder(pristine, degraded))
    heads = fit_attributes(ladders)
    assert list(heads) == list(ATTRIBUTES) == [name for name in LOOK if name != "quality"]
    for name, head in heads.items():
        attribute = ATTRIBUTES[name]
        moved = {}
        for degradation in names:
            moves = [head(each.degraded[degradation][1]) - head(each.pristine[None]) for each in ladders]
            moved[degradation] = float(torch.stack(moves)[:, -1].mean())
        for degradation, sign in attribute.own.items():
            if sign:
                assert sign * moved[degradation] > 0.5, (name, degradation)
        others = [abs(moved[each]) for each in names if each not in attribute.own and each not in attribute.open]
        assert max(others) < 0.3, name
        assert head.bias == attribute.pristine


def test_change_has_the_sign_of_the_type() -> None:
    brightness, colour = ATTRIBUTES["brightness"], ATTRIBUTES["colorfulness"]
    assert change(brightness, "darken", 5) < change(brightness, "darken", 1) < 0 < change(brightness, "brighten", 1)
    assert change(brightness, "jpeg", 5) == 0
    assert {change(brightness, "mean_shift", level) > 0 for level in levels_of()} == {True, False}
    assert change(colour, "color_saturation_1", 5) == change(colour, "color_saturation_1", 4) < 0
    for attribute in ATTRIBUTES.values():
        assert {*attribute.own, *attribute.open} <= set(DEGRADATIONS) and not attribute.open & set(attribute.own)


def levels_of() -> range:
    return range(1, LEVELS + 1)


def test_rated_images_are_framed_at_random(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image and its mirror image lack 8 rows and columns, at sides that the seed decides."""
    ratings = command.read_opinions(folder / "mos.csv", folder / "rated")
    monkeypatch.setattr(command, "pass_frozen", lambda tower, images: list(images))
    first, again, other = (command.read_rated(random_tower(), ratings, seed).passed for seed in (0, 0, 1))
    assert len(first) == 2 * RATED and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    framings = set()
    for number, framed in enumerate(first):
        image = load_image(ratings.paths[number // 2])
        image = image.flip(-1) if number % 2 else image
        assert framed.shape == (3, image.shape[1] - 8, image.shape[2] - 8)
        (place,) = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(framed, image[:, top : top + framed.shape[1], left : left + framed.shape[2]])
        ]
        framings.add(place)
    assert len(framings) > 10


def test_logits_of_opinions() -> None:
    found = logits_of(torch.tensor([0.0, 1.0, 25.0, 50.0, 75.0, 100.0]), 0, 100)
    assert found.dtype == torch.float32 and found[3] == 0 and float(found[2]) == pytest.approx(-float(found[4]))
    low, high = torch.tensor(EXTREMES, dtype=torch.float64).logit().float()
    assert found[0] == found[1] == low and found[5] == high


def test_opinions_are_learned_and_the_seed_decides() -> None:
    """Opinion scores that follow the images' contrast."""
    tower = random_tower()
    shares = torch.linspace(0.1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    images = [0.5 + share * (synthetic_photograph(k, 64, 64) - 0.5) for k, share in enumerate(shares.tolist())]
    both = [each for image in images for each in (image, image.flip(-1))]
    rated = Rated(pass_frozen(tower, both), logits_of(shares, 0, 1))
    crops = Crops(pass_frozen(tower, images[:12]), (shares[:12] - shares[:12].mean()) / shares[:12].std())
    some = rated.part([3, 1])
    assert torch.equal(some.logits, rated.logits[[3, 1]])
    assert torch.equal(some.passed.early, rated.passed.early[[6, 7, 2, 3]])

    def run(seed: int, epochs: int) -> tuple[Tensor, dict[str, Tensor]]:
        tuned = random_tower()
        head = fit_opinions(tuned, rated, crops, seed, epochs)
        out = head(statistics(tuned, rated.passed)).unflatten(0, (-1, 2)).mean(1)
        return out, tuned.state_dict()

    (first, state), (again, same), (other, _) = run(0, 1), run(0, 1), run(1, 1)
    assert spearmanr(first, rated.logits).statistic > 0.8
    assert torch.equal(first, again) and all(torch.equal(state[name], same[name]) for name in state)
    assert not torch.equal(first, other)
    for name, value in tower.state_dict().items():
        block = name.split(".")[1] if name.startswith("trunk.") else name
        tuned = block.startswith("block") and int(block[5:]) >= FROZEN
        assert tuned or torch.equal(state[name], value), name
    assert any(not torch.equal(state[name], value) for name, value in tower.state_dict().items())
    _, untouched = run(0, 0)
    assert all(torch.equal(untouched[name], value) for name, value in tower.state_dict().items())
