"""Full-reference metrics: which reference belongs to which image, and what a run with references leaves unchanged."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_metric import SmallMetric
from test_cli_score import rows, score

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.images.convert import read_pixels
from qualiclip_pyiqa.report.profile import Profiler
from qualiclip_pyiqa.report.runs import plan_runs
from qualiclip_pyiqa.scoring.ray import RayScorer
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.sources import ReferenceFolder, pair
from qualiclip_pyiqa.scoring.tables import Record, read_meta, read_table
from qualiclip_pyiqa.scoring.tables.meta import meta_path

RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _same_pixels_in_any_order_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(5))


class Difference(torch.nn.Module):
    """The mean absolute difference of an image and its reference."""

    metric_mode = "FR"
    lower_better = True

    def forward(self, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (x - reference).abs().mean()[None]


def pixels(width: int = 48, height: int = 40) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Images, and references of most: `b` and `sub/c` with another suffix than their images, none of `d`."""
    images, references = tmp_path / "images", tmp_path / "references"
    for name, other in {"a.png": "a.png", "b.jpg": "b.png", "d.png": None, "sub/c.png": "sub/c.bmp"}.items():
        reference = pixels()
        save(
            images / name, np.clip(reference.astype(int) + RNG.integers(-20, 20, reference.shape), 0, 255).astype("u1")
        )
        if other is not None:
            save(references / other, reference)
    save(references / "c.png", pixels())  # of the same name as sub/c.png, but not in the same place
    return images, references


def expected_psnr(image: Path, reference: Path) -> float:
    metric = pyiqa.create_metric("psnr", device="cpu")
    return metric(load_image(image)[None], load_image(reference)[None]).item()


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_full_and_no_reference_scores_in_one_table(
    suffix: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, references = folders
    out, alone = tmp_path / f"s.{suffix}", tmp_path / f"alone.{suffix}"
    metrics = ("-m", "psnr", "-m", "qualiclip-mini", "-m", "gmsd")
    assert score(images, "--reference", references, *metrics, "-o", out, "--batch-size", 1) == 1
    said = capsys.readouterr().err
    assert "psnr (higher is better): count 3" in said and "gmsd (lower is better): count 3" in said
    assert score(images, "-m", "qualiclip-mini", "-o", alone, "--batch-size", 1) == 0
    found = rows(out)
    assert [row.path for row in found] == [str(images / name) for name in ("a.png", "b.jpg", "d.png", "sub/c.png")]
    partners = {"a.png": "a.png", "b.jpg": "b.png", "sub/c.png": "sub/c.bmp"}
    for row in found:
        name = str(Path(str(row.path)).relative_to(images).as_posix())
        if name == "d.png":
            assert row.scores.keys() == {"qualiclip-mini"} and row.error == (
                f"reference: {references / 'd.png'} does not exist, nor an image of that name with another suffix; "
                "expected one"
            )
        else:
            assert row.error is None
            assert row.scores["psnr"] == pytest.approx(expected_psnr(images / name, references / partners[name]), 1e-6)
    assert [row.scores["qualiclip-mini"] for row in found] == [row.scores["qualiclip-mini"] for row in rows(alone)]
    described = read_meta(out)
    assert described is not None
    assert described["references"] == {"path": str(references), "pairing": "by name"}
    assert [each["lower_better"] for each in described["columns"].values()] == [False, False, True]
    needs = "needed: the score compares an image with its reference"
    assert [each.get("reference") for each in described["columns"].values()] == [needs, None, needs]
    assert "references" not in (read_meta(alone) or {})
    if suffix == "parquet":  # the copy in the file itself
        meta_path(out).unlink()
        assert read_meta(out) == described


def test_one_file_is_the_reference_of_every_image(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, references = folders
    out = tmp_path / "s.csv"
    assert score(images / "a.png", "--reference", references / "a.png", "-m", "psnr", "-o", out) == 0
    assert rows(out)[0].scores["psnr"] == pytest.approx(expected_psnr(images / "a.png", references / "a.png"), 1e-6)
    out = tmp_path / "all.csv"
    assert score(images, "--reference", references / "a.png", "-m", "psnr", "-o", out) == 0
    assert [row.scores["psnr"] for row in rows(out)] == [
        pytest.approx(expected_psnr(Path(str(row.path)), references / "a.png"), 1e-6) for row in rows(out)
    ]
    meta = read_meta(out) or {}
    assert meta["references"] == {"path": str(references / "a.png"), "pairing": "one for all images"}


def test_each_fault_of_a_reference_is_one_line_in_its_row(folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, references = folders
    original = pixels()
    for name in ("damaged", "larger", "several", "turned", "locked/x"):
        save(images / f"{name}.png", original)
    (references / "damaged.png").write_bytes(b"no image")
    save(references / "larger.png", pixels(50, 41))
    for other in ("bmp", "tif"):
        save(references / f"several.{other}", original)
    save(references / "turned.png", np.rot90(original))
    (references / "locked").write_text("a file in place of a folder")
    (images / "broken.png").write_bytes(b"no image")
    out = tmp_path / "s.csv"
    assert score(images, "--reference", references, "-m", "psnr", "-m", "qualiclip-mini", "-o", out) == 1
    found = {Path(str(row.path)).stem: row for row in rows(out)}
    assert list(found) == [
        *("a", "b", "broken", "d", "damaged", "larger", "x", "several", "c", "turned"),
    ]  # in the order of their paths
    errors = {name: row.error for name, row in found.items() if row.error is not None}
    assert errors.pop("broken").startswith(f"{images / 'broken.png'} is not an image")
    assert all(set(found[name].scores) == {"qualiclip-mini"} for name in errors)
    assert errors.pop("damaged").startswith(f"reference: {references / 'damaged.png'} is not an image")
    sizes = "pixels, the image 48x40; expected equal sizes"
    assert errors == {
        "d": f"reference: {references / 'd.png'} does not exist, nor an image of that name with another suffix; "
        "expected one",
        "larger": f"reference: {references / 'larger.png'} is 50x41 {sizes}",
        "several": f"reference: {references / 'several.png'} does not exist, and 2 images have that name with another "
        "suffix (several.bmp, several.tif); expected one",
        "turned": f"reference: {references / 'turned.png'} is 40x48 {sizes}",
        "x": f"reference: {references / 'locked' / 'x.png'} does not exist, nor an image of that name with another "
        "suffix; expected one",
    }


def test_references_follow_the_rules_of_reading(tmp_path: Path) -> None:
    """EXIF orientation, on both sides or on one, as for every image."""
    upright = pixels(64, 40)
    reference = save(tmp_path / "r.png", upright)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a turn by 90 degrees to the right
    image = save(tmp_path / "i.png", np.rot90(upright).copy(), exif=turned)
    (record,) = Scorer("psnr", device="cpu", workers=0).score(image, reference)
    assert record.error is None and record.scores["psnr"] > 70
    (record,) = Scorer("psnr", device="cpu", workers=0, ignore_orientation=True).score(image, reference)
    assert record.error == f"reference: {reference} is 64x40 pixels, the image 40x64; expected equal sizes"
    (record,) = Scorer("psnr", device="cpu", workers=0, max_pixels=2000).score(upright[:32, :32], reference)
    assert record.error is not None and record.error.startswith(f"reference: {reference} is too large")


def test_resume_with_the_same_references_alone(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, references = folders
    out, whole = tmp_path / "s.csv", tmp_path / "whole.csv"
    options = ("-m", "psnr", "-m", "qualiclip-mini", "--batch-size", 1)
    assert score(images / "a.png", images / "b.jpg", "--reference", references, *options, "-o", out) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert score(images, "--reference", references / "a.png", *options, "-o", out, "--resume") == 2
    said = capsys.readouterr().err
    assert f"references path was {str(references)[:10]}" in said and "resume with the same settings" in said
    assert score(images, *options[2:], "-o", out, "--resume") == 2 and out.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert score(images, "--reference", "images/../references", *options, "-o", out, "--resume") == 1
    assert score(images, "--reference", references, *options, "-o", whole) == 1
    assert [(row.path, row.scores) for row in rows(out)] == [(row.path, row.scores) for row in rows(whole)]
    assert len(rows(out)) == 4


def test_images_in_parquet_have_one_reference_or_none(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    images, references = folders
    data, out = tmp_path / "data.parquet", tmp_path / "s.csv"
    files = [images / "a.png", images / "d.png"]
    pyarrow.parquet.write_table(pyarrow.table({"image": [path.read_bytes() for path in files]}), data)
    assert score(data, "--reference", references / "a.png", "-m", "psnr", "-o", out) == 0
    assert [row.scores["psnr"] for row in rows(out)] == [
        pytest.approx(expected_psnr(path, references / "a.png"), 1e-6) for path in files
    ]
    capsys.readouterr()
    assert score(data, "--reference", references, "-m", "psnr") == 2
    assert "data.parquet is a Parquet file, whose images have no names" in capsys.readouterr().err
    assert score(images, "--reference", data, "-m", "psnr") == 2
    assert "data.parquet is a Parquet file; expected a folder, or an image" in capsys.readouterr().err


# ---------------------------------------------------------------- maps and reports


def test_maps_are_of_no_reference_metrics(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    images, references = folders
    maps, out = tmp_path / "maps", tmp_path / "s.csv"
    common = ("--reference", references, "--maps", maps)
    assert score(images, *common, "-m", "psnr", "-m", "qualiclip-mini", "-o", out) == 1
    said = capsys.readouterr().err
    assert "no maps of psnr: full-reference metrics have none" in said
    # That of the image without a reference too: its map needs none.
    assert "4 images mapped" in said and len(list(maps.glob("*.png"))) == 4
    for drawing in maps.glob("d-*.png"):
        drawing.unlink()
    assert score(images, *common, "-m", "psnr", "-m", "qualiclip-mini", "-o", out, "--resume") == 1
    assert len(list(maps.glob("*.png"))) == 4
    assert score(images, *common, "-m", "psnr") == 2
    assert "--maps has no effect on psnr: full-reference metrics have no maps; leave it out" in capsys.readouterr().err


def test_a_report_of_a_table_with_references(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    images, references = folders
    (images / "d.png").unlink()
    out, page = tmp_path / "s.csv", tmp_path / "page.html"
    metrics = ("-m", "psnr", "-m", "gmsd", "-m", "qualiclip-mini")
    assert score(images, "--reference", references, *metrics, "-o", out) == 0
    run = plan_runs([out])[0].run
    assert run.lower_better == {"psnr": False, "gmsd": True, "qualiclip-mini": False}
    meta_path(out).unlink()  # then by name
    assert plan_runs([out])[0].run.lower_better == run.lower_better
    assert score(images, "--reference", references, *metrics, "-o", tmp_path / "again.csv") == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "again.csv"), "-o", str(page)]) == 0
    said = capsys.readouterr().err
    assert "no maps for psnr: psnr needs a reference image" in said and "3 images, 0 with an error" in said
    text = page.read_text()
    assert "gmsd" in text and "by name" in text and str(references) not in text


# ---------------------------------------------------------------- what is refused


def test_prompts_of_a_full_reference_metric_are_refused(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, references = folders
    for reference in ((), ("--reference", references)):
        assert score(images, *reference, "-m", "psnr:look") == 2
        assert "'psnr:look': psnr is another package's metric, which takes no prompts" in capsys.readouterr().err


def test_references_and_metrics_that_do_not_belong_together(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, references = folders
    out = tmp_path / "s.csv"
    no_image = tmp_path / "scores.txt"
    no_image.write_text("0.5")
    monkeypatch.setattr("pyiqa.create_metric", None)  # all of it is known before a metric is built
    for arguments, message in (
        (
            ["-m", "psnr", "-m", "ssim"],
            "psnr, ssim: a full-reference metric compares each image with a reference",
        ),
        (["-m", "qualiclip-mini", "--reference", references], "--reference has no effect on qualiclip-mini; leave it"),
        (["-m", "psnr", "--reference", tmp_path / "none"], f"--reference {tmp_path / 'none'} is missing; expected a"),
        (["-m", "psnr", "--reference", ""], "--reference '' is missing; expected a folder of references, or an image"),
        (["-m", "psnr", "--reference", no_image], f"--reference: {no_image} is not an image of a supported format"),
        (["-m", "psnr", "--reference", "s3://b/references"], "--reference s3://b/references is a URL; expected"),
        (["-m", "psnr", "--reference", references, "--engine", "ray"], "--reference cannot be used with --engine ray"),
        (["-m", "psnr", "--reference", references, "--precision", "int8", "--calibrate", images], "metrics in int8"),
    ):
        assert score(images, *arguments, "-o", out) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and said[-1].startswith("qualiclip: ") and not out.exists()


def test_what_takes_no_references_says_so_before_metrics_are_built(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyiqa.create_metric", None)
    images, _ = folders
    ratings = tmp_path / "r.csv"
    ratings.write_text("image,mos\na.png,1\nb.jpg,2\nd.png,3\nsub/c.png,4\n")
    evaluate = ["evaluate", "--ratings", ratings, "--images", images]
    for command in (
        ["describe", images / "a.png"],
        ["report", images, "-o", tmp_path / "page.html"],
        ["explain", images / "a.png", "-o", tmp_path / "map.png"],
        evaluate,
    ):
        assert cli.main([*map(str, command), "-m", "ckdn", "--device", "cpu"]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("qualiclip: ckdn needs a reference image; expected no-reference metrics")
        assert "`qualiclip score --reference PATH` takes full-reference ones" in said
        assert command is not evaluate or "metrics to score here, or --scores TABLE with full-reference scores" in said
    with pytest.raises(SettingsError, match=r"^psnr needs a reference image; .* for a profile"):
        Profiler(iter(["qualiclip-mini", "psnr"]), device="cpu")


def test_ray_and_servers_take_no_references() -> None:
    pytest.importorskip("ray")
    from qualiclip_pyiqa.serve.settings import make_settings

    with pytest.raises(SettingsError, match=r"^psnr needs a reference image; .* on a server"):
        make_settings(metrics=["psnr"]).scorer("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qualiclip_pyiqa.scoring.ray._ray", lambda: None)
        with pytest.raises(SettingsError, match=r"^psnr needs a reference image; .* with Ray"):
            RayScorer(["qualiclip-mini", "psnr"])


def test_scores_of_a_table_with_references_can_be_evaluated(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    images, references = tmp_path / "x", tmp_path / "y"
    lines = ["image,mos"]
    for number in range(8):
        original = pixels()
        save(references / f"{number}.png", original)
        noisy = original + number * RNG.integers(-9, 10, original.shape)
        save(images / f"{number}.png", np.clip(noisy, 0, 255).astype(np.uint8))
        lines.append(f"{number}.png,{10 - number}")
    (tmp_path / "r.csv").write_text("\n".join(lines))
    out = tmp_path / "s.csv"
    assert score(images, "--reference", references, "-m", "psnr", "-m", "gmsd", "-o", out) == 0
    capsys.readouterr()
    found = tmp_path / "found.json"
    command = ["evaluate", "--ratings", tmp_path / "r.csv", "--images", images, "--scores", out, "--json", found]
    assert cli.main([str(word) for word in command]) == 0
    metrics = json.loads(found.read_text())["metrics"]
    # Both agree with the opinions, though lower values of one are better.
    assert [metrics[name]["lower_better"] for name in ("psnr", "gmsd")] == [False, True]
    assert [metrics[name]["srcc"] for name in ("psnr", "gmsd")] == pytest.approx([1, 1])


# ---------------------------------------------------------------- Scorer


def test_a_scorer_says_which_columns_need_references() -> None:
    scorer = Scorer(["qualiclip-mini:look", "gmsd", "piqe", "psnr"], device="cpu", workers=0)
    assert scorer.full_reference == ("gmsd", "psnr")
    assert scorer.lower_better["gmsd"] and not scorer.lower_better["psnr"]
    with pytest.raises(SettingsError, match=r"^gmsd, psnr needs a reference image for each image; pass references"):
        list(scorer.score([pixels()]))
    with pytest.raises(SettingsError, match=r"^references have no effect on qualiclip-mini; leave them out, or"):
        list(Scorer("qualiclip-mini", device="cpu", workers=0).score([pixels()], [pixels()]))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_reference(workers: int, folders: tuple[Path, Path]) -> None:
    images, references = folders
    image, reference = images / "a.png", references / "a.png"
    array = read_pixels(reference)
    scorer = Scorer(["psnr", "qualiclip-mini"], device="cpu", workers=workers)
    sources = [
        *(reference, str(reference), reference.read_bytes(), Image.open(reference), array, load_image(reference)),
        *(ImageError("it was lost"), None, 5, "none.png"),
    ]
    records = list(scorer.score([image] * len(sources), sources))
    wanted = expected_psnr(image, reference)
    assert [record.scores["psnr"] for record in records[:6]] == [pytest.approx(wanted, 1e-6)] * 6
    assert [record.error for record in records[6:]] == [
        "reference: it was lost",
        "reference: none was given for this image",
        "reference: image is an int; expected a path, bytes, a PIL image, a NumPy array or a tensor",
        "reference: none.png does not exist; expected an image file",
    ]
    assert all("qualiclip-mini" in record.scores and "psnr" not in record.scores for record in records[6:])
    for alone in (reference, reference.read_bytes(), array, load_image(reference)):  # for every image
        for record in scorer.score([image, image], alone):
            assert record.scores["psnr"] == pytest.approx(wanted, 1e-6)


def test_folders_of_images_and_references(folders: tuple[Path, Path]) -> None:
    images, references = folders
    scorer = Scorer("psnr", device="cpu", workers=0)
    by_folder = list(scorer.score(images, references))
    assert [record.error is None for record in by_folder] == [True, True, False, True]
    # Without a folder the name alone counts: references/c.png, not references/sub/c.bmp.
    (record,) = scorer.score([images / "sub" / "c.png"], references)
    assert record.scores["psnr"] < by_folder[3].scores["psnr"]
    (record,) = scorer.score([images / "sub" / "c.png"], ReferenceFolder(references, [str(images)]))
    assert record == by_folder[3]
    (record,) = scorer.score([pixels()], references)
    assert record.error == f"reference: array has no name by which to find one in {references}"


def test_a_table_in_memory_says_what_the_references_were(folders: tuple[Path, Path]) -> None:
    images, references = folders
    scorer = Scorer(["psnr", "qualiclip-mini"], device="cpu", workers=0)
    table = scorer.table(images, references=references)
    assert table["psnr"].isna().tolist() == [False, False, True, False]
    assert table.attrs["scores"]["references"] == {"path": str(references), "pairing": "by name"}
    table = scorer.table([pixels()], references=[pixels()])
    assert table.attrs["scores"]["references"] == {"pairing": "one for each image, in order"}
    array = pixels()
    assert scorer.table(array, references=array).attrs["scores"]["references"] == {"pairing": "one for all images"}


@pytest.mark.parametrize(
    ("images", "references", "yielded", "message"),
    [
        (["a", "b"], ["a"], 0, "^2 images, but 1 reference; expected one for each"),
        (["a"], ["a", "b"], 0, "^1 image, but 2 references; expected one for each"),
        (iter(["a", "b"]), ["a"], 1, "^at least 2 images, but 1 reference"),
        (["a"], iter(["a", "b"]), 1, "^1 image, but at least 2 references"),
        (["a"], itertools.repeat("a"), 1, "^1 image, but at least 2 references; .* or one alone for all"),
        (["a"], 5, 0, "^references is of type int; expected an iterable of images, or one image"),
    ],
)
def test_images_and_references_are_equally_many(images: object, references: object, yielded: int, message: str) -> None:
    found = pair(images, references)  # type: ignore[arg-type]
    assert [next(found) for _ in range(yielded)] == [("a", "a")] * yielded
    with pytest.raises(SettingsError, match=message):
        next(found)


def test_names_in_a_folder_of_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain.png", "deep/er/x.jpg", "two.dots.png", ".hidden.png", "UPPER.PNG"):
        save(tmp_path / "r" / name, pixels())
    (tmp_path / "r" / "notes.txt").touch()
    (tmp_path / "r" / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    below = ["i/n", "i", "."]
    for image, reference in {
        "i/plain.png": "r/plain.png",
        "i/n/plain.webp": "r/plain.png",  # below the first folder that contains it
        "i/deep/er/x.png": "r/deep/er/x.jpg",
        "i/two.dots.jpg": "r/two.dots.png",
        "i/UPPER.jpg": "r/UPPER.PNG",
        "./deep/er/x.jpg": "r/deep/er/x.jpg",
        "elsewhere/plain.bmp": "r/plain.png",
        "ii/plain.png": "r/plain.png",
        "i/.hidden.png": "r/.hidden.png",  # by its whole name
    }.items():
        assert ReferenceFolder("r", below).reference_of(image) == reference
    for image in ("i/.hidden.jpg", "i/notes.png", "i/folder.jpg", "i/two.png", "i/er/x.png", "i/none.png"):
        error = ReferenceFolder("r", below).reference_of(image)
        assert isinstance(error, ImageError) and "does not exist, nor an image of that name" in str(error)


def test_sub_folders_tell_images_of_one_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x/1.png", "y/1.png", "1.png"):
        reference = save(Path("references", name), pixels())
        if name != "1.png":
            save(Path("images", name), read_pixels(reference))
    wanted = ["--reference", "references", "-m", "psnr"]
    for argument in ("images", "images/**/*.png", "images/?/*.png"):
        assert score(argument, *wanted, "-o", "scores.csv") == 0
        assert [row.scores["psnr"] for row in rows(Path("scores.csv"))] == pytest.approx([80, 80])  # the same image
        Path("scores.csv").unlink()
    for several in (["images/x", "images/y"], ["images/x/1.png", "images/y/1.png"]):
        assert score(*several, *wanted, "-o", "scores.csv") == 2
        assert "would both have the reference references/1.png" in capsys.readouterr().err
        assert not Path("scores.csv").exists()
    named = pair(["images/x/1.png", "images/x/1.png", "images/y/1.png"], "references")
    first, again, other = (reference for _, reference in named)
    assert first == again == "references/1.png"
    assert isinstance(other, ImageError) and "that of another image of this name" in str(other)


def test_a_folder_of_references_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: str) -> dict[str, list[str]]:
        raise PermissionError(13, "Permission denied")

    save(tmp_path / "a.png", pixels())
    monkeypatch.setattr("qualiclip_pyiqa.scoring.sources.images_by_stem", refused)
    folder = ReferenceFolder(tmp_path)
    assert folder.reference_of("i/a.png") == str(tmp_path / "a.png")  # needs no list
    assert str(folder.reference_of("i/a.jpg")) == (
        f"{tmp_path} cannot be listed (Permission denied); expected a folder that can be read"
    )


SIZES = [(32, 40), (40, 32), (33, 47)]
KINDS = ["same", "noisy", "grey", "deep", "other size", "missing", "damaged"]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[Path, Path | ImageError]]:
    """An image and its reference of every size and kind."""
    folder = tmp_path_factory.mktemp("faulty")
    found: dict[tuple[int, str], tuple[Path, Path | ImageError]] = {}
    for number, (height, width) in enumerate(SIZES):
        for kind in KINDS:
            original = pixels(width, height)
            image = save(folder / f"{number} {kind}.png", original)
            reference: Path | ImageError = folder / f"{number} {kind} reference.png"
            if kind == "missing":
                reference = ImageError("lost")
            elif kind == "damaged":
                reference.write_bytes(image.read_bytes()[:200])
            else:
                other = {
                    "same": original,
                    "noisy": original ^ 3,
                    "grey": original[:, :, 0],
                    "deep": original[:, :, 1].astype(np.uint16) * 257,
                    "other size": pixels(width + 1, height),
                }[kind]
                save(reference, other)
            found[number, kind] = image, reference
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.tuples(st.integers(0, len(SIZES) - 1), st.sampled_from(KINDS)), max_size=9),
    batch_size=st.integers(1, 5),
)
def test_references_change_no_no_reference_score(
    chosen: list[tuple[int, str]],
    batch_size: int,
    faulty: dict[tuple[int, str], tuple[Path, Path | ImageError]],
    scorers: tuple[Scorer, Scorer],
) -> None:
    """Every image has its row, in order, with the bits of a run without references and full-reference metrics."""
    images = [faulty[each][0] for each in chosen]
    references = [faulty[each][1] for each in chosen]
    both, alone = scorers
    both.batch_size = alone.batch_size = batch_size
    with_references, without = list(both.score(images, references)), list(alone.score(images))
    assert [(r.path, r.width, r.height) for r in with_references] == [(r.path, r.width, r.height) for r in without]
    for (number, kind), one, other in zip(chosen, with_references, without, strict=True):
        # Batches depend on the time that decoding takes: with or without references, 2e-6; alone, not a bit.
        assert one.scores["small"] == pytest.approx(other.scores["small"], abs=0 if batch_size == 1 else 2e-6)
        assert one.scores["mean"] == other.scores["mean"]
        good = kind in KINDS[:4]
        assert (one.error is None) == good and ("difference" in one.scores) == good and other.error is None
        if good:
            image, reference = (load_image(path) for path in faulty[number, kind])
            assert one.scores["difference"] == pytest.approx((image - reference).abs().mean().item(), abs=1e-6)


class Mean(torch.nn.Module):
    """A no-reference metric of another package."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()[None]


@pytest.fixture(scope="module")
def scorers() -> tuple[Scorer, Scorer]:
    metrics = {"small": SmallMetric(), "mean": Mean()}
    both = Scorer({"difference": Difference(), **metrics}, device="cpu", workers=0)
    return both, Scorer(metrics, device="cpu", workers=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_has_the_same_bits_with_references(precision: str) -> None:
    metrics = {"mini": "qualiclip-mini+:look", "piqe": "piqe"}
    both = Scorer({"psnr": "psnr", **metrics, "d": Difference()}, device="cpu", precision=precision).networks[0]
    alone = Scorer(metrics, device="cpu", precision=precision).networks[0]
    batch = [pixels() for _ in range(5)]
    references = [pixels(), ImageError("lost"), pixels(), *batch[3:]]
    with_references, without = both(batch, references), alone(batch)
    for one, other in zip(with_references, without, strict=True):
        assert {name: value for name, value in one.scores.items() if name not in ("psnr", "d")} == other.scores
    assert [image.error for image in with_references] == [None, "reference: lost", None, None, None]
    assert with_references[3].scores["d"] == 0 and with_references[0].scores["d"] > 0.1


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_bounded_with_references(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, reference = (save(tmp_path / name, pixels()) for name in ("i.png", "r.png"))
    read = [0, 0]

    def endless(which: int, path: Path) -> Iterator[Path]:
        while True:
            read[which] += 1
            yield path

    scorer = Scorer({"d": Difference(), "small": SmallMetric()}, device="cpu", batch_size=2, workers=workers)
    running = scorer.score(endless(0, image), endless(1, reference))
    for number, record in enumerate(itertools.islice(running, 30)):
        assert record.error is None and len(record.scores) == 2
        assert read[0] == read[1] and read[0] - number <= 8 * 2 + 2 * workers
    running.close()
    # One image and its reference fill the memory: the next pair is read when they are scored.
    monkeypatch.setattr("qualiclip_pyiqa.scoring.run.DECODED_BYTES", 40 * 48 * 3 * 2)
    read[:] = 0, 0
    running = scorer.score(endless(0, image), endless(1, reference))
    for number, _ in enumerate(itertools.islice(running, 12)):
        assert read[0] <= max(2 * max(1, workers), number + 1)
    running.close()


def test_an_image_too_small_for_a_metric_is_said_to_be() -> None:
    image = pixels()[:32, :32].copy()
    (record,) = Scorer("ms_ssim", device="cpu", workers=0).score([image], [image])
    assert record.error == "ms_ssim: 32x32 pixels are too few for this metric; score larger images"


def test_a_metric_that_returns_no_number_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    class Pair(Difference):
        def forward(self, x: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return x.mean()[None], reference.mean()[None]

    class Greedy(Difference):
        def forward(self, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    image = pixels()
    metrics = {"pair": Pair(), "greedy": Greedy(), "d": Difference(), "mini": "qualiclip-mini"}
    with caplog.at_level(logging.WARNING):
        (record,) = Scorer(metrics, device="cpu", workers=0).score([image], [image])
    assert record.scores.keys() == {"d", "mini"} and record.error == (
        "pair: TypeError: the metric returned a tuple; expected one number; "
        "greedy: 48x40 pixels do not fit into the memory of cpu"
    )
    assert not caplog.text


# ---------------------------------------------------------------- DR-IQA


def test_ckdn_scores_beside_our_metrics(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """DR-IQA is pyiqa's `ckdn`: here with random weights, in files of the layout and the names that pyiqa reads."""
    from pyiqa.archs import ckdn_arch

    hub = Path(torch.hub.get_dir())
    imagenet, weights = hub / "checkpoints" / "resnet50-19c8e357.pth", hub / "pyiqa" / "CKDN_model_best-38b27dc6.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ckdn_arch._resnet("resnet50", ckdn_arch.Bottleneck, [3, 4, 6, 3], False, False)
    with torch.no_grad():
        net.fc_[6].weight *= 30  # scores that differ
    for path, content in (
        (imagenet, {}),  # of which `ckdn` keeps nothing
        (weights, {f"net.{name}": value for name, value in net.state_dict().items()}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    images, references = folders
    out = tmp_path / "s.csv"
    try:
        assert score(images, "--reference", references, "-m", "ckdn", "-m", "qualiclip-mini", "-o", out) == 1
        metric = pyiqa.create_metric("ckdn", device="cpu")
    finally:
        imagenet.unlink()
        weights.unlink()
    found = [row for row in rows(out) if row.error is None]
    assert len(found) == 3 and all(row.scores.keys() == {"ckdn", "qualiclip-mini"} for row in found)
    partners = {"a": "a.png", "b": "b.png", "c": "sub/c.bmp"}
    for row in found:
        image = load_image(str(row.path))[None]
        reference = load_image(references / partners[Path(str(row.path)).stem])[None]
        assert row.scores["ckdn"] == pytest.approx(metric(image, reference).item(), abs=1e-6)
        assert abs(row.scores["ckdn"] - metric(reference, image).item()) > 1e-5  # the second is the degraded input
    assert np.std([row.scores["ckdn"] for row in found]) > 1e-5
    assert read_table(out).lower_better("ckdn") is False
    assert isinstance(rows(out)[0], Record)
