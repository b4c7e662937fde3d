"""What a wheel holds, and that an editable install works the same and leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since a build writes into it."""
    target = tmp_path_factory.mktemp("source") / "checkout"
    skip = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", ".venv")
    shutil.copytree(ROOT, target, ignore=skip)
    return target


def pip(python: str, *arguments: str) -> str:
    command = [python, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: Path, folder: Path) -> Path:
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkout as it is, before a test changes its copy."""
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


def modules(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in (folder / "qualiclip_pyiqa").rglob("*.py")}


@pytest.mark.usefixtures("wheel")  # whose build leaves a folder behind
def test_moved_module_ships_once(source: Path, tmp_path: Path) -> None:
    before = source / "qualiclip_pyiqa" / "screen.py"
    after = source / "qualiclip_pyiqa" / "training" / "screen.py"
    before.rename(after)
    try:
        with zipfile.ZipFile(wheel_of(source, tmp_path)) as archive:
            held = {name for name in archive.namelist() if name.endswith(".py")}
        assert held == modules(source) | {"qualiclip_pyiqa_start.py"}
    finally:
        after.rename(before)


def test_wheel_holds_the_package_the_weights_and_the_hook_only(wheel: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
        line = archive.read("qualiclip_pyiqa.pth").decode()
        start = archive.read("qualiclip_pyiqa.start").decode()
        metadata = archive.read(next(name for name in held if name.endswith(".dist-info/METADATA"))).decode()
    top = {name.split("/")[0] for name in held}
    info = next(name for name in top if name.endswith(".dist-info"))
    assert top == {
        "qualiclip_pyiqa", "qualiclip_pyiqa_start.py", "qualiclip_pyiqa.pth", "qualiclip_pyiqa.start", info,
    }  # fmt: skip
    for name in ("manifest.toml", "qualiclip-mini.safetensors", "qualiclip-mini+.safetensors", "PROVENANCE.md"):
        assert f"qualiclip_pyiqa/_weights/{name}" in held
    assert modules(ROOT) <= set(held)
    configs = (ROOT / "qualiclip_pyiqa" / "training" / "configs").glob("*.toml")
    assert {f"qualiclip_pyiqa/training/configs/{path.name}" for path in configs} <= set(held)
    assert {"qualiclip_pyiqa/degradations/severities.toml", "qualiclip_pyiqa/report/reference.toml"} <= set(held)
    for room in ("report", "serve"):
        assets = (ROOT / "qualiclip_pyiqa" / room / "assets").iterdir()
        assert {f"qualiclip_pyiqa/{room}/assets/{path.name}" for path in assets} <= set(held)
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/weights/LICENSE", "qualiclip_pyiqa/_weights/LICENSE"} <= set(
        held
    )
    assert "License-Expression: Apache-2.0 AND CC-BY-SA-4.0" in metadata
    # One `import` line, as .pth files want it; and PEP 829's `module:function`.
    assert line.startswith("import ") and line.count("\n") == 1
    module, function = start.strip().split(":")
    assert callable(getattr(__import__(module), function))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_editable_install_and_uninstall(source: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    # The new environment sees this one's packages, except this distribution.
    others = tmp_path / "others"
    others.mkdir()
    for folder in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in folder.iterdir():
            ours = entry.name.lower().lstrip("_").startswith(("qualiclip", "editable"))
            if not ours and not (others / entry.name).exists():
                (others / entry.name).symlink_to(entry)
    (site / "zz_others.pth").write_text(f"{others}\n")
    before = names(site)
    pip(
        sys.executable, "--python", python, "install", "--no-deps", "--no-build-isolation", "--ignore-installed",
        "-e", str(source),
    )  # fmt: skip
    assert {"qualiclip_pyiqa.pth", "qualiclip_pyiqa.start"} <= names(site)
    code = """
import pyiqa.default_model_configs as table, qualiclip_pyiqa, qualiclip_pyiqa_start
import qualiclip_pyiqa.pretrained.find as w
assert "qualiclip-mini" in table.DEFAULT_CONFIGS
print(qualiclip_pyiqa.__file__); print(w.find("qualiclip-mini")); print(qualiclip_pyiqa_start.__file__)
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(source) for line in done.stdout.splitlines()), done.stdout
    pip(sys.executable, "--python", python, "uninstall", "-y", "qualiclip-pyiqa")
    left = {name for name in names(site) - before if name != "__pycache__"}
    assert not left
