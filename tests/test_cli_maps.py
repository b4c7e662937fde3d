"""`qualiclip explain` and `qualiclip score --maps`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli_score import picture, rows, score

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.explain import drawing
from qualiclip_pyiqa.explain import folder as folder_module
from qualiclip_pyiqa.explain.drawing import draw_maps
from qualiclip_pyiqa.explain.folder import MapFolder
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.explain.quality_map import QualityMap

pytest.importorskip("matplotlib")


def explain(*arguments: object) -> int:
    return cli.main(["explain", *map(str, arguments), "--device", "cpu"])


def test_a_drawing_and_the_relations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = picture(tmp_path / "a.png"), tmp_path / "map.png"
    look = ("-m", "qualiclip-mini:look", "--attribute", "sharpness", "--attribute", "noisiness")
    assert explain(image, *look, "-o", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[2] for line in lines] == ["sharpness", "noisiness"]
    with Image.open(out) as drawn:
        assert drawn.width > drawn.height > 100
    before = out.read_bytes()
    assert explain(image, "-o", out) == 2
    assert "exists already; pass --force" in capsys.readouterr().err and out.read_bytes() == before
    assert explain(image, "-o", out, "--force") == 0 and out.read_bytes() != before


def test_several_images_have_numbered_drawings(tmp_path: Path) -> None:
    images = [picture(tmp_path / f"{number}.png") for number in range(2)]
    assert explain(*images, "-m", "qualiclip-mini", "-m", "qualiclip-mini+", "-o", tmp_path / "map.svg") == 0
    assert sorted(path.name for path in tmp_path.glob("map*")) == ["map-1.svg", "map-2.svg"]


def test_one_scale_for_all_drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def watched(picture: object, maps: list[QualityMap], title: str = "") -> object:
        drawn.extend((each.low, each.high) for each in maps)
        return draw_maps(picture, maps, title)

    monkeypatch.setattr(drawing, "draw_maps", watched)
    monkeypatch.setattr(folder_module, "draw_maps", watched)
    images = [picture(tmp_path / "a.png"), Path(__file__).parents[1] / "examples" / "photos" / "hats.jpg"]
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
        (["0.png", "-o", "map.png", "--kind", "contributions"], 2, "kinds that work: local"),
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
    drawn = sorted(path.name for path in maps.iterdir())
    assert len(drawn) == 4 and all(name.isascii() and name.isprintable() and name[0] != "-" for name in drawn)
    assert sum(name.startswith("x-") for name in drawn) == 2
    for path in maps.iterdir():
        with Image.open(path) as image:
            image.load()


def test_no_map_is_replaced_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, maps, table = picture(tmp_path / "a.png"), tmp_path / "maps", tmp_path / "s.csv"
    assert score(image, "--maps", maps, "--workers", 0) == 0
    (drawn,) = maps.iterdir()
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
    assert "2 images mapped" in capsys.readouterr().err and len(list(maps.iterdir())) == 2
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
