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


COMMANDS = {
    "score PHOTO -o x.parquet": "parquet",
    "score PHOTO -o x.csv --engine ray": "ray",
    "evaluate --degradations FOLDER": "eval",
    "evaluate --ratings RATINGS --images FOLDER": "eval",
    "evaluate --ratings RATINGS --images FOLDER --plot x.png": "plots",
    "report FOLDER -o x.html": "report",
    "serve qualiclip-mini": "serve",
    "train --config toy --pristine FOLDER --out run": "train",
    "fit -m qualiclip-mini --ratings RATINGS --images FOLDER -o x.safetensors": "fit",
    "tune -m clipiqa+ --ratings RATINGS --images FOLDER --out run": "train",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit status, standard error and files left of every command, all in one process, which takes seconds to start."""
    top = tmp_path_factory.mktemp("bare")
    (top / "ratings.csv").write_text("image,mos\nlighthouse.jpg,1\nhats.jpg,2\nparrots.jpg,3\nportrait.jpg,4\n")
    names = {"PHOTO": str(PHOTO), "FOLDER": str(PHOTO.parent), "RATINGS": str(top / "ratings.csv")}
    words = [[names.get(word, word) for word in command.split()] for command in COMMANDS]
    done = bare(f"""
import os, traceback
for number, words in enumerate({words!r}):
    folder = os.path.join({str(top)!r}, str(number))
    os.mkdir(folder)
    os.chdir(folder)
    saved = os.dup(2)
    file = os.open(folder + ".txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    try:
        status = main(words)
    except BaseException as error:
        traceback.print_exc()
        status = error.code if isinstance(error, SystemExit) else 1
    sys.stderr.flush()
    os.dup2(saved, 2)
    print("status", number, status, flush=True)
""")
    assert done.returncode == 0, done.stderr
    found = {}
    for number, command in enumerate(COMMANDS):
        status = next(line for line in done.stdout.splitlines() if line.startswith(f"status {number} "))
        left = sorted(path.name for path in (top / str(number)).iterdir())
        found[command] = int(status.split()[2]), (top / f"{number}.txt").read_text(), left
    return found


@pytest.mark.parametrize(("command", "extra"), COMMANDS.items())
def test_a_command_says_which_extra_it_needs(
    command: str, extra: str, said: dict[str, tuple[int, str, list[str]]]
) -> None:
    status, err, left = said[command]
    lines = [line for line in err.splitlines() if line.startswith("qualiclip: ")]
    assert status == 2, err
    assert lines and f'pip install "qualiclip-pyiqa[{extra}]"' in lines[-1] and "Traceback" not in err
    assert not left
