"""`qualiclip filter`: the direction of a score, rows kept, images copied."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cli_score import command, picture, rows

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.scoring.tables import Record, ScoreTable, meta_path, read_meta, write_table

META: dict[str, Any] = {
    "columns": {"qualiclip-mini": {"lower_better": False}, "piqe": {"lower_better": True}},
    "precision": "fp32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png", "sub/deep.jpg"):
        picture(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def scored(folder: Path, tmp_path: Path) -> Path:
    paths = [str(folder / name) for name in ("0.png", "1.png", "sub/deep.jpg")]
    records = [Record(path, 48, 40, {"piqe": number / 4}) for number, path in enumerate(paths)]
    write_table(tmp_path / "s.csv", ["piqe"], records, {"columns": {"piqe": {"lower_better": True}}})
    return tmp_path / "s.csv"


def test_a_pipe_that_nobody_reads(table: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    run = command("filter", table, "-m", "piqe", "--best", 1, stdout=write)
    os.close(write)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and err == b"7 of 7 scored images kept; 1 without a score left out\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    records = [Record(f"{n}.png", 40, 40, {"qualiclip-mini": n / 10, "piqe": n}) for n in (3, 1, 4, 1.5, 9, 2, 6)]
    records.insert(3, Record("broken.png", error="broken"))
    write_table(tmp_path / "t.csv", ["qualiclip-mini", "piqe"], records, META)
    return tmp_path / "t.csv"


def keep(table: Path, *arguments: object) -> int:
    return cli.main(["filter", str(table), *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-m", "qualiclip-mini", "--above", 0.3), "3 4 9 6"),
        (("-m", "qualiclip-mini", "--below", 0.15), "1 1.5"),
        (("-m", "qualiclip-mini", "--best", 0.25), "9 6"),
        (("-m", "piqe", "--best", 0.25), "1 1.5"),  # lower is better
        (("-m", "piqe", "--best", 0), ""),
        (
            (
                "-m",
                "piqe",
                "--above=-1",
            ),
            "3 1 4 1.5 9 2 6",
        ),
        (("-m", "piqe", "--best", 1), "3 1 4 1.5 9 2 6"),
    ],
)
def test_filter_lists(
    arguments: tuple[object, ...], expected: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keep(table, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [f"{number}.png" for number in expected.split()]
    assert f"{len(expected.split())} of 7 scored images kept; 1 without a score left out" in captured.err
    assert keep(table, *arguments, "-0") == 0
    assert capsys.readouterr().out == "".join(f"{number}.png\0" for number in expected.split())


def test_filter_keeps_rows_and_copies(
    folder: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keep(tmp_path / "s.csv", "--best", 1, "-o", tmp_path / "k.parquet", "--copy", tmp_path / "kept") == 0
    assert capsys.readouterr().out == ""
    assert rows(tmp_path / "k.parquet") == rows(scored)
    assert read_meta(tmp_path / "k.parquet") == read_meta(scored)
    for path in [*folder.glob("*.png"), folder / "sub" / "deep.jpg"]:
        assert (tmp_path / "kept" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert keep(tmp_path / "s.csv", "--best", 1, "--copy", tmp_path / "kept") == 2
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert keep(tmp_path / "s.csv", "--best", 1, "--copy", tmp_path / "more") == 1
    assert "cannot be copied" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "more").rglob("*") if path.is_file()]
    assert keep(tmp_path / "s.csv", "--best", 1, "-o", tmp_path / "nowhere" / "k.csv") == 2
    assert capsys.readouterr().err.endswith("k.csv cannot be written: " + f"{tmp_path}/nowhere is not a folder\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for suffix in (".csv", ".jsonl", ".parquet"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            assert keep(tmp_path / "s.csv", "--best", 1, "-o", tmp_path / f"full{suffix}") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capsys.readouterr().err.endswith(f"full{suffix} cannot be written (File too large)\n")
    assert not list(tmp_path.glob("full*"))


def test_copies_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "other" / "x.png")
    picture(tmp_path / "photos" / "y.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    paths = ["../photos/../other/x.png", "../photos/y.png"]
    write_table("t.csv", ["piqe"], [Record(path, 48, 40, {"piqe": 1}) for path in paths])
    (tmp_path / "kept" / "photos").mkdir(parents=True)
    (tmp_path / "kept" / "photos" / "y.png.part").write_text("mine")
    assert keep(Path("t.csv"), "--best", 1, "--copy", "../kept") == 0
    copies = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert copies == ["kept/other/x.png", "kept/photos/y.png", "kept/photos/y.png.part"]
    assert (tmp_path / "kept" / "photos" / "y.png.part").read_text() == "mine"


def test_filter_refuses(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--above", 0.5), "choose one with -m"),
        (("-m", "niqe", "--above", 0.5), "has no score 'niqe'"),
        (("-m", "piqe", "--best", 20), "expected a share in 0..1"),
        (("-m", "piqe", "--best", 1, "-o", table), "exists already"),
        (("-m", "piqe", "--best", 1, "-o", tmp_path / "x.txt"), "expected a table with one of"),
        (("-m", "piqe", "--above", 1, "--lower-better"), "--lower-better has no effect without --best"),
        (("-m", "piqe", "--above", 1, "--copy", table), f"{table} is not a folder; expected one for the copies"),
        (
            ("-m", "piqe", "--above", 1, "--copy", table / "sub"),
            f"{table} is not a folder; expected one for the copies",
        ),
    ):
        assert keep(table, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("filter", "t.csv", "--above", "nan"),
        ("filter", "t.csv", "--below", "NaN"),
        ("filter", "t.csv", "--best", "nan"),
        ("score", "in", "--decode-timeout", "nan"),
        ("tune", "-m", "clipiqa+", "--ratings", "r.csv", "--out", "r", "--validation", "nan"),
        ("tune", "-m", "clipiqa+", "--ratings", "r.csv", "--out", "r", "--mos-range", "1", "nan"),
        ("tune", "-m", "clipiqa+", "--ratings", "r.csv", "--out", "r", "--learning-rate", "nan"),
        ("tune", "-m", "clipiqa+", "--ratings", "r.csv", "--out", "r", "--seed", "-1"),
        ("train", "--config", "mini", "--pristine", "in", "--out", "r", "--seed", "-1"),
        ("evaluate", "--ratings", "r.csv", "--seed", "-1"),
        ("evaluate", "--degradations", "in", "--seed", str(2**64)),
    ],
)
def test_numbers_that_cannot_be_meant(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"'{arguments[-1]}' is not a" in last and last.startswith(f"qualiclip {arguments[0]}: error: argument ")


def test_the_direction_is_the_table_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its column is called: "my piqe" is no metric's name, and a model file's path says nothing either."""
    names = ["my piqe", "runs/x/model.safetensors"]
    records = [Record(f"{n}.png", 40, 40, dict.fromkeys(names, float(n))) for n in range(4)]
    meta = {"columns": {names[0]: {"lower_better": True}, names[1]: {"lower_better": False}}}
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"t{suffix}"
        write_table(path, names, records, meta)
        for name, best in zip(names, ("0.png", "3.png"), strict=True):
            assert keep(path, "-m", name, "--best", 0.25) == 0
            captured = capsys.readouterr()
            assert captured.out == f"{best}\n" and "direction" not in captured.err
        assert keep(path, "-m", names[0], "--best", 0.25, "--no-lower-better") == 0
        captured = capsys.readouterr()
        assert captured.out == "3.png\n" and "lower scores of my piqe are better; the option overrides" in captured.err
        # Through another table, twice.
        for source, target in (
            (path, tmp_path / f"{suffix}1.jsonl"),
            (tmp_path / f"{suffix}1.jsonl", tmp_path / f"{suffix}2.csv"),
        ):
            assert keep(source, "-m", names[0], "--above", 0, "-o", target) == 0
        assert read_meta(target) == meta
    capsys.readouterr()
    meta_path(target).unlink()
    for options, best in (((), "3.png"), (("--lower-better",), "0.png"), (("--no-lower-better",), "3.png")):
        assert keep(target, "-m", names[0], "--best", 0.25, *options) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{best}\n"
        assert ("does not state the direction of my piqe; by its name, higher is" in captured.err) != bool(options)
    write_table(target, ["piqe"], [Record(f"{n}.png", 1, 1, {"piqe": n}) for n in range(4)])
    assert keep(target, "--best", 0.25) == 0
    captured = capsys.readouterr()
    assert captured.out == "0.png\n" and "by its name, lower is" in captured.err


def test_the_described_score_is_meant_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [Record(f"{n}.png", 40, 40, {"mos": float(-n), "piqe": float(n)}) for n in range(4)]
    write_table(tmp_path / "t.csv", ["mos", "piqe"], records, {"columns": {"piqe": {"lower_better": True}}})
    assert keep(tmp_path / "t.csv", "--best", 0.25) == 0
    assert capsys.readouterr().out == "0.png\n"
    meta_path(tmp_path / "t.csv").unlink()
    assert keep(tmp_path / "t.csv", "--best", 0.25) == 2
    assert "has the scores mos, piqe; choose one with -m" in capsys.readouterr().err


def test_a_column_that_one_cell_keeps_from_being_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,m\na.png,1\nb.png,?\n")
    assert keep(table, "--above", 0) == 2
    assert capsys.readouterr().err == (
        f"qualiclip: {table} has no column of scores (not scores: 'm': line 3: '?' is not a number)\n"
    )
    table.write_text("path,m,n,o\na.png,1,2,3\nb.png,?,2,3\n")
    assert keep(table, "--above", 0) == 2
    assert "the scores n, o; choose one with -m (not scores: 'm': line 3: '?' is not" in capsys.readouterr().err


def test_rows_of_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in `evaluate --scores`: it is one image, unless its scores differ."""
    monkeypatch.chdir(tmp_path)
    rows_of = [Record(path, 48, 40, {"piqe": 1, "niqe": n}) for n, path in enumerate(("a.png", "b.png", "./a.png"))]
    write_table("t.csv", ["piqe", "niqe"], rows_of)
    assert keep(Path("t.csv"), "-m", "piqe", "--above", 0) == 0
    assert capsys.readouterr().out == "a.png\nb.png\n"
    assert keep(Path("t.csv"), "-m", "niqe", "--above", 2) == 2
    assert "t.csv has two rows of ./a.png with different scores; expected one per image" in capsys.readouterr().err


def test_an_unfinished_parquet_table_is_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.parquet"
    table = ScoreTable(path, ["piqe"])
    table.write([Record("a.png", 48, 40, {"piqe": 1})])
    assert keep(path, "--above", 0) == 2
    err = capsys.readouterr().err
    assert f"{path.name}.part beside it has the rows of an unfinished run; complete it with --resume" in err
    assert keep(Path(f"{path}.part"), "--above", 0) == 0


def test_one_image_that_cannot_be_copied_keeps_no_other_from_it(
    folder: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0.png").unlink()
    assert keep(scored, "--best", 1, "--copy", tmp_path / "kept") == 1
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()) == ["1.png", "deep.jpg"]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"qualiclip: {folder}/0.png cannot be copied to {tmp_path}/kept (No such file or directory)",
        "qualiclip: 1 of 3 images not copied",
    ]


def test_an_image_that_was_spelled_twice_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "deep" / "a.png")
    (tmp_path / "link").symlink_to("in/deep")
    monkeypatch.chdir(tmp_path)
    write_table("t.csv", ["piqe"], [Record(path, 48, 40, {"piqe": 1}) for path in ("in/a.png", "./in/a.png")])
    assert keep(Path("t.csv"), "--above", 0, "--copy", "kept") == 0
    assert [str(path) for path in Path("kept").rglob("*")] == ["kept/a.png"]
    # `link/../x` is not `x`: two images of which the second would take the first one's place.
    picture(tmp_path / "a.png")
    write_table("u.csv", ["piqe"], [Record(path, 48, 40, {"piqe": 1}) for path in ("a.png", "link/../a.png")])
    assert keep(Path("u.csv"), "--above", 0, "--copy", "both") == 2
    assert not Path("both").exists()
