"""Score many images: decode in worker processes, batch by size, yield one record each in input order.

Path of an image: source -> `Decoder` -> queue of its size -> `Network` on a device -> record. Nothing is padded or
resized, so a score does not depend on the batch. The number of images in flight and the memory of their pixels are
bounded, whatever the number of inputs.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, SettingsError
from ..images.convert import ReadRules, read_or_error, source_name
from ..images.paths import list_images
from ..images.tensors import Source, load_image
from ..images.workers import DecodedImage, Decoder
from ..metrics.prompts import Pair
from ..metrics.words import comparatives
from .building import Metrics, build_metrics, named_metrics
from .description import attributes_of, describe_metric, lower_is_better
from .network import Network, Scored
from .precision import PRECISIONS, warn_of_slow_bf16
from .tables import Record, to_table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

# Bytes of decoded images waiting to be scored, at most.
DECODED_BYTES = 2**30

ShapeAndDtype: TypeAlias = tuple[tuple[int, ...], np.dtype]


class Scorer:
    """Scores any number of images by one or more no-reference metrics.

    On a CPU in fp32, scores equal `metric(x)` of one image at a time to 2e-6, for any batch size, workers, order and
    devices. On an NVIDIA GPU, a scorer uses TF32 only on request, while pyiqa's `metric(x)` always allows it for
    convolutions: fp32 scores then agree with a CPU's to float32 rounding, but not with `metric(x)`.

    Args:
        metrics: a name known to `pyiqa.create_metric`, the file of a model trained with this package, a metric or
            network, a list of those, or a mapping from column to one of those. Names and files of this package's
            metrics take other prompts after a colon: a set (`"clipiqa:look"`), a pair
            (`"clipiqa:Clear photo./Foggy photo."`) or a TOML file (`"clipiqa:sets.toml:weather"`), as `prompts=` of
            `create_metric` does. Modules are copied, not changed.
            Metrics on equal towers share one pass. Other packages' metrics run as pyiqa runs them, in float32 and
            image by image, since their scores may depend on the rest of a batch.
        device: for example "cpu", "cuda" or "cuda:0"; several, in a list or separated by commas, share the work.
            Default: CUDA if available.
        batch_size: maximum number of images of equal size per batch; large images make smaller batches. Default: 32,
            on a CPU 8.
        workers: number of decoding processes; 0 decodes in this process. Default: by the number of CPU cores, 0 in a
            process that may not start others.
        precision: "fp32", "tf32" (fp32 with the faster, coarser products of NVIDIA GPUs), "bf16" or "fp16". On a CPU,
            bf16 is fast only if the CPU has instructions for it, and a warning says if not. For int8 see
            `export_metric`.
        compile: use `torch.compile`, which pays off from a few hundred images.
        max_pixels: refuse larger images before decoding. Default: Pillow's limit, 89 million.
        ignore_orientation: keep the stored orientation instead of applying EXIF orientation.
        ignore_profile: keep the stored colours instead of converting from an embedded ICC profile to sRGB.
        allow_truncated: score files with truncated image data.
        decode_timeout: seconds to decode an image, after which the worker is replaced and the image becomes an error;
            `math.inf`: no limit.

    Attributes:
        columns: names of the scores: the metric's name, followed by a dot and the attribute if it has several.
        lower_better: whether a lower score means a better image, by column.
        comparatives: what an image with a higher score is, and one with a lower score, by column: "better" and
            "worse", or for example "brighter" and "darker".

    Raises:
        SettingsError: an unknown metric, one that needs a reference, two with the same column, or an invalid setting.
        WeightsError: a weight file is missing.

    Example:
        >>> scorer = Scorer("qualiclip-mini", device="cpu", workers=0)
        >>> scorer.lower_better
        {'qualiclip-mini': False}
        >>> grey = np.full((40, 60, 3), 128, np.uint8)
        >>> [(record.width, record.height, list(record.scores)) for record in scorer.score([grey])]
        [(60, 40, ['qualiclip-mini'])]
    """

    def __init__(
        self,
        metrics: Metrics,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        precision: str = "fp32",
        compile: bool = False,
        max_pixels: int | None = None,
        ignore_orientation: bool = False,
        allow_truncated: bool = False,
        decode_timeout: float = 60.0,
        ignore_profile: bool = False,
    ) -> None:
        devices = usable_devices(device)
        on_cpu = devices[0].type == "cpu"
        cores = os.cpu_count() or 1
        self.batch_size = _at_least(1, "batch_size", 8 if on_cpu else 32, batch_size)
        # A daemonic process, such as a DataLoader's, may not start others.
        usual = 0 if multiprocessing.current_process().daemon else max(1, min(8, cores // 4 if on_cpu else cores))
        self.workers = _at_least(0, "workers", usual, workers)
        limit = None if max_pixels is None else _at_least(1, "max_pixels", 1, max_pixels)
        self.rules = ReadRules(bool(ignore_orientation), bool(allow_truncated), limit, bool(ignore_profile))
        self.decode_timeout = _seconds("decode_timeout", decode_timeout)
        if precision == "int8":
            raise SettingsError(
                "precision int8 is that of files: pass one of `qualiclip export --int8 --calibrate DIR` as a metric"
            )
        if precision not in PRECISIONS:
            raise SettingsError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        if precision == "bf16" and on_cpu:
            warn_of_slow_bf16()
        named = named_metrics(metrics)
        self.networks = [Network(build_metrics(named, each), each, precision, compile) for each in devices]
        self.columns: tuple[str, ...] = self.networks[0].columns
        self.lower_better: dict[str, bool] = {
            column: lower_is_better(metric) for column, metric in self.networks[0].metrics.items()
        }
        self.comparatives: dict[str, Pair] = {
            column: comparatives(pairs, self.lower_better[column])
            for column, (_, pairs) in attributes_of(self.networks[0].metrics).items()
        }

    def score(self, images: Iterable[Source | ImageError] | Source) -> Iterator[Record]:
        """Yield one record per image, in input order, as soon as it is ready.

        An image that cannot be scored has a record with an error. A decoding process that dies or hangs is replaced; a
        batch that exceeds a device's memory is halved. Any other failure is raised.

        Args:
            images: an iterable of sources as for `load_image`, read as needed and not kept; or a single one: a path,
                bytes, a PIL image, an array (H, W) or (H, W, C), a tensor (C, H, W). The path of a folder stands for
                the images below it, as in `qualiclip score FOLDER`; within an iterable a folder is an image that cannot
                be read. An `ImageError` in place of an image becomes its record's error. Paths and bytes are decoded in
                worker processes.

        Raises:
            SettingsError: `images` is neither an image nor an iterable; or a folder without images, or one that cannot
                be listed.
        """
        sources = _each(images)
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ahead = 2 * self.workers or self.batch_size
        decoder = Decoder(self.workers, ahead, events, self.rules, self.decode_timeout)
        threads = [ThreadPoolExecutor(1) for _ in self.networks]
        try:
            yield from _Run(self, sources, events, decoder, threads)
        finally:
            decoder.close()
            for thread in threads:
                thread.shutdown(cancel_futures=True)

    @overload
    def table(
        self, images: Iterable[Source | ImageError] | Source, kind: Literal["pandas"] = "pandas"
    ) -> pd.DataFrame: ...
    @overload
    def table(self, images: Iterable[Source | ImageError] | Source, kind: Literal["arrow"]) -> pyarrow.Table: ...
    def table(
        self, images: Iterable[Source | ImageError] | Source, kind: Literal["pandas", "arrow"] = "pandas"
    ) -> pd.DataFrame | pyarrow.Table:
        """Score images into one table in memory; `score` needs no memory for all of them.

        Args:
            images: as for `score`.
            kind: "pandas" or "arrow", see `scoring.tables.to_table`.

        Returns:
            One row per image, in input order, with the columns path, width, height, the scores and error. A DataFrame
            has `describe()` in `attrs["scores"]`, and with it the direction of each score.

        Raises:
            SettingsError: as for `score`; or pyarrow is not installed.

        Example:
            >>> scorer = Scorer("qualiclip-mini+", device="cpu", workers=0)
            >>> table = scorer.table(["examples/photos/hats.jpg", "none.jpg"])
            >>> table["qualiclip-mini+"].round(2).tolist(), table["error"][1]
            ([0.79, nan], 'none.jpg does not exist; expected an image file')
        """
        return to_table(self.score(images), self.describe(), kind)

    def describe(self) -> dict[str, Any]:
        """Return everything that affects the scores, JSON-ready, as stored beside a table.

        Hashes the weight files, which takes about a second for a large one.

        Returns:
            `version` (of this package), `torch`, `columns` (by score: `lower_better` and the metric's own description),
            `precision`, `device` (its type) and `images` (the reading rules).
        """
        network = self.networks[0]
        return {
            "version": version("qualiclip-pyiqa"),
            "torch": str(torch.__version__),
            "columns": {column: describe_metric(metric, network.device) for column, metric in network.metrics.items()},
            "precision": network.precision,
            "device": network.device.type,
            "images": asdict(self.rules),
        }


@dataclass(frozen=True)
class _ScoredBatch:
    """A finished batch, as a device's thread puts it on the queue.

    Attributes:
        device: index of the device.
        numbers: of the images.
        height, width: of every image.
        weight: bytes of all pixels.
        scored: the scores, or the exception.
    """

    device: int
    numbers: list[int]
    height: int
    width: int
    weight: int
    scored: Future[list[Scored]]


class _Run:
    """One pass over the inputs. Everything except decoding and networks runs in the caller's thread."""

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
        self.busy = [0] * len(threads)  # batches running or queued, by device
        self.paths: dict[int, str | None] = {}
        self.waiting: OrderedDict[ShapeAndDtype, deque[tuple[int, np.ndarray]]] = OrderedDict()
        self.decoded_bytes = 0  # of images not scored yet
        self.last_bytes = 0  # of the last decoded image, as an estimate for the pending ones
        self.done: dict[int, Record] = {}
        self.read = 0  # number of images read from the input
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
                event: DecodedImage | _ScoredBatch = self.events.get()
                if isinstance(event, DecodedImage):
                    self._take_decoded(event)
                else:
                    self._take_scored(event)

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
        if isinstance(source, os.PathLike):  # a worker may lack its class
            source = os.fsdecode(source)
        self.paths[number] = source if isinstance(source, str) else None
        if isinstance(source, str | bytes):
            self.decoder.submit(number, source)
        elif isinstance(source, ImageError):  # the caller could not get the image
            self._add(number, source)
        elif isinstance(source, Tensor):
            try:
                self._add(number, np.asarray(load_image(source).detach().cpu().movedim(0, -1)))
            except ImageError as error:
                self._add(number, error)
        else:
            self._add(number, read_or_error(source, self.scorer.rules))

    def _add(self, number: int, result: np.ndarray | ImageError) -> None:
        """Queue decoded pixels by size, or complete the record of an image that failed."""
        if isinstance(result, ImageError):
            self.done[number] = Record(self.paths.pop(number), error=str(result))
            return
        self.waiting.setdefault((result.shape, result.dtype), deque()).append((number, result))
        self.last_bytes = result.nbytes
        self.decoded_bytes += result.nbytes

    def _dispatch(self) -> None:
        """Give work to every device: a full batch in advance, a smaller one only if the device is idle."""
        for device, thread in enumerate(self.threads):
            while self.waiting and self.busy[device] < 2:
                size = self.scorer.batch_size
                key = next((key for key, images in self.waiting.items() if len(images) >= size), None)
                if key is None:
                    if self.busy[device]:
                        break
                    key = min(self.waiting, key=lambda key: self.waiting[key][0][0])  # with the oldest image
                images = self.waiting[key]
                batch = [images.popleft() for _ in range(min(size, len(images)))]
                if not images:
                    del self.waiting[key]
                numbers, pixels = [n for n, _ in batch], [p for _, p in batch]
                self.busy[device] += 1
                height, width = pixels[0].shape[:2]
                weight = len(pixels) * pixels[0].nbytes
                finished = partial(_ScoredBatch, device, numbers, height, width, weight)
                future = thread.submit(self.scorer.networks[device], pixels)
                future.add_done_callback(partial(self._put, finished))

    def _put(self, finished: partial[_ScoredBatch], scored: Future[list[Scored]]) -> None:
        self.events.put(finished(scored))

    def _take_decoded(self, event: DecodedImage) -> None:
        self.decoder.pending -= 1
        if not isinstance(event.result, np.ndarray | ImageError):
            raise event.result
        self._add(event.number, event.result)

    def _take_scored(self, batch: _ScoredBatch) -> None:
        self.busy[batch.device] -= 1
        self.decoded_bytes -= batch.weight
        for number, image in zip(batch.numbers, batch.scored.result(), strict=True):
            self.done[number] = Record(self.paths.pop(number), batch.width, batch.height, image.scores, image.error)


def _each(images: Iterable[Source | ImageError] | Source) -> Iterator[Source | ImageError]:
    """Iterate over images; a single image is one item, though paths, arrays and tensors are iterable."""
    if isinstance(images, str | os.PathLike) and os.path.isdir(images):  # noqa: PTH112 - '' is no Path
        found = list_images(Path(os.fsdecode(images)))
        if not found:
            raise SettingsError(f"no images in {source_name(images)}; expected a folder of images, or an image")
        return map(str, found)
    if isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image):
        return iter([images])
    if isinstance(images, np.ndarray | Tensor) and images.ndim < 4:
        return iter([images])
    try:
        return iter(images)
    except TypeError:
        raise SettingsError(
            f"images is of type {type(images).__name__}; expected an iterable of images, or one image"
        ) from None


def usable_devices(device: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = device.split(",") if isinstance(device, str) else [device] if isinstance(device, torch.device) else device
    try:
        devices = [torch.device(name) for name in names]
        for each in devices:
            torch.empty(0, device=each)
    except (RuntimeError, AssertionError, TypeError) as error:  # the first line of torch's message is enough
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"device {device!r} cannot be used ({reason}); expected for example 'cpu' or 'cuda:0'"
        ) from error
    if not devices or len({each.type for each in devices}) > 1:
        raise SettingsError(f"device is {device!r}; expected one device, or several of the same type")
    return devices


def _at_least(least: int, what: str, default: int, value: int | None) -> int:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise SettingsError(f"{what} is {value!r}; expected an integer of at least {least}")
    return default if value is None else value


def _seconds(what: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise SettingsError(f"{what} is {value!r}; expected seconds above 0")
    return float(value)
