"""Tables of scores: what was written is read again, a torn end costs nothing but the torn row, a full disk is said."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import resource
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.scoring.tables import Record, ScoreTable, read_table, utf8, write_table

SUFFIXES = [".csv", ".jsonl", ".parquet"]
COLUMNS = ("clipiqa", "look.sharpness")
ROWS = [
    Record("a b.png", 512, 384, {"clipiqa": 0.25, "look.sharpness": 0.123456789}),
    Record('line\nbreak, "quoted".png', 40, 40, {"clipiqa": 1e-9}, "look.sharpness: the score is nan"),
    Record("broken.png", error="broken.png is empty (0 bytes); expected a picture"),
    Record(os.fsdecode(b"latin\xe9.png"), 32, 32, {"clipiqa": 1.0, "look.sharpness": 0.0}),
    Record("ünïcode 写真.png", 33, 47, {"clipiqa": 0.5, "look.sharpness": 0.5}),
    Record("carriage\rreturn.png", 40, 41, {"clipiqa": 0.75, "look.sharpness": 0.5}),
]


def read(path: Path) -> list[Record]:
    table = read_table(path)
    assert table.columns == COLUMNS
    return list(table)


def seen(rows: list[Record], suffix: str) -> list[Record]:
    """Parquet cannot hold a name that is not UTF-8."""
    if suffix != ".parquet":
        return rows
    return [Record(utf8(str(r.path)), r.width, r.height, r.scores, r.error) for r in rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scores{suffix}"
    with ScoreTable(path, COLUMNS) as table:
        table.write(ROWS[:2])
        table.write(ROWS[2:])
    assert read(path) == seen(ROWS, suffix)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    write_table(tmp_path / f"again{suffix}", COLUMNS, ROWS)
    assert read(tmp_path / f"again{suffix}") == seen(ROWS, suffix)


def test_others_read_it_too(tmp_path: Path) -> None:
    import pyarrow.parquet

    for suffix in SUFFIXES:
        write_table(tmp_path / f"t{suffix}", COLUMNS, ROWS)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "width", "height", "clipiqa", "look.sharpness", "error"]
    assert rows[1] == ["a b.png", "512", "384", "0.25", "0.123456789", ""] and len(rows) == 1 + len(ROWS)
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[2]) == {
        "path": "broken.png",
        "width": None,
        "height": None,
        "clipiqa": None,
        "look.sharpness": None,
        "error": "broken.png is empty (0 bytes); expected a picture",
    }
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert table.column("clipiqa").to_pylist() == [0.25, 1e-9, None, 1.0, 0.5, 0.75]
    assert b"latin\xe9.png" in (tmp_path / "t.csv").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(share=st.floats(0, 1))
def test_a_run_killed_at_any_byte_is_resumed(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    growing = path.with_name("t.parquet.part") if suffix == ".parquet" else path
    for file in (path, growing):
        file.unlink(missing_ok=True)
    table = ScoreTable(path, COLUMNS)
    table.write(ROWS)
    table._file.close()  # the process is gone
    whole = growing.read_bytes()
    growing.write_bytes(whole[: round(share * len(whole))])
    with ScoreTable(path, COLUMNS, resume=True) as table:
        kept = list(table.rows())
        assert kept == ROWS[: len(kept)]
        table.write(ROWS[len(kept) :])
    assert read(path) == seen(ROWS, suffix)
    if share == 1:
        assert kept == ROWS


def test_a_finished_parquet_table_can_be_extended(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for rows in (ROWS[:2], [], ROWS[2:]):
        with ScoreTable(path, COLUMNS, resume=True) as table:
            table.write(rows)
    assert read(path) == seen(ROWS, ".parquet")
    # Killed after the table got its name and before the rows were removed: nothing twice.
    with ScoreTable(tmp_path / "u.parquet", COLUMNS) as table:
        table.write(ROWS)
        table._file.close()
        (tmp_path / "copy").write_bytes((tmp_path / "u.parquet.part").read_bytes())
        table._file = (tmp_path / "u.parquet.part").open("ab", buffering=0)
    (tmp_path / "copy").rename(tmp_path / "u.parquet.part")
    with ScoreTable(tmp_path / "u.parquet", COLUMNS, resume=True):
        pass
    assert read(tmp_path / "u.parquet") == seen(ROWS, ".parquet")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 1])
def test_a_parquet_table_whose_extension_was_killed_at_its_start_keeps_its_rows(share: float, tmp_path: Path) -> None:
    path, part = tmp_path / "t.parquet", tmp_path / "t.parquet.part"
    with ScoreTable(path, COLUMNS) as table:
        table.write(ROWS[:4])
    table = ScoreTable(path, COLUMNS, resume=True)
    table._file.close()  # the process is gone while it copied the table
    copied = part.read_bytes()
    part.write_bytes(copied[: round(share * len(copied))])
    with ScoreTable(path, COLUMNS, resume=True) as table:
        assert list(table.rows()) == seen(ROWS[:4], ".parquet")
        table.write(ROWS[4:])
    assert read(path) == seen(ROWS, ".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_similar_names_are_left_alone(suffix: str, tmp_path: Path) -> None:
    for name in (f"t.new{suffix}", f"t{suffix}.new"):
        (tmp_path / name).write_text("mine")
    write_table(tmp_path / f"t{suffix}", COLUMNS, ROWS)
    assert read(tmp_path / f"t{suffix}") == seen(ROWS, suffix)
    with pytest.raises(AttributeError):
        write_table(tmp_path / f"t{suffix}", COLUMNS, [None])  # type: ignore[list-item]
    assert read(tmp_path / f"t{suffix}") == seen(ROWS, suffix)  # the old one
    assert [(tmp_path / name).read_text() for name in (f"t.new{suffix}", f"t{suffix}.new")] == ["mine", "mine"]
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "usual").touch()
    assert (tmp_path / f"t{suffix}").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_overwritten_or_mixed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    with ScoreTable(path, COLUMNS) as table:
        table.write(ROWS)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match="exists already; pass --resume"):
        ScoreTable(path, COLUMNS)
    with pytest.raises(SettingsError, match=r"has the scores clipiqa, look\.sharpness, not other"):
        ScoreTable(path, ["other"], resume=True)
    assert path.read_bytes() == before


def test_two_runs_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScoreTable(tmp_path / "t.csv", COLUMNS), pytest.raises(SettingsError, match="another process is writing"):
        ScoreTable(tmp_path / "t.csv", COLUMNS, resume=True)

    # Until the end, when rows become a Parquet table; and a file that was there a moment ago is not this table.
    path, replaced = tmp_path / "t.parquet", []
    replace, flock = Path.replace, fcntl.flock

    def refused(part: Path, whole: Path) -> None:
        with pytest.raises(SettingsError, match="another process is writing"):
            ScoreTable(path, COLUMNS, resume=True)
        replaced.append(replace(part, whole))

    monkeypatch.setattr(Path, "replace", refused)
    with ScoreTable(path, COLUMNS) as table:
        table.write(ROWS)
    assert replaced == [path]
    monkeypatch.undo()

    def late(file: BinaryIO, how: int) -> None:
        (tmp_path / "t.parquet.part").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(SettingsError, match="another process is writing"):
        ScoreTable(path, COLUMNS, resume=True)


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"expected a table with one of \.csv, \.jsonl, \.parquet"):
        ScoreTable(tmp_path / "t.xlsx", COLUMNS)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    for suffix in SUFFIXES:
        (tmp_path / f"x{suffix}").write_bytes(b"a,b\n1,2\n")
        with pytest.raises(SettingsError, match="is not a table of scores"):
            read_table(tmp_path / f"x{suffix}")
    (tmp_path / "one line.csv").write_text("x" * 200_000)
    with pytest.raises(SettingsError, match="is not a table of scores"):
        read_table(tmp_path / "one line.csv")
    (tmp_path / "y.csv").write_text("path,width,height,m,error\na,1,x,0.5,\n")
    with pytest.raises(SettingsError, match="line 2"):
        list(read_table(tmp_path / "y.csv"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.csv", "my only copy of a note"),
        ("other.csv", "name,score\nx,1\ny,2"),
        ("torn.csv", "path,width,height,oth"),
        ("notes.jsonl", "my only copy of a note"),
        ("other.jsonl", '{"name": "x", "score": 1}\n{"name": "y", "sc'),
        ("notes.parquet", "my only copy of a note"),
    ],
)
def test_what_is_no_table_is_not_touched(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=r"is not a table of scores|has the scores oth, not"):
        ScoreTable(tmp_path / name, COLUMNS, resume=True)
    assert (tmp_path / name).read_text() == content


def test_full_disk(tmp_path: Path) -> None:
    """A real ENOSPC, and a file-size limit in the middle of a row: the rows before are kept whole."""
    (tmp_path / "full.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        ScoreTable(tmp_path / "full.csv", COLUMNS)
    path = tmp_path / "t.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large"), ScoreTable(path, COLUMNS) as table:
        table.write(ROWS[:3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            table.write(ROWS[3:4])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(path) == ROWS[:3]
    with ScoreTable(path, COLUMNS, resume=True) as table:
        table.write(ROWS[3:])
    assert read(path) == ROWS


def test_a_parquet_table_that_cannot_be_finished_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError), ScoreTable(path, COLUMNS) as table:
            table.write(ROWS)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet.part"]
    with ScoreTable(path, COLUMNS, resume=True):
        pass
    assert read(path) == seen(ROWS, ".parquet")
