"""Measure restored images against their targets, and by scores that need no target; put images on one sheet."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyiqa
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from qualiclip_pyiqa.files import replacing
from qualiclip_pyiqa.scoring.building import Metrics
from qualiclip_pyiqa.scoring.scorer import Scorer

WITH_TARGET = ("psnr", "ssim", "fsim")  # of pyiqa; none needs a download
HEADING, GAP, LETTER = 28, 4, 6  # pixels of a sheet; width of a letter, about


class Measures:
    """Fidelity to a target (`WITH_TARGET`), and scores of no-reference metrics.

    Args:
        metrics: no-reference metrics, as `Scorer` takes them: names, files, networks.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.with_target = {name: pyiqa.create_metric(name, device="cpu") for name in WITH_TARGET}
        self.scorer = Scorer(metrics, device="cpu", workers=0)

    @torch.no_grad()
    def of(self, images: Iterable[Tensor], targets: Iterable[Tensor]) -> list[dict[str, float]]:
        """Measure images (1, 3, H, W) in 0..1 as 8-bit files have them -> a value for each measure, for each image."""
        stored = [eight_bits(image) for image in images]
        records = self.scorer.score([image[0].movedim(0, -1).numpy() for image in stored])
        rows = []
        for image, target, record in zip(stored, targets, records, strict=True):
            pair = image / 255, eight_bits(target) / 255
            rows.append({name: float(metric(*pair)) for name, metric in self.with_target.items()} | record.scores)
        return rows


def eight_bits(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255).byte()


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each measure."""
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def sheet(rows: Sequence[Mapping[str, Tensor]], path: Path) -> None:
    """Write a contact sheet: a line for each mapping from heading to image (1, 3, H, W), all of one size."""
    height, width = next(iter(rows[0].values())).shape[2:]
    columns = max(len(row) for row in rows)
    step = height + HEADING + GAP
    drawn = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * step - GAP), "white")
    pen = ImageDraw.Draw(drawn)
    for y, row in enumerate(rows):
        for x, (heading, image) in enumerate(row.items()):
            left, top = x * (width + GAP), y * step
            pen.text((left + 2, top + 2), textwrap.fill(heading, width // LETTER), fill="black")
            drawn.paste(Image.fromarray(eight_bits(image)[0].movedim(0, -1).numpy()), (left, top + HEADING))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        drawn.save(part, Image.registered_extensions()[path.suffix.lower()], quality=85)
