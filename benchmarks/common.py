"""Shared by all benchmarks: options, weights, photographs, the machine's name, timing, memory and output."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lab"))

import open_clip
import pyiqa
import torch
import upstream
from torch import Tensor

from qualiclip_pyiqa import OpenQualiCLIP
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.metrics.prompts import PromptsLike
from qualiclip_pyiqa.metrics.registry import METRICS
from qualiclip_pyiqa.training.photographs import read_held_out

oracle = upstream.oracle
images = upstream.pictures


def parser(doc: str) -> argparse.ArgumentParser:
    """Create a parser with the options of every benchmark; `doc` is the script's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows, the command and the machine")
    made.add_argument("--quick", action="store_true", help="smallest sizes, once: shows that it runs, measures nothing")
    return made


@contextmanager
def weights(folder: Path | None, draw: int = 0) -> Iterator[Path]:
    """Put a folder with RN50.pt and QualiCLIP.pth on the look-up path.

    Args:
        folder: the user's own; None: files with random content in upstream's layouts.
        draw: seed of the random content.
    """
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            os.environ["QUALICLIP_PYIQA_VERIFY"] = "0"  # random content does not have the published hash
            logging.getLogger("qualiclip_pyiqa").setLevel(logging.ERROR)
            config = open_clip.get_model_config("RN50-quickgelu")
            torch.save(upstream.random_clip(config, seed=2 * draw), Path(made, "RN50.pt"))
            upstream.write_qualiclip(Path(made, "QualiCLIP.pth"), upstream.random_clip(config, seed=2 * draw + 1))
        os.environ["QUALICLIP_PYIQA_WEIGHTS"] = str(folder or made)
        yield folder or Path(made)


def load(model: str, prompts: PromptsLike | None = None) -> OpenQualiCLIP:
    """Load a metric of the embedded models' kind by its name, or the file of a trained one."""
    known = model in METRICS
    made = OpenQualiCLIP(model if known else "qualiclip", prompts=prompts, weights=None if known else model)
    return made.eval()


def photographs(folder: Path) -> tuple[list[str], list[str]]:
    """List the images of a folder that may be trained on, and those held out by its `manifest.csv`.

    Raises:
        SettingsError: one of the two is empty.
    """
    paths = find_images([str(folder)]).paths if folder.is_dir() else []
    names = {folder / name for name in read_held_out(folder)}
    held_out = [path for path in paths if Path(path) in names]
    training = [path for path in paths if Path(path) not in names]
    if not training or not held_out:
        raise SettingsError(
            f"{folder} has {len(held_out)} photographs that are held out and {len(training)} that are not; expected "
            "some of both (held_out is 1 in its manifest.csv, which names each `file`)"
        )
    return training, held_out


def spread(paths: Sequence[str], most: int) -> list[str]:
    """Select at most this many paths, evenly spread."""
    count = min(most, len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]


def medians(calls: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Measure the median seconds of each call. Calls take turns, so that other load affects all alike.

    A single repetition measures nothing, so none goes before it to warm up.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls if repeat > 1 else ():
        call()
    for _ in range(repeat):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def peak_memory(create: Callable[[], Callable[[Tensor], object]], height: int, width: int, fresh: bool = True) -> float:
    """Measure by how many MiB one image raises the peak of a fresh process that has created the network.

    With `fresh` False, of this process, from where `create` is still sent as to another: this takes no seconds to
    start, and is for `--quick`, whose figures do not count.
    """
    if not fresh:
        return _peak_memory(pickle.loads(pickle.dumps(create)), height, width)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (create, height, width))


@torch.no_grad()
def _peak_memory(create: Callable[[], Callable[[Tensor], object]], height: int, width: int) -> float:
    net = create()
    net(images(1, 64, 64))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, loading included, is forgotten
    before = _kib("VmRSS")
    large = height * width > 2**24  # the memory of such an image is counted too
    x = torch.rand(1, 3, height, width) if large else images(1, height, width)
    if not large:
        Path("/proc/self/clear_refs").write_text("5")
        before = _kib("VmRSS")
    net(x)
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def machine(device: str = "cpu") -> str:
    """Name the processor with its number of threads, or the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    # Family and model distinguish processors of one name but very different speed.
    pairs = (line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines())
    info = {key.strip(): value.strip() for key, value in pairs}
    name = info.get("model name", platform.processor())
    kind = f" (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else ""
    return f"{name}{kind}, {torch.get_num_threads()} threads"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as a Markdown table; floats get four significant digits, None becomes `-`."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def report(
    options: argparse.Namespace, rows: list[dict[str, Any]], device: str = "cpu", weights: str | None = None
) -> None:
    """Print the rows as a table with date, machine and versions, and write all of it to `--json FILE`."""
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "pyiqa": pyiqa.__version__, "python": platform.python_version()},
        "weights": weights or "random content in upstream's layouts",
        "quick": options.quick,
        "rows": rows,
    }
    print(f"\n{table(rows)}\n")
    print(f"{result['date']}, {result['machine']}, torch {torch.__version__}, pyiqa {pyiqa.__version__}")
    if options.quick:
        print("--quick: these figures only show that the benchmark runs")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
