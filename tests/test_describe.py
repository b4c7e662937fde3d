"""`qualiclip describe` and profiles: scores with their meaning, against a table or the shipped reference."""

from __future__ import annotations

import json
import tomllib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import qualiclip_pyiqa
from qualiclip_pyiqa import ImageError, Profiler, SettingsError
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.figures import fitted_ends, text_width
from qualiclip_pyiqa.metrics.prompts import LOOK
from qualiclip_pyiqa.pretrained.files import file_sha256
from qualiclip_pyiqa.pretrained.find import find
from qualiclip_pyiqa.report import profile as profile_module
from qualiclip_pyiqa.report.bars import draw_profiles
from qualiclip_pyiqa.report.profile import Attribute, Trait
from qualiclip_pyiqa.report.reference import Distribution, TableReference, shipped_reference

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
PHOTO, BLURRED, NOISY = (str(PHOTOS / f"lighthouse{end}.jpg") for end in ("", "-blurred", "-noisy"))
REFERENCE = Path(profile_module.__file__).with_name("reference.toml")


def describe(*arguments: object) -> int:
    return cli.main(["describe", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of the example photographs."""
    path = tmp_path_factory.mktemp("table") / "scores.csv"
    metrics = ("-m", "qualiclip-mini+:look", "-m", "qualiclip-mini")
    assert cli.main(["score", str(PHOTOS), "-o", str(path), "--device", "cpu", "--workers", "0", *metrics]) == 0
    return path


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(-1, 10), st.booleans())
def test_a_percentile_counts_the_worse_side(values: list[int], score: int, lower_better: bool) -> None:
    worse = sum(value > score if lower_better else value < score for value in values)
    expected = 100 * (worse + values.count(score) / 2) / len(values)
    found = Distribution(np.sort(np.array(values, float))).percentile(score, lower_better)
    assert found == pytest.approx(expected)


@given(st.floats(0, 1), st.booleans())
def test_percentiles_between_quantiles_are_interpolated(score: float, lower_better: bool) -> None:
    scores = np.linspace(0, 1, 2001) ** 2
    quantiles = Distribution(np.percentile(scores, np.arange(101)), quantiles=True)
    whole = Distribution(scores).percentile(score, lower_better)
    assert quantiles.percentile(score, lower_better) == pytest.approx(whole, abs=0.3)


def test_ends_and_ties_of_quantiles() -> None:
    found = Distribution(np.array([0.0, 0.5, 0.5, 0.5, 1.0]), quantiles=True)
    assert [found.percentile(score) for score in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == [0, 0, 12.5, 50, 87.5, 100, 100]
    assert found.percentile(0.25, lower_better=True) == 87.5


def test_an_image_far_from_the_size_of_the_reference_is_noted(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"small": (200, 150), "usual": (400, 300), "large": (1100, 700)}
    with Image.open(PHOTO) as opened:
        for name, size in sizes.items():
            opened.resize(size).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in sizes]
    assert describe(*paths, "-m", "qualiclip-mini:sharpness") == 0
    small, usual, large = capsys.readouterr().out.split(".png, ")[1:]
    assert "far smaller than the images of the reference (most have 512 pixels on their longer side)" in small
    assert "the reference (most" not in usual and "far larger than the images of the reference" in large
    # A table has the sizes of its own images, 768 pixels; without them nothing is said.
    for text, said in ((table.read_text(), True), (table.read_text().replace("512", "").replace("768", ""), False)):
        sized = tmp_path / "sized.csv"
        sized.write_text(text)
        (tmp_path / "sized.csv.meta.json").write_text(table.with_name("scores.csv.meta.json").read_text())
        assert describe(paths[0], "-m", "qualiclip-mini", "--against", sized, "--json") == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["note"] is not None) == said and (not said or "most have 768 pixels" in found["note"])
    # Nor without percentiles.
    assert describe(paths[0], "-m", "piqe", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["note"] is None


def test_the_shipped_reference_is_of_the_shipped_models() -> None:
    content = tomllib.loads(REFERENCE.read_text(encoding="utf-8"))
    assert [model["name"] for model in content["models"]] == ["qualiclip-mini+", "qualiclip-mini"]
    for model in content["models"]:
        assert model["sha256"] == file_sha256(find(model["name"])), "run benchmarks/reference.py --write"
        assert list(model["pairs"]) == ["/".join(pair) for pair in LOOK.values()]
        for values in model["pairs"].values():
            assert len(values) == 101 and values == sorted(values) and 0 <= values[0] < values[-1] <= 1


def test_another_model_is_not_compared_with_the_shipped_reference() -> None:
    described = {
        "weights": {"sha256": file_sha256(find("qualiclip-mini"))},
        "temperature": 1.0,
        "resize": "at its own size",
    }
    pair = [LOOK["sharpness"]]
    assert shipped_reference().values("any", described, pair) is not None
    for change in ({"weights": {"sha256": "0" * 64}}, {"temperature": 2.0}, {"resize": "windows"}, {"weights": None}):
        assert shipped_reference().values("any", described | change, pair) is None
    assert shipped_reference().values("any", described, [("Clear photo.", "Foggy photo.")]) is None
    assert shipped_reference().values("any", described, pair * 2) is None


def test_a_profile_says_what_is_wrong() -> None:
    profiler = Profiler(device="cpu", workers=0)
    plain, blurred, noisy = profiler.profiles([PHOTO, BLURRED, NOISY])
    assert [trait.attribute.name for trait in plain.traits] == list(LOOK)
    assert "blurrier than 99 %" in blurred.unusual and "noisier than 99 %" in noisy.unusual
    assert not {"blurrier", "noisier", "worse"} & {text.split()[0] for text in plain.unusual}
    assert (plain.width, plain.height) == (512, 768)
    assert plain.reference == "800 photographs of the embedded models' training set"
    sharpness = blurred.traits[2].attribute
    assert (sharpness.column, sharpness.metric) == ("qualiclip-mini+:look.sharpness", "qualiclip-mini+:look")
    assert (sharpness.high, sharpness.low) == LOOK["sharpness"]


def test_one_image_in_memory() -> None:
    with Image.open(PHOTO) as opened:
        found = qualiclip_pyiqa.profile(opened.convert("RGB"), "qualiclip-mini:sharpness", device="cpu")
    assert found.path is None
    (trait,) = found.traits
    assert trait.percentile is not None and trait.attribute.name == "sharpness"
    with pytest.raises(ImageError, match="does not exist"):
        qualiclip_pyiqa.profile("none.png", device="cpu")


def trait(percent: float | None, pairs: tuple[tuple[str, str], ...], lower_better: bool = False) -> Trait:
    return Trait(Attribute("m", "m", "quality", pairs, lower_better, (0.0, 1.0), None), 0.5, percent)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (trait(3.0, (LOOK["sharpness"],)), "blurrier than 97 %"),
        (trait(0.0, (LOOK["noisiness"],)), "noisier than 99 %"),
        (trait(96.4, (LOOK["brightness"],)), "brighter than 96 %"),
        (trait(96.875, (LOOK["compression"],)), "less compressed than 97 %"),  # the table has 97 % too
        (trait(3.125, (LOOK["compression"],)), "more compressed than 97 %"),
        (trait(99.9, (LOOK["brightness"],)), "brighter than 99 %"),
        (trait(50.0, (LOOK["sharpness"],)), None),
        (trait(None, (LOOK["sharpness"],)), None),
        (trait(2.0, (("Clear photo.", "Foggy photo."),)), "closer to 'Foggy photo.' than 98 %"),
        (trait(2.0, (("Clear photo.", "Foggy photo."), ("a", "b"))), "closer to 'Foggy photo. (+1)' than 98 %"),
        (trait(2.0, (), lower_better=True), "worse than 98 %"),
    ],
)
def test_words_come_from_percentiles_alone(found: Trait, said: str | None) -> None:
    assert found.unusual == said


def test_text_names_pairs_directions_and_percentiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(PHOTO, BLURRED) == 0
    out = capsys.readouterr().out
    assert out.count("qualiclip-mini+:look") == 2
    row = next(line for line in out.partition("blurred")[2].splitlines() if line.strip().startswith("sharpness"))
    assert "<1 %" in row and row.endswith("Sharp photo. / Blurry photo.")
    assert "unusual: worse than 99 %, blurrier than 99 %" in out
    assert "800 photographs" in out


def test_against_a_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(PHOTO, "--against", table, "-m", "qualiclip-mini", "-m", "qualiclip-mini:sharpness", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    first, second = found["attributes"]
    assert found["reference"] == "7 images of scores.csv"
    assert 0 < first["percentile"] <= 100 and second["percentile"] is None
    assert second["prompts"] == [list(LOOK["sharpness"])]
    assert found["path"] == PHOTO and found["error"] is None


def test_a_table_without_these_scores_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(PHOTO, "--against", table, "-m", "qualiclip-mini:sharpness") == 2
    said = capsys.readouterr().err
    assert "has no scores of qualiclip-mini:sharpness; its scores: qualiclip-mini+:look.quality" in said
    assert said.count("\n") == 1


def test_a_refused_table_is_not_called_small(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert describe(PHOTO, "--against", table, "-m", "qualiclip-mini:sharpness") == 2
    assert not caplog.records
    assert describe(PHOTO, "--against", table, "-m", "qualiclip-mini") == 0
    assert any("so few" in record.getMessage() for record in caplog.records)


def test_a_table_of_another_model_is_refused(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "scores.csv"
    copied.write_bytes(table.read_bytes())
    meta = json.loads(table.with_name("scores.csv.meta.json").read_text())
    meta["columns"]["qualiclip-mini"]["weights"]["sha256"] = "0" * 64
    copied.with_name("scores.csv.meta.json").write_text(json.dumps(meta))
    assert describe(PHOTO, "--against", copied, "-m", "qualiclip-mini") == 2
    assert "scores of another qualiclip-mini: its weights differ" in capsys.readouterr().err
    copied.with_name("scores.csv.meta.json").unlink()
    assert describe(PHOTO, "--against", copied, "-m", "qualiclip-mini") == 0


def test_a_bad_image_among_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.png"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    assert describe(broken, PHOTO, tmp_path / "none.png", "--json", "-o", out) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2 and "none.png does not exist" in captured.err
    assert [each["error"] is None for each in json.loads(captured.out)] == [False, True, False]
    with Image.open(out) as drawn:
        assert drawn.width > 200
    assert describe(broken, "-o", tmp_path / "no.png") == 1
    assert not (tmp_path / "no.png").exists()
    assert "none of 1 image could be scored" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_several_images_are_drawn(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"profile.{suffix}"
    assert describe(PHOTO, BLURRED, "-m", "qualiclip-mini:sharpness", "-o", out) == 0
    kept = out.read_bytes()
    assert len(kept) > 1000
    assert describe(PHOTO, "-m", "qualiclip-mini:sharpness", "-o", out) == 2
    assert "pass --force to replace it" in capsys.readouterr().err
    assert out.read_bytes() == kept
    assert describe(PHOTO, "-m", "qualiclip-mini:sharpness", "-o", out, "--force") == 0
    assert out.read_bytes() != kept


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PHOTO, "--force"], "--force has no effect without -o FILE"),
        ([PHOTO, "-o", "profile.doc"], "expected a suffix of"),
        ([PHOTO] * 25 + ["-o", "profile.png"], "25 images; -o draws at most 24"),
        ([PHOTO, "--against", "none.csv"], "none.csv"),
        ([PHOTO, "--against", "nothere/"], "nothere cannot be read (No such file or directory); expected a table"),
        ([PHOTO, "-m", "qualiclip-mini:lok"], "did you mean 'look'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_figures_show_scores_without_a_reference_too(tmp_path: Path) -> None:
    class Dark(qualiclip_pyiqa.BlindMetric):
        def __init__(self) -> None:
            import torch

            super().__init__("dark", paper="none", score_range="", lower_better=True)
            self.tower = torch.nn.Identity()

        def encode(self, rgb):  # type: ignore[no-untyped-def]
            return 5 * rgb.mean(dim=(2, 3))

        def rate(self, features):  # type: ignore[no-untyped-def]
            return features.mean(dim=1, keepdim=True)

    profiler = Profiler({"dark": Dark(), "sharp": "qualiclip-mini:sharpness"}, device="cpu", workers=0)
    (found,) = profiler.profiles([PHOTO])
    assert found.traits[0].percentile is None and found.traits[1].percentile is not None
    assert (found.traits[0].attribute.high, found.traits[0].attribute.low) == ("worse", "better")
    figure = found.figure()
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert f"{found.traits[0].score:.3g}" in texts
    assert any("dark" in text for text in texts)
    with pytest.raises(SettingsError, match="0 profiles to draw; expected 1 to 24"):
        draw_profiles([], [])


def test_words_of_a_drawing_fit_into_their_panels(tmp_path: Path) -> None:
    paths = [tmp_path / f"{letter * 60}.png" for letter in "Wi"]
    Image.new("RGB", (64, 48), "white").save(paths[0])
    Image.new("RGB", (1100, 64), "grey").save(paths[1])
    pairs = "qualiclip-mini:look"
    found = list(Profiler(pairs, device="cpu", workers=0).profiles(map(str, paths)))
    figure = draw_profiles(found, [each.path for each in found])
    figure.canvas.draw()
    heads, rows = figure.axes[:2], figure.axes[2:]
    boxes = [axis.title.get_window_extent() for axis in heads]
    assert boxes[0].x0 >= 0 and boxes[0].x1 < boxes[1].x0 and boxes[1].x1 <= figure.bbox.x1
    assert all("..." in axis.get_title() and axis.get_title().endswith(".png") for axis in heads[:1])
    # A white image has a frame; what an image's size makes of its percentiles is said.
    assert all(len(axis.patches) == 1 for axis in heads)
    for axis, size in zip(heads, ("smaller", "larger"), strict=True):
        assert any(f"* far {size} than the images of the reference" in text.get_text() for text in axis.texts)
        assert f"* far {size} than" in figure.get_supxlabel()
    for axis in rows:
        texts = [text for text in axis.texts if text.get_text()]
        assert "Photo with compression artifacts." in [text.get_text() for text in texts]
        extents = [text.get_window_extent() for text in texts]
        assert not any(one.overlaps(other) for one, other in combinations(extents, 2))


def test_two_texts_share_a_line() -> None:
    assert fitted_ends("Dark photo.", "Bright photo.", 7, 3.3) == ("Dark photo.", "Bright photo.")
    left, right = fitted_ends("a " * 80 + "end", "short", 7, 3.3)
    assert right == "short" and "..." in left and left.endswith("end")
    both = fitted_ends("W" * 90, "W" * 90, 7, 3.3)
    assert sum(text_width(text, 7) for text in both) < 3.3


def test_what_makes_a_reference_weak_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("path,width,height,qualiclip-mini,error\na.png,64,64,0.5,\nb.png,64,64,0.6,\n")
    TableReference(table).check({"qualiclip-mini": {}})
    said = [record.getMessage() for record in caplog.records]
    assert any("scores.csv.meta.json" in line and "is not known" in line for line in said)
    assert any("scores.csv has 2 images with these scores: percentiles of so few" in line for line in said)
    # An image without a score is none of the reference.
    with table.open("a") as file:
        file.write("c.png,9000,9000,,c.png is damaged\n")
    found = TableReference(table)
    caplog.clear()
    found.check({"qualiclip-mini": {}})
    assert found.description == "2 images of scores.csv" and found.sides is not None and found.sides.high == 64
    assert any("scores.csv has 2 images with these scores" in record.getMessage() for record in caplog.records)
    rows = "".join(f"{number}.png,64,64,0.{number:03},\n" for number in range(100))
    table.write_text(f"path,width,height,qualiclip-mini,error\n{rows}")
    caplog.clear()
    TableReference(table).check({"qualiclip-mini": {}})
    assert not any("so few" in record.getMessage() for record in caplog.records)


def test_a_profile_is_printed_without_its_reference() -> None:
    found = qualiclip_pyiqa.profile(PHOTO, device="cpu")
    assert "array" not in repr(found) and "sharpness" in repr(found)
