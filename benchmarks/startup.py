"""What the start-up hook costs an interpreter that never imports pyiqa.

    python benchmarks/startup.py [--runs 200]

Starts `python -c pass` alternately with our .pth file's line replaced by nothing and as installed, and prints the medians
of the wall time; the module's own import time as `-X importtime` reports it stands beside them.
"""

from __future__ import annotations

import argparse
import py_compile
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import qualiclip_pyiqa_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    module = Path(qualiclip_pyiqa_start.__file__)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, module.name)
        copy.write_text(module.read_text())
        py_compile.compile(str(copy))  # as pip does at installation
        hook = f"import sys; sys.path.insert(0, {folder!r}); import qualiclip_pyiqa_start as q; q.start()"
        none = f"import sys; sys.path.insert(0, {folder!r})"
        times: dict[str, list[float]] = {none: [], hook: []}
        for _ in range(runs):
            for code, taken in times.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, "-S", "-c", code], check=True)
                taken.append((time.perf_counter() - started) * 1e3)
        reported = subprocess.run(
            [sys.executable, "-S", "-X", "importtime", "-c", hook], capture_output=True, text=True, check=True
        ).stderr
    (own,) = re.findall(r"(\d+) \|\s+\d+ \|\s*qualiclip_pyiqa_start", reported)
    without, with_hook = (statistics.median(taken) for taken in times.values())
    print(f"start without hook {without:.2f} ms, with hook {with_hook:.2f} ms, difference {with_hook - without:.2f} ms")
    print(f"import of the hook's module: {int(own) / 1e3:.2f} ms")


if __name__ == "__main__":
    main()
