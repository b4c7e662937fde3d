"""Measure a step of QualityLoss beside one forward and one input-only backward of its tower: time and peak memory.

    python benchmarks/loss.py [--image HxW ...] [--repeat N] [--json FILE]

A step is `loss(x).backward()`: the tower's own is `tower(x).sum().backward()` with the gradient of the image alone, as
the weights are frozen. Memory is by how much a step raises the peak of a fresh process that has created the network.
All kinds of steps are measured at the first size of `--image`; at the others, those that show what activation
checkpointing saves, and memory alone.

Metrics: `qualiclip-mini+`, and `clipiqa` on a ResNet50 tower with random weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from qualiclip_pyiqa import QualityLoss

METRICS = {"qualiclip-mini+": "embedded", "clipiqa": "ResNet50, random weights"}
STEPS: dict[str, dict[str, Any]] = {
    "tower": {},
    "loss": {},
    "loss, relative to target": {"relative_to": "target"},
    "loss, 4 crops of 224": {"crops": (4, 224)},
    "loss, scales 1 and 0.5": {"scales": (1.0, 0.5)},
    "loss, checkpointing": {"checkpointing": True},
}


def step(metric: str, kind: str) -> Callable[[Tensor], object]:
    """Create a step: a forward and a backward pass to the image."""
    options = STEPS[kind]
    loss = QualityLoss(metric, **options)
    tower: Any = loss.metric.network.tower

    def run(x: Tensor) -> object:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = tower(leaf).sum() if kind == "tower" else loss(leaf, x if options.get("relative_to") else None)
            value.backward()
        return leaf.grad

    return run


def rows(sizes: list[tuple[int, int]], repeat: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every metric and kind of step."""
    for metric, what in list(METRICS.items())[: 1 if quick else None]:
        for number, (height, width) in enumerate(sizes):
            x = common.images(1, height, width)
            timed = number == 0
            kinds = list(STEPS) if timed else ["tower", "loss", "loss, checkpointing"]
            seconds = common.medians([partial(step(metric, kind), x) for kind in kinds], repeat) if timed else []
            first = None
            for k, kind in enumerate(kinds):
                memory = common.peak_memory(partial(step, metric, kind), height, width, fresh=not quick)
                first = memory if k == 0 else first
                yield {
                    "metric": f"{metric} ({what})",
                    "image": f"{height}x{width}",
                    "step": kind,
                    "seconds": seconds[k] if timed else None,
                    "of the tower's time": seconds[k] / seconds[0] if timed else None,
                    "peak MiB": memory,
                    "of the tower's memory": memory / first if memory and first else None,
                }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--image", nargs="+", default=["384x512", "1080x1920"], metavar="HxW")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with RN50.pt; default: random weights")
    options = parser.parse_args()
    if options.quick:
        options.image, options.repeat = ["64x64"], 1
    sizes = [(int(height), int(width)) for height, width in (size.split("x") for size in options.image)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with nullcontext() if options.quick else common.weights(options.weights):
        common.report(options, list(rows(sizes, options.repeat, options.quick)))


if __name__ == "__main__":
    main()
