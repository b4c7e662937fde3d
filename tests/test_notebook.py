"""The example notebook runs as it is, through nbmake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first-look.ipynb"


def run(notebook: Path) -> subprocess.CompletedProcess[str]:
    # A run of its own, so that no other test of this one needs the plugin.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(notebook)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=NOTEBOOK.parent)


def test_the_notebook_runs() -> None:
    pytest.importorskip("nbmake")
    before = NOTEBOOK.read_bytes()
    done = run(NOTEBOOK)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
    assert NOTEBOOK.read_bytes() == before


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
