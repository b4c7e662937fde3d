"""What scored a table stands beside it, and a table is not continued with what would make other scores of it."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.files import writing
from qualiclip_pyiqa.images.identity import image_key
from qualiclip_pyiqa.scoring.tables import (
    Record,
    ScoreTable,
    meta_path,
    read_meta,
    read_table,
    utf8,
    write_table,
)

SUFFIXES = (".csv", ".jsonl", ".parquet")
COLUMNS = ("mine", "piqe")
META: dict[str, Any] = {
    "version": "0.1.0",
    "columns": {
        "mine": {
            "lower_better": False,
            "temperature": 2.0,
            "weights": {"path": "/a/model.safetensors", "sha256": "aa" * 32, "licence": "CC-BY-SA-4.0"},
        },
        "piqe": {"lower_better": True, "metric": "piqe", "pyiqa_version": "0.1.16"},
    },
    "precision": "fp32",
    "device": "cpu",
    "rules": {"ignore_orientation": False, "max_pixels": None},
}
ROWS = [Record(f"{n}.png", 40, 50, {"mine": n / 8, "piqe": 100.0 - n}) for n in range(4)]


def changed(*keys: str, to: object) -> dict[str, Any]:
    meta = copy.deepcopy(META)
    place = meta
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return meta


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_says_what_scored_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    with ScoreTable(path, COLUMNS, meta=META) as table:
        assert read_meta(path) == META  # before the first row
        table.write(ROWS)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.meta.json"]
    assert json.loads(meta_path(path).read_text()) == META == read_table(path).meta
    assert read_table(path).lower_better("piqe") is True and read_table(path).lower_better("mine") is False
    before = meta_path(path).read_bytes(), meta_path(path).stat().st_mtime_ns
    with ScoreTable(path, COLUMNS, resume=True, meta=copy.deepcopy(META)) as table:
        assert list(table.rows()) == ROWS
    assert (meta_path(path).read_bytes(), meta_path(path).stat().st_mtime_ns) == before
    # A Parquet file also holds it itself, wherever it is moved.
    meta_path(path).unlink()
    assert read_meta(path) == (META if suffix == ".parquet" else None)
    assert list(read_table(path)) == ROWS


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("columns", "mine", "weights", "sha256"), "bb" * 32, r"weights sha256 of mine was a{40}\.\.\., is now b{40}"),
        (("columns", "mine", "temperature"), 1.0, "temperature of mine was 2.0, is now 1.0"),
        (("columns", "piqe", "pyiqa_version"), "0.2.0", r"pyiqa_version of piqe was 0\.1\.16, is now 0\.2\.0"),
        (("precision",), "bf16", "precision was fp32, is now bf16"),
        (("device",), "cuda", "device was cpu, is now cuda"),
        (("rules", "ignore_orientation"), True, "rules ignore orientation was False, is now True"),
        (("new setting",), 7, "new setting was absent, is now 7"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_changes_scores_is_refused(
    suffix: str, keys: tuple[str, ...], to: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"t{suffix}"
    with ScoreTable(path, COLUMNS, meta=META) as table:
        table.write(ROWS)
    before = path.read_bytes(), meta_path(path).read_bytes()
    with pytest.raises(SettingsError, match=message) as caught:
        ScoreTable(path, COLUMNS, resume=True, meta=changed(*keys, to=to))
    assert sorted(tmp_path.iterdir()) == [path, meta_path(path)]
    assert "\n" not in str(caught.value) and "resume with the same settings, or" in str(caught.value)
    assert (path.read_bytes(), meta_path(path).read_bytes()) == before
    # After the rows that were written before the run was stopped, too.
    path.unlink()
    with pytest.raises(KeyError), ScoreTable(path, COLUMNS, meta=META) as table:
        table.write(ROWS[:2])
        raise KeyError
    with pytest.raises(SettingsError, match=message):
        ScoreTable(path, COLUMNS, resume=True, meta=changed(*keys, to=to))


def test_what_changes_no_score_is_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    with ScoreTable(path, COLUMNS, meta=META) as table:
        table.write(ROWS[:2])
    moved = changed("columns", "mine", "weights", "path", to="/b/model.safetensors")
    with ScoreTable(path, COLUMNS, resume=True, meta=moved):
        pass
    assert not caplog.records and read_meta(path) == META
    newer = changed("version", to="0.2.0")
    newer["rules"]["max_pixels"] = 10
    for _ in range(2):
        with ScoreTable(path, COLUMNS, resume=True, meta=newer) as table:
            table.write([Record("more.png", 1, 1, {"mine": 1.0, "piqe": 1.0})])
    assert "version was 0.1.0, is now 0.2.0; rules max pixels was absent, is now 10" in caplog.text
    assert read_meta(path) == {**META, "continued": [newer]}
    with pytest.raises(SettingsError, match="precision"):
        ScoreTable(path, COLUMNS, resume=True, meta=changed("precision", to="tf32"))


def test_rows_of_unknown_settings_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    write_table(path, COLUMNS, ROWS)
    with ScoreTable(path, COLUMNS, resume=True, meta=META) as table:
        table.write(ROWS)
    assert "has 4 rows but no t.csv.meta.json" in caplog.text
    assert read_meta(path) == {**META, "rows_of_unknown_settings": 4}
    caplog.clear()
    with ScoreTable(path, COLUMNS, resume=True, meta=META):
        pass
    assert not caplog.records and read_meta(path) == {**META, "rows_of_unknown_settings": 4}


def test_the_description_of_another_table_is_not_taken(tmp_path: Path) -> None:
    """It is replaced where a new table begins, and removed where nobody says what scored it."""
    for suffix in SUFFIXES:
        path = tmp_path / f"t{suffix}"
        meta_path(path).write_text("{broken")
        with ScoreTable(path, COLUMNS, meta=META):
            pass
        assert read_meta(path) == META
        write_table(path, COLUMNS, ROWS)
        assert not meta_path(path).exists() and read_meta(path) is None
        meta_path(path).write_text('["no table"]')
        with pytest.raises(SettingsError, match=r"meta\.json is not the description of a table of scores"):
            read_table(path)
        with pytest.raises(SettingsError, match=r"meta\.json is not the description of a table of scores"):
            ScoreTable(path, COLUMNS, resume=True, meta=META)
    meta_path(tmp_path / "new.csv").write_text(json.dumps(META))
    with ScoreTable(tmp_path / "new.csv", COLUMNS):
        assert read_meta(tmp_path / "new.csv") is None


def test_other_columns_than_described_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with ScoreTable(path, COLUMNS, meta=META) as table:
        table.write(ROWS)
    text = path.read_text()
    path.write_text(text.replace("error", "mos,error").replace(",\n", ",3.5,\n"))  # a column of the user's
    with ScoreTable(path, COLUMNS, resume=True, meta=META) as table:
        table.write(ROWS[:1])
    assert read_table(path).columns == (*COLUMNS, "mos")
    assert [record.scores.get("mos") for record in read_table(path)] == [3.5] * 4 + [None]
    one = {**META, "columns": {"mine": META["columns"]["mine"]}}
    with pytest.raises(SettingsError, match="has the scores mine, piqe, not mine;"):
        ScoreTable(path, ["mine"], resume=True, meta=one)
    path.write_text(text.replace("0.125", "cat"))
    with pytest.raises(SettingsError, match="column 'mine', line 3: 'cat' is not a number"):
        read_table(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("when", ["before the description", "before the first row"])
def test_a_run_killed_at_its_start_leaves_nothing_wrong(suffix: str, when: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    child = os.fork()
    if child == 0:
        victim = "write_meta" if when == "before the description" else "csv_line"
        module = __import__("qualiclip_pyiqa.scoring.tables.write", fromlist=["write_meta"])
        setattr(module, victim, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        ScoreTable(path, COLUMNS, meta=META)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert meta_path(path).exists() == (when == "before the first row")
    other = changed("precision", to="bf16")  # no row was scored, so any settings will do, with --resume and without
    for resume in (False, True):
        with pytest.raises(KeyError), ScoreTable(path, COLUMNS, resume=resume, meta=other):
            assert read_meta(path) == other
            raise KeyError
        path.unlink(missing_ok=True)
    with ScoreTable(path, COLUMNS, meta=META) as table:
        table.write(ROWS)
    assert list(read_table(path)) == ROWS and read_meta(path) == META


NAMES = st.one_of(
    st.text(min_size=1, max_size=30),
    st.binary(min_size=1, max_size=30).map(os.fsdecode),
    st.sampled_from(
        ["=1+1", "nan", "NULL", " a", "a ", '"', "\r", "\r\n", "a\nb", "\x1f", "\u2028", ";", ",", "\ufeff"]
    ),
).filter(lambda name: "\0" not in name)
MISSING = ("nan", "na", "n/a", "<na>", "null", "none")  # of an error, what pandas may write for none
SCORES = st.floats(allow_nan=False, allow_infinity=False)
RECORDS = st.builds(
    Record,
    NAMES,
    st.none() | st.integers(1, 2**31 - 1),
    st.none() | st.integers(1, 2**31 - 1),
    st.dictionaries(st.sampled_from(COLUMNS), SCORES),
    st.none() | st.just("nan is what it said") | NAMES.filter(lambda text: text.casefold() not in MISSING),
)


def storable(text: str | None) -> bool:
    """Whether UTF-8 with surrogate escapes can hold it, as every file name of the system can be."""
    try:
        os.fsencode(text or "")
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(records=st.lists(RECORDS.filter(lambda r: storable(r.path) and storable(r.error)), max_size=6), data=st.data())
def test_any_record_is_read_as_it_was_written_after_any_kill(
    suffix: str, records: list[Record], data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"t{suffix}"
    for file in tmp_path.iterdir():
        file.unlink()
    table = ScoreTable(path, COLUMNS, meta=META)
    table.write(records)
    table._file.close()  # the process is gone
    growing = path.with_name("t.parquet.part") if suffix == ".parquet" else path
    whole = growing.read_bytes()
    growing.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with ScoreTable(path, COLUMNS, resume=True, meta=META) as table:
        kept = list(table.rows())
        assert kept == records[: len(kept)]
        table.write(records[len(kept) :])
    if suffix == ".parquet":
        records = [Record(utf8(str(r.path)), r.width, r.height, r.scores, r.error and utf8(r.error)) for r in records]
    assert list(read_table(path)) == records
    assert read_meta(path) == META


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for suffix in SUFFIXES:
        caplog.clear()
        with ScoreTable(tmp_path / f"t{suffix}", COLUMNS) as table:
            table.write(ROWS[:2])
            table.write(ROWS[2:])
        assert list(read_table(tmp_path / f"t{suffix}")) == ROWS
        (said,) = caplog.records
        assert said.levelno == logging.WARNING and "cannot be locked" in said.getMessage()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_empty_file_stays(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / f"t{suffix}"
    monkeypatch.setattr("qualiclip_pyiqa.scoring.tables.write.write_meta", fail)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
        ScoreTable(path, COLUMNS, meta=META)
    assert list(tmp_path.iterdir()) == []
    path.touch()  # the user's
    with pytest.raises(OSError):
        ScoreTable(path, COLUMNS, meta=META)
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_is_known_however_its_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "in" / "sub")
    monkeypatch.chdir(tmp_path)
    same = [
        "in/a.png",
        "./in/a.png",
        "in//a.png",
        "in/./a.png",
        "in/sub/../a.png",
        "elsewhere/../a.png",
        f"{tmp_path}/in/a.png",
    ]
    assert len({image_key(path) for path in same}) == 1
    other = ["a.png", "in/sub/a.png", "in/b.png", "s3://bucket/in/a.png", "s3://bucket/./in/a.png"]
    assert len({image_key(path) for path in [*same, *other]}) == 1 + len(other)
    assert image_key("elsewhere/a.png") == image_key("in/sub/a.png")
    (tmp_path / "in" / "link.png").symlink_to("a.png")  # two names of one file are two images
    assert image_key("in/link.png") != image_key("in/a.png")
    monkeypatch.chdir(tmp_path / "in")
    assert image_key("a.png") == image_key("../in/a.png") == image_key(f"{tmp_path}/in/a.png")
    assert image_key("..") == image_key(str(tmp_path)) and image_key("x\0/a") == image_key("./x\0/a")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert image_key("a.png") == image_key("a.png") != image_key("b.png")


def test_writing_says_what_cannot_be_written() -> None:
    def call(error: OSError) -> Callable[[], None]:
        def fail() -> None:
            with writing("scores.csv"):
                raise error

        return fail

    with pytest.raises(OSError, match=r"^scores\.csv cannot be written \(No space left on device\)$"):
        call(OSError(errno.ENOSPC, "No space left on device"))()
    with pytest.raises(BrokenPipeError):
        call(BrokenPipeError())()
