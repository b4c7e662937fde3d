"""Score a folder of photographs end to end: `qualiclip score` against `pyiqa METRIC -t FOLDER`, without start-up.

    python benchmarks/folder.py --images DIR... [--limit 200] [--sizes WIDTHxHEIGHT...] [--metric qualiclip]
        [--engine onnxruntime|openvino|openvino-bf16] [--device cpu] [--rounds 2] [--weights DIR]

Both read, decode and score the same files with the same weights (without --weights: random content, on which time does
not depend), each in its own process, as the two commands do: ours with `Scorer` and `keep_freed_memory`, pyiqa's own
network with `metric(path).item()` file by file. Models are loaded before the clock starts; decoding workers start
within it. A bare call is the same network on pixels that are decoded already, image by image, without the loop around
it. Every n-th photograph is used. The three take turns, a folder each, and seconds are those of a round. With --sizes,
photographs are first resampled to these sizes in turn, cropped at the centre, and saved as JPEG. With --engine, ours
is the exported metric.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import pyiqa
from PIL import ImageOps

from qualiclip_pyiqa import export_metric, load_image
from qualiclip_pyiqa.images.convert import read_or_error
from qualiclip_pyiqa.images.formats import open_image
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.scoring.allocator import keep_freed_memory
from qualiclip_pyiqa.scoring.scorer import Scorer

_loaded: dict[str, Any] = {}  # of the process that scores


def load_ours(metric: str, device: str, compile: bool, engine: str | None) -> None:
    keep_freed_memory()
    with TemporaryDirectory() as folder:
        if engine is not None:
            exported = Path(folder, f"{metric}.onnx")
            export_metric(pyiqa.create_metric(metric, device="cpu").net, exported, metric)
            metric = f"{exported}:{engine}"
        _loaded["scorer"] = Scorer(metric, device=device, compile=compile)


def load_theirs(metric: str, device: str, folder: Path) -> None:
    _loaded["metric"] = pyiqa.create_metric(metric, device=device)
    _loaded["metric"].net = common.oracle(metric, folder).to(device)


def score_ours(paths: list[str]) -> tuple[float, list[float]]:
    started = time.perf_counter()
    scores = [next(iter(record.scores.values())) for record in _loaded["scorer"].score(paths)]
    return time.perf_counter() - started, scores


def call_ours(paths: list[str]) -> float:
    """Return the seconds of the network alone."""
    images = [read_or_error(path, _loaded["scorer"].rules) for path in paths]
    started = time.perf_counter()
    for image in images:
        _loaded["scorer"].networks[0]([image])
    return time.perf_counter() - started


def score_theirs(paths: list[str]) -> tuple[float, list[float]]:
    started = time.perf_counter()
    scores = [_loaded["metric"](path).item() for path in paths]
    return time.perf_counter() - started, scores


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def resample(paths: list[str], sizes: list[tuple[int, int]], folder: Path) -> list[str]:
    """Write copies in the given sizes in turn."""
    made = []
    for number, path in enumerate(paths):
        with Path(path).open("rb") as file:
            fitted = ImageOps.fit(open_image(file).convert("RGB"), sizes[number % len(sizes)])
        made.append(str(folder / f"{number:05d}.jpg"))
        fitted.save(made[-1], quality=92)
    return made


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--sizes", nargs="+", type=size, metavar="WIDTHxHEIGHT")
    parser.add_argument("--metric", default="qualiclip", choices=("qualiclip", "clipiqa"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", choices=("onnxruntime", "openvino", "openvino-bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.limit, options.rounds, options.sizes = 2, 1, options.sizes or [(64, 48)]
    paths = find_images(options.images).paths
    paths = paths[:: max(1, len(paths) // options.limit)][: options.limit]
    with TemporaryDirectory() as copies:
        compare(resample(paths, options.sizes, Path(copies)) if options.sizes else paths, options)


def compare(paths: list[str], options: argparse.Namespace) -> None:
    # Each in a process of its own, but for `--quick`: processes take seconds to import everything.
    one_process = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    start: Callable[[], Executor] = partial(ThreadPoolExecutor, 1) if options.quick else one_process
    ours_s = bare_s = theirs_s = largest = 0.0
    with common.weights(options.weights) as folder, start() as one, start() as other:
        one.submit(load_ours, options.metric, options.device, options.compile, options.engine).result()
        other.submit(load_theirs, options.metric, options.device, folder).result()
        for number in range(-1, options.rounds):  # the first one, of two images, is a warm-up
            part = paths if number >= 0 else paths[:2]
            seconds, own = one.submit(score_ours, part).result()
            bare_seconds = one.submit(call_ours, part).result()
            upstream_seconds, upstreams = other.submit(score_theirs, part).result()
            if number >= 0:
                ours_s, bare_s, theirs_s = ours_s + seconds, bare_s + bare_seconds, theirs_s + upstream_seconds
                largest = max(largest, *(abs(a - b) for a, b in zip(own, upstreams, strict=True)))
    sizes = Counter(tuple(load_image(path).shape[1:]) for path in paths)
    (common_size, count), *_ = sizes.most_common(1)
    row = {
        "metric": options.metric,
        "photographs": len(paths),
        "sizes": len(sizes),
        "most common": f"{count} of {common_size[1]}x{common_size[0]}",
        "engine": options.engine or f"torch{', compiled' * options.compile}",
        "seconds": ours_s / options.rounds,
        "bare calls, seconds": bare_s / options.rounds,
        "times a bare call": ours_s / bare_s,
        "pyiqa, seconds": theirs_s / options.rounds,
        "ratio": theirs_s / ours_s,
        "largest difference of a score": largest,
    }
    common.report(options, [row], options.device, options.weights and options.weights.name)


if __name__ == "__main__":
    main()
