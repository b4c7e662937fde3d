"""What the comparisons with pyiqa share: weights that both read, pyiqa's own network, the machine's name."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import open_clip
import pyiqa
import torch
import upstream

oracle = upstream.oracle
pictures = upstream.pictures


@contextmanager
def weights(folder: Path | None, draw: int = 0) -> Iterator[Path]:
    """A folder with RN50.pt and QualiCLIP.pth in the look-up path: the given one, or files with random content, another
    for each draw."""
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            os.environ["QUALICLIP_PYIQA_VERIFY"] = "0"  # nothing random has the published hash
            logging.getLogger("qualiclip_pyiqa").setLevel(logging.ERROR)
            config = open_clip.get_model_config("RN50-quickgelu")
            torch.save(upstream.random_clip(config, seed=2 * draw), Path(made, "RN50.pt"))
            upstream.write_qualiclip(Path(made, "QualiCLIP.pth"), upstream.random_clip(config, seed=2 * draw + 1))
        os.environ["QUALICLIP_PYIQA_WEIGHTS"] = str(folder or made)
        yield folder or Path(made)


def machine(device: str = "cpu") -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    # Processors of one name and very different speed differ by family and model.
    pairs = (line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {key.strip(): value.strip() for key, value in pairs}
    name = said.get("model name", platform.processor())
    kind = f" (family {said['cpu family']}, model {said['model']})" if "cpu family" in said else ""
    return f"{name}{kind}, {torch.get_num_threads()} threads"


def report(file: Path | None, device: str, weights: Path | None, rows: list[dict[str, Any]]) -> None:
    """Say where and when, and write everything to `file`."""
    said = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "pyiqa": pyiqa.__version__, "python": platform.python_version()},
        "weights": weights.name if weights else "random content in upstream's layouts",
        "rows": rows,
    }
    print(f"{said['date']}, {said['machine']}, torch {torch.__version__}, pyiqa {pyiqa.__version__}")
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(said, indent=1) + "\n")
