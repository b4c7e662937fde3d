"""Compare one network call with pyiqa's own on the same weights: time, memory, scores.

    python benchmarks/speed.py [--repeat 5] [--no-compile] [--keep-freed-memory] [--weights DIR]
    python benchmarks/speed.py --device cuda

Without --weights (a folder with RN50.pt and QualiCLIP.pth), files with random content in upstream's layouts are used;
time and memory do not depend on it.

On the CPU each case is timed in this process, ours and pyiqa's in turn, and medians are compared; `limit` is the time
of its multiply-adds at the rate of a large matrix product, measured in the same run. Memory is the rise of a fresh
process's peak above its use with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import common
import pyiqa
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qualiclip_pyiqa.scoring.allocator import keep_freed_memory
from qualiclip_pyiqa.scoring.network import compiled

# Metric, batch, height, width, and the target ratio to pyiqa's speed (eager, compiled).
CPU_CASES = (
    ("clipiqa", 1, 224, 224, 6.0, None),
    ("qualiclip", 8, 224, 224, 1.5, None),
    ("qualiclip", 1, 768, 1024, 1.6, 2.1),
    ("qualiclip", 1, 1080, 1920, 2.1, None),
    ("qualiclip", 1, 2160, 3840, 3.0, None),
)
GPU_SIZES = ((224, 224), (384, 512), (1080, 1920), (2160, 3840))
GPU_BATCH_PIXELS = 2**25
Row: TypeAlias = dict[str, Any]
# "channels last" is about the images; towers use that order for their features in every row.
GPU_ROWS = (
    "fp32",
    "tf32",
    "bf16",
    "fp32, channels last",
    "bf16, channels last",
    "fp32, compiled",
    "tf32, compiled",
    "bf16, compiled",
    "fp32, single",
    "bf16, single",
)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--keep-freed-memory", action="store_true", help="as the qualiclip command does, for both")
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.repeat, options.compile = 1, False
    if options.keep_freed_memory and not keep_freed_memory():
        parser.error("--keep-freed-memory has no effect with this C library")
    with common.weights(options.weights) as folder, torch.no_grad():
        rows = on_gpu(folder, options) if options.device.startswith("cuda") else on_cpu(folder, options)
    common.report(options, rows, options.device, options.weights and options.weights.name)


def on_cpu(folder: Path, options: argparse.Namespace) -> list[Row]:
    rate = multiply_adds_per_second(512 if options.quick else 4096)
    rows: list[Row] = []
    for name, count, height, width, wanted, wanted_compiled in CPU_CASES[:1] if options.quick else CPU_CASES:
        ours = pyiqa.create_metric(name, device="cpu").net
        theirs = common.oracle(name, folder)
        x = common.images(count, height, width)
        calls = [lambda ours=ours, x=x: ours(x), lambda theirs=theirs, x=x: theirs(x)]
        if options.compile and wanted_compiled:
            fast = compiled(ours)
            calls.append(lambda fast=fast, x=x: fast(x))
        with FlopCounterMode(display=False) as counter:
            score = ours(x)
        own, upstreams, *rest = common.medians(calls, options.repeat)
        row: Row = {
            "case": f"{name} {count}x{height}x{width}",
            "seconds": own,
            "pyiqa, seconds": upstreams,
            "ratio": upstreams / own,
            "at least": wanted,
            "compiled, seconds": rest[0] if rest else None,
            "compiled, ratio": upstreams / rest[0] if rest else None,
            "compiled, at least": wanted_compiled,
            "limit, seconds": counter.get_total_flops() / 2 / rate,
            "difference": float((score - theirs(x)).abs().max()),
        }
        if height * width <= 1080 * 1920:
            exact = ours.double()(x.double())
            row["difference to float64"] = float((score - exact).abs().max())
            row["pyiqa, difference to float64"] = float((theirs(x) - exact).abs().max())
        rows.append(row)
        print(f"{row['case']}: ratio {row['ratio']:.2f}", flush=True)
        del ours, theirs, calls
        torch.compiler.reset()
        gc.collect()
    if options.quick:
        mib = common.peak_memory(partial(_network, "ours", folder), 64, 64, fresh=False)
        return [*rows, {"case": "extra memory, 1x64x64", "MiB": mib}]
    create = [lambda: pyiqa.create_metric("qualiclip", device="cpu"), lambda: common.oracle("qualiclip", folder)]
    own, upstreams = common.medians(create, options.repeat)
    created = {"seconds": own, "pyiqa, seconds": upstreams, "ratio": upstreams / own, "at least": 4.0}
    rows.append({"case": "create_metric('qualiclip')", **created})
    own_mib, their_mib = (peak_memory(which, folder, 2160, 3840) for which in ("ours", "pyiqa"))
    rows.append({"case": "extra memory, 1x2160x3840", "MiB": own_mib, "pyiqa, MiB": their_mib})
    mib = peak_memory("ours", folder, 10000, 10000)  # the image's own 1,144 MiB included
    return [*rows, {"case": "extra memory, 1x10000x10000, its 1144 MiB included", "MiB": mib}]


def multiply_adds_per_second(size: int) -> float:
    a, b = torch.rand(size, size), torch.rand(size, size)
    (seconds,) = common.medians([lambda: a @ b], 5)
    return size**3 / seconds


def peak_memory(which: str, folder: Path, height: int, width: int) -> float:
    return common.peak_memory(partial(_network, which, folder), height, width)


def _network(which: str, folder: Path) -> torch.nn.Module:
    return pyiqa.create_metric("qualiclip", device="cpu").net if which == "ours" else common.oracle("qualiclip", folder)


def on_gpu(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Measure images per second and peak memory by size and precision, beside pyiqa's one image at a time."""
    rows: list[Row] = []
    theirs = common.oracle("qualiclip", folder).to(options.device)
    for height, width in GPU_SIZES:
        batch = min(64, max(1, GPU_BATCH_PIXELS // (height * width)))
        x = common.images(min(batch, 8), height, width).to(options.device)
        x = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch]
        base, _, memory = gpu_rate(theirs, x[:1], "fp32", options)
        rows.append(gpu_row(f"{height}x{width}", "pyiqa fp32, single", 1, base, base, memory, 0.0))
        exact = None
        for what in GPU_ROWS:
            precision, _, how = what.partition(", ")
            if how == "compiled" and not options.compile:
                continue
            net = pyiqa.create_metric("qualiclip", device=options.device).net
            net = net.to(torch.bfloat16 if precision == "bf16" else torch.float32)
            if how == "compiled":
                net = compiled(net)
            inputs = x[:1] if how == "single" else x
            if how == "channels last":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            speed, score, memory = gpu_rate(net, inputs, precision, options)
            exact = score if exact is None else exact
            difference = float((score - exact[: len(score)]).abs().max())
            rows.append(gpu_row(f"{height}x{width}", what, len(inputs), speed, base, memory, difference))
            del net
            torch.compiler.reset()  # which otherwise compiles only so many networks
            torch.cuda.empty_cache()
    return rows


def gpu_rate(
    net: Callable[[Tensor], Tensor], x: Tensor, precision: str, options: argparse.Namespace
) -> tuple[float, Tensor, float]:
    """Measure images per second, scores, and peak memory in MiB."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    for _ in range(3):
        score = net(x)
    torch.cuda.synchronize(options.device)
    torch.cuda.reset_peak_memory_stats(options.device)
    times = []
    for _ in range(max(10, options.repeat)):
        started = time.perf_counter()
        net(x)
        torch.cuda.synchronize(options.device)
        times.append(time.perf_counter() - started)
    return len(x) / statistics.median(times), score.float(), torch.cuda.max_memory_allocated(options.device) / 2**20


def gpu_row(size: str, what: str, batch: int, speed: float, base: float, memory: float, difference: float) -> Row:
    row: Row = {"size": size, "what": what, "batch": batch, "images per second": speed, "ratio to pyiqa": speed / base}
    print(f"{size} {what}: {speed:.1f} images per second", flush=True)
    return row | {"peak MiB": memory, "difference to fp32": difference}


if __name__ == "__main__":
    main()
