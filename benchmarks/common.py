"""Shared by all benchmarks: options, weights for both packages, the machine's name, timing and output."""

from __future__ import annotations

import argparse
import json
import logging
import os
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


def medians(calls: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Measure the median seconds of each call. Calls take turns, so that other load affects all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeat):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


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
