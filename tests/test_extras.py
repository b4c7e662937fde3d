"""Scoring needs no extra; a command that needs one says which, in one line."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "examples" / "photos" / "lighthouse.jpg"
# As if none of the extras were installed: our code cannot import them, whatever pyiqa itself needs.
BARE = """
import builtins, importlib, sys
extras = set({extras!r})
real_import, real_import_module = builtins.__import__, importlib.import_module
def refuse(name):
    if name.partition(".")[0] in extras:
        raise ModuleNotFoundError(f"No module named {{name!r}}")
def bare_import(name, globals=None, locals=None, fromlist=(), level=0):
    if not level and str((globals or {{}}).get("__name__")).startswith("qualiclip_pyiqa"):
        refuse(name)
    return real_import(name, globals, locals, fromlist, level)
builtins.__import__ = bare_import
import qualiclip_pyiqa.optional as optional
def bare_import_module(name, *rest):
    refuse(name)
    return real_import_module(name, *rest)
optional.import_module = bare_import_module
from qualiclip_pyiqa.commands.cli import main
"""


def modules_of_extras() -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [each for name, each in extras.items() if name not in ("all", "docs", "test")]
    return sorted({line.split(">")[0].split("[")[0].replace("-", "_") for each in needed for line in each})


def bare(code: str) -> subprocess.CompletedProcess[str]:
    start = BARE.format(extras=modules_of_extras())
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=600)


def test_the_guard_guards() -> None:
    assert {"accelerate", "kornia", "matplotlib", "pyarrow", "ray", "scipy"} <= set(modules_of_extras())
    done = bare("from qualiclip_pyiqa.optional import require; require('scipy.stats', 'eval', 'This')")
    assert 'SettingsError: This needs scipy: pip install "qualiclip-pyiqa[eval]"' in done.stderr


def test_scoring_needs_no_extra(tmp_path: Path) -> None:
    done = bare(f"""
import pyiqa, torch
metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
score = metric({str(PHOTO)!r}).item()
from qualiclip_pyiqa import QualityLoss, Scorer, load_image
assert QualityLoss(metric)(load_image({str(PHOTO)!r})[None]).item() > 0
(record,) = Scorer("qualiclip-mini", device="cpu", workers=1).score([{str(PHOTO)!r}])
assert abs(record.scores["qualiclip-mini"] - score) < 1e-5, (record, score)
assert main(["score", {str(PHOTO)!r}, "--device", "cpu", "-o", {str(tmp_path / "scores.csv")!r}]) == 0
assert main(["filter", {str(tmp_path / "scores.csv")!r}, "--above", "0"]) == 0
assert main(["weights", "list"]) == 0
""")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scores.csv").read_text().startswith("path,width,height,qualiclip-mini+,error\n")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("score PHOTO -o x.parquet", "parquet"),
        ("score PHOTO -o x.csv --engine ray", "ray"),
        ("evaluate --degradations FOLDER", "eval"),
        ("evaluate --ratings RATINGS --images FOLDER", "eval"),
        ("evaluate --ratings RATINGS --images FOLDER --plot x.png", "plots"),
        ("report FOLDER -o x.html", "report"),
        ("serve qualiclip-mini", "serve"),
        ("train --config toy --pristine FOLDER --out run", "train"),
        ("fit -m qualiclip-mini --ratings RATINGS --images FOLDER -o x.safetensors", "fit"),
        ("tune -m clipiqa+ --ratings RATINGS --images FOLDER --out run", "train"),
    ],
)
def test_a_command_says_which_extra_it_needs(command: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("image,mos\nlighthouse.jpg,1\nhats.jpg,2\nparrots.jpg,3\nportrait.jpg,4\n")
    names = {"PHOTO": str(PHOTO), "FOLDER": str(PHOTO.parent), "RATINGS": str(tmp_path / "ratings.csv")}
    words = [names.get(word, word) for word in command.split()]
    done = bare(f"import os; os.chdir({str(tmp_path)!r}); sys.exit(main({words!r}))")
    lines = [line for line in done.stderr.splitlines() if line.startswith("qualiclip: ")]
    assert done.returncode == 2, done.stderr
    assert lines and f'pip install "qualiclip-pyiqa[{extra}]"' in lines[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("x.*"))
