"""Many pictures: decoded in worker processes, scored in batches of one size, one record each in input order.

A picture goes  source -> `Decoder` -> waiting room by size -> `Network` on a device -> record.  Nothing is padded or
resized, so that a batched score is the single picture's. The number of pictures between the oldest without a record and
the newest that was read is bounded, and so is what their pixels weigh, whatever the number of inputs.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import multiprocessing
import os
import queue
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ImageError, SettingsError
from ..images.convert import ReadRules
from ..images.decoding import decode
from ..images.tensors import Source, from_pixels, load_image
from ..images.workers import DecodedImage, Decoder
from ..metrics.prompt_iqa import PromptIQA
from ..towers.onednn import use_onednn
from ..towers.streaming import LARGE_PIXELS
from .description import describe_metric, lower_is_better
from .precision import PRECISIONS, tf32
from .tables import Record

logger = logging.getLogger(__name__)

# Pixels of a batch on a GPU: 85 pictures of 512x384, 8 of 1080p, 2 of 4K; a larger picture goes alone. On a CPU larger
# batches are slower than single pictures, since their features leave the caches and the memory that is at hand.
BATCH_PIXELS = {"cuda": 2**24, "cpu": 2**18}
# What decoded pictures may weigh until they are scored.
DECODED_BYTES = 2**30

# How PyTorch says so on a CPU, and where CUDA or its libraries ask for the memory themselves.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class Scorer:
    """Scores any number of pictures by one or more no-reference metrics.

    Scores equal those of one picture at a time to 2e-6 (fp32), whatever the batch size, workers, order and devices.

    Args:
        metrics: a name that `pyiqa.create_metric` knows, the file of a model that was trained with this package, a
            metric or network, a list of those, or a mapping from column to one of those. Metrics on the same tower
            share its pass. Metrics that are not this package's are scored picture by picture, since theirs may depend
            on what else is in a batch.
        device: such as "cpu", "cuda" or "cuda:0"; several, in a list or with commas, share the work. Default: CUDA if
            there is one.
        batch_size: pictures of equal size that go through a network together, at most; fewer where they are large.
            Default: 32, on a CPU 8.
        workers: processes that decode; 0 decodes here, in between. Default: by the number of CPU cores, 0 in a
            process that may not start others.
        precision: "fp32", "tf32" (fp32 with the faster, coarser products of NVIDIA GPUs), "bf16" or "fp16".
        compile: whether the networks go through `torch.compile`, which pays from a few hundred pictures on.
        ignore_orientation, allow_truncated, max_pixels: how files become pixels, see `images.convert.ReadRules`.
        decode_timeout: seconds after which a worker process that has not decoded an image is replaced and the image
            is an error; `math.inf`: no limit.

    Raises:
        SettingsError: an unknown metric, one that needs a reference, two with the same column, or a setting that makes
            no sense. WeightsError: a weight file is missing.

    Example:
        >>> for record in Scorer(["qualiclip", "clipiqa"]).score(Path("photos").glob("*.jpg")):
        ...     print(record.path, record.scores)
    """

    def __init__(
        self,
        metrics: Any,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        precision: str = "fp32",
        compile: bool = False,
        max_pixels: int | None = None,
        ignore_orientation: bool = False,
        allow_truncated: bool = False,
        decode_timeout: float = 60.0,
    ) -> None:
        devices = _devices(device)
        on_cpu = devices[0].type == "cpu"
        cores = os.cpu_count() or 1
        self.batch_size = _at_least(1, "batch_size", 8 if on_cpu else 32, batch_size)
        # A daemonic process, such as a DataLoader's, may not start others.
        usual = 0 if multiprocessing.current_process().daemon else max(1, min(8, cores // 4 if on_cpu else cores))
        self.workers = _at_least(0, "workers", usual, workers)
        limit = None if max_pixels is None else _at_least(1, "max_pixels", 1, max_pixels)
        self.rules = ReadRules(ignore_orientation, allow_truncated, limit)
        if not decode_timeout > 0:
            raise SettingsError(f"decode_timeout is {decode_timeout!r}; expected seconds above 0")
        self.decode_timeout = decode_timeout
        if precision not in PRECISIONS:
            raise SettingsError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        named = _named(metrics)
        self.networks = [Network(_build(named, each), each, precision, compile) for each in devices]
        #: Names of the scores: the metric's, followed by a dot and the attribute for a metric with several.
        self.columns = self.networks[0].columns
        #: Column -> whether a lower score means a better image, as the metric itself says.
        self.lower_better = {c: lower_is_better(metric) for c, metric in self.networks[0].metrics.items()}

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the scores, as plain values; tables are stored with it.

        `columns` maps every score to what is known of its metric, `lower_better` among that.
        """
        first = self.networks[0]
        return {
            "version": version("qualiclip-pyiqa"),
            "torch": str(torch.__version__),
            "columns": {column: describe_metric(metric) for column, metric in first.metrics.items()},
            "precision": first.precision,
            "device": first.device.type,
            "images": asdict(self.rules),
        }

    def score(self, images: Iterable[Source | ImageError]) -> Iterator[Record]:
        """Yield one record per picture, in input order, as they are ready.

        Args:
            images: what `load_image` takes, one picture each, or the `ImageError` that there is instead of one; any
                iterable, read as needed and never kept. Paths and bytes are decoded in worker processes.

        A picture that cannot be scored is a record with an error. A decoding process that is killed is replaced; a
        batch for which a device has too little memory is halved. Anything else that goes wrong is raised.
        """
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ahead = 2 * self.workers or self.batch_size
        decoder = Decoder(self.workers, ahead, events, self.rules, self.decode_timeout)
        threads = [ThreadPoolExecutor(1) for _ in self.networks]
        try:
            yield from _Run(self, iter(images), events, decoder, threads)
        finally:
            decoder.close()
            for thread in threads:
                thread.shutdown(cancel_futures=True)


class _Run:
    """One pass over the inputs. Everything but decoding and the networks happens in the caller's thread."""

    def __init__(
        self,
        scorer: Scorer,
        images: Iterator[Source | ImageError],
        events: queue.SimpleQueue[Any],
        decoder: Decoder,
        threads: Sequence[ThreadPoolExecutor],
    ) -> None:
        self.scorer, self.images, self.events, self.decoder, self.threads = scorer, images, events, decoder, threads
        self.window = 8 * scorer.batch_size + 2 * scorer.workers
        self.busy = [0] * len(threads)  # batches that a device has or that wait for it
        self.paths: dict[int, str | None] = {}
        self.waiting: OrderedDict[Any, deque[tuple[int, np.ndarray]]] = OrderedDict()  # by shape and dtype
        self.decoded_bytes = 0  # of pictures that are not scored yet
        self.last_bytes = 0  # of the picture that was decoded last, as a guess for the next ones
        self.done: dict[int, Record] = {}
        self.read = 0  # pictures taken from the input
        self.exhausted = False

    def __iter__(self) -> Iterator[Record]:
        number = 0
        while True:
            while number in self.done:
                yield self.done.pop(number)
                number += 1
            while self._may_read(number):
                self._read_one()
            self._dispatch()
            if self.exhausted and number == self.read:
                return
            if number not in self.done:
                self._handle(self.events.get())

    def _may_read(self, number: int) -> bool:
        weight = self.decoded_bytes + self.decoder.pending * self.last_bytes
        full = weight >= DECODED_BYTES or self.read - number >= self.window
        return not self.exhausted and not full and self.decoder.ready

    def _read_one(self) -> None:
        try:
            source = next(self.images)
        except StopIteration:
            self.exhausted = True
            return
        number, self.read = self.read, self.read + 1
        if isinstance(source, os.PathLike):  # perhaps of a class that no worker knows
            source = os.fsdecode(source)
        self.paths[number] = source if isinstance(source, str) else None
        if isinstance(source, str | bytes):
            self.decoder.submit(number, source)
        elif isinstance(source, ImageError):  # of whoever should have brought the picture
            self._decoded(number, source)
        elif isinstance(source, Tensor):
            try:
                self._decoded(number, np.asarray(load_image(source).detach().cpu().movedim(0, -1)))
            except ImageError as error:
                self._decoded(number, error)
        else:
            self._decoded(number, decode(source, self.scorer.rules))

    def _decoded(self, number: int, result: np.ndarray | ImageError) -> None:
        if isinstance(result, ImageError):
            self.done[number] = Record(self.paths.pop(number), error=str(result))
            return
        self.waiting.setdefault((result.shape, result.dtype), deque()).append((number, result))
        self.last_bytes = result.nbytes
        self.decoded_bytes += result.nbytes

    def _dispatch(self) -> None:
        """Give every device work: a full batch ahead of time, a smaller one only if there is nothing else to do."""
        for device, thread in enumerate(self.threads):
            while self.waiting and self.busy[device] < 2:
                size = self.scorer.batch_size
                key = next((key for key, room in self.waiting.items() if len(room) >= size), None)
                if key is None:
                    if self.busy[device]:
                        break
                    key = min(self.waiting, key=lambda key: self.waiting[key][0][0])  # that of the oldest picture
                room = self.waiting[key]
                batch = [room.popleft() for _ in range(min(size, len(room)))]
                if not room:
                    del self.waiting[key]
                numbers, pixels = [n for n, _ in batch], [p for _, p in batch]
                self.busy[device] += 1
                future = thread.submit(self.scorer.networks[device], pixels)
                shape, weight = pixels[0].shape, len(pixels) * pixels[0].nbytes
                future.add_done_callback(
                    lambda done, event=("scored", device, numbers, shape, weight): self.events.put(  # type: ignore[misc]
                        (*event, done)
                    )
                )

    def _handle(self, event: Any) -> None:
        if isinstance(event, DecodedImage):
            self.decoder.pending -= 1
            if not isinstance(event.result, np.ndarray | ImageError):
                raise event.result
            self._decoded(event.number, event.result)
            return
        _, device, numbers, (height, width, *_), weight, done = event
        self.busy[device] -= 1
        self.decoded_bytes -= weight
        finished: Future[list[tuple[dict[str, float], str | None]]] = done
        for number, (scores, error) in zip(numbers, finished.result(), strict=True):
            self.done[number] = Record(self.paths.pop(number), width, height, scores, error)


class Network:
    """All metrics on one device: pixels of one shape and dtype -> per picture its scores and what went wrong.

    Args:
        metrics: what `_build` gives.
        device, precision, compile: see `Scorer`.
    """

    def __init__(self, metrics: Mapping[str, nn.Module], device: torch.device, precision: str, compile: bool) -> None:
        self.device = device
        self.precision = precision
        self.batch_pixels = BATCH_PIXELS.get(device.type, BATCH_PIXELS["cuda"])
        self.heads: list[tuple[list[str], PromptIQA, int]] = []  # columns, network, index of its features
        self.towers: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = []  # compiled, plain
        self.others: list[tuple[str, nn.Module]] = []
        own: list[tuple[str, PromptIQA]] = []
        for name, metric in metrics.items():
            net = getattr(metric, "net", metric)
            if not isinstance(net, PromptIQA):
                self.others.append((name, metric.to(device).eval()))
                continue
            net.eval()
            twin = next((first for _, first in own if _same(first.tower, net.tower)), None)
            if twin is not None:
                net.tower = twin.tower  # and its own memory is freed
            own.append((name, net))
        firsts: list[PromptIQA] = []  # those whose features the others share
        for name, net in own:
            net.to(device=device, dtype=PRECISIONS[precision])
            if not compile:
                use_onednn(net.tower)
            index = next(
                (k for k, first in enumerate(firsts) if (first.tower, first.tile) == (net.tower, net.tile)), -1
            )
            if index < 0:
                index = len(firsts)
                firsts.append(net)
                self.towers.append((compiled(net.features) if compile else net.features, net.features))
            self.heads.append((_columns(name, net), net, index))
        self.columns = tuple(c for name, metric in metrics.items() for c in _columns(name, metric))
        self.metrics = {c: metric for name, metric in metrics.items() for c in _columns(name, metric)}
        if len(set(self.columns)) < len(self.columns):
            twice = next(c for c in self.columns if self.columns.count(c) > 1)
            raise SettingsError(f"two metrics would be called {twice!r}; pass a mapping from column to metric")

    @torch.no_grad()
    def __call__(self, pixels: Sequence[np.ndarray]) -> list[tuple[dict[str, float], str | None]]:
        each = pixels[0].shape[0] * pixels[0].shape[1]
        out: list[tuple[dict[str, float], str | None]] = []
        while len(out) < len(pixels):
            count = max(1, self.batch_pixels // each)
            part = pixels[len(out) : len(out) + count]
            scored = self._unless_out_of_memory(part)
            if scored is not None:
                out += scored
            elif len(part) > 1:
                self.batch_pixels = each * (len(part) // 2)
                logger.warning("%s is out of memory; going on with %d pictures a batch", self.device, len(part) // 2)
            else:
                height, width = part[0].shape[:2]
                out.append(({}, f"{width}x{height} pixels do not fit into the memory of {self.device}"))
            if scored is None and self.device.type == "cuda":
                torch.cuda.empty_cache()
        return out

    def _unless_out_of_memory(self, pixels: Sequence[np.ndarray]) -> list[tuple[dict[str, float], str | None]] | None:
        try:
            return self._score(pixels)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            return None

    def _score(self, pixels: Sequence[np.ndarray]) -> list[tuple[dict[str, float], str | None]]:
        rgb = from_pixels(pixels, self.device)
        rows: list[dict[str, float]] = [{} for _ in pixels]
        errors: list[list[str]] = [[] for _ in pixels]
        # Strips, which keep a large picture's memory low, are not compiled.
        large = rgb.shape[2] * rgb.shape[3] > LARGE_PIXELS
        with tf32(self.device, self.precision == "tf32"):
            features = [(plain if large else fast)(rgb) for fast, plain in self.towers]
            for columns, net, index in self.heads:
                for row, problems, scores in zip(rows, errors, net.score(features[index]).tolist(), strict=True):
                    for column, score in zip(columns, scores, strict=True):
                        _keep(row, problems, column, score)
        for name, metric in self.others:
            with tf32(self.device, self.precision == "tf32", foreign=True):
                for row, problems, picture in zip(rows, errors, rgb, strict=True):
                    try:
                        score = metric(picture.unsqueeze(0).contiguous()).item()
                    except Exception as error:  # what a foreign metric cannot score is that picture's error
                        if _out_of_memory(error):
                            raise
                        problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
                    else:
                        _keep(row, problems, name, score)
        return [(row, "; ".join(problems) or None) for row, problems in zip(rows, errors, strict=True)]


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`torch.compile`, with the frozen weights packed for the CPU's convolutions.

    The first size is compiled as such, which is fastest; the second one makes it a graph for any size. Packing is
    Inductor's "freezing" (environment variable TORCHINDUCTOR_FREEZING); given as an option of `torch.compile` it has no
    effect in torch 2.15. The function must not need gradients, and its weights must not change afterwards.
    """
    import torch._inductor.config

    fast = torch.compile(function)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), torch._inductor.config.patch(freezing=x.device.type == "cpu"):
            return fast(x)

    return call


def _keep(row: dict[str, float], problems: list[str], column: str, score: float) -> None:
    if math.isfinite(score):
        row[column] = float(f"{score:.9g}")  # all that single precision holds
    else:
        problems.append(f"{column}: the score is {score}")


def _same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two towers give the same features: the same modules with the same settings and values."""
    ours, theirs = dict(first.named_buffers()), dict(second.named_buffers())
    return (
        _structure(first) == _structure(second)
        and ours.keys() == theirs.keys()
        and all(
            value.dtype == theirs[name].dtype and torch.equal(value.to(theirs[name].device), theirs[name])
            for name, value in ours.items()
        )
    )


def _structure(tower: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Per module its class and its settings, such as strides, heads and whether there is a positional table."""
    return {
        path: (type(module), {name: value for name, value in vars(module).items() if not name.startswith("_")})
        for path, module in tower.named_modules()
    }


def _named(metrics: Any) -> Mapping[str, Any]:
    """Column -> name, file, metric or network."""
    if not isinstance(metrics, Mapping):
        metrics = [metrics] if isinstance(metrics, str | os.PathLike | nn.Module) else list(metrics)
        metrics = [os.fspath(metric) if isinstance(metric, os.PathLike) else metric for metric in metrics]
        named = [(metric if isinstance(metric, str) else _name(metric), metric) for metric in metrics]
        metrics = dict(named)
        if len(metrics) < len(named):
            raise SettingsError("two metrics have the same name; pass a mapping from column to metric")
    if not metrics:
        raise SettingsError("no metric was given; expected names such as 'qualiclip-mini'")
    return metrics


def _build(metrics: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """Column -> metric, made for this device or copied, so that nothing of the caller's is moved or changed."""
    import pyiqa

    built: dict[str, nn.Module] = {}
    for column, metric in metrics.items():
        if isinstance(metric, str) and metric.endswith(".safetensors"):
            metric = pyiqa.create_metric("qualiclip", device=device, weights=metric)
        elif isinstance(metric, str):
            known = pyiqa.list_models()
            if metric not in known:
                near = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)[0]
                raise SettingsError(f"unknown metric {metric!r}; did you mean {near!r}? `pyiqa -ls` lists all")
            metric = pyiqa.create_metric(metric, device=device)
        elif isinstance(metric, nn.Module):
            metric = _copied(metric)
        else:
            raise SettingsError(f"metric is a {type(metric).__name__}; expected a name, a pyiqa metric or a network")
        if getattr(metric, "metric_mode", "NR") != "NR":
            raise SettingsError(f"{column} needs a reference picture; expected no-reference metrics")
        built[column] = metric
    return built


def _copied(metric: nn.Module) -> nn.Module:
    """A copy that follows `.to()`.

    Off the CPU the `dummy_param` by which pyiqa's metrics know their device is no parameter but what `.to()` made of
    one: it would stay where it is, and PyTorch copies no tensor that has a history.
    """
    marker = metric.__dict__.get("dummy_param")
    if not isinstance(marker, Tensor):
        return copy.deepcopy(metric)
    parameter = nn.Parameter(marker.detach())
    copied = copy.deepcopy(metric, {id(marker): parameter})
    copied.dummy_param = parameter
    return copied


def _columns(name: str, metric: nn.Module) -> list[str]:
    net = getattr(metric, "net", metric)
    if not isinstance(net, PromptIQA) or len(net.attributes) == 1:
        return [name]
    return [f"{name}.{attribute}" for attribute in net.attributes]


def _name(metric: Any) -> str:
    return getattr(metric, "metric_name", None) or getattr(metric, "model_type", None) or type(metric).__name__


def _devices(device: Any) -> list[torch.device]:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = device.split(",") if isinstance(device, str) else [device] if isinstance(device, torch.device) else device
    try:
        devices = [torch.device(name) for name in names]
        for each in devices:
            torch.empty(0, device=each)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch says in its first line what is missing
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"device {device!r} cannot be used ({reason}); expected such as 'cpu' or 'cuda:0'"
        ) from error
    if not devices or len({each.type for each in devices}) > 1:
        raise SettingsError(f"device is {device!r}; expected one, or several of one kind")
    return devices


def _at_least(least: int, what: str, default: int, value: int | None) -> int:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise SettingsError(f"{what} is {value!r}; expected an integer of at least {least}")
    return default if value is None else value
