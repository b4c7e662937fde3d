"""Measure the cost of the start-up hook, and what the cache of prompt features saves.

    python benchmarks/startup.py [--runs 200] [--created 10] [--weights DIR]

Starts Python alternately with two site-packages folders, one of which has our .pth file, and prints the median wall
times and, from `-X importtime`, the time to import the hook's module. Then creates `clipiqa` alternately with an empty
and a filled cache of prompt features; without --weights, a folder with RN50.pt, its weights are random.
"""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import qualiclip_pyiqa_start
from qualiclip_pyiqa import OpenCLIPIQA
from qualiclip_pyiqa.pretrained.files import file_sha256


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--created", type=int, default=10, metavar="N", help="create the metric this often")
    parser.add_argument("--weights", type=Path, metavar="DIR")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.created = 2, 1
    rows = [measure_hook(options.runs), measure_cache(options.created, options.weights)]
    common.report(options, rows, weights=options.weights and options.weights.name)


def measure_cache(repeat: int, given: Path | None) -> dict[str, object]:
    """Time the creation of `clipiqa` with its prompt features computed, and read from the cache."""
    with tempfile.TemporaryDirectory() as folder, common.weights(given) as weights:
        file_sha256(weights / "RN50.pt")  # as for a published file, whose hash is compared when it is read
        os.environ["XDG_CACHE_HOME"] = folder

        def with_text_tower() -> None:
            shutil.rmtree(Path(folder, "qualiclip_pyiqa", "prompts"), ignore_errors=True)
            OpenCLIPIQA("clipiqa")

        computed, cached = common.medians([with_text_tower, lambda: OpenCLIPIQA("clipiqa")], repeat)
    return {"runs": repeat, "create clipiqa, prompts encoded, ms": 1e3 * computed, "cached, ms": 1e3 * cached}


def measure_hook(runs: int) -> dict[str, object]:
    """Time the start of an interpreter with and without the hook."""
    module = Path(qualiclip_pyiqa_start.__file__)
    line = next(path for entry in sys.path if (path := Path(entry, "qualiclip_pyiqa.pth")).is_file())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for name in ("without", "with"):
            site = Path(folder, name)
            site.mkdir()
            (site / module.name).write_text(module.read_text())
            py_compile.compile(str(site / module.name))  # as pip does at installation
            commands.append(f"import site; site.addsitedir({str(site)!r})")
        (site / line.name).write_text(line.read_text())
        times: list[list[float]] = [[], []]
        for _ in range(runs):
            for code, taken in zip(commands, times, strict=True):
                started = time.perf_counter()
                subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
                taken.append((time.perf_counter() - started) * 1e3)
        reported = subprocess.run(
            [sys.executable, "-S", "-X", "importtime", "-c", commands[1]], capture_output=True, text=True, check=True
        ).stderr
    (own,) = re.findall(r"(\d+) \|\s+\d+ \|\s*qualiclip_pyiqa_start", reported)
    without, with_hook = (statistics.median(taken) for taken in times)
    row = {"start without hook, ms": without, "with hook, ms": with_hook, "difference, ms": with_hook - without}
    return {"runs": runs, **row, "import of the hook, ms": int(own) / 1e3}


if __name__ == "__main__":
    main()
