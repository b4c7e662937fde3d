"""Measure the cost of the start-up hook for an interpreter that never imports pyiqa.

    python benchmarks/startup.py [--runs 200]

Starts Python alternately with two site-packages folders, one of which has our .pth file, and prints the median wall
times and, from `-X importtime`, the time to import the hook's module.
"""

from __future__ import annotations

import os
import py_compile
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import qualiclip_pyiqa_start


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
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
    common.report(options, [{"runs": runs, **row, "import of the hook, ms": int(own) / 1e3}], weights="none")


if __name__ == "__main__":
    main()
