"""Images inside Parquet files: Hugging Face's `{bytes, path}` and plain columns of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_cli_score import picture, rows, score

from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.images.parquet import ParquetImages
from qualiclip_pyiqa.scoring.tables import Record


def write(file: Path, /, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=4)
    return file


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / "photos" / f"{n}.png", 48 + n % 2, 40) for n in range(10)]


def same(found: list[Record], expected: list[Record]) -> bool:
    """Whether sizes and scores are the same; those of a batch and of a single image may differ by rounding."""
    assert [(row.width, row.height) for row in found] == [(row.width, row.height) for row in expected]
    scores = [row.scores["qualiclip-mini+"] for row in expected]
    return [row.scores["qualiclip-mini+"] for row in found] == pytest.approx(scores, abs=2e-6)


def structs(photos: list[Path]) -> list[dict[str, object]]:
    return [{"bytes": path.read_bytes(), "path": path.name} for path in photos]


def test_scores_are_those_of_the_files(photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "data.parquet", label=list(range(10)), image=structs(photos))
    assert score(photos[0].parent, "-o", tmp_path / "files.csv", "--workers", 0) == 0
    for workers in (0, 2):
        out = tmp_path / f"{workers}.csv"
        assert score(file, "-o", out, "--workers", workers) == 0
        assert same(rows(out), rows(tmp_path / "files.csv"))
        assert [row.path for row in rows(out)] == [f"{file}#{n}" for n in range(10)]
    # Among files, and each image once.
    mixed = tmp_path / "mixed.jsonl"
    assert score(photos[3], file, f"{tmp_path}/./data.parquet", photos[4], "-o", mixed, "--workers", 0) == 0
    assert [row.path for row in rows(mixed)] == [str(photos[3]), *(f"{file}#{n}" for n in range(10)), str(photos[4])]
    assert same(rows(mixed)[:1], rows(mixed)[4:5])


def test_a_stopped_run_goes_on(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "data.parquet", image=structs(photos))
    out = tmp_path / "s.csv"
    assert score(file, "-o", out, "--workers", 0) == 0
    whole = rows(out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([lines[0], *lines[2:6], lines[9]]))  # without rows 0, 5, 6, 7 and 9
    read: list[int] = []
    original = ParquetImages._cells

    def watched(self: ParquetImages, file: object, group: int) -> Any:
        read.append(group)
        return original(self, file, group)

    monkeypatch.setattr(ParquetImages, "_cells", watched)
    assert score(file, "-o", out, "--resume", "--workers", 0) == 0
    assert same(sorted(rows(out), key=lambda row: str(row.path)), whole) and read == [0, 1, 2]
    out.write_text("".join([*lines[:5], *lines[9:]]))  # without those of the second row group
    read.clear()
    assert score(file, "-o", out, "--resume", "--workers", 0) == 0
    assert read == [1] and same(sorted(rows(out), key=lambda row: str(row.path)), whole)


def test_rows_without_an_image(photos: list[Path], tmp_path: Path) -> None:
    """A row without bytes is the file that its path names, beside the Parquet file; one without both is an error."""
    images = [
        *structs(photos[:1]),
        {"bytes": None, "path": "photos/1.png"},
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": "x.png"},
        None,
    ]
    file = write(tmp_path / "data.parquet", picture=images)
    assert score(file, "-o", tmp_path / "s.csv", "--workers", 0) == 1
    table: list[Record] = rows(tmp_path / "s.csv")
    assert [row.path for row in table] == [f"{file}#{n}" for n in range(5)]
    assert [row.error is None for row in table] == [True, True, False, False, False]
    assert table[1].width == 49
    assert all(str(row.error).startswith(f"{row.path}: ") for row in table[2:])


def test_which_column_is_meant(photos: list[Path], tmp_path: Path) -> None:
    data = [path.read_bytes() for path in photos]
    for columns in (
        {"bytes": data, "thumbnail": [b""] * 10},
        {"image": structs(photos), "mask": structs(photos[::-1])},
        {"anything": structs(photos), "hash": [b""] * 10},
    ):
        images = ParquetImages(str(write(tmp_path / "d.parquet", **columns)))
        assert list(images.read([7, 2, 7])) == [data[2], data[7]] and len(images.names) == 10
    for wrong, message in (
        ({"a": structs(photos), "b": structs(photos)}, "has several columns of images among a, b; expected"),
        ({"path": ["a"], "score": [1.0]}, "has no column of images among path, score; expected"),
    ):
        with pytest.raises(SettingsError, match=message):
            ParquetImages(str(write(tmp_path / "d.parquet", **wrong)))


def test_files_that_cannot_be_read(photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.parquet").write_text("not Parquet")
    assert score(tmp_path / "text.parquet", "-o", tmp_path / "s.csv") == 2
    err = capsys.readouterr().err
    assert "text.parquet cannot be read" in err and err.count("\n") == 1 and not (tmp_path / "s.csv").exists()
    file = write(tmp_path / "data.parquet", image=structs(photos))
    assert score(file, "--engine", "ray", "-o", tmp_path / "s.csv") == 2
    assert "score it without --engine ray" in capsys.readouterr().err
    # Damaged within: rows before are scored, the others are errors, none is missing.
    images = ParquetImages(str(file))
    whole = file.read_bytes()
    place = whole.index(photos[5].read_bytes()[:64])
    file.write_bytes(whole[:place] + bytes(len(whole) - place - 2000) + whole[-2000:])
    read = list(images.read(range(10)))
    assert len(read) == 10 and read[:4] == [path.read_bytes() for path in photos[:4]]
    assert all(isinstance(each, bytes | ImageError) for each in read)
    file.unlink()
    assert [type(each) for each in images.read([1, 2])] == [ImageError] * 2
