"""`qualiclip weights ...`: output, exit status, and scores against published ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_bytes import exif, gamma, grey_profile
from PIL import Image
from synthetic import synthetic_photograph

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.metrics.prompt_iqa import OpenQualiCLIP
from qualiclip_pyiqa.pretrained import manifest
from qualiclip_pyiqa.pretrained.files import file_sha256


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with an RN50; nothing else on this machine."""
    home = tmp_path / "home"
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.delenv("QUALICLIP_PYIQA_VERIFY", raising=False)
    path = tmp_path / "mine"
    path.mkdir()
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(path))
    torch.save({"visual.x": torch.ones(1), "logit_scale": torch.ones(())}, path / "RN50.pt")
    return path


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def test_list_names_licence_and_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "list"]) == 0
    out, err = lines(capsys)
    assert not err and len(out) == 1 + len(manifest.manifest())
    rows = {line.split()[0]: line for line in out}
    assert "MIT" in rows["RN50"] and " yes " in rows["RN50"] and " known " in rows["RN50"]
    assert rows["RN50"].endswith(f"{folder / 'RN50.pt'} (QUALICLIP_PYIQA_WEIGHTS)")
    assert "CC-BY-NC-4.0" in rows["QualiCLIP"] and " no " in rows["QualiCLIP"]
    assert rows["QualiCLIP"].endswith("not here")


def test_path_takes_names_of_weights_and_metrics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "path", "clipiqa", "RN50"]) == 0
    assert lines(capsys) == ([str(folder / "RN50.pt")], [])
    assert cli.main(["weights", "path", "clipiqa+"]) == 1
    out, err = lines(capsys)
    assert out == [str(folder / "RN50.pt")] and "qualiclip weights get CLIP-IQA+_learned_prompts" in err[0]


def test_get_finds_or_says_where_to_get_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "get", "RN50"]) == 0
    assert lines(capsys) == ([str(folder / "RN50.pt")], [])
    assert cli.main(["weights", "get", "qualiclip"]) == 1
    out, err = lines(capsys)
    assert not out and len(err) == 1 and "QualiCLIP.pth" in err[0] and "qualiclip-mini" in err[0]


def test_a_file_that_cannot_be_downloaded_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = manifest.manifest()["CONTRIQUE"]
    assert cli.main(["weights", "get", "CONTRIQUE"]) == 1
    out, err = lines(capsys)
    assert not out and len(err) == 1
    for word in (record.file, record.by_hand, "QUALICLIP_PYIQA_WEIGHTS", str(folder.parent / "home")):
        assert word in err[0], word
    assert cli.main(["weights", "list"]) == 0
    rows = {line.split()[0]: line for line in lines(capsys)[0]}
    assert " unknown " in rows["CONTRIQUE"] and " known " in rows["CONTRIQUE_koniq"]


def test_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("path", "get", "verify"):
        assert cli.main(["weights", action, "qualiclp"]) == 2
        assert "did you mean 'qualiclip'" in lines(capsys)[1][0]
    for wrong in ([], ["weights"], ["weights", "path"], ["weights", "fetch", "RN50"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(wrong)
        assert caught.value.code == 2


def test_verify_tells_right_wrong_unknown_and_missing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "QualiCLIP+_koniq.pth"
    file.write_bytes(b"some content")
    known = manifest.manifest()
    upstreams = known["QualiCLIP+_koniq"]
    monkeypatch.setitem(known, "QualiCLIP+_koniq", replace(upstreams, sha256=file_sha256(file)))
    assert cli.main(["weights", "verify", "RN50", "QualiCLIP+_koniq"]) == 0
    out, _ = lines(capsys)
    assert out[0].startswith("RN50: unknown: no hash") and out[1].startswith("QualiCLIP+_koniq: verified: sha256")
    assert all(file_sha256(path) in line for path, line in zip((folder / "RN50.pt", file), out, strict=True))

    monkeypatch.setitem(known, "QualiCLIP+_koniq", upstreams)
    (folder / "QualiCLIP+_spaq.pth").mkdir()
    assert cli.main(["weights", "verify"]) == 1
    out, _ = lines(capsys)
    verdicts = {line.split(":")[0]: line for line in out}
    assert set(verdicts) == set(known)
    wrong = verdicts["QualiCLIP+_koniq"]
    assert "WRONG" in wrong and file_sha256(file) in wrong and known["QualiCLIP+_koniq"].sha256 in wrong
    assert "WRONG" in verdicts["QualiCLIP+_spaq"] and "is a folder" in verdicts["QualiCLIP+_spaq"]
    assert verdicts["QualiCLIP"] == "QualiCLIP: not here"
    assert cli.main(["weights", "verify", "QualiCLIP"]) == 1  # asked for by name


@pytest.fixture
def rated(tmp_path: Path) -> list[str]:
    """Arguments for twenty rated images, some of kinds that pyiqa's own loader reads as other pixels."""
    images = tmp_path / "images"
    images.mkdir()
    rows = ["image,mos"]
    for number in range(20):
        blurred = F.avg_pool2d(synthetic_photograph(number)[None], 1 + 2 * (number % 7), 1, number % 7)[0]
        pixels = (blurred.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        picture = Image.fromarray(pixels)
        if number % 3 == 1:
            picture.putalpha(Image.fromarray(np.full(pixels.shape[:2], 255 - 5 * number, np.uint8)))
        if number % 3 == 2:
            picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        picture.save(images / f"{number}.png")
        rows.append(f"{number}.png,{(7 * number) % 20 - 5 * (number % 7)}")
    (tmp_path / "ratings.csv").write_text("\n".join(rows))
    return ["--ratings", str(tmp_path / "ratings.csv"), "--images", str(images), "--dataset", "CLIVE"]


def test_verify_compares_with_published_scores(
    rated: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.stats import pearsonr, spearmanr

    net = OpenQualiCLIP("qualiclip-mini")
    with torch.no_grad():
        scores = [float(net(load_image(Path(rated[3]) / f"{number}.png")[None])) for number in range(20)]
    opinions = [(7 * number) % 20 - 5 * (number % 7) for number in range(20)]
    srcc, plcc = float(spearmanr(scores, opinions)[0]), float(pearsonr(scores, opinions)[0])
    row = {"metric": "qualiclip-mini", "dataset": "CLIVE", "srcc": round(srcc, 4), "source": "a table"}
    row["verified"] = True
    monkeypatch.setitem(manifest._manifest_file(), "published", [row])
    assert cli.main(["weights", "verify", "qualiclip-mini", *rated]) == 0
    out, _ = lines(capsys)
    assert f"qualiclip-mini on CLIVE, 20 images: SRCC {srcc:.4f} PLCC {plcc:.4f};" in out[-1] and "(a table)" in out[-1]
    row["srcc"] = srcc - 0.1
    assert cli.main(["weights", "verify", "qualiclip-mini", *rated]) == 1
    assert lines(capsys)[0][-1].endswith("+0.1000 DIFFERS")
    row["verified"] = False  # a figure at second hand proves nothing
    assert cli.main(["weights", "verify", "qualiclip-mini", *rated]) == 0
    lines(capsys)
    (Path(rated[3]) / "3.png").write_bytes(b"not an image")
    assert cli.main(["weights", "verify", "qualiclip-mini", *rated]) == 1
    assert "3.png" in lines(capsys)[1][-1]


def test_verify_scores_stored_pixels_and_each_image_once(
    rated: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.stats import spearmanr

    images, table = Path(rated[3]), Path(rated[1])
    for number in range(10):
        with Image.open(images / f"{number}.png") as picture:
            picture.convert("L").save(
                images / f"{number}.png", exif=exif(6), icc_profile=grey_profile(gamma(1 + number / 4))
            )
    opinions = [(7 * number) % 20 - 5 * (number % 7) for number in range(20)]
    table.write_text(table.read_text() + "\n0.png,30")
    opinions[0] = (opinions[0] + 30) / 2
    net = OpenQualiCLIP("qualiclip-mini")
    stored = {"ignore_orientation": True, "ignore_profile": True}
    with torch.no_grad():
        scores = [float(net(load_image(images / f"{number}.png", **stored)[None])) for number in range(20)]
        shown = [float(net(load_image(images / f"{number}.png")[None])) for number in range(20)]
    srcc = float(spearmanr(scores, opinions)[0])
    assert abs(srcc - float(spearmanr(shown, opinions)[0])) > 1e-3
    row = {"metric": "qualiclip-mini", "dataset": "CLIVE", "srcc": srcc, "source": "a table", "verified": True}
    monkeypatch.setitem(manifest._manifest_file(), "published", [row])
    assert cli.main(["weights", "verify", "qualiclip-mini", *rated]) == 0
    assert f"qualiclip-mini on CLIVE, 20 images: SRCC {srcc:.4f} " in lines(capsys)[0][-1]


def test_verify_with_unusable_ratings(rated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, status: int) -> str:
        assert cli.main(["weights", "verify", *arguments]) == status
        return lines(capsys)[1][-1]

    assert "belong together" in said("clipiqa", *rated[:2], status=2)
    assert "'CLIV'; expected one of CLIVE, " in (line := said("clipiqa", *rated[:-1], "CLIV", status=2))
    assert line.endswith("; did you mean 'CLIVE'?")
    assert "name a metric" in said("RN50", *rated, status=2)
    assert "no.csv cannot be read" in said("clipiqa", "--ratings", "no.csv", *rated[2:], status=2)
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("image,mos\n0.png,bad\n")
    assert "'bad'; expected a number" in said("clipiqa", *rated, status=2)
    ratings.write_text("image,mos\n0.png,1\n1.png,2\ngone.png,3\n")
    assert "gone.png" in said("clipiqa", *rated, status=2)


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys\nfrom qualiclip_pyiqa.commands.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += "print('torch' in sys.modules, 'pyiqa' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "weights" in done.stdout and done.stdout.splitlines()[-1] == "False False"
