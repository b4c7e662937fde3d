"""The scorer as a stage of Ray Data, on a local Ray of two workers."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray.data
from test_cli_score import picture, rows

from qualiclip_pyiqa import cli
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.ray_stage import score_dataset
from qualiclip_pyiqa.scoring import Scorer


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
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


def check(table: list[dict[str, object]], expected: dict[str, float | None]) -> None:
    assert sorted(str(row["path"]) for row in table) == sorted(expected)  # nothing lost, nothing twice
    for row in table:
        score = expected[str(row["path"])]
        if score is None:
            assert row["qualiclip-mini"] is None and row["width"] is None and "is damaged" in str(row["error"])
        else:
            assert row["qualiclip-mini"] == pytest.approx(score, abs=2e-6) and row["error"] is None
            assert row["height"] == 40


def test_folders_and_parquet_with_image_bytes(photos: Path, expected: dict[str, float | None], tmp_path: Path) -> None:
    files = ray.data.read_binary_files(str(photos), include_paths=True)
    scored = score_dataset(files, "qualiclip-mini", actors=2)
    scored.write_parquet(str(tmp_path / "scores"))
    table = ray.data.read_parquet(str(tmp_path / "scores")).take_all()
    assert list(table[0]) == ["path", "width", "height", "qualiclip-mini", "error"]
    check(table, expected)

    # Other columns are kept; the column of the pictures has another name.
    packed = [{"caption": path.stem, "photo": path.read_bytes(), "path": str(path)} for path in photos.iterdir()]
    ray.data.from_items(packed).write_parquet(str(tmp_path / "packed"))
    dataset = ray.data.read_parquet(str(tmp_path / "packed"))
    table = score_dataset(dataset, "qualiclip-mini", image="photo", actors=2, batch_size=3).take_all()
    check(table, expected)
    assert all(row["caption"] == Path(row["path"]).stem and "photo" not in row for row in table)


def test_a_killed_worker_costs_nothing(photos: Path, expected: dict[str, float | None], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    paths = [str(path) for path in photos.iterdir()] * 40
    dataset = ray.data.from_items([{"path": path, "number": n} for n, path in enumerate(paths)]).repartition(6)
    scored = score_dataset(dataset, "qualiclip-mini", actors=2, workers=0)
    table = []
    killed = 0
    for row in scored.iter_rows():
        table.append(row)
        if not killed:
            for pid in stage_workers():
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert killed == 2
    assert sorted(row["number"] for row in table) == list(range(len(paths)))
    for row in table:
        check([row], {row["path"]: expected[row["path"]]})


def stage_workers() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if b"ScoreStage" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def test_the_command(photos: Path, expected: dict[str, float | None], tmp_path: Path) -> None:
    strange = tmp_path / os.fsdecode(b"\xff.png")
    strange.write_bytes((photos / "1.png").read_bytes())
    url = f"file://{photos}"
    out = tmp_path / "s.jsonl"
    for _ in range(2):  # the second time there is nothing left to do
        command = ["score", str(photos), str(strange), url, "file:///nowhere.png", "--engine", "ray", "--resume"]
        assert cli.main([*command, "-o", str(out), "--device", "cpu"]) == 1
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


def test_what_cannot_be_scored_is_said(photos: Path) -> None:
    with pytest.raises(SettingsError, match="has the columns id; expected 'bytes' or 'path'"):
        score_dataset(ray.data.range(3), "qualiclip-mini")
    with pytest.raises(SettingsError, match="has a column 'error' already"):
        score_dataset(ray.data.from_items([{"path": "x", "error": 1}]), "qualiclip-mini")
