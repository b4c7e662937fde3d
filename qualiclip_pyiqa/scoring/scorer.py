"""Score many images: decode in worker processes, batch by size, yield one record each in input order."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..errors import SettingsError
from ..images.convert import ReadRules
from ..images.workers import Decoder
from ..metrics.prompts import Pair
from ..metrics.words import comparatives
from .building import Metrics, build_metrics, named_metrics, needs_reference
from .description import attributes_of, describe_metric, lower_is_better
from .network import Network
from .precision import PRECISIONS, warn_of_slow_bf16
from .run import Run
from .sources import Images, References, describe_references, pair
from .tables import Record, to_table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow


class Scorer:
    """Scores any number of images by one or more metrics.

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
            image by image, since their scores may depend on the rest of a batch. Full-reference metrics, such as
            "psnr", need the `references` of `score`; they change no other metric's scores.
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
        full_reference: those of the columns whose metrics compare an image with a reference.
        lower_better: whether a lower score means a better image, by column.
        comparatives: what an image with a higher score is, and one with a lower score, by column: "better" and
            "worse", or for example "brighter" and "darker".

    Raises:
        SettingsError: an unknown metric, two with the same column, or an invalid setting.
        WeightsError: a weight file is missing.

    Example:
        >>> import numpy as np
        >>> scorer = Scorer("qualiclip-mini", device="cpu", workers=0)
        >>> scorer.lower_better
        {'qualiclip-mini': False}
        >>> grey = np.full((40, 60, 3), 128, np.uint8)
        >>> [(record.width, record.height, list(record.scores)) for record in scorer.score([grey])]
        [(60, 40, ['qualiclip-mini'])]
        >>> [record.scores["psnr"] for record in Scorer("psnr", device="cpu").score([grey], references=[grey // 2])]
        [12.0...]
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
        self.networks = [
            Network(build_metrics(named, each, full_reference=True), each, precision, compile) for each in devices
        ]
        self.columns: tuple[str, ...] = self.networks[0].columns
        self.full_reference = tuple(
            column for column, metric in self.networks[0].metrics.items() if needs_reference(metric)
        )
        self.lower_better: dict[str, bool] = {
            column: lower_is_better(metric) for column, metric in self.networks[0].metrics.items()
        }
        self.comparatives: dict[str, Pair] = {
            column: comparatives(pairs, self.lower_better[column])
            for column, (_, pairs) in attributes_of(self.networks[0].metrics).items()
        }

    def score(self, images: Images, references: References | None = None) -> Iterator[Record]:
        """Yield one record per image, in input order, as soon as it is ready.

        An image that cannot be scored has a record with an error. A decoding process that dies or hangs is replaced; a
        batch that exceeds a device's memory is halved. Any other failure is raised.

        Args:
            images: an iterable of sources as for `load_image`, read as needed and not kept; or a single one: a path,
                bytes, a PIL image, an array (H, W) or (H, W, C), a tensor (C, H, W). The path of a folder stands for
                the images below it, as in `qualiclip score FOLDER`; within an iterable a folder is an image that cannot
                be read. An `ImageError` in place of an image becomes its record's error. Paths and bytes are decoded in
                worker processes.
            references: for full-reference metrics. An iterable of as many sources as images, in the same order; or a
                single source, the reference of every image; or a folder: the path of one, in which a reference has the
                name of its image, with the path below the folder `images` if that is a folder, or a `ReferenceFolder`.
                References are read like images and must have their sizes. What is wrong with one (or an `ImageError` in
                its place) becomes the record's error, and no score of a no-reference metric is lost.

        Raises:
            SettingsError: `images` or `references` is neither an image nor an iterable; or a folder without images, or
                one that cannot be listed; there are not as many references as images; a metric needs references and
                none are given, or they are given and no metric needs them.
        """
        self._check_references(references)
        sources = pair(images, references)
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ahead = 2 * self.workers or self.batch_size
        decoder = Decoder(self.workers, ahead, events, self.rules, self.decode_timeout)
        threads = [ThreadPoolExecutor(1) for _ in self.networks]
        try:
            yield from Run(self, sources, events, decoder, threads)
        finally:
            decoder.close()
            for thread in threads:
                thread.shutdown(cancel_futures=True)

    @overload
    def table(
        self, images: Images, kind: Literal["pandas"] = "pandas", references: References | None = None
    ) -> pd.DataFrame: ...
    @overload
    def table(self, images: Images, kind: Literal["arrow"], references: References | None = None) -> pyarrow.Table: ...
    def table(
        self, images: Images, kind: Literal["pandas", "arrow"] = "pandas", references: References | None = None
    ) -> pd.DataFrame | pyarrow.Table:
        """Score images into one table in memory; `score` needs no memory for all of them.

        Args:
            images: as for `score`.
            kind: "pandas" or "arrow", see `scoring.tables.to_table`.
            references: as for `score`.

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
        return to_table(self.score(images, references), self.describe(references), kind)

    def describe(self, references: References | None = None) -> dict[str, Any]:
        """Return everything that affects the scores, JSON-ready, as stored beside a table.

        Hashes the weight files, which takes about a second for a large one.

        Args:
            references: as for `score`.

        Returns:
            `version` (of this package), `torch`, `columns` (by score: `lower_better` and the metric's own description),
            `precision`, `device` (its type), `images` (the reading rules) and, with references, `references` (their
            `path`, if they have one, and how they are paired with images).
        """
        network = self.networks[0]
        described = {} if references is None else {"references": describe_references(references)}
        return {
            "version": version("qualiclip-pyiqa"),
            "torch": str(torch.__version__),
            "columns": {column: describe_metric(metric, network.device) for column, metric in network.metrics.items()},
            "precision": network.precision,
            "device": network.device.type,
            "images": asdict(self.rules),
            **described,
        }

    def _check_references(self, references: References | None) -> None:
        """Raise SettingsError if a metric needs references and none are given, or the other way round."""
        if references is None and self.full_reference:
            raise SettingsError(
                f"{', '.join(self.full_reference)} needs a reference image for each image; pass references "
                "(`qualiclip score --reference PATH`)"
            )
        if references is not None and not self.full_reference:
            raise SettingsError(
                f"references have no effect on {', '.join(self.columns)}; leave them out, or add a full-reference "
                "metric such as psnr"
            )


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
