"""Records as pandas DataFrames and Arrow tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qualiclip_pyiqa import Record, Scorer, SettingsError
from qualiclip_pyiqa.scoring.tables import read_table, to_table

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
META = {"columns": {"a": {"lower_better": True}, "b:Clear photo./Foggy photo.": {"lower_better": False}}}
RECORDS = [
    Record("a.png", 64, 48, {"a": 1.5, "b:Clear photo./Foggy photo.": 0.25}),
    Record("latin\udce9.png", None, None, {}, "broken"),
    Record(None, 32, 32, {"a": 2.0}, "b: the score is nan"),
]


def test_pandas_keeps_every_record() -> None:
    table = to_table(iter(RECORDS), META)
    assert list(table) == ["path", "width", "height", *META["columns"], "error"]
    assert table["path"].tolist() == [record.path for record in RECORDS]
    assert table["error"].tolist() == [record.error for record in RECORDS]
    assert table["width"].isna().tolist() == [False, True, False] and table["width"][0] == 64
    assert str(table["width"].dtype) == "Int64" and str(table["a"].dtype) == "float64"
    assert table["a"][[0, 2]].tolist() == [1.5, 2.0] and table["a"].isna().tolist() == [False, True, False]
    assert table.attrs["scores"]["columns"]["a"]["lower_better"]
    assert table.sort_values("a").attrs == table.attrs


def test_no_record_is_an_empty_table() -> None:
    table = to_table([], META)
    assert len(table) == 0 and str(table["a"].dtype) == "float64"


def test_arrow_equals_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = to_table(RECORDS, META, "arrow")
    assert table.column("path").to_pylist() == ["a.png", "latin\\udce9.png", None]
    assert table.column("a").to_pylist() == [1.5, None, 2.0]
    assert json.loads(table.schema.metadata[b"qualiclip_pyiqa"]) == META
    pyarrow.parquet.write_table(table, tmp_path / "scores.parquet")
    read = read_table(tmp_path / "scores.parquet")
    assert read.lower_better("a") and [record.scores for record in read] == [record.scores for record in RECORDS]
    with pytest.raises(SettingsError, match="expected 'pandas' or 'arrow'"):
        to_table(RECORDS, META, "polars")  # type: ignore[call-overload]


def test_a_folder_is_the_images_below_it_in_the_order_of_the_command(tmp_path: Path) -> None:
    for name in ("b.png", "sub/c.png", "a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").touch()
    scorer = Scorer("qualiclip-mini", device="cpu", workers=0)
    for folder in (tmp_path / "in", str(tmp_path / "in")):
        table = scorer.table(folder)
        assert table["path"].tolist() == [str(tmp_path / "in" / name) for name in ("a.png", "b.png", "sub/c.png")]
        assert table["error"].isna().all() and table["qualiclip-mini"].notna().all()
    (record,) = scorer.score([tmp_path / "in"])
    assert record.error is not None and "is a folder; expected an image file" in record.error
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"no images in .*empty; expected a folder of images"):
        scorer.table(tmp_path / "empty")


def test_a_scorer_makes_a_table(tmp_path: Path) -> None:
    scorer = Scorer(["qualiclip-mini", "qualiclip-mini:sharpness"], device="cpu", workers=0)
    paths = [str(PHOTOS / "hats.jpg"), str(tmp_path / "none.jpg")]
    table = scorer.table(paths)
    (record, _) = scorer.score(paths)
    assert table.iloc[0][list(scorer.columns)].tolist() == list(record.scores.values())
    assert "does not exist" in table["error"][1] and table["error"][0] is None
    assert table.attrs["scores"] == scorer.describe()
