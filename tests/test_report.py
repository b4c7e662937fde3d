"""Reports, the data side: what the page holds, and that it is whole, safe and beside nothing it may not replace."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image
from report_pages import ERROR, HOSTILE, data_of, hostile_table, save, write_scores

from qualiclip_pyiqa import SettingsError
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import visible
from qualiclip_pyiqa.metrics.prompts import QUALITY_SETS
from qualiclip_pyiqa.report import page as page_module
from qualiclip_pyiqa.report.beside import MARKER
from qualiclip_pyiqa.report.findings import near_duplicates, outliers, robust_z
from qualiclip_pyiqa.report.page import write_report
from qualiclip_pyiqa.report.previews import make_preview
from qualiclip_pyiqa.report.render import SCRIPTS, asset
from qualiclip_pyiqa.report.runs import Run
from qualiclip_pyiqa.report.settings import shown_settings
from qualiclip_pyiqa.report.text import link
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.tables import Record

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("hostile")
    report = write_report(hostile_table(folder), folder / "report.html", title=HOSTILE[0])
    assert (report.images, report.errors, report.previews) == (21, 1, 20)
    return folder, report.path.read_text(encoding="utf-8")


def test_page_has_the_table(hostile: tuple[Path, str]) -> None:
    folder, text = hostile
    data = data_of(text)
    with (folder / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [data["folder"] + path for path in data["paths"]] == [row["path"] for row in rows]
    for number, name in enumerate(("good", "bad")):
        assert data["values"][number] == [float(row[name]) if row[name] else None for row in rows]
    assert [column["lowerBetter"] for column in data["columns"]] == [False, True]
    assert data["errors"] == {"20": ERROR}
    assert data["duplicates"] == [[0, 19]]
    assert data["outliers"][0].keys() == {"12"} and data["outliers"][0]["12"] < -3.5


def test_hostile_names_stay_text(hostile: tuple[Path, str]) -> None:
    _, text = hostile
    elements = Elements(text).found
    assert not [each for each in elements if any(name.startswith("on") for name in each[1])]
    assert [attributes for tag, attributes in elements if tag == "img"] == [{"id": "full", "alt": ""}]
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert [each for each in scripts if each.get("type") != "application/json"] == [{}]  # ours alone
    assert "\u202e" not in text and "\udce9" not in text and "\0" not in text
    assert html.escape(ERROR.replace("\u202e", "\\u202e"), quote=False).replace("'", "&#39;") in text
    data = data_of(text)
    assert data["names"]["4"] == "right\\u202egnp.exe.png" and data["names"]["6"] == "latin\\xe9.png"


def test_links_lead_to_the_files(hostile: tuple[Path, str]) -> None:
    folder, text = hostile
    data = data_of(text)
    for number, name in enumerate(HOSTILE):
        address = data["linkStart"] + data["links"][number][0]
        assert re.fullmatch(r"\./images/[A-Za-z0-9._~%-]+", address)
        assert unquote_to_bytes(address) == b"./images/" + name.encode("utf-8", "surrogateescape")
        assert (folder / Path(address.split("/")[1]) / name).is_file()
    assert data["links"][20] == [None]


def test_policy_allows_this_style_and_script_and_nothing_from_elsewhere(hostile: tuple[Path, str]) -> None:
    _, text = hostile
    policy = next(attributes for tag, attributes in Elements(text).found if "http-equiv" in attributes)["content"]
    assert policy and policy.startswith("default-src 'none'; ") and "http" not in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    outside = [
        value for _, attributes in Elements(text).found for value in attributes.values() if value and "//" in value
    ]
    assert not outside
    assert "</script" not in "".join(asset(name) for name in SCRIPTS)


def test_previews_have_no_metadata_and_the_orientation_of_the_image(tmp_path: Path) -> None:
    wide = Image.open(save(tmp_path / "one.png", 1, (400, 100)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "<script>alert(3)</script>"
    wide.save(tmp_path / "turned.jpg", exif=exif)
    table = write_scores(tmp_path / "s.csv", [Record(str(tmp_path / "turned.jpg"), 100, 400, {"a": 1.0})], {"a": False})
    write_report(table, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert data_of(text)["previewSizes"] == [[100, 400]]
    (chunk,) = re.findall(r'id="previews-0">\["(.*?)"\]', text)
    assert b"alert(3)" not in base64.b64decode(chunk) and "alert(3)" not in text


def test_previews_keep_to_their_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    preview = make_preview(noise, 256, 4000)
    assert len(preview.data) <= 4000 and preview.hash is not None
    flat = np.full((64, 64), 65535, np.uint16)
    assert make_preview(flat, 256, 4000).hash is None
    assert make_preview(np.ones((64, 64, 4), np.float32), 256, 4000).width == 64


def test_robust_z_of_few_different_values() -> None:
    assert robust_z([1.0] * 9).tolist() == [0.0] * 9
    z = robust_z([1.0] * 9 + [2.0, float("nan")])
    assert z[9] == pytest.approx(1 / (1.2533 * 0.1)) and np.isnan(z[10])
    # A long tail is none of outliers, what lies beyond it is, and so is what lies apart on the short side.
    tail = (1 - np.linspace(0.001, 0.999, 400) ** 3).tolist()
    assert outliers(tail) == {} and list(outliers([*tail, 4.0, -3.0])) == [400, 401]
    assert outliers([0.5] * 6 + [9.0]) == {}  # too few to tell
    assert list(outliers([0.5] * 9 + [9.0])) == [9]


def test_near_duplicates_equal_all_pairs() -> None:
    draw = np.random.default_rng(0)
    hashes = [int(value) for value in draw.integers(0, 2**64, 300, dtype=np.uint64)]
    for near in range(40):
        bits = draw.choice(64, int(draw.integers(0, 9)), replace=False)
        hashes.append(hashes[near] ^ sum(1 << int(bit) for bit in bits))
    found = {tuple(group) for group in near_duplicates(hashes)}
    pairs = [(i, j) for i in range(340) for j in range(i + 1, 340) if (hashes[i] ^ hashes[j]).bit_count() <= 6]
    groups = [set(pair) for pair in pairs]
    assert len({group for group in found for i, j in pairs if {i, j} <= set(group)}) == len(found) > 20
    assert all(any(group <= set(each) for each in found) for group in groups)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    table = hostile_table(tmp_path)
    output = tmp_path / "r.html"
    write_report(table, output, thumbnails="beside")
    files = tmp_path / "r_files"
    assert (files / MARKER).is_file() and len(list(files.glob("000/*"))) == 20
    before = output.read_bytes()
    with pytest.raises(SettingsError, match="exists already"):
        write_report(table, output)
    output.unlink()
    with pytest.raises(SettingsError, match="r_files exists already"):
        write_report(table, output, thumbnails="beside")
    output.write_bytes(before)
    write_report(table, output, thumbnails="beside", force=True)
    addresses = data_of(output.read_text())["previewAddresses"]
    assert all((tmp_path / address).is_file() for address in addresses[:20]) and addresses[20] is None
    (files / MARKER).unlink()
    with pytest.raises(SettingsError, match="not the folder of an earlier report"):
        write_report(table, output, thumbnails="beside", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "images", "r.html", "r_files", "scores.csv", "scores.csv.meta.json",
    ]  # fmt: skip


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = hostile_table(tmp_path)
    write_report(table, tmp_path / "r.html", thumbnails="beside")
    (tmp_path / "r_files" / "mine.txt").write_text("kept")
    before = (tmp_path / "r.html").read_bytes(), sorted(tmp_path.rglob("*"))

    def broken(page: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module, "render", broken)
    with pytest.raises(OSError, match=r"r\.html cannot be written \(No space left"):
        write_report(table, tmp_path / "r.html", thumbnails="beside", force=True)
    assert ((tmp_path / "r.html").read_bytes(), sorted(tmp_path.rglob("*"))) == before


def test_many_images_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "INSIDE_MOST", 5)
    report = write_report(hostile_table(tmp_path), tmp_path / "r.html")
    assert report.folder == tmp_path / "r_files" and data_of(report.path.read_text())["previewSlots"] is None


def test_two_runs_are_compared_by_place_and_name(tmp_path: Path) -> None:
    first, second = [], []
    for number in range(4):
        first.append(Record(save(tmp_path / "before" / "x" / f"{number}.png", number), 96, 64, {"q": 0.1 * number}))
        second.append(Record(save(tmp_path / "after" / "x" / f"{number}.jpg", number), 96, 64, {"q": 0.3}))
    one = write_scores(tmp_path / "one.csv", first, {"q": True})
    two = write_scores(tmp_path / "two.csv", second[:3], {"q": True})
    write_report(one, tmp_path / "r.html", two)
    data = data_of((tmp_path / "r.html").read_text())
    assert data["joined"].endswith("without suffix") and data["runs"] == ["one", "two"]
    assert [column["name"] for column in data["columns"]] == ["q · change", "q · one", "q · two"]
    assert data["pairs"] == [[1, 2, 0]] and data["columns"][0]["lowerBetter"]
    assert data["values"][0] == [pytest.approx(0.3), pytest.approx(0.2), pytest.approx(0.1), None]
    assert [len([each for each in links if each]) for links in data["links"]] == [2, 2, 2, 1]
    with pytest.raises(SettingsError, match="same direction"):
        write_report(one, tmp_path / "s.html", write_scores(tmp_path / "three.csv", second, {"q": False}))
    other = write_scores(tmp_path / "four.csv", [Record("elsewhere.png", 1, 1, {"q": 1.0})], {"q": True})
    with pytest.raises(SettingsError, match="no image of"):
        write_report(one, tmp_path / "s.html", other)
    assert not (tmp_path / "s.html").exists()


def test_two_folders_are_matched_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("one", "a"), ("two", "a"), ("three", "b")):
        save(tmp_path / folder / f"{name}.png", len(folder))
    metric = "qualiclip-mini"
    table = write_scores(tmp_path / "t.csv", [Record("a.png", 96, 64, {metric: 0.1})], {metric: True})
    write_report(tmp_path / "one", tmp_path / "r.html", tmp_path / "two", metrics=[metric], maps=False)
    data = data_of((tmp_path / "r.html").read_text())
    assert data["runs"] == ["one", "two"] and [len(each) for each in data["values"]] == [1, 1, 1]
    assert data["values"][0][0] == pytest.approx(data["values"][2][0] - data["values"][1][0])

    monkeypatch.setattr(Scorer, "score", lambda *_, **__: pytest.fail("images are scored"))
    for second, message in (
        (tmp_path / "three", f"no image of {tmp_path / 'one'} is in {tmp_path / 'three'}"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (table, f"a lower {metric} is better in only one of"),
    ):
        line = ["report", str(tmp_path / "one"), str(second), "-o", str(tmp_path / "s.html"), "-m", metric]
        assert cli.main(line) == 2
        assert message in capsys.readouterr().err


def test_a_folder_is_scored_and_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lighthouse", "lighthouse-blurred"):
        with Image.open(PHOTOS / f"{name}.jpg") as photo:
            photo.resize((192, 256)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    command = ["report", str(tmp_path), "-m", "qualiclip-mini+:look", "-o", str(tmp_path / "r.html"), "--device", "cpu"]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "r.html") and "3 images, 1 with an error" in said.err
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    data = data_of(text)
    assert [column["label"] for column in data["columns"]][:3] == ["quality", "brightness", "sharpness"]
    assert data["mapped"] == [1, 2] and set(data["mapScales"]) == {str(number) for number in range(7)}
    assert len(re.findall(r'id="maps-\d+"', text)) == 2
    assert cli.main(command) == 2  # it is not overwritten
    assert "--force" in capsys.readouterr().err


def test_settings_are_shown_once_for_each_metric_and_without_folders(tmp_path: Path) -> None:
    prompts = {"quality": [["Good photo.", "Bad photo."]], "fog": [["Clear.", "Foggy."], ["Sunny.", "Misty."]]}
    path = "/home/somebody/secret place/model.safetensors"
    weights = {"file": "model.safetensors", "path": path, "sha256": "0123abcd", "detail": f"{path} was seen"}
    shared = {"prompts": prompts, "weights": weights}
    other = {"context": {"path": r"C:\Users\somebody\x.safetensors"}, "prompts": "damaged"}
    meta = {"version": "0", "columns": {"m_1:s.quality": shared, "m_1:s.fog": {**shared}, "piqe": other}}
    assert shown_settings(Run("t", Path("t.csv"), tuple(meta["columns"]), {}, (), meta)) == {
        "metrics": {
            "m_1:s": {
                "prompts": {"quality": "Good photo. / Bad photo.", "fog": ["Clear. / Foggy.", "Sunny. / Misty."]},
                "weights": {
                    "file": "model.safetensors",
                    "sha256": "0123abcd",
                    "detail": "model.safetensors was seen",
                },
            },
            "piqe": {"context": {"path": "x.safetensors"}, "prompts": "damaged"},
        },
        "version": "0",
    }
    # Attributes that were scored by different models are two blocks.
    meta = {"columns": {**meta["columns"], "m_1:s.fog": {**shared, "weights": {"sha256": "ef"}}}}
    run = Run("t", Path("t.csv"), tuple(meta["columns"]), {}, (), meta)
    assert list((shown_settings(run) or {})["metrics"]) == ["m_1:s", "m_1:s.fog", "piqe"]
    assert shown_settings(Run("t", Path("t.csv"), (), {}, (), None)) is None
    table = write_scores(tmp_path / "s.csv", [Record("gone.png", 96, 64, {"m_1:s.fog": 0.5})], {"m_1:s.fog": False})
    (tmp_path / "s.csv.meta.json").write_text(json.dumps(meta))
    text = write_report(table, tmp_path / "r.html", maps=False).path.read_text(encoding="utf-8")
    assert "somebody" not in text and "<dt>m_1:s</dt>" in text and text.count("Good photo. / Bad photo.") == 2


def test_the_sets_of_a_prompt_file_are_scored_and_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    with Image.open(PHOTOS / "lighthouse.jpg") as photo:
        photo.resize((96, 128)).save(tmp_path / "photos" / "small.png")
    sets, table = tmp_path / "sets.toml", tmp_path / "scores.csv"
    sets.write_text("[mine]\nedges = ['Sharp photo.', 'Blurry photo.']\n")
    metric = ["-m", "qualiclip-mini:mine", "--device", "cpu"]
    assert cli.main(["score", str(tmp_path / "photos"), "-o", str(table), *metric, "--prompts", str(sets)]) == 0
    # A table keeps the prompts, so its maps need no file.
    for source, options in ((tmp_path / "photos", [*metric, "--prompts", str(sets)]), (table, [])):
        page = tmp_path / f"{source.stem}.html"
        assert cli.main(["report", str(source), "-o", str(page), "--maps", *options]) == 0
        data = data_of(page.read_text(encoding="utf-8"))
        assert [column["name"] for column in data["columns"]] == ["qualiclip-mini:mine"]
        assert set(data["mapScales"]) == {"0"}
    capsys.readouterr()
    assert cli.main(["report", str(table), "-o", str(tmp_path / "no.html"), "--prompts", str(sets)]) == 2
    assert "--prompts has no effect on a table of scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report none.csv -o r.html", "none.csv cannot be read"),
        ("report s.csv -o r.txt", "expected a page, *.html"),
        ("report s.csv -o none/r.html", "none is not a folder"),
        ("report s.csv -m niqe -o r.html", "no score 'niqe'"),
        ("report s.csv -o r.html --ignore-profile", "--ignore-profile has no effect"),
        ("report s.csv -o r.html --maps", "unknown metric 'a'"),
        ("report empty -o r.html", "no images in empty"),
        ("report nothere/ -o r.html", "nothere does not exist; expected a folder of images, or a table of scores"),
        ("report s.csv nothere -o r.html", "nothere does not exist"),
    ],
)
def test_bad_input_gets_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_scores(tmp_path / "s.csv", [Record(save(tmp_path / "i.png", 1), 96, 64, {"a": 1.0})], {"a": False})
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("qualiclip: ") and message in line
    assert not (tmp_path / "r.html").exists()


def test_text_is_made_visible() -> None:
    assert visible("a\0b\x1b[31m\u2066") == "a\\x00b\\x1b[31m\\u2066"
    assert link("//host/x.png", Path("/y")).startswith("../")


@pytest.mark.parametrize(
    ("column", "prompts", "word"),
    [
        ("m", {"quality": [["Good photo.", "Bad photo."]]}, "better"),
        ("m.brightness", {"quality": [], "brightness": [["Bright photo.", "Dark photo."]]}, "brighter"),
        ("m", {"fog": [["Clear photo.", "Foggy photo."]]}, "closer to 'Clear photo.'"),
        ("m", {"quality": [list(pair) for pair in QUALITY_SETS["qualiclip"]]}, "better"),
        ("m", {"quality": [["Good photo.", "Bad photo."]] * 2}, "closer to 'Good photo. (+1)'"),
        ("m", {"quality": []}, "better"),
        ("m", {"quality": "damaged"}, "better"),
        ("m", None, "better"),
    ],
)
def test_more_of_what_describes_an_image_is_not_called_better(column: str, prompts: object, word: str) -> None:
    meta = {"columns": {column: {"prompts": prompts, "lower_better": False}}}
    run = Run("t", Path("t.csv"), (column,), {column: False}, (), meta)
    assert run.comparative(column) == word
