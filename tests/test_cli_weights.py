"""`qualiclip weights ...`: output, exit status, and scores against published ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.pretrained import weights


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
    assert not err and len(out) == 1 + len(weights.manifest())
    rows = {line.split()[0]: line for line in out}
    assert "MIT" in rows["RN50"] and " yes " in rows["RN50"]
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
    known = weights.manifest()
    right = {**known, "QualiCLIP+_koniq": replace(known["QualiCLIP+_koniq"], sha256=weights.file_sha256(file))}
    monkeypatch.setattr(weights, "manifest", lambda: right)
    assert cli.main(["weights", "verify", "RN50", "QualiCLIP+_koniq"]) == 0
    out, _ = lines(capsys)
    assert out[0].startswith("RN50: unknown: no hash") and out[1].startswith("QualiCLIP+_koniq: ok")
    assert all(weights.file_sha256(path) in line for path, line in zip((folder / "RN50.pt", file), out, strict=True))

    monkeypatch.setattr(weights, "manifest", lambda: known)
    (folder / "QualiCLIP+_spaq.pth").mkdir()
    assert cli.main(["weights", "verify"]) == 1
    out, _ = lines(capsys)
    verdicts = {line.split(":")[0]: line for line in out}
    assert set(verdicts) == set(known)
    wrong = verdicts["QualiCLIP+_koniq"]
    assert "WRONG" in wrong and weights.file_sha256(file) in wrong and known["QualiCLIP+_koniq"].sha256 in wrong
    assert "WRONG" in verdicts["QualiCLIP+_spaq"] and "is a folder" in verdicts["QualiCLIP+_spaq"]
    assert verdicts["QualiCLIP"] == "QualiCLIP: not here"
    assert cli.main(["weights", "verify", "QualiCLIP"]) == 1  # asked for by name


SCORES = [(7 * i) % 20 if i % 5 == 0 else i for i in range(20)]


class NumberMetric:
    """Stands in for a metric whose weights are not here: a file's score is the number in it."""

    def __call__(self, path: str) -> torch.Tensor:
        return torch.tensor([[float(Path(path).read_text())]])


@pytest.fixture
def rated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for twenty rated 'pictures', which a stand-in for pyiqa scores."""
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda name: NumberMetric()))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = ["image,mos"]
    for opinion, score in enumerate(SCORES):
        (pictures / f"{opinion}.png").write_text(str(score))
        rows.append(f"{opinion}.png,{opinion}")
    (tmp_path / "ratings.csv").write_text("\n".join(rows))
    return ["--ratings", str(tmp_path / "ratings.csv"), "--images", str(pictures), "--dataset", "CLIVE"]


def test_verify_compares_with_published_scores(
    rated: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scipy.stats import spearmanr

    srcc = float(spearmanr(SCORES, range(20))[0])
    row = {"metric": "clipiqa", "dataset": "CLIVE", "srcc": round(srcc, 4), "source": "a table", "verified": True}
    monkeypatch.setattr(weights, "published", lambda: [row])
    assert cli.main(["weights", "verify", "clipiqa", *rated]) == 0
    out, _ = lines(capsys)
    assert f"clipiqa on CLIVE, 20 pictures: SRCC {srcc:.4f}" in out[-1] and "(a table)" in out[-1]
    row["srcc"] = srcc - 0.1
    assert cli.main(["weights", "verify", "clipiqa", *rated]) == 1
    assert lines(capsys)[0][-1].endswith("+0.1000 DIFFERS")
    row["verified"] = False  # a figure at second hand proves nothing
    assert cli.main(["weights", "verify", "clipiqa", *rated]) == 0


def test_verify_with_unusable_ratings(rated: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, status: int) -> str:
        assert cli.main(["weights", "verify", *arguments]) == status
        return lines(capsys)[1][-1]

    assert "belong together" in said("clipiqa", *rated[:2], status=2)
    assert "'LIVE'" in said("clipiqa", *rated[:-1], "LIVE", status=2)
    assert "name a metric" in said("RN50", *rated, status=2)
    assert "cannot be read" in said("clipiqa", "--ratings", "no.csv", *rated[2:], status=2)
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("file,score\na,1\n")
    assert "`image` and `mos`" in said("clipiqa", *rated, status=2)
    ratings.write_text("image,mos\na.png,bad\n")
    assert "`image` and `mos`" in said("clipiqa", *rated, status=2)
    ratings.write_text("image,mos\n")
    assert "at least 3" in said("clipiqa", *rated, status=2)
    ratings.write_text("image,mos\n0.png,1\n1.png,2\ngone.png,3\n")
    assert "gone.png does not exist" in said("clipiqa", *rated, status=1)


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys\nfrom qualiclip_pyiqa.commands.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += "print('torch' in sys.modules, 'pyiqa' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "weights" in done.stdout and done.stdout.splitlines()[-1] == "False False"
