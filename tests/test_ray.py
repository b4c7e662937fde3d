"""The scorer as a stage of Ray Data, on a local Ray of two workers."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import ray
import ray.data
import torch
from test_cli_score import picture, rows

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.scoring.ray import ScoreStage, _fetch, _share, expand_urls, score_dataset
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.tables import Record, ScoreTable, read_meta


# Each worker of Ray Data takes seconds to import everything: few tests start some, and as few as show something.
@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=2**27,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(9):
        picture(folder / f"{number}.png", 48 + 16 * (number % 2), 40)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def expected(photos: Path) -> dict[str, float | None]:
    records = Scorer("qualiclip-mini", device="cpu", workers=0).score(sorted(photos.iterdir()))
    return {str(record.path): record.scores.get("qualiclip-mini") for record in records}


def check(table: list[dict[str, object]], expected: dict[str, float | None], times: int = 1) -> None:
    assert sorted(str(row["path"]) for row in table) == sorted([*expected] * times)  # nothing lost, nothing twice
    for row in table:
        score = expected[str(row["path"])]
        if score is None:
            assert row["qualiclip-mini"] is None and row["width"] is None and "is damaged" in str(row["error"])
        else:
            assert row["qualiclip-mini"] == pytest.approx(score, abs=2e-6) and row["error"] is None
            assert row["height"] == 40


def test_images_in_other_forms(photos: Path, expected: dict[str, float | None], tmp_path: Path) -> None:
    """Hugging Face's `{bytes, path}`, paths and URLs; what is not an image is an error of its row."""
    paths = [str(path) for path in sorted(photos.iterdir())]
    by_url = [f"file://{path}" for path in paths]
    cells = [
        *({"bytes": Path(path).read_bytes(), "path": "0001.png"} for path in paths),
        *({"bytes": None, "path": path} for path in (*paths, *by_url)),
        None,
        {"bytes": None, "path": None},
    ]
    packed = pyarrow.table({"image": cells, "caption": [*paths, *paths, *paths, "none", "neither"]})
    pyarrow.parquet.write_table(packed, tmp_path / "train-00000-of-00001.parquet")
    stage = ScoreStage("qualiclip-mini", "image", torch.get_num_threads(), workers=0, device="cpu")
    table = stage(pyarrow.parquet.read_table(tmp_path / "train-00000-of-00001.parquet")).to_pylist()
    assert list(table[0]) == ["caption", "width", "height", "qualiclip-mini", "error"]
    assert [row["error"].partition(";")[0] for row in table[-2:]] == ["null instead of an image"] * 2
    check([{**row, "path": row["caption"]} for row in table[:-2]], expected, times=3)

    (row,) = stage(pyarrow.table({"image": [5], "path": paths[:1]})).to_pylist()
    assert row["error"].startswith("int value instead of an image; expected bytes") and row["path"] == paths[0]
    scored, none = stage(pyarrow.table({"path": [paths[0], None]})).to_pylist()
    assert (
        scored["qualiclip-mini"] == pytest.approx(expected[paths[0]], abs=2e-6) and "instead of a path" in none["error"]
    )


@pytest.mark.usefixtures("local_ray")
def test_what_ray_reads_from_folders(photos: Path, expected: dict[str, float | None]) -> None:
    """As a worker gets it: encoded bytes, or arrays."""
    whole = {path: score for path, score in expected.items() if score is not None}
    files = ray.data.read_binary_files(str(photos), include_paths=True)
    arrays = ray.data.read_images(list(whole), include_paths=True)
    for dataset, image, scores in ((files, "bytes", expected), (arrays, "image", whole)):
        table = dataset.take_batch(len(scores), batch_format="pyarrow")
        stage = ScoreStage("qualiclip-mini", image, torch.get_num_threads(), workers=0, device="cpu")
        check(stage(table).to_pylist(), scores)


@pytest.mark.usefixtures("local_ray")
def test_parquet_with_image_bytes_and_a_killed_worker(photos: Path, tmp_path: Path) -> None:
    class Deadly(torch.nn.Module):
        """A metric that kills its process on the wide image, once, in the middle of its block."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dead = tmp_path / f"{x.shape[3]}"
            if x.shape[3] > 100 and not dead.exists():
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return x.mean()

    paths = [str(path) for path in sorted(photos.iterdir())] * 4
    paths[20], paths[30] = (str(picture(tmp_path / f"{width}.png", width, 40)) for width in (120, 140))
    options = {"workers": 0, "max_pixels": 130 * 40}
    scored = Scorer("qualiclip-mini", "cpu", **options).score(paths)
    scores = {record.path: record.scores.get("qualiclip-mini") for record in scored}
    assert scores[paths[30]] is None
    # Other columns are kept; the column of the images has another name.
    packed = [{"number": n, "photo": Path(path).read_bytes(), "path": path} for n, path in enumerate(paths)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packed), tmp_path / "packed.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "packed.parquet")).repartition(4)
    metrics = {"qualiclip-mini": "qualiclip-mini", "deadly": Deadly()}
    dataset = score_dataset(dataset, metrics, image="photo", actors=2, batch_size=3, **options)
    dataset.write_parquet(str(tmp_path / "scores"))
    table = pyarrow.parquet.read_table(tmp_path / "scores").to_pylist()
    assert list(table[0]) == ["number", "path", "width", "height", "qualiclip-mini", "deadly", "error"]
    assert (tmp_path / "120").exists()
    assert sorted(row["number"] for row in table) == list(range(len(paths)))  # nothing lost, nothing twice
    for row in table:
        assert row["path"] == paths[row["number"]]
        assert (row["deadly"] is None) == (scores[row["path"]] is None)
        if row["number"] == 30:  # options reach the workers
            assert row["qualiclip-mini"] is None and "140x40, limit 5200 pixels" in row["error"]
        else:
            check([row], {row["path"]: scores[row["path"]]})


@pytest.mark.usefixtures("local_ray")
def test_the_command(
    photos: Path, expected: dict[str, float | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / os.fsdecode(b"\xff.png")
    strange.write_bytes((photos / "1.png").read_bytes())
    url = f"file://{photos}"
    out = tmp_path / "s.jsonl"
    command = ["score", str(photos), str(strange), url, "file:///nowhere.png", "--engine", "ray", "--resume"]
    command += ["-o", str(out), "-m", "qualiclip-mini", "--device", "cpu"]
    write = ScoreTable.write

    def stopped(table: ScoreTable, records: list[Record]) -> None:
        write(table, records)
        if len(list(table.rows())) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScoreTable, "write", stopped)
    assert cli.main(command) == 130
    monkeypatch.undo()
    assert len(rows(out)) == 7
    for _ in range(2):  # the second time there is nothing left to do
        assert cli.main(command) == 1
        table = rows(out)
        assert [row.path for row in table] == [
            *map(str, sorted(photos.iterdir())),
            str(strange),
            *(f"file://{path}" for path in sorted(photos.iterdir())),
            "file:///nowhere.png",
        ]
    for row in table[:-1]:
        twin = str(photos / "1.png") if row.path == str(strange) else str(row.path).removeprefix("file://")
        assert row.scores.get("qualiclip-mini") == (expected[twin] and pytest.approx(expected[twin], abs=2e-6))
    assert "cannot be read" in str(table[-1].error)
    meta = read_meta(out) or {}
    assert meta["device"] == "cpu" and meta["columns"]["qualiclip-mini"]["lower_better"] is False
    assert cli.main([*command, "--precision", "bf16"]) == 2


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(SettingsError, match="has the columns id; expected 'bytes' or 'path'"):
        score_dataset(ray.data.range(3), "qualiclip-mini")
    with pytest.raises(SettingsError, match="already has a column 'error'"):
        score_dataset(ray.data.from_items([{"path": "x", "error": 1}]), "qualiclip-mini")
    with pytest.raises(SettingsError, match="already has a column 'qualiclip-mini'"):
        score_dataset(ray.data.from_items([{"path": "x", "qualiclip-mini": 1}]), "qualiclip-mini")
    with pytest.raises(SettingsError, match=r"actors is 4; expected 1\.\.3, two per CPU core"):
        score_dataset(ray.data.from_items([{"path": "x"}]), "qualiclip-mini", actors=4)


@pytest.mark.parametrize(
    ("nodes", "actors", "share"),
    [([2], 2, 0.5), ([4], 1, 3), ([16], 4, 3), ([4] * 4, 1, 4), ([4] * 4, 4, 3), ([5] * 4, 6, 2), ([6, 2], 2, 3)],
)
def test_every_worker_finds_a_node(nodes: list[int], actors: int, share: float) -> None:
    assert _share(nodes, actors) == share


def test_urls_of_folders(tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    names = ["a b.png", "h#1.png", "p%20q.png", "q?1.png", "sub/plain.png", "ü.png"]
    for name in names:
        picture(folder / name)
    (folder / "notes.txt").touch()
    for hidden in ("._a b.png", ".Trash/x.png", "sub/@eaDir/y.png", "__MACOSX/z.png"):
        picture(folder / hidden)
    for slash in ("", "/"):
        urls = list(expand_urls(["local.png", f"file://{tmp_path}/my%20photos{slash}"]))
        assert urls[0] == "local.png"
        assert urls[1] == f"file://{tmp_path}/my%20photos/a%20b.png"
        assert [_fetch(url) for url in urls[1:]] == [(folder / name).read_bytes() for name in names]
        assert list(expand_urls(urls)) == urls
    picture(folder / "x.png").rename(folder / os.fsdecode(b"\xff.png"))
    with pytest.raises(SettingsError, match=r"cannot be listed .*utf-8"):
        list(expand_urls([f"file://{tmp_path}/my%20photos"]))
