"""What is said on standard error while something is loading."""

from __future__ import annotations

import sys
import time

import pytest

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.screen import loading


def said(capsys: pytest.CaptureFixture[str], seconds: float, after: float = 0.01, early: bool = False) -> str:
    with loading("a\nb", after) as loaded:
        if early:
            loaded()
        time.sleep(seconds)
    time.sleep(0.05)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_one_line_if_it_takes_a_while_and_a_person_is_watching(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, 0.2) == ""  # a file or a pipe
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert said(capsys, 0.2) == "qualiclip: loading a\\nb ...\n"
    assert said(capsys, 0.2, early=True) == "" == said(capsys, 0, after=0.5)


@pytest.mark.parametrize("command", ["score", "describe", "explain", "report"])
def test_commands_say_what_they_load(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    for module in ("score", "describe", "explain", "report"):

        def watched(what: str) -> object:
            loaded.append(what)
            raise KeyboardInterrupt  # enough of it

        monkeypatch.setattr(f"qualiclip_pyiqa.commands.{module}.loading", watched)
    out = {"score": (), "describe": (), "explain": ("-o", "no.png"), "report": ("-o", "no.html")}[command]
    assert cli.main([command, "examples/photos", "-m", "qualiclip-mini", *out]) == 130
    assert loaded == ["qualiclip-mini"]
