"""Tables and pages for the tests of reports: small images with hostile names, and scores without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qualiclip_pyiqa.scoring.tables import Record, write_table

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "\"quoted' &amp; more.png",
    "javascript:alert(1).png",
    "a b#c?d%20.png",
    "right\u202egnp.exe.png",
    "new\nline.png",
    "latin\udce9.png",
]
ERROR = "</script><img src=x onerror=alert(2)> \u202e broken & 'bad'"


def save(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> str:
    """Save an image of smooth blobs, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


def write_scores(path: Path, records: Sequence[Record], lower_better: Mapping[str, bool]) -> Path:
    meta = {
        "version": "0",
        "columns": {
            name: {"lower_better": lower, "score_range": "0, 1", "note": "<b>&</b>"}
            for name, lower in lower_better.items()
        },
        "images": {"ignore_orientation": False, "allow_truncated": False, "max_pixels": None, "ignore_profile": False},
    }
    write_table(path, list(lower_better), records, meta)
    return path


def hostile_table(folder: Path) -> Path:
    """Write 20 images, seven with hostile names, two of them near-duplicates, one outlier, and one error."""
    records = []
    for number in range(20):
        name = HOSTILE[number] if number < len(HOSTILE) else f"photo {number:02d}.png"
        file = save(folder / "images" / name, 0 if number == 19 else number)
        score = 0.02 if number == 12 else 0.5 + number / 100
        records.append(Record(file, 96, 64, {"good": score, "bad": 1 - score + number % 3 / 100}))
    records.append(Record(str(folder / "images" / "gone</script>.png"), error=ERROR))
    return write_scores(folder / "scores.csv", records, {"good": False, "bad": True})


def data_of(page: str) -> dict[str, Any]:
    """Return what the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])
