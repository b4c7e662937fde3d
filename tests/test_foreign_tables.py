"""Tables of scores that went through pandas, a spreadsheet or PowerShell are read as what they are, or refused."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pandas
import pytest

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.scoring.tables import Record, ScoreTable, read_table, write_table

COLUMNS = ("clipiqa", "look.sharpness")
ROWS = [
    Record("a b.png", 160, 120, {"clipiqa": 0.25, "look.sharpness": 0.125}),
    Record('x, "y".png', 40, 41, {"clipiqa": 0.5}, "look.sharpness: the score is nan"),
    Record("broken.png", error="broken.png is empty"),
    Record("写真.png", 33, 47, {"clipiqa": 0.75, "look.sharpness": 1e-9}),
]
SUFFIXES = (".csv", ".jsonl", ".parquet")


def load(path: Path) -> pandas.DataFrame:
    if path.suffix == ".csv":
        return pandas.read_csv(path)
    if path.suffix == ".jsonl":
        return pandas.read_json(path, lines=True)
    return pandas.read_parquet(path)


def store(frame: pandas.DataFrame, path: Path, **options: object) -> None:
    if path.suffix == ".csv":
        frame.to_csv(path, **{"index": False, **options})
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path, **options)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    write_table(tmp_path / "ours.csv", COLUMNS, ROWS)
    return tmp_path / "ours.csv"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_pandas_writes_is_read(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"a{suffix}", COLUMNS, ROWS)
    frame = load(tmp_path / f"a{suffix}")
    assert frame["width"].dtype == float  # since one is missing: 160.0
    shuffled = frame[["look.sharpness", "error", "path", "clipiqa", "height", "width"]]
    labelled = frame.assign(label=["cat", "dog", None, "写"])
    for name, each in {"as is": frame, "shuffled": shuffled, "labelled": labelled}.items():
        store(each, tmp_path / f"{name}{suffix}")
        table = read_table(tmp_path / f"{name}{suffix}")
        assert sorted(table.columns) == sorted(COLUMNS)
        assert list(table) == ROWS
        assert list(table.others) == (["label"] if name == "labelled" else [])
    # Without the rows that have an error, as a user drops them to have them tried again.
    store(frame[frame["error"].isna()], tmp_path / f"good{suffix}")
    with ScoreTable(tmp_path / f"good{suffix}", COLUMNS, resume=True) as table:
        assert [record.path for record in table.rows()] == ["a b.png", "写真.png"]
        table.write(ROWS[1:3])
    assert list(read_table(tmp_path / f"good{suffix}")) == [ROWS[0], ROWS[3], ROWS[1], ROWS[2]]


@pytest.mark.parametrize(
    "options",
    [
        {"index": True},
        {"sep": ";"},
        {"sep": "\t"},
        {"encoding": "utf-8-sig"},
        {"encoding": "utf-16"},
        {"na_rep": "NaN"},
        {"na_rep": "NA", "quoting": csv.QUOTE_ALL},
        {"lineterminator": "\r\n"},
        {"encoding": "utf-8-sig", "sep": ";", "index": True, "lineterminator": "\r\n"},
    ],
    ids=str,
)
def test_every_way_of_writing_csv(options: dict[str, object], ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "k.csv"
    store(load(ours), path, **options)
    assert list(read_table(path)) == ROWS and read_table(path).columns == COLUMNS
    more = Record("new;\n.png", 50, 60, {"clipiqa": 0.5, "look.sharpness": 0.25})
    if options.get("encoding") == "utf-16":
        before = path.read_bytes()
        with pytest.raises(SettingsError, match="convert it to UTF-8"):
            ScoreTable(path, COLUMNS, resume=True)
        assert path.read_bytes() == before
        return
    with ScoreTable(path, COLUMNS, resume=True) as table:
        table.write([more])
    assert list(read_table(path)) == [*ROWS, more]
    again = pandas.read_csv(path, sep=str(options.get("sep", ",")))
    assert len(again) == 5 and again["path"].iloc[-1] == more.path and again["width"].iloc[-1] == 50


def test_a_resumed_table_keeps_columns_of_yours_and_their_order(ours: Path, tmp_path: Path) -> None:
    frame = load(ours)
    frame.insert(0, "label", ["cat", "dog", "owl", "eel"])
    more = Record("new.png", 50, 60, {"clipiqa": 0.5, "look.sharpness": 0.25})
    for suffix in SUFFIXES:
        path = tmp_path / f"k{suffix}"
        store(frame[["error", "label", "clipiqa", "path", "width", "look.sharpness", "height"]], path)
        if suffix == ".parquet":
            before = path.read_bytes()
            with pytest.raises(SettingsError, match=r"additional columns \(label\), which a resumed Parquet table"):
                ScoreTable(path, COLUMNS, resume=True)
            assert path.read_bytes() == before and not path.with_name("k.parquet.part").exists()
            continue
        with ScoreTable(path, COLUMNS, resume=True) as table:
            table.write([more])
        assert load(path)["label"].tolist()[:4] == ["cat", "dog", "owl", "eel"]
        assert list(read_table(path)) == [*ROWS, more]
    del frame["error"]
    store(frame, tmp_path / "l.csv")
    with pytest.raises(SettingsError, match="has no column 'error' for new rows"):
        ScoreTable(tmp_path / "l.csv", COLUMNS, resume=True)
    store(frame.assign(error=None, mos=1.5), tmp_path / "m.csv")
    with pytest.raises(SettingsError, match=r"has the scores .*mos, not clipiqa, look\.sharpness"):
        ScoreTable(tmp_path / "m.csv", COLUMNS, resume=True)


def test_an_index_column_is_no_reason_to_refuse_a_parquet_table(ours: Path, tmp_path: Path) -> None:
    store(load(ours).iloc[[0, 1, 3]], tmp_path / "k.parquet")  # pandas keeps the index of a filtered frame
    assert list(read_table(tmp_path / "k.parquet").others.values()) == ["an index"]
    with ScoreTable(tmp_path / "k.parquet", COLUMNS, resume=True) as table:
        table.write(ROWS[2:3])
    assert list(read_table(tmp_path / "k.parquet")) == [ROWS[0], ROWS[1], ROWS[3], ROWS[2]]


def test_data_sets_with_images_are_filtered_without_reading_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"path": [b"a\xff.png", b"b.png"], "image": [{"bytes": b"x", "path": None}] * 2, "clipiqa": [0.5, 0.75]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    table = read_table(tmp_path / "d.parquet")
    assert table.columns == ("clipiqa",) and "struct" in table.others["image"]
    assert [record.path for record in table] == [os.fsdecode(b"a\xff.png"), "b.png"]


def test_filter_writes_what_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "a.jsonl", COLUMNS, ROWS)
    store(load(tmp_path / "a.jsonl").assign(label="x"), tmp_path / "j.jsonl")
    assert "160.0" in (tmp_path / "j.jsonl").read_text()
    for source in ("j.jsonl", "k.csv", "k.parquet"):
        target = {"j.jsonl": "k.csv", "k.csv": "k.parquet", "k.parquet": "k.jsonl"}[source]
        arguments = [str(tmp_path / source), "-m", "clipiqa", "--above", "0", "-o", str(tmp_path / target)]
        assert cli.main(["filter", *arguments]) == 0
        assert list(read_table(tmp_path / target)) == [ROWS[0], ROWS[1], ROWS[3]]
        lost = "columns that are not scores were not written to" in capsys.readouterr().err
        assert lost == (source == "j.jsonl")
    assert b"160.0" not in (tmp_path / "k.csv").read_bytes() + (tmp_path / "k.jsonl").read_bytes()


HEADER = "path,width,height,clipiqa,error"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "path,path,clipiqa\na,b,1\n", "two columns are called 'path'"),
        ("t.csv", "image,clipiqa\na,1\n", "no column 'path'; its columns are image, clipiqa"),
        ("t.csv", "", r"\(it is empty\)"),
        ("t.csv", "\n\n", r"\(it is empty\)"),
        ("t.csv", f"{HEADER}\na\n", "line 2 has 1 cell for 5 columns"),
        ("t.csv", f"{HEADER}\na,160.5,1,0.5,\n", r"line 2, column 'width': 160\.5 is not a number of pixels"),
        ("t.csv", f"{HEADER}\na,-3,1,0.5,\n", "-3 is not a number of pixels"),
        ("t.csv", f"{HEADER}\na,1,x,0.5,\n", "line 2, column 'height': 'x' is not a number"),
        ("t.csv", f"{HEADER}\na,1,1,0.5,\nb,1\n", "line 3 has 2 cells for 5 columns"),
        ("t.csv", f"{HEADER}\na,1,1,0.5,,,\n", "line 2 has 7 cells for 5 columns"),
        ("t.csv", f"{HEADER}\n{'x' * 140_000},1,1,0.5,\n", r"line 2: field larger than field limit \(131072\)"),
        ("t.csv", "x" * 140_000, "field larger than field limit"),
        ("t.jsonl", '{"path": "a", "clipiqa": 1}\n[1]\n', "line 2 is .*, not an object"),
        ("t.jsonl", '{"path": "a", "clipiqa": 1}\n{"clipiqa": 1}\n', "line 2 has no 'path'; its keys: clipiqa"),
        ("t.jsonl", '{"path": "a", "clipiqa": 1}\n{"path', "line 2: "),
        ("t.jsonl", '{"path": 7, "clipiqa": 1}\n', "column 'path': 7 is not text"),
        ("t.jsonl", '{"path": "a", "width": true, "clipiqa": 1}\n', "column 'width': True is not a number"),
        ("t.jsonl", "[" * 100_000, "line 1: "),
        (
            "t.csv",
            f"{HEADER}\na,1,1,0.5,\nx\0y.jpg,1,1,0.5,\n",
            r"line 3, column 'path': 'x\\x00y.jpg' is not a file name",
        ),
        ("t.jsonl", '{"path": "a\\u0000", "clipiqa": 1}\n', r"line 1, column 'path': 'a\\x00' is not a file name"),
        ("t.jsonl", '{"path": "\\ud83d.jpg", "clipiqa": 1}\n', r"column 'path': '\\ud83d.jpg' is not a file name"),
        ("t.jsonl", '{"path": "a", "error": {}, "clipiqa": 1}\n', "column 'error': {} is not text"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    limit = csv.field_size_limit()
    with pytest.raises(SettingsError, match=message) as caught:
        list(read_table(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and csv.field_size_limit() == limit


@pytest.mark.parametrize("cell", ['"cat"', "true", "[0.5]", "1e999", "Infinity", '"1_000"', '"٣"', "1" + "0" * 400])
def test_a_column_with_anything_but_numbers_holds_no_scores(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"path": "a", "clipiqa": 0.5}\n' + f'{{"path": "b", "clipiqa": {cell}}}\n', encoding="utf-8")
    before = path.read_bytes()
    assert read_table(path).columns == ()
    assert cli.main(["filter", str(path), "-m", "clipiqa", "--best", "1"]) == 2
    err = capsys.readouterr().err
    assert "no scores in column 'clipiqa' (line 2: " in err and err.count("\n") == 1
    with pytest.raises(SettingsError, match="column 'clipiqa', line 2: "):
        ScoreTable(path, ["clipiqa"], resume=True)
    assert path.read_bytes() == before


def test_missing_scores_and_scores_as_text(tmp_path: Path) -> None:
    cells = ["0.5", '"0.5"', "null", "NaN", '""', '" nan "', "7", '"5e-1"']
    lines = [f'{{"path": "{n}", "clipiqa": {cell}, "width": 160.0}}\n' for n, cell in enumerate(cells)]
    (tmp_path / "t.jsonl").write_text("".join([*lines, "\n", '{"path": "z", "other": 1}\n']))
    table = read_table(tmp_path / "t.jsonl")
    assert table.columns == ("clipiqa", "other")
    assert [record.scores.get("clipiqa") for record in table] == [0.5, 0.5, None, None, None, None, 7, 0.5, None]
    assert all(math.isfinite(score) for record in table for score in record.scores.values())
    assert next(iter(table)).width == 160


def test_what_is_written_can_be_read_however_long(tmp_path: Path) -> None:
    long = Record("a.png", error="x" * 300_000)
    for suffix in SUFFIXES:
        with ScoreTable(tmp_path / f"t{suffix}", COLUMNS) as table:
            table.write([long, ROWS[0]])
        first, second = read_table(tmp_path / f"t{suffix}")
        assert str(first.error).endswith("... (200031 more characters)") and second == ROWS[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_that_no_encoding_has_is_escaped(suffix: str, tmp_path: Path) -> None:
    """Half a surrogate pair, as JSON may contain, and bytes that are not UTF-8, in errors and names of columns."""
    row = {"path": "a.png", "caf\udce9": 0.5, "\ud83d": 0.25, "error": "piqe: \ud83d"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    target = tmp_path / f"u{suffix}"
    assert cli.main(["filter", str(tmp_path / "t.jsonl"), "-m", "\ud83d", "--above", "0", "-o", str(target)]) == 0
    (written,) = read_table(target)
    assert (
        list(written.scores.values()) == [0.5, 0.25]
        and "ud83d" in (written.error or "").encode("ascii", "backslashreplace").decode()
    )


def test_empty_json_lines(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    assert read_table(tmp_path / "t.jsonl").columns == () and list(read_table(tmp_path / "t.jsonl")) == []
