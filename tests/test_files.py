"""A file is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qualiclip_pyiqa.files import replacing


@pytest.mark.parametrize("name", ["a.csv", "x" * 255, "ü" * 127 + "x", ".hidden"])
def test_replaced_at_the_end_and_not_before(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == path.parent
    assert path.read_text() == "new" and [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
def test_left_as_it_was_when_something_goes_wrong(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    path = tmp_path / "a.csv"
    if there:
        path.write_text("old")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half")
        raise error
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"] * there


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # it ended last
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_that_cannot_be_is_the_error_of_the_block() -> None:
    with pytest.raises(ValueError, match="mine"), replacing(Path("a\0b")):
        raise ValueError("mine")


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.csv"
    with pytest.raises(FileNotFoundError) as caught, replacing(path) as part:
        part.write_text("1")
    assert caught.value.filename == str(path) and ".part" not in str(caught.value)
