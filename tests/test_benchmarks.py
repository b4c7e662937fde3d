"""Every benchmark runs as its docstring says, in small, and writes the one form of output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
ARGUMENTS = {
    "backbones": [],
    "fit": [f"--{which}{what}" for which in ("", "test-") for what in ("ratings=rated/dmos.csv", "images=rated")],
    "folder": ["--images", str(PHOTOS)],
    "mini": ["--pristine", "pristine", "--ratings", "rated/dmos.csv", "--images", "rated"],
    "onednn": [],
    "rounding": [],
    "severity": ["--pristine", str(PHOTOS), "--write", "out/severities.toml"],
    "speed": [],
    "startup": [],
    "tiles": ["--images", str(PHOTOS)],
}


def run(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small photographs to fit and degrade, and blurred ones with opinion scores."""
    (tmp_path / "pristine").mkdir()
    (tmp_path / "rated").mkdir()
    lines = ["image,dmos"]
    photos = sorted(PHOTOS.glob("*[!0d].jpg"))
    for number, path in enumerate(photos):
        with Image.open(path) as photo:
            small = photo.convert("RGB").resize((128, 96))
        small.save(tmp_path / "pristine" / path.name)
        for radius in range(5):
            small.filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "rated" / f"{number}{radius}.png")
            lines.append(f"{number}{radius}.png,{10 + 20 * radius - number}")
    (tmp_path / "pristine" / "manifest.csv").write_text(f"file,held_out\n{photos[0].name},1\n")
    (tmp_path / "rated" / "dmos.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_every_benchmark_is_run() -> None:
    assert set(ARGUMENTS) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_benchmark_runs_small(name: str, folder: Path, upstream_weights: Path) -> None:
    given = ["--weights", str(upstream_weights)] if name in ("folder", "onednn", "speed") else []
    done = run(name, *ARGUMENTS[name], *given, "--quick", "--json", "out/result.json", folder=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert {"date", "command", "machine", "versions", "weights", "quick", "rows"} == result.keys()
    assert result["quick"] and result["rows"]
    (header,) = re.findall(r"^\| (.+) \|\n\| ---", done.stdout, flags=re.MULTILINE)
    assert header.split(" | ") == list(dict.fromkeys(key for row in result["rows"] for key in row))
    if name == "fit":
        inside, across = result["rows"]
        assert inside["fitted on"] == "80 %" and inside["SRCC"] > 0.5
        assert across["SRCC 95 % from"] <= across["SRCC"] and across["SRCC"] > 0.9  # the images it was fitted on
    if name == "mini":
        rows = {(row["measured"], row["metric"]): row for row in result["rows"]}
        for metric in ("qualiclip-mini", "log variance of the Laplacian"):
            # A lower DMOS is better, and so is a higher score: blur by blur that is what the opinions are.
            assert rows["opinion scores, all", metric]["SRCC"] > 0.7
        assert ("degradations, 1 photographs, held out", "qualiclip-mini") in rows
        assert "not run: niqe needs" in done.stdout


def test_mini_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("image,mos\n0.png,1\n1.png,2\n")
    for name in ("0.png", "1.png"):
        Image.new("RGB", (48, 48)).save(tmp_path / name)
    done = run("mini", "--pristine", "none", "--ratings", "few.csv", "--images", ".", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: few.csv rates 2 images")
