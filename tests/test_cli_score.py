"""`qualiclip score`: tables, exit status, and real faults of files, disks and processes."""

from __future__ import annotations

import csv
import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import as_nobody, workers_of
from forks import Fork
from PIL import Image

from qualiclip_pyiqa.commands import DEFAULT_METRIC, cli
from qualiclip_pyiqa.commands.summary import Summary
from qualiclip_pyiqa.errors import counted
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.scoring.tables import Record, read_table

RNG = np.random.default_rng(0)


def picture(path: Path, width: int = 48, height: int = 40, mode: str = "RGB", **options: object) -> Path:
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def score(*arguments: object) -> int:
    return cli.main(["score", *map(str, arguments), "--device", "cpu"])


def rows(path: Path) -> list[Record]:
    return list(read_table(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        picture(tmp_path / "photos" / f"{number}.png", 48 + number % 2, 40)
    picture(tmp_path / "photos" / "sub" / "deep.jpg")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / "._0.png").touch()
    return tmp_path / "photos"


def test_table_summary_and_status(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.csv"
    assert score(folder, "-m", "qualiclip-mini", "-m", "piqe", "-o", out) == 0
    with out.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "width", "height", "qualiclip-mini", "piqe", "error"]
    assert [row["path"] for row in table] == [str(folder / f"{n}.png") for n in range(4)] + [
        str(folder / "sub" / "deep.jpg")
    ]
    assert (table[1]["width"], table[1]["height"], table[1]["error"]) == ("49", "40", "")
    captured = capsys.readouterr()
    assert captured.out == ""
    scores = [float(row["qualiclip-mini"]) for row in table]
    assert f"qualiclip-mini (higher is better): count 5, mean {np.mean(scores):.4f}" in captured.err
    assert f"50% {np.median(scores):.4f}" in captured.err
    assert f"  best: {max(scores):.4f} {table[int(np.argmax(scores))]['path']}" in captured.err
    assert f"  worst: {min(scores):.4f} {table[int(np.argmin(scores))]['path']}" in captured.err
    assert "piqe (lower is better)" in captured.err
    assert "skipped in folders: 1 file without the suffix of an image" in captured.err
    assert "skipped in folders: 1 hidden entry (those that are named are scored)" in captured.err
    assert "\r" not in captured.err and "5/5" not in captured.err  # a progress bar is for terminals
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert score(folder, "-m", "qualiclip-mini", "-m", "piqe", "-o", out, "--resume") == 0
    assert "5/5" in capsys.readouterr().err


def test_the_summary_of_huge_scores_is_short() -> None:
    summary = Summary(["norm"], {"norm": False}, {"norm": ("better", "worse")})
    for number in (1, 2):
        summary.add(Record(f"{number}.png", scores={"norm": number * 1e16}))
    text = "\n".join(summary.lines(0, 0))
    assert "mean 1.5000e+16;" in text and "best: 2.0000e+16 2.png" in text and "000000" not in text


def test_the_summary_calls_no_brightness_better(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("qualiclip-mini:brightness", "qualiclip-mini")
    assert score("examples/photos", *(word for name in names for word in ("-m", name))) == 0
    said = capsys.readouterr().err
    assert "qualiclip-mini:brightness (higher is brighter): " in said
    assert "qualiclip-mini (higher is better): " in said
    assert [said.count(f"  {end}: ") for end in ("lowest", "highest", "worst", "best")] == [1, 1, 1, 1]


def test_a_table_of_other_metrics_is_refused_before_they_are_built(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.csv"
    assert score(folder / "0.png", "-o", out, "--workers", 0) == 0
    before = out.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__init__", None)
        for metrics in (["piqe"], [DEFAULT_METRIC, "piqe"]):
            options = [option for metric in metrics for option in ("-m", metric)]
            assert score(folder, *options, "-o", out, "--resume") == 2
            said = capsys.readouterr().err
            assert f"s.csv has the scores {DEFAULT_METRIC}, not {', '.join(metrics)}; resume with" in said
    assert out.read_bytes() == before
    assert score(folder, "-o", out, "--resume", "--workers", 0) == 0
    assert len(rows(out)) == 5


def test_summary_of_repeated_names_and_few_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.csv"
    pattern = folder / "nope*.jpg"
    again = f"{folder}/./1.png"  # another spelling
    assert score(folder, folder, folder / "0.png", again, folder / "sub", pattern, "-o", out, "--workers", 0) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(rows(out)) == 6 and rows(out)[0] == Record(str(pattern), error=f"no file matches the pattern {pattern}")
    assert "left out: 3 repeated names (each image is scored once)" in lines
    worst, best = (next(line for line in lines if line.startswith(f"  {what}: ")) for what in ("worst", "best"))
    assert (worst.count(str(folder)), best.count(str(folder))) == (2, 3)
    assert all((worst + best).count(str(row.path)) == 1 for row in rows(out)[1:])
    assert score(folder / "0.png", "-o", tmp_path / "one.csv", "--workers", 0) == 0
    said = capsys.readouterr().err
    assert "worst" not in said and "best: " in said and "left out" not in said


def test_stdout_and_stdin(
    folder: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = picture(folder / "line\nbreak.png")
    paths = [folder / "1.png", strange, folder / "0.png"]
    stdin = io.TextIOWrapper(io.BytesIO(b"\0".join(os.fsencode(path) for path in paths) + b"\0"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert score("-", "-0") == 0
    table = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode())))
    assert [row["path"] for row in table] == [str(path) for path in paths]
    returned = picture(folder / "ends with a carriage return.png\r", format="PNG")
    stdin = io.TextIOWrapper(io.BytesIO(os.fsencode(returned) + b"\0"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert score("-", "-0", "--workers", 0) == 0
    assert os.fsencode(returned) + b'",48,40' in capsysbinary.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{folder / '0.png'}\r\n\n{folder}\n".encode())))
    assert score("-") == 0
    table = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode())))
    assert len(table) == 6 and table[0]["path"] == str(folder / "0.png")  # and once only


def test_usage_errors_have_status_2_and_write_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    folder_called_csv = tmp_path / "folder.csv"
    folder_called_csv.mkdir()
    out = tmp_path / "s.csv"
    for arguments, message in (
        ([folder, "-m", "qualiclipmini", "-o", out], "did you mean 'qualiclip-mini'"),
        ([folder, "-o", tmp_path / "s.xls"], "expected a table with one of .csv"),
        (["nope*.jpg", "-o", out], "no file matches the pattern nope*.jpg"),
        (["s3://bucket/photos", "-o", out], "s3://bucket/photos is a URL; pass --engine ray"),
        ([folder, "-m", "piqe", "-m", "piqe", "-o", out], "-m piqe is given twice"),
        (
            [folder, "-m", folder / "notes.txt", "-o", out],
            "notes.txt is a file without the suffix .safetensors; expected",
        ),
        ([folder, "-m", "nope.safetensors", "-o", out], "nope.safetensors does not exist; expected a metric's name"),
        ([folder, "-o", tmp_path / "nowhere" / "s.csv"], "nowhere is not a folder"),
        ([folder, "-o", folder_called_csv], "it is a folder"),
        ([folder, "--resume"], "pass -o FILE"),
        ([folder, "-0", "-o", out], "-0 has no effect without - for a list"),
        ([empty, "-o", out], "no images in"),
        ([folder, "--precision", "fp8", "-o", out], "expected one of fp32"),
        ([folder, "--batch-size", "0", "-o", out], "batch_size is 0"),
    ):
        assert score(*arguments) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert message in err[-1] and err[-1].startswith("qualiclip: ")
    with pytest.raises(SystemExit) as caught:
        score()
    assert caught.value.code == 2
    assert not out.exists()


def test_every_broken_picture_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    good = {
        "cmyk.jpg": picture(folder / "cmyk.jpg", mode="CMYK"),
        "png named.jpg": picture(folder / "x.png").rename(folder / "png named.jpg"),
        "grey.png": picture(folder / "grey.png", mode="L"),
    }
    Image.fromarray(RNG.integers(0, 65536, (40, 48), dtype=np.uint16)).save(folder / "16 bit.png")
    frames = [Image.fromarray(RNG.integers(0, 256, (40, 48), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    picture(folder / "new\nline.png")
    picture(folder / "bytes.png").rename(folder / os.fsdecode(b"\xff\xfe.png"))
    bad = {
        "truncated.jpg": "is damaged (truncated: its image data end too early); expected a whole image",
        "empty.png": "is empty (0 bytes)",
        "text.jpg": "is not an image",
        "one pixel.png": "is 1x1 pixels",
        "huge.png": "is too large",
        "folder.png.link.png": "does not exist",
        "loop.png": "cannot be read",
        "pipe.png": "is a pipe",
    }
    whole = picture(folder / "truncated.jpg", 400, 400).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("Hello")
    picture(folder / "one pixel.png", 1, 1)
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    (folder / "folder.png.link.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "again").symlink_to(folder)  # a loop of folders
    out = tmp_path / "s.jsonl"
    assert score(folder, folder / "vanished.png", "-o", out) == 1
    table = {Path(str(row.path)).name: row for row in rows(out)}
    assert len(table) == len(rows(out)) == len(bad) + len(good) + 4 + 1
    for name, message in {**bad, "vanished.png": "does not exist"}.items():
        assert message in str(table[name].error) and not table[name].scores, name
        assert "\n" not in str(table[name].error)
    for name in {*good, "16 bit.png", "animated.gif", "new\nline.png", os.fsdecode(b"\xff\xfe.png")}:
        assert table[name].error is None and 0 <= table[name].scores[DEFAULT_METRIC] <= 1
    err = capsys.readouterr().err
    assert f"{len(table)} images: 7 scored, 9 with an error" in err and "and 4 more" in err

    # The same by pattern and into the other formats; nothing is scored twice when it is done already.
    for suffix in (".csv", ".parquet"):
        again = tmp_path / f"s{suffix}"
        for _ in range(2):
            assert score(tmp_path / "m*", folder / "vanished.png", "-o", again, "--resume") == 1
        assert len(rows(again)) == len(table)


def test_a_folder_that_cannot_be_listed_is_a_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sub").chmod(0)
    monkeypatch.chdir(folder)  # the folders above may be closed too
    assert as_nobody(lambda: str(find_images(["sub"]).unreadable)) == str({"sub": "Permission denied"})
    (folder / "sub").chmod(0o755)

    scandir = os.scandir

    def refuse(path: str) -> object:  # the command itself cannot run without root's rights where its caches are root's
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert score(folder, "-o", tmp_path / "s.csv") == 1
    first, *others = rows(tmp_path / "s.csv")
    assert first.path == str(folder / "sub") and "cannot be listed (Permission denied)" in str(first.error)
    assert len(others) == 4 and all(row.error is None for row in others)


def test_files_that_vanish_or_may_not_be_read_are_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, opened = Scorer.score, Path.open

    def vanishing(self: Scorer, images: list[str], references: object) -> Iterator[Record]:
        (folder / "1.png").unlink()  # after it was listed
        return original(self, images)

    def refuse(path: Path, *arguments: object, **options: object) -> object:  # root may read every file
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Scorer, "score", vanishing)
    monkeypatch.setattr(Path, "open", refuse)
    assert score(folder, "-o", tmp_path / "s.jsonl", "--workers", 0) == 1
    errors = {Path(str(row.path)).name: row.error for row in rows(tmp_path / "s.jsonl")}
    assert list(errors) == ["0.png", "1.png", "2.png", "3.png", "deep.jpg"]
    assert str(errors["1.png"]).endswith("1.png does not exist; expected an image file")
    assert str(errors["2.png"]).endswith("2.png cannot be read (Permission denied); expected an image file")
    assert [name for name, error in errors.items() if error is None] == ["0.png", "3.png", "deep.jpg"]


def test_a_listed_name_is_no_pattern(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = folder / "[0].png"  # which would match 0.png
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(gone))))
    assert score("-", str(folder / "[1].png"), "-o", tmp_path / "s.csv", "--workers", 0) == 1
    assert [row.path for row in rows(tmp_path / "s.csv")] == [str(gone), str(folder / "1.png")]


def test_a_table_is_extended(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins = [picture(folder / "\\udcff.png"), picture(folder / os.fsdecode(b"\xff.png"))]
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"s{suffix}"
        for path, total in ((folder / "sub", 1), (twins[0], 2), (twins[1], 2 if suffix == ".parquet" else 3)):
            assert score(path, "-o", out, "--resume", "--workers", 0) == 0
            assert f"{counted(total, 'image')}: {total} scored" in capsys.readouterr().err
            assert len(rows(out)) == total  # in Parquet the twins have the same name


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(60):
        picture(tmp_path / "many" / f"{number:02}.png", 200, 160)
    return tmp_path / "many"


def start(folder: Path, *arguments: object, **options: Any) -> Fork:
    """Score in a process of its own, whose standard error goes into the file `said` beside the folder."""
    words = ["score", str(folder), *map(str, arguments), "--device", "cpu"]
    return Fork(words, stderr=folder.parent / "said", **options)


def command(*arguments: object, environment: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qualiclip_pyiqa", *map(str, arguments)]
    root = str(Path(cli.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=variables, **options)


def wait_for_rows(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "no rows came"
        time.sleep(0.01)


@pytest.mark.parametrize(("suffix", "how"), [(".csv", signal.SIGKILL), (".parquet", signal.SIGINT)])
def test_a_stopped_run_is_resumed_and_nothing_is_scored_twice(
    suffix: str, how: signal.Signals, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"s{suffix}"
    growing = tmp_path / "s.parquet.part" if suffix == ".parquet" else out
    run = start(many, "-o", out, "--workers", 2, "--batch-size", 1)
    wait_for_rows(growing, 8)
    workers = workers_of(run.pid)
    assert workers
    run.send(how)
    status, err = run.wait(60), (tmp_path / "said").read_bytes()
    if how == signal.SIGINT:
        assert status == 130
        assert b"stopped after" in err and b"--resume continues" in err and b"Traceback" not in err
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a decoding process outlived its run"
        time.sleep(0.05)
    before = growing.read_bytes().count(b"\n") - (suffix == ".csv")
    assert 0 < before < 60
    with growing.open("ab") as file:
        file.write(b'"torn')

    scored = []
    original = Scorer.score

    def watched(self: Scorer, images: list[str], references: object) -> Iterator[Record]:
        scored.extend(images)
        return original(self, images)

    monkeypatch.setattr(Scorer, "score", watched)
    assert score(many, "-o", out, "--resume", "--workers", 0) == 0
    assert len(scored) == 60 - before
    assert [row.path for row in rows(out)] == [str(path) for path in sorted(many.iterdir())]
    whole = tmp_path / "whole.csv"
    assert score(many, "-o", whole, "--workers", 0) == 0
    for row, expected in zip(rows(out), rows(whole), strict=True):
        assert row.scores[DEFAULT_METRIC] == pytest.approx(expected.scores[DEFAULT_METRIC], abs=2e-6)


def test_a_killed_worker_does_not_stop_the_command(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    run = start(many, "-o", out, "--workers", 2, "--batch-size", 1)
    wait_for_rows(out, 8)
    for worker in workers_of(run.pid):
        os.kill(worker, signal.SIGKILL)
    assert run.wait(120) == 0, (tmp_path / "said").read_text()
    assert [row.path for row in rows(out)] == [str(path) for path in sorted(many.iterdir())]
    assert all(row.error is None for row in rows(out))


def test_a_full_disk_is_said_and_the_rows_before_are_kept(
    many: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.csv"
    # Enough for the description, but not for all rows.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    run = start(many, "-o", out, "--workers", 0, before=limit)
    status, err = run.wait(120), (tmp_path / "said").read_text()
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith(f"qualiclip: {out} cannot be written (File too large)"), err
    assert last.endswith(f"the rows in {out} are kept, --resume continues")
    kept = len(rows(out))
    assert 0 < kept < 60 and out.read_bytes().endswith(b"\n")
    assert score(many, "-o", out, "--resume") == 0
    assert len({row.path for row in rows(out)}) == len(rows(out)) == 60
    (tmp_path / "full.csv").symlink_to("/dev/full")
    assert score(folder, "-o", tmp_path / "full.csv") == 1
    assert capsys.readouterr().err.endswith("full.csv cannot be written (No space left on device)\n")
    assert not (tmp_path / "full.csv.meta.json").exists()


def test_what_is_no_fault_of_the_table_is_not_said_to_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Scorer.score

    def failing(self: Scorer, images: list[str], references: object) -> Iterator[Record]:
        yield next(original(self, images))
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Scorer, "score", failing)
    out = tmp_path / "s.csv"
    assert score(folder, "-o", out, "--workers", 0) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"qualiclip: [Errno 24] Too many open files; the rows in {out} are kept, --resume continues"
    assert len(rows(out)) == 1


def test_a_reader_that_has_enough(many: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run = start(many, "--workers", 0, stdout=pipe)
    with pipe.open("rb") as reader:
        assert reader.readline().startswith(b"path,width")
    assert run.wait(60) == 1
    assert b"Traceback" not in (tmp_path / "said").read_bytes()


def test_results_do_not_depend_on_the_screen(folder: Path, tmp_path: Path) -> None:
    """Standard error that takes nothing, or no more: the table is whole and the status says how it went."""
    (folder / "broken.png").touch()

    def code(name: str) -> str:
        words = ["score", str(folder), "-o", str(tmp_path / f"{name}.csv"), "--device", "cpu", "--workers", "0"]
        # 1 for the broken one, 2 as the table is there already; and the process ends as it should.
        twice = f"first = main({words!r}); second = main({words!r}); raise SystemExit(10 * first + second)"
        return f"from qualiclip_pyiqa.commands.cli import main; {twice}"

    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code("closed")], stderr=write, timeout=120)
    os.close(write)
    assert done.returncode == 12 and len(rows(tmp_path / "closed.csv")) == 6
    full = Fork([], before=code("full"), command=False, stderr="/dev/full")
    assert full.wait(120) == 12 and len(rows(tmp_path / "full.csv")) == 6


def test_a_terminal_without_the_characters_of_a_name(tmp_path: Path) -> None:
    names = ["写真.png", os.fsdecode(b"\xff.png")]
    for name in names:
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "壊れた.png").touch()
    environment = {"PYTHONIOENCODING": "cp1252:strict"}
    run = start(tmp_path / "in", "-o", tmp_path / "s.csv", "--workers", 0, environment=environment)
    status, err = run.wait(120), (tmp_path / "said").read_bytes()
    assert status == 1 and b"Traceback" not in err
    assert b"\\u5199\\u771f.png" in err and b"\\u58ca\\u308c\\u305f.png is empty" in err
    assert [Path(str(row.path)).name for row in rows(tmp_path / "s.csv")] == sorted([*names, "壊れた.png"])
    # What goes to standard output as text: here the path of a weight file.
    weights = tmp_path / "重み"
    weights.mkdir()
    (weights / "RN50.pt").touch()
    environment["QUALICLIP_PYIQA_WEIGHTS"] = str(weights)
    run = command("weights", "path", "RN50", environment=environment)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and out.endswith(b"\\u91cd\\u307f/RN50.pt\n"), err


def test_a_name_that_cannot_be_printed_is_shown_in_one_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, shown = os.fsdecode(b"la\xe9\n.png"), "la\\xe9\\n.png"
    path = picture(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / os.fsdecode(b"small\xe9.png"))
    common = ["--device", "cpu", "--workers", "0"]
    assert score(tmp_path, "-m", "qualiclip-mini", "--workers", 0) == 1
    assert cli.main(["describe", str(path), *common, "-m", "qualiclip-mini"]) == 0
    out, err = capfd.readouterr()
    assert f"{shown}, 48x40" in out and shown in err and "small\\xe9.png is 8x8 pixels" in err
    assert cli.main(["score", str(tmp_path / f"none{name}"), "-m", "qualiclip-mini", "--workers", "0"]) == 1
    # A message with a path as it is, and the parser's words.
    assert cli.main(["filter", str(tmp_path / f"none{name}.csv"), "--above", "0"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["score", "a.png", f"--{name}"])
    _, err = capfd.readouterr()
    assert err.count(f"none{shown}") >= 2 and f"arguments: --{shown}" in err
    assert "udce9" not in err + out
    # A warning of the library.
    assert cli._Formatter().format(logging.makeLogRecord({"msg": name})) == shown


def test_one_row_an_image_however_it_was_spelled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ["photos", "./photos", "photos/0.png", "./photos/0.png", "photos/sub/../0.png", folder / "0.png"]
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"s{suffix}"
        assert score(*relative, "-o", out, "--workers", 0) == 0
        assert len(rows(out)) == 5 and rows(out)[0].path == "photos/0.png"  # as it was spelled first
        before = out.read_bytes()
        for again in (["./photos"], [folder], [f"../{tmp_path.name}/photos", "photos/./1.png"]):
            assert score(*again, "-o", out, "--resume", "--workers", 0) == 0
            assert len(rows(out)) == 5
        assert suffix == ".parquet" or out.read_bytes() == before
    capsys.readouterr()
    assert score(*relative[2:], "--workers", 0) == 0
    assert "1 image: 1 scored" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_any_encoding(
    encoding: str, end: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(folder / "1.png"), str(picture(folder / "写 真.png"))]
    data = end.join([*paths, "", ""]).encode(encoding)
    data = b"\xfe\xff" + data if encoding == "utf-16-be" else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert score("-", "-o", tmp_path / "s.jsonl", "--workers", 0) == 0
    assert [row.path for row in rows(tmp_path / "s.jsonl")] == paths


def test_missing_image_of_a_list_in_another_encoding_is_told_how_to_save_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [str(folder / "1.png"), str(folder / "é.png"), str(folder / "none.png")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode("latin-1"))))
    out = tmp_path / "s.jsonl"
    assert score("-", "-o", out, "--workers", 0) == 1
    errors = [row.error or "" for row in rows(out)]
    assert errors[0] == "" and "UTF-8" not in errors[2] and "none.png does not exist" in errors[2]
    assert "does not exist" in errors[1]
    assert errors[1].endswith("; its name is not UTF-8: if a list or table names it, save that as UTF-8")


def test_lists_that_are_no_text(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    strange = picture(folder / os.fsdecode(b"\xff\xfe.png"))  # begins as UTF-16 does
    for data, options in ((b"\xff\xfe.png\n", ()), (b"\xff\xfe.png\x000.png\0", ("-0",))):
        out = tmp_path / f"{len(options)}.csv"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert score("-", *options, "-o", out, "--workers", 0) == 0
        assert rows(out)[0].path == strange.name
    for data in (b"a.png\0b.png\0", "a.png\n".encode("utf-16-le"), b"\xff\xfea\0b"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert score("-", "-o", tmp_path / "none.csv") == 2
    assert not (tmp_path / "none.csv").exists()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["qualiclip-pyiqa", version("qualiclip-pyiqa")]
    assert f"{version('pyiqa')}," in words and f"{version('torch')}," in words
    code = "import sys; from qualiclip_pyiqa.commands import cli\ntry: cli.main(['--version'])\n"
    code += "finally: assert not {'torch', 'pyiqa'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_parquet_without_pyarrow_is_said_before_scoring(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(Scorer, "score", None)
    assert score(folder, "-o", tmp_path / "s.parquet") == 2
    assert 'a Parquet table needs pyarrow: pip install "qualiclip-pyiqa[parquet]"' in capsys.readouterr().err
    assert not list(tmp_path.glob("s.parquet*"))
