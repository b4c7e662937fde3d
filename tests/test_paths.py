"""Which images are meant: folders, patterns, loops of links, hidden entries, suffixes."""

from __future__ import annotations

import glob
import inspect
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import as_nobody
from test_cli_score import picture

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.images.formats import SUFFIXES, has_image_suffix
from qualiclip_pyiqa.images.paths import FoundPaths, find_images, list_images, matches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        picture(tmp_path / "photos" / f"{number}.png")
    picture(tmp_path / "photos" / "sub" / "deep.jpg")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def test_find_images(folder: Path, tmp_path: Path) -> None:
    found = find_images([str(folder / "1.png"), str(folder), str(folder)])
    assert Counter(found.paths).most_common(1)[0][1] == 1 and found.paths[0] == str(folder / "1.png")
    assert find_images([str(folder / "[01].png")]).paths == [str(folder / "[01].png")]  # no pattern


def test_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert matches(str(folder / "[01].png")) == [str(folder / "0.png"), str(folder / "1.png")]
    picture(folder / "[01].png")  # a name that looks like a pattern is a name first
    assert matches(str(folder / "[01].png")) == [str(folder / "[01].png")]
    assert matches(str(folder / "x*")) == [str(folder / "x*")] and matches("x") == ["x"]  # so that an error says it
    picture(folder / "sub" / "[x]" / "deeper.jpg")
    picture(folder / ".hidden" / "not.jpg")
    monkeypatch.chdir(folder)
    for pattern in ("**/*.jpg", "./**/*.jpg", f"{folder}/**/*.jpg", "../*/**/sub/**/*.jpg", "sub/**/", "s**"):
        usual = sorted(set(glob.glob(pattern, recursive=True)))  # noqa: PTH207
        assert matches(pattern) == usual and usual[0] != pattern
    assert {str(folder / path) for path in find_images(matches("sub/**")).paths} == {
        str(folder / "sub" / "deep.jpg"),
        str(folder / "sub" / "[x]" / "deeper.jpg"),
    }


def test_a_loop_of_folders_ends(folder: Path) -> None:
    for name in ("again", "once more", "sub/up"):
        (folder / name).symlink_to(folder)
    elsewhere = picture(folder.parent / "elsewhere" / "z.jpg").parent
    (folder / "link").symlink_to(elsewhere)
    assert matches(str(folder / "**" / "*.jpg")) == [str(folder / "link" / "z.jpg"), str(folder / "sub" / "deep.jpg")]
    assert len(find_images([str(folder)]).paths) == 6


def test_folders_within_folders(tmp_path: Path) -> None:
    """However many, in the order of their names."""
    find_images([str(tmp_path)])  # what is imported only once needs a deeper stack
    expected, below = [], tmp_path
    for _ in range(80):
        expected.append(picture(below / "a.png"))
        below = below / "b"
    expected += [folder.parent / "c.png" for folder in reversed(expected)]
    for path in expected[80:]:
        picture(path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        found = find_images([str(tmp_path)]).paths
    finally:
        sys.setrecursionlimit(limit)
    assert found == [str(path) for path in expected]


HIDDEN_FILES = (
    "._0.png",
    ".hidden.jpg",
    ".ipynb_checkpoints/0-checkpoint.png",
    ".Trash/x.png",
    "__MACOSX/._0.png",
    "__MACOSX/0.png",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "sub/@eaDir/t.jpg",
    "$RECYCLE.BIN/r.png",
    "#recycle/r.png",
)


@pytest.fixture
def littered(folder: Path) -> Path:
    image = (folder / "0.png").read_bytes()
    for name in HIDDEN_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    return folder


def test_hidden_entries_of_folders_are_left_out_and_counted(littered: Path) -> None:
    expected = [str(littered / f"{n}.png") for n in range(4)] + [str(littered / "sub" / "deep.jpg")]
    found = find_images([str(littered)])
    assert found == FoundPaths(
        expected, others=1, hidden=9, folders=[str(littered)]
    )  # folders count once; @eaDir is there twice
    assert [str(path) for path in list_images(littered)] == expected


def test_patterns_leave_out_what_folders_do(littered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(littered)
    assert matches("**/*.png") == [f"{n}.png" for n in range(4)]
    assert matches("**/*.jpg") == ["sub/deep.jpg"]
    assert matches("*/*.jpg") == ["sub/deep.jpg"]
    assert matches("*//*.jpg") == ["sub/deep.jpg"]
    assert matches("[!x]*") == ["0.png", "1.png", "2.png", "3.png", "notes.txt", "sub"]
    assert matches(f"{littered}/*/**/*.jpg") == [str(littered / "sub" / "deep.jpg")]


def test_hidden_entries_that_are_named_are_found(littered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(littered)
    assert find_images(["._0.png", "__MACOSX", ".Trash/x.png"]).paths == ["._0.png", "__MACOSX/0.png", ".Trash/x.png"]
    assert matches(".*/*.png") == [".Trash/x.png", ".ipynb_checkpoints/0-checkpoint.png"]
    assert matches("@eaDir/**/*.jpg") == ["@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg"]
    assert matches("__M*/*.png") == ["__MACOSX/0.png"]
    shutil.move("sub", ".sub")
    monkeypatch.chdir(".sub")  # a folder named as "." is not hidden, whatever it is called
    assert find_images(["."]).paths == ["./deep.jpg"]
    assert find_images([str(littered / ".sub")]).paths == [str(littered / ".sub" / "deep.jpg")]


def test_every_suffix_that_is_opened_in_any_case(tmp_path: Path) -> None:
    assert {".jpg", ".mpo", ".heic", ".tif", ".webp"} <= SUFFIXES
    for suffix in SUFFIXES:
        for spelling in (suffix, suffix.upper(), suffix.title()):
            assert has_image_suffix(f"x{spelling}")
    assert not any(map(has_image_suffix, ("x.eps", "x.txt", "x", "jpg", ".jpg", "x.jpg/y")))
    (tmp_path / "DSC_1.MPO").touch()
    assert find_images([str(tmp_path)]).paths == [str(tmp_path / "DSC_1.MPO")]


def test_list_images_is_all_or_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list_images(folder) == sorted([*folder.glob("*.png"), *folder.glob("sub/*.jpg")])
    for path in (folder / "nowhere", folder / "0.png"):
        with pytest.raises(SettingsError, match=r"is not a folder; expected one with images$"):
            list_images(path)
    (folder / "sub").chmod(0)
    monkeypatch.chdir(folder)  # the folders above may be closed too

    def message() -> str:
        with pytest.raises(SettingsError) as caught:
            list_images(Path())
        return str(caught.value)

    try:
        assert as_nobody(message) == "./sub cannot be listed (Permission denied); expected a folder that can be read"
    finally:
        (folder / "sub").chmod(0o755)
