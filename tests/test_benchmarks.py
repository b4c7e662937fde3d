"""Every benchmark runs as its docstring says, in small, and writes the one form of output."""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import QUALICLIP_TEXTS
from PIL import Image, ImageFilter
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESTORATION = ROOT / "examples" / "restoration"
PHOTOS = ROOT / "examples" / "photos"
EMBEDDED = str(ROOT / "weights" / "qualiclip-mini.safetensors")
ARGUMENTS = {
    "attributes": ["--pristine", "pristine"],
    "backbones": [],
    "fit": [f"--{which}{what}" for which in ("", "test-") for what in ("ratings=rated/dmos.csv", "images=rated")],
    "folder": ["--images", str(PHOTOS)],
    "hacking": [
        *("--pristine", "pristine", "--ensemble", EMBEDDED, "--others", EMBEDDED),
        *("--sheet", "out/hacked.jpg", "--shown", "hats.jpg"),
    ],
    "limits": ["--pristine", "pristine"],
    "loss": [],
    "maps": ["--pristine", "pristine"],
    "mini": [
        *("--pristine", "pristine", "--rated", "blurred", "rated/dmos.csv", "rated", "--trained-on", "two", "blurred"),
        *("--seeds", "one", EMBEDDED, "--seeds", "two", EMBEDDED, EMBEDDED, "--before", EMBEDDED, "--fitted", "2"),
    ],
    "onednn": [],
    "precision": ["--photographs", "pristine", "--calibrate", "many", "--model", "small.safetensors"],
    "reference": ["--pristine", "pristine", "--write", "out/reference.toml"],
    "report": [],
    "restoration": ["--pristine", "pristine", "--others", EMBEDDED, "--restorers", "out", "--sheets", "out"],
    "rounding": [],
    "serve": ["--images", str(PHOTOS)],
    "severity": ["--pristine", str(PHOTOS), "--write", "out/severities.toml"],
    "speed": [],
    "startup": [],
    "tiles": ["--images", str(PHOTOS)],
}

APART = ("limits",)  # run as their docstrings say, in a process of its own


@dataclass(frozen=True)
class Done:
    """What a benchmark has left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


def run_apart(name: str, *arguments: str, folder: Path) -> Done:
    """Run a benchmark as its docstring says, in a process of its own."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a benchmark as the main module of this process, which has everything imported; undoes what it sets."""
    environment, modules = dict(os.environ), set(sys.modules)
    logger, threads = logging.getLogger("qualiclip_pyiqa"), torch.get_num_threads()
    level = logger.level

    def run_here(name: str, *arguments: str, folder: Path) -> Done:
        script = str(BENCHMARKS / f"{name}.py")
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        monkeypatch.setattr("qualiclip_pyiqa.scoring.allocator.keep_freed_memory", lambda: True)  # it cannot be undone
        capfd.readouterr()
        status: object = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as caught:
            status = caught.code
        printed = capfd.readouterr()
        # As an interpreter does: anything but a number is printed, and means failure.
        said = f"{status}\n" if not isinstance(status, int | None) else ""
        return Done(status or 0 if isinstance(status, int | None) else 1, printed.out, printed.err + said)

    yield run_here
    os.environ.clear()
    os.environ.update(environment)
    logger.setLevel(level)
    torch.set_num_threads(threads)
    for each in set(sys.modules) - modules:
        if Path(getattr(sys.modules[each], "__file__", None) or "/").parent in (BENCHMARKS, RESTORATION):
            del sys.modules[each]  # "report", "train": names that others may have


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small photographs to fit and degrade, and blurred ones with opinion scores."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("pristine", "rated", "many"):
        (folder / name).mkdir()
    lines = ["image,dmos"]
    photos = [PHOTOS / f"{name}.jpg" for name in ("hats", "lighthouse", "parrots", "portrait")]
    for number, path in enumerate(photos):
        with Image.open(path) as photo:
            small = photo.convert("RGB").resize((128, 96))
        small.save(folder / "pristine" / path.name)
        for degrees in range(8):  # as many as calibration takes
            small.rotate(45 * degrees).save(folder / "many" / f"{number}{degrees}.png")
        for radius in range(5):
            small.filter(ImageFilter.GaussianBlur(radius)).save(folder / "rated" / f"{number}{radius}.png")
            lines.append(f"{number}{radius}.png,{10 + 20 * radius - number}")
    (folder / "pristine" / "manifest.csv").write_text(f"file,held_out\n{photos[0].name},1\n")
    (folder / "rated" / "dmos.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of `images`, for what a benchmark writes beside them."""
    return Path(shutil.copytree(images, tmp_path / "work"))


def write_small(path: Path, tiny_folder: Path) -> None:
    """Write a small model as training does, with random values: it is exported in seconds."""
    state = torch.load(tiny_folder / "tiny-resnet.pt")
    tensors = {key: value for key, value in state.items() if key.startswith("visual.")}
    draw = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(len(QUALICLIP_TEXTS), 32, generator=draw), dim=-1)
    metadata = {
        "format": "qualiclip-pyiqa/1",
        "backbone": "tiny-resnet",
        "tower": "{}",
        "prompts": json.dumps(list(zip(QUALICLIP_TEXTS[::2], QUALICLIP_TEXTS[1::2], strict=True))),
        "licence": "CC0-1.0",
        "source": "this test",
    }
    save_file({**tensors, "prompts_features": features, "logit_scale": torch.tensor(3.0)}, path, metadata)


def test_every_benchmark_is_run() -> None:
    assert set(ARGUMENTS) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_benchmark_runs_small(name: str, folder: Path, upstream_weights: Path, tiny_folder: Path, run: Run) -> None:
    if name == "report" and shutil.which("chromium") is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    given = ["--weights", str(upstream_weights)] if name in ("folder", "onednn", "rounding", "speed", "startup") else []
    if name == "rounding":
        given.append(str(upstream_weights))  # two draws of images, with the same weights
    if name == "precision":
        write_small(folder / "small.safetensors", tiny_folder)
    start = run_apart if name in APART else run
    done = start(name, *ARGUMENTS[name], *given, "--quick", "--json", "out/result.json", folder=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "result.json").read_text())
    assert {"date", "command", "machine", "versions", "weights", "quick", "rows"} == result.keys()
    assert result["quick"] and result["rows"]
    (header,) = re.findall(r"^\| (.+) \|\n\| ---", done.stdout, flags=re.MULTILINE)
    assert header.split(" | ") == list(dict.fromkeys(key for row in result["rows"] for key in row))
    if name == "fit":
        inside, across = result["rows"]
        assert inside["fitted on"] == "80 %" and inside["SRCC"] > 0.5
        assert across["SRCC 95 % from"] <= across["SRCC"] + 1e-12  # which is 1 but for rounding
        assert across["SRCC"] > 0.9  # the images it was fitted on
    rows = {(row.get("measured"), row.get("metric", row.get("attribute"))): row for row in result["rows"]}
    if name == "mini":
        for metric in ("one", "the model before", "log energy of the Laplacian", "log variance of the Laplacian"):
            # A lower DMOS is better, and so is a higher score: blur by blur that is what the opinions are.
            row = rows["opinion scores, blurred", metric]
            assert row["SRCC"] > 0.7 and row["95 % interval"] and "note" not in row
        seeds = rows["opinion scores, blurred", "two, mean of 2 seeds"]
        assert seeds["SRCC"] == rows["opinion scores, blurred", "one"]["SRCC"] and seeds["note"]
        assert rows["opinion scores, blurred", "two, standard deviation of 2 seeds"]["SRCC"] == 0
        difference = rows["SRCC minus that of sharpest parts, blurred", "one"]["SRCC"]
        sharpest = rows["opinion scores, blurred", "sharpest parts"]["SRCC"]
        assert difference == pytest.approx(rows["opinion scores, blurred", "one"]["SRCC"] - sharpest)
        assert rows["degradations of bank kadid, 1 photographs", "one"]["of"] == 24
        assert rows["degradations of bank camera, 1 photographs", "two, mean of 2 seeds"]["of"] == 12
        assert rows["speed, 1x64x64", "the model before"]["of the model before"] == 1
        assert rows["extra memory, 1x64x64", "one"]["MiB"] >= 0
        assert "not run: niqe needs" in done.stdout
    if name == "hacking":
        ways = {(row["way"], row["start"]): row for row in result["rows"]}
        noisy = ways["none", "noise of 25"]
        assert ways["score alone", "noise of 25"]["qualiclip-mini"] > noisy["qualiclip-mini"] + 0.1
        assert noisy["grey levels moved"] == 0 < ways["score alone", "noise of 25"]["grey levels moved"] < 2
        assert (folder / "out" / "hacked.jpg").exists()
    if name == "restoration":
        means = {(row["task"], row["loss"]): row for row in result["rows"] if row["measured"] == "mean"}
        assert means["sr2", "pixel loss alone"]["ssim"] < means["sr2", "photograph"]["ssim"] == pytest.approx(1)
        assert means["denoise", "input"]["psnr"] == pytest.approx(20.2, abs=0.5)  # of noise of 25 in 255
        kept = {path.name for path in (folder / "out").iterdir()}
        assert {"denoise-0-base.safetensors", "restored-denoise.jpg", "restored-sr2.jpg"} <= kept
    if name == "serve":
        assert [row["lost"] for row in result["rows"][1:]] == [0] * 2
        assert result["rows"][0]["images a second"] > 0  # a step of the load may be too short for a slow machine
    if name == "attributes":
        assert rows["steps along own types", "sharpness"]["right"] > 0.5  # chance is a half
        table = rows["movement of scores", "sharpness"]
        assert table["sharpness"] == pytest.approx(1) and 0 <= table["brightness"] < 1
        assert rows["movement of scores, by type", "contrast"]["open"] == "mean_shift"
        assert 0 <= rows["two faults", "mean of 15 pairs"]["named"] <= 1


def test_mini_says_in_one_line_what_is_missing(tmp_path: Path, run: Run) -> None:
    done = run("mini", "--pristine", "none", "--rated", "few", "few.csv", ".", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: none has 0 photographs")
    (tmp_path / "few.csv").write_text("image,mos\n0.png,1\n1.png,2\n")
    for name in ("0.png", "1.png"):
        Image.new("RGB", (48, 48)).save(tmp_path / name)
    (tmp_path / "manifest.csv").write_text("file,held_out\n0.png,1\n")
    done = run("mini", "--pristine", ".", "--rated", "few", "few.csv", ".", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: few.csv rates 2 images")
