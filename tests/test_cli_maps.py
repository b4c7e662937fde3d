"""`qualiclip explain` and `qualiclip score --maps`."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import upstream
from PIL import Image
from test_cli_score import picture, rows, score

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.explain import drawing
from qualiclip_pyiqa.explain import folder as folder_module
from qualiclip_pyiqa.explain.drawing import draw_maps
from qualiclip_pyiqa.explain.folder import MapFolder
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.explain.quality_map import QualityMap
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.pretrained.manifest import manifest
from qualiclip_pyiqa.report.reference import shipped_reference
from qualiclip_pyiqa.scoring.tables.csv_rows import CsvRows

pytest.importorskip("matplotlib")


def explain(*arguments: object) -> int:
    return cli.main(["explain", *map(str, arguments), "--device", "cpu"])


def test_a_drawing_and_the_relations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = picture(tmp_path / "a.png"), tmp_path / "map.png"
    look = ("-m", "qualiclip-mini:look", "--attribute", "sharpness", "--attribute", "noisiness")
    assert explain(image, *look, "-o", out) == 0
    first, *scores, relation = capsys.readouterr().out.splitlines()
    assert first == f"{image}  {out}" and relation.startswith("  sharpness, noisiness: windows have a head")
    assert [line.split("  ")[2] for line in scores] == ["sharpness", "noisiness"]
    with Image.open(out) as drawn:
        assert drawn.width > drawn.height > 100
    before = out.read_bytes()
    assert explain(image, "-o", out) == 2
    assert "exists already; pass --force" in capsys.readouterr().err and out.read_bytes() == before
    assert explain(image, "-o", out, "--force") == 0 and out.read_bytes() != before


def test_several_images_have_numbered_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [picture(tmp_path / f"{number}.png") for number in range(2)]
    assert explain(*images, "-m", "qualiclip-mini", "-m", "qualiclip-mini+", "-o", tmp_path / "map.svg") == 0
    assert sorted(path.name for path in tmp_path.glob("map*")) == ["map-1.svg", "map-2.svg"]
    said = capsys.readouterr().out
    for number, image in enumerate(images, start=1):
        assert f"{image}  {tmp_path / f'map-{number}.svg'}\n" in said
    assert said.count("one window as large as the image") == 1  # not for each image and metric


def test_a_bad_image_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    picture(tmp_path / "small.png", 16, 16)
    images = [tmp_path / "bad.png", good, tmp_path / "none.png", tmp_path / "small.png", good]
    assert explain(*images, "-m", "qualiclip-mini", "-o", tmp_path / "map.png") == 1
    said = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.glob("map*")) == ["map-2.png", "map-5.png"]
    lines = said.err.splitlines()
    assert [name in line for name, line in zip(("bad.png", "none.png", "small.png"), lines, strict=True)] == [True] * 3
    assert "map-2.png" in said.out and "map-5.png" in said.out and "map-1.png" not in said.out


def test_an_image_far_larger_than_the_training_photographs_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, usual = picture(tmp_path / "large.png", 1030, 64), picture(tmp_path / "usual.png", 1000, 64)
    metrics = ("-m", "qualiclip-mini:sharpness")
    assert explain(large, *metrics, "-o", tmp_path / "large.svg") == 0
    said = capsys.readouterr().out
    assert said.count("far larger than the photographs that the model was fitted to (most have 512 pixels") == 1
    assert explain(usual, *metrics, "-o", tmp_path / "usual.svg") == 0
    assert "far larger" not in capsys.readouterr().out
    # The drawings say it too.
    mapper = Mapper("qualiclip-mini:sharpness", device="cpu")
    for image, noted in ((large, True), (usual, False)):
        rgb = load_image(image)
        figure = draw_maps(rgb, mapper.maps(rgb[None])[0])
        assert ("can be upside down" in " ".join(figure.get_supxlabel().split())) == noted


def test_the_side_of_the_training_photographs_is_that_of_the_reference() -> None:
    sides = {record.fitted_side for record in manifest().values() if record.fitted_side}
    assert sides == {shipped_reference().sides.high}


def test_words_of_neighbouring_maps_do_not_overlap() -> None:
    rgb = upstream.pictures(1, 64, 96)[0]
    maps = Mapper("qualiclip-mini:look", device="cpu").maps(rgb[None])[0]
    figure = draw_maps(rgb, maps)
    figure.canvas.draw()
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label) if text.get_text().strip()]
    boxes = [text.get_window_extent() for text in [*texts, figure.findobj(lambda each: each is figure._supxlabel)[0]]]
    assert len(boxes) > 20 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize(
    "words",
    [("stronger in contrast", "weaker in contrast"), ("x" * 70, "stronger in contrast"), ("closer to 'A'", "a " * 40)],
)
def test_labels_of_colour_bars_stay_below_their_panels(words: tuple[str, str]) -> None:
    values = np.array([[0.0, 1.0]], np.float32)
    made = QualityMap(values, (32, 64), (32, 32), "m", "a", "occlusion", 0.5, 0, 1, "", "", words)
    local = QualityMap(values, (32, 64), (32, 32), "m", "a", "local", 0.5, 0, 1, "", "", words)
    figure = draw_maps(np.zeros((32, 64), np.uint8), [made, local, local])
    figure.canvas.draw()
    bars = [axis for axis in figure.axes if hasattr(axis, "_colorbar") and axis.get_xlabel().strip()]
    spans = sorted((bar.xaxis.label.get_window_extent() for bar in bars), key=lambda each: each.x0)
    assert len(spans) == 3 and spans[-1].x1 <= figure.bbox.x1
    assert all(left.x1 < right.x0 for left, right in pairwise(spans))


def test_an_index_names_the_map_of_every_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps, table = tmp_path / "maps", tmp_path / "s.csv"
    names = ["写真.png", 'Ünï, "q".png', "हिन्दी.png", "plain.png", "line\nbreak.png"]
    images = [picture(tmp_path / "in" / name) for name in names]
    assert score(*images, "--maps", maps, "-o", table, "--workers", 0) == 0
    index = index_of(maps)
    assert list(index) == [record.path for record in rows(table)] == list(map(str, images))
    assert {path.name for path in maps.iterdir()} == {*index.values(), "maps.csv"}
    stems = [name.rpartition("-")[0] for name in index.values()]
    assert stems == ["写真", "Ünï_q", "हिन्दी", "plain", "line_break"]
    # A killed process leaves half a row, or a drawing without one.
    file = maps / "maps.csv"
    whole = file.read_bytes()
    for left in (whole[:-5], whole[: whole.rindex(b"plain") - 40], b""):
        file.write_bytes(left)
        assert score(*images, "--maps", maps, "-o", table, "--workers", 0, "--resume") == 0
        assert index_of(maps) == index
    assert score(*images, "--maps", maps, "-o", tmp_path / "t.csv", "--workers", 0, "--force") == 0
    assert file.read_bytes().count(b"path,map") == 1 and index_of(maps) == index
    assert len(list(CsvRows(file).rows())) == len(names)
    capsys.readouterr()
    file.write_text("mine\n")
    assert score(*images, "--maps", maps, "--force") == 2
    said = capsys.readouterr()
    assert "maps.csv is not an index of maps (path,map); choose another folder" in said.err and said.out == ""
    assert file.read_text() == "mine\n"


def index_of(maps: Path) -> dict[object, str]:
    return {cells["path"]: str(cells["map"]) for _, cells in CsvRows(maps / "maps.csv").rows()}


def drawn_in(maps: Path) -> list[Path]:
    return sorted(maps.glob("*.png"))


def test_one_scale_for_all_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def watched(picture: object, maps: list[QualityMap], title: str = "") -> object:
        drawn.extend((each.low, each.high) for each in maps)
        return draw_maps(picture, maps[:1], title)  # which is quick

    monkeypatch.setattr(drawing, "draw_maps", watched)
    monkeypatch.setattr(folder_module, "draw_maps", watched)
    images = [picture(tmp_path / "a.png"), tmp_path / "hats.png"]
    with Image.open(Path(__file__).parents[1] / "examples" / "photos" / "hats.jpg") as photo:
        photo.resize((192, 128)).save(images[1])
    common = ("-m", "qualiclip-mini:look")
    assert explain(*images, *common, "-o", tmp_path / "own.png") == 0 and len(set(drawn)) == 14
    drawn.clear()
    assert explain(*images, *common, "-o", tmp_path / "one.png", "--range", 0.25, 0.5) == 0
    assert score(*images, *common, "--maps", tmp_path / "maps", "--map-range", 0.25, 0.5, "--workers", 0) == 0
    assert drawn == [(0.25, 0.5)] * 28


def test_values_beyond_a_scale_are_shown_by_its_ends() -> None:
    values = np.array([[0.0, 1.0]], np.float32)
    made = QualityMap(values, (32, 64), (32, 32), "m", "a", "local", 0.5, 0, 1, "", "")
    for scale, extend in (((0, 1), "neither"), ((0.5, 1), "min"), ((0, 0.5), "max"), ((0.4, 0.5), "both")):
        figure = made.scaled(*scale).figure(np.zeros((32, 64), np.uint8))
        bars = [axis._colorbar.extend for axis in figure.axes if hasattr(axis, "_colorbar")]
        assert bars[-1] == extend


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["0.png", "-o", "map.png", "--range", "0.5", "0.5"], 2, "colours is 0.5 0.5; expected two numbers, the lower"),
        (["0.png", "-o", "map.png", "--range", "0", "inf"], 2, "colours is 0 inf; expected two numbers, the lower"),
        (["missing.png", "-o", "map.png"], 1, "missing.png"),
        (["0.png", "-o", "map.txt"], 2, "expected a suffix of"),
        (["0.png", "-o", "nowhere/map.png"], 2, "nowhere is not a folder"),
        (["0.png", "-o", "map.png", "--kind", "heat"], 2, "kind is 'heat'"),
        (["0.png", "-o", "map.png", "--kind", "contributions"], 2, "kinds that work: local, gradcam, occlusion"),
        (["0.png", "-o", "map.pgf"], 2, "expected a suffix of .png, .svg, .pdf, .jpg"),
        (["0.png", "-o", "map.png", "--attribute", "beauty"], 2, "has no attribute 'beauty'; expected one of quality"),
        (["0.png", "-o", "map.png", "-m", "qualiclp-mini"], 2, "did you mean .qualiclip-mini"),
        (["text.png", "-o", "map.png"], 1, "text.png"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    assert explain(*arguments) == status
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("qualiclip:")]
    assert re.search(message, line) and "Traceback" not in said.err and said.out == ""
    assert not list(tmp_path.glob("map*"))


def test_every_scored_image_has_a_map_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal names in two folders, and names that are hostile to file systems, shells and mathtext."""
    names = ["a/x.png", "b/x.png", "a/$x_1^2$ <b>\n.png", "a/-rf.png"]
    for name in names:
        picture(tmp_path / name)
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    maps, table = tmp_path / "maps", tmp_path / "s.csv"
    assert score(tmp_path / "a", tmp_path / "b", "--maps", maps, "-o", table, "--workers", 0) == 1
    said = capsys.readouterr().err
    assert "4 images mapped to" in said and len(rows(table)) == 5
    drawn = [path.name for path in drawn_in(maps)]
    assert len(drawn) == 4 and all(name.isascii() and name.isprintable() and name[0] != "-" for name in drawn)
    assert sum(name.startswith("x-") for name in drawn) == 2
    for path in drawn_in(maps):
        with Image.open(path) as image:
            image.load()


def test_no_map_is_replaced_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, maps, table = picture(tmp_path / "a.png"), tmp_path / "maps", tmp_path / "s.csv"
    assert score(image, "--maps", maps, "--workers", 0) == 0
    (drawn,) = drawn_in(maps)
    drawn.write_bytes(b"mine")
    capsys.readouterr()
    assert score(image, "--maps", maps, "-o", table, "--workers", 0) == 2
    said = capsys.readouterr()
    assert "exists already; pass --force" in said.err and not table.exists()
    assert drawn.read_bytes() == b"mine"
    assert score(image, "--maps", maps, "-o", table, "--workers", 0, "--force") == 0
    assert drawn.read_bytes() != b"mine"


def test_resuming_draws_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps, table = tmp_path / "maps", tmp_path / "s.csv"
    first = picture(tmp_path / "p" / "a.png")
    assert score(first, "-o", table, "--workers", 0) == 0
    picture(tmp_path / "p" / "b.png")
    assert score(tmp_path / "p", "-o", table, "--workers", 0, "--maps", maps, "--resume") == 0
    assert "2 images mapped" in capsys.readouterr().err and len(drawn_in(maps)) == 2
    assert score(tmp_path / "p", "-o", table, "--workers", 0, "--maps", maps, "--resume") == 0
    assert "0 images mapped" in capsys.readouterr().err


def test_a_map_that_fails_loses_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(tmp_path / f"{number}.png") for number in range(2)]
    draw = MapFolder.write

    def fail(self: MapFolder, name: str, source: object) -> Path:
        if name.endswith("0.png"):
            raise OSError("No space left on device\nindeed")
        return draw(self, name, source)  # type: ignore[arg-type]

    monkeypatch.setattr(MapFolder, "write", fail)
    table = tmp_path / "s.csv"
    assert score(*images, "--maps", tmp_path / "maps", "-o", table, "--workers", 0) == 1
    said = capsys.readouterr().err
    assert "0.png: No space left on device indeed" in said and "1 image mapped" in said and "1 with an error" in said
    assert [record.error for record in rows(table)] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--force"], "--force has no effect without --maps DIR"),
        (["--maps", "a.png"], "a.png is a file; expected a folder"),
        (["--maps", ".", "-o", "maps.csv"], "maps.csv is the index of --maps .; choose another name"),
        (["--maps", "maps", "--engine", "ray"], "--maps has no effect with --engine ray"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert score("a.png", *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_names_of_drawings_are_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = MapFolder(tmp_path / "maps", [Mapper("qualiclip-mini", device="cpu")])
    assert folder.path("a/b.png") == folder.path("./a//b.png") == folder.path(str(tmp_path / "a" / "b.png"))
    assert folder.path("a/b.png") != folder.path("b.png")
    assert len(folder.path("x" * 300 + ".png").name) < 100
    assert folder.path("\udcff.png").name.startswith("image-")
