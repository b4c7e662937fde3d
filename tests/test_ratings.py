"""Opinion scores from CSV files as people, spreadsheets and data sets write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.evaluation.ratings import read_ratings

ROWS = [("a.png", "1.5"), ("sub/b.JPG", "2"), ("c d,e.png", "3")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, _ in ROWS:
        (folder / name).touch()
    return folder


def write(folder: Path, text: str | bytes) -> Path:
    path = folder.parent / "scores.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    return path


def read(folder: Path, text: str | bytes, **options: object) -> list[tuple[str, float]]:
    found = read_ratings(write(folder, text), folder, **options)  # type: ignore[arg-type]
    return [
        (path.relative_to(folder).as_posix(), opinion)
        for path, opinion in zip(found.paths, found.opinions, strict=True)
    ]


EXPECTED = [("a.png", 1.5), ("sub/b.JPG", 2.0), ("c d,e.png", 3.0)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_encodings(folder: Path, delimiter: str, encoding: str, end: str) -> None:
    lines = [delimiter.join(cells) for cells in (("image", "mos"), *((f'"{n}"', o) for n, o in ROWS))]
    assert read(folder, end.join([*lines, delimiter, ""]).encode(encoding)) == EXPECTED


def test_delimiter_is_the_one_that_gives_the_columns(folder: Path) -> None:
    # More commas than semicolons in the first line, and names given by the caller.
    assert read(folder, "image;mos;a,b,c,d\na.png;1;x\n") == [("a.png", 1.0)]
    text = "Which file;how good, on a scale from 1 to 5\na.png;1\n"
    options = {"image_column": "which FILE", "opinion_column": "how good, on a scale from 1 to 5"}
    assert read(folder, text, **options) == [("a.png", 1.0)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub\\b.JPG", "sub/b.JPG"),
        (".\\A.PNG", "a.png"),
        ("SUB/B.jpg", "sub/b.JPG"),
        ("./a.png", "a.png"),
        ("a", "a.png"),
        ("b", "sub/b.JPG"),
        ("sub/B", "sub/b.JPG"),
    ],
)
def test_names_in_other_spellings(folder: Path, name: str, expected: str) -> None:
    assert read(folder, f"image,mos\n{name},1\n") == [(expected, 1.0)]


def test_the_case_as_written_wins(folder: Path) -> None:
    (folder / "A.png").touch()
    assert read(folder, "image,mos\nA.png,1\na.png,2\n") == [("A.png", 1.0), ("a.png", 2.0)]
    assert read(folder, "image,mos\nA,1\na,2\n") == [("A.png", 1.0), ("a.png", 2.0)]
    with pytest.raises(SettingsError, match=r"line 2: A\.PNG may be .*A\.png and .*a\.png; add its folder"):
        read(folder, "image,mos\nA.PNG,1\n")


def test_a_stem_is_of_the_one_image(folder: Path) -> None:
    for name in ("a.txt", "a.xml", "._a.png", "1600.AWGN.1.png", "1600.png"):
        (folder / name).touch()
    assert read(folder, "image,mos\na,1\n1600.AWGN.1,2\n1600,3\n") == [
        ("a.png", 1.0),
        ("1600.AWGN.1.png", 2.0),
        ("1600.png", 3.0),
    ]
    (folder / "sub" / "a.bmp").touch()
    assert read(folder, "image,mos\na,1\n") == [("a.png", 1.0)]  # no folder is written
    (folder / "a.bmp").touch()
    with pytest.raises(SettingsError, match=r"line 2: a may be .*a\.bmp and .*a\.png; add its folder and suffix"):
        read(folder, "image,mos\na,1\n")
    assert read(folder, "image,mos\nsub/a,1\n") == [("sub/a.bmp", 1.0)]
    # A whole name is not looked for in other folders, where it may be another image.
    with pytest.raises(SettingsError, match=r"line 2: b\.JPG not found; expected an image below"):
        read(folder, "image,mos\nb.JPG,1\n")


def test_rows_that_are_all_of_one_image_are_refused(folder: Path) -> None:
    """CSIQ's sheet: the column `image` holds the reference's number, which is a reference image's stem."""
    lines = ["image,dst_idx,dst_lev,dmos"]
    for number in ("1600", "boston"):
        (folder / f"{number}.png").touch()
        for level in range(1, 6):
            (folder / f"{number}.AWGN.{level}.png").touch()
            lines.append(f"{number},1,{level},0.{level}")
    with pytest.raises(SettingsError, match=r"several rows named 1600 \(lines 2 and 3\), all matching .*1600\.png; if"):
        read(folder, "\n".join(lines))


def test_repeated_ratings(folder: Path) -> None:
    text = "image,mos,who\na.png,1,x\n./a.png,2,y\nsub/b.JPG,5,x\nsub/../a.png,6,x\n"
    ratings = read_ratings(write(folder, text), folder, group_column="who")
    assert len(ratings.paths) == 4 and len(set(ratings.images)) == 2
    assert list(ratings.mean_opinions().values()) == [3.0, 5.0]
    assert list(ratings.mean_opinions("x").values()) == [3.5, 5.0]
    assert list(ratings.mean_opinions("y").values()) == [2.0]
    assert str(ratings).startswith("4 rows of 2 images, whose opinion scores are averaged (image, mos; higher")


@pytest.mark.parametrize("name", ["../x.png", "sub/../../x.png", "..\\x.png", "/x.png", "{folder}/../x.png"])
@pytest.mark.parametrize("listed", [False, True])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, listed: bool, folder: Path) -> None:
    (folder.parent / "x.png").touch()
    name = name.format(folder=folder)
    options = {"among": [str(folder / ".." / "x.png")]} if listed else {}
    with pytest.raises(SettingsError, match=r"line 2: .*x\.png lies outside .*; expected an image "):
        read(folder, f"image,mos\n{name},1\n", **options)


def test_names_that_stay_in_the_folder_are_taken(folder: Path) -> None:
    (folder / "a").mkdir(exist_ok=True)
    (folder / "only.png").touch()
    (read_one,) = read(folder, "image,mos\na/../only.png,1\n")
    assert read_one[1] == 1.0


def test_names_that_are_not_utf8(folder: Path) -> None:
    name = "caf\udce9.png"
    try:
        (folder / name).touch()
    except OSError:
        pytest.skip("a file system of UTF-8 names only")
    assert read(folder, f"image,mos\n{name},1\n") == [(name, 1.0)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("image,mos\né.png,1\n", {}, r"line 2: \\xe9\.png not found; expected an image below"),
        ("image,qualité\na.png,1\n", {}, r"has no usual column of opinion scores"),
        ("image,qualité\na.png,1\n", {"opinion_column": "qualité"}, r"has no column 'qualité'"),
        ("image,mos\na.png,1£\n", {}, r"line 2: mos is '1\\udca3'; expected a number"),
    ],
)
def test_table_in_another_encoding_is_told_how_to_save_it(
    folder: Path, text: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        read(folder, text.encode("latin-1"), **options)
    assert str(error.value).endswith("; the table is not UTF-8: save it as UTF-8 and try again")
    assert "\n" not in str(error.value)


def test_missing_image_of_a_utf8_table_has_no_hint_about_encoding(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"é\.png not found") as error:
        read(folder, "image,mos\né.png,1\n")
    assert "UTF-8" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1.5\nsub/b.JPG,2\n", r"line 1 looks like data, not a header \(a\.png, 1\.5\); insert one"),
        ("a.png;1.5\n", r"line 1 looks like data, not a header \(a\.png, 1\.5\)"),
        ("image;mos\na.png;1,5\n", r"line 2: mos is '1,5'; expected a number with a decimal point"),
        ("image,mos\na.png,\n", r"line 2: mos is ''; expected a number"),
        ("image,mos\na.png,inf\n", r"line 2: mos is 'inf'; expected a finite number"),
        ("image,mos\na.png,-1e308\n", r"line 2: mos is '-1e308'; expected a number between -1e\+100 and 1e\+100"),
        ("image,mos\na.png\n", r"line 2: mos is ''; expected a number"),
        ("image,mos\nc d,e.png,3\n", r"line 2 has 3 cells; expected 2 as in the header"),
        ("image,mos\n,3\n", r"line 2 has no image name"),
        ("image,mos\n" + "x" * 200_000 + ",3\n", r"cannot be read \(field larger than field limit"),
        ("image,MOS,Mos\na.png,3,4\n", r"has 2 columns 'MOS'; expected one"),
        (
            "picture of,mos\na.png,3\n",
            r"no usual column of image names; its columns, separated by commas: picture of, mos;",
        ),
        ("", r"is empty; expected a CSV file with a header"),
        ("\n \n", r"is empty; expected a CSV file with a header"),
        ("image,mos\nz.png,3\n", r"line 2: z\.png not found; expected an image below"),
        ("image,mos\na.png/,3\n", None),
        (b"\xff\xfei\x00m", r"cannot be read \(.*utf-16"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, text: str | bytes, message: str | None) -> None:
    if message is None:
        assert read(folder, text) == [("a.png", 3.0)]
        return
    with pytest.raises(SettingsError, match=message) as error:
        read(folder, text)
    assert "\n" not in str(error.value) and "scores.csv" in str(error.value)


def test_columns_are_named_in_any_case(folder: Path) -> None:
    assert read(folder, "Image , MOS \na.png,1\n", image_column="image", opinion_column="mos") == [("a.png", 1.0)]
    with pytest.raises(SettingsError, match="has no column 'mso'; did you mean 'mos'"):
        read(folder, "image,mos\na.png,1\n", opinion_column="mso")


def test_names_among_the_paths_of_a_table(tmp_path: Path) -> None:
    table = tmp_path / "r.csv"
    table.write_text("image,mos\n1.png,1\nb/2,2\nc/3.png,3\n")
    among = ["/data/a/1.png", "s3://bucket/b/2.png", "x/c/3.PNG", "x/c/3.txt"]
    found = read_ratings(table, None, among=among)
    assert found.paths == [Path(path) for path in among[:3]]
    with pytest.raises(SettingsError, match=r"line 2: 1\.png may be /data/a/1\.png and /data/b/1\.png"):
        read_ratings(table, None, among=[*among, "/data/b/1.png"])
    # A folder decides, and images need not exist.
    table.write_text("image,mos\n1.png,1\n")
    assert read_ratings(table, Path("/data/b"), among=[*among, "/data/b/1.png"]).paths == [Path("/data/b/1.png")]
    with pytest.raises(SettingsError, match=r"1\.png not found; expected an image in the table .* below /elsewhere"):
        read_ratings(table, Path("/elsewhere"), among=among)
