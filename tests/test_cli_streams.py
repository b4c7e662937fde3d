"""Standard streams that are closed or full: every command says so in one line, and none writes into another file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_score import picture

from qualiclip_pyiqa.scoring.tables import Record, write_table

CLOSED = b"qualiclip: standard output cannot be written (it is closed)"
FULL = b"qualiclip: standard output cannot be written (No space left on device)"


def run(redirection: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return execute(redirection, [sys.executable, "-m", "qualiclip_pyiqa", *map(str, arguments)], cwd)


def execute(redirection: str, command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    shell = ["bash", "-c", f'exec "$@" {redirection}', "-", *command]
    return subprocess.run(shell, capture_output=True, cwd=cwd, timeout=300)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    records = [Record(str(picture(tmp_path / f"{n}.png")), 48, 40, {"piqe": n / 2}) for n in range(4)]
    write_table(tmp_path / "s.csv", ["piqe"], records)
    (tmp_path / "mos.csv").write_text("".join(["image,mos\n", *(f"{n}.png,{n}\n" for n in range(4))]))
    return tmp_path / "s.csv"


def filtering(table: Path) -> list[object]:
    return ["filter", table, "--above", 0]


def evaluating(table: Path) -> list[object]:
    return ["evaluate", "--ratings", table.parent / "mos.csv", "--scores", table]


def scoring(table: Path) -> list[object]:
    return ["score", table.parent / "0.png", "-m", "piqe", "--device", "cpu", "--workers", 0]


def listing(_: Path) -> list[object]:
    return ["weights", "list"]


def version(_: Path) -> list[object]:
    return ["--version"]


def helping(_: Path) -> list[object]:
    return ["score", "--help"]


@pytest.mark.parametrize("arguments", [filtering, listing, version, helping])
def test_standard_output_that_takes_nothing(arguments, table: Path) -> None:  # type: ignore[no-untyped-def]
    for redirection, last in (("<&- >&-", CLOSED), (">/dev/full", FULL)):
        done = run(redirection, *arguments(table))
        assert done.stderr.splitlines()[-1] == last and b"Traceback" not in done.stderr
        assert done.returncode == 1


AGAIN = """
import os, sys
from qualiclip_pyiqa.commands.cli import main
closed = sys.stdout is None
kept = None if closed else os.dup(1)
first = main({0!r})
print("then", file=sys.stderr)
if closed:
    sys.stdout.close()
    sys.stdout = None  # as an interpreter has it that starts so
else:
    os.dup2(kept, 1)
    sys.stdout = open(1, "w", closefd=False)
raise SystemExit(10 * first + main({1!r}))
"""


@pytest.mark.parametrize(
    ("redirection", "last", "commands"),
    [("<&- >&-", CLOSED, (evaluating, scoring)), (">/dev/full", FULL, (scoring, evaluating))],
    ids=["closed", "full"],
)
def test_standard_output_that_takes_no_scores(redirection, last, commands, table: Path) -> None:  # type: ignore[no-untyped-def]
    """Two commands in one process, as each takes seconds to import what it needs."""
    code = AGAIN.format(*([str(word) for word in arguments(table)] for arguments in commands))
    done = execute(redirection, [sys.executable, "-c", code])
    assert b"Traceback" not in done.stderr
    assert [said.splitlines()[-1] for said in done.stderr.split(b"then\n")] == [last, last]
    assert done.returncode == 11


def test_a_closed_standard_output_that_is_not_needed(table: Path, tmp_path: Path) -> None:
    assert run("<&- >&- 2>&-", *filtering(table), "-o", tmp_path / "t.csv").returncode == 0
    assert (tmp_path / "t.csv").read_bytes() == table.read_bytes()
    done = run("<&- >&- 2>&-", *scoring(table), "-o", tmp_path / "u.csv")
    assert done.returncode == 0 and (tmp_path / "u.csv").read_bytes().count(b"\n") == 2


def test_standard_input_that_cannot_be_read() -> None:
    done = run("<&-", "score", "-")
    assert done.stderr == b"qualiclip: standard input cannot be read (it is closed)\n" and done.returncode == 1
    done = run("</dev/null", "score", "-")
    assert done.stderr.startswith(b"qualiclip: the list on standard input is empty") and done.returncode == 2
