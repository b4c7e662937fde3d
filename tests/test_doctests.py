"""Examples in docstrings run, offline and from the checkout's top."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import qualiclip_pyiqa

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(qualiclip_pyiqa.__path__, "qualiclip_pyiqa.")
    if not module.name.endswith(("__main__", "._weights"))
)


def examples(name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples(name):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_there_are_examples() -> None:
    assert sum(len(examples(name)) for name in MODULES) >= 10
