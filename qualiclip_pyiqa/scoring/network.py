"""Run a scorer's metrics on one device: batches of equal size, one pass for metrics on equal towers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ImageError, SettingsError, kind_of, one_line
from ..images.convert import check_size
from ..images.tensors import from_pixels
from ..metrics.base import BlindMetric
from ..metrics.exported import ExportedIQA
from ..towers.onednn import use_onednn
from ..towers.streaming import LARGE_PIXELS
from .building import blind_metric, columns_of, needs_reference
from .precision import PRECISIONS, tf32

logger = logging.getLogger(__name__)

Features: TypeAlias = Callable[[Tensor], Tensor]
#: An image's reference: its pixels, or why there are none; None if no metric needs one.
Reference: TypeAlias = np.ndarray | ImageError | None

# Pixels per batch. On a GPU: 85 images of 512x384, 8 of 1080p, 2 of 4K; a larger image is a batch of its own. On a CPU,
# larger batches are slower than single images, since their features exceed the caches.
BATCH_PIXELS = {"cuda": 2**24, "cpu": 2**18}

# Messages of RuntimeErrors from the CPU allocator, and from CUDA and its libraries.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# Parts of PyTorch's messages when an image is too small for a convolution or its padding.
TOO_SMALL = ("Kernel size can't be greater than actual input size", "Padding size should be less than")


@dataclass
class Scored:
    """One image's scores by column, and errors for missing ones."""

    scores: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        return "; ".join(self.errors) or None

    def add(self, column: str, score: float) -> None:
        if math.isfinite(score):
            self.scores[column] = float(f"{score:.9g}")  # all digits of single precision
        else:
            self.errors.append(f"{column}: the score is {score}")


class Network:
    """Scores images of one shape and dtype by several metrics on one device.

    This package's metrics run on batches, and share features if these are equal. Other packages' metrics run on one
    image at a time, because their scores may depend on the rest of a batch; full-reference metrics take its reference
    too.

    Args:
        metrics: column -> metric; they are moved and changed.
        device, precision, compile: see `Scorer`.

    Raises:
        SettingsError: two scores would have the same column, or a setting has no effect on an exported file.
        WeightsError: an exported file cannot be run.
    """

    def __init__(self, metrics: Mapping[str, nn.Module], device: torch.device, precision: str, compile: bool) -> None:
        self.device = device
        self.precision = precision
        self.batch_pixels = BATCH_PIXELS.get(device.type, BATCH_PIXELS["cuda"])
        self.heads: list[tuple[list[str], BlindMetric, int]] = []  # columns, metric, index of its features
        self.towers: list[tuple[Features, Features]] = []  # compiled if `compile`, and never compiled
        self.others: list[tuple[str, nn.Module]] = []  # no-reference metrics of other packages
        self.full_reference: list[tuple[str, nn.Module]] = []
        self.columns = tuple(column for name, metric in metrics.items() for column in columns_of(name, metric))
        self.metrics = {column: metric for name, metric in metrics.items() for column in columns_of(name, metric)}
        if len(set(self.columns)) < len(self.columns):
            twice = next(column for column in self.columns if self.columns.count(column) > 1)
            raise SettingsError(f"two metrics would be called {twice!r}; pass a mapping from column to metric")
        own: list[tuple[str, BlindMetric]] = []
        for name, metric in metrics.items():
            net = blind_metric(metric)
            if net is None:
                foreign = self.full_reference if needs_reference(metric) else self.others
                foreign.append((name, metric.to(device).eval()))
                continue
            net.eval()
            if isinstance(net, ExportedIQA):
                if compile or precision != "fp32":
                    given = "compile" if compile else f"precision {precision!r}"
                    raise SettingsError(f"{given} has no effect on {name}, an exported file; leave it out")
                net.check()
            twin = next((first for _, first in own if _same_tower(first.tower, net.tower)), None)
            if twin is not None:
                net.tower = twin.tower  # frees the memory of its own
            own.append((name, net))
        firsts: list[BlindMetric] = []  # one metric per distinct features
        for name, net in own:
            net.to(device=device, dtype=PRECISIONS[precision])
            index = next((k for k, first in enumerate(firsts) if _same_features(first, net)), len(firsts))
            if index == len(firsts):
                firsts.append(net)
                self.towers.append((compiled(net.features) if compile else net.features, net.features))
            self.heads.append((columns_of(name, net), net, index))
        if not compile:
            for net in firsts:
                use_onednn(net.tower)

    @torch.no_grad()
    def __call__(self, pixels: Sequence[np.ndarray], references: Sequence[Reference] | None = None) -> list[Scored]:
        """Score images of one shape and dtype.

        Args:
            pixels: of the images, as from `read_pixels`.
            references: of each, of its height and width; None if no metric needs one.
        """
        images = self._score_batches(pixels) if self.heads else [Scored() for _ in pixels]
        if self.others or self.full_reference:
            with tf32(self.device, self.precision == "tf32", foreign=True):
                for image, own, reference in zip(images, pixels, references or [None] * len(pixels), strict=True):
                    self._score_foreign(own, reference, image)
        return images

    def _score_batches(self, pixels: Sequence[np.ndarray]) -> list[Scored]:
        """Score images by this package's metrics, in batches that fit into memory."""
        each = pixels[0].shape[0] * pixels[0].shape[1]
        out: list[Scored] = []
        while len(out) < len(pixels):
            count = max(1, self.batch_pixels // each)
            part = pixels[len(out) : len(out) + count]
            scored = self._unless_out_of_memory(part)
            if scored is not None:
                out += scored
            elif len(part) > 1:
                self.batch_pixels = each * (len(part) // 2)
                logger.warning("%s is out of memory; continuing with %d images per batch", self.device, len(part) // 2)
            else:
                out.append(Scored(errors=[self._too_large(part[0])]))
            if scored is None:
                self._free_memory()
        return out

    def _unless_out_of_memory(self, pixels: Sequence[np.ndarray]) -> list[Scored] | None:
        try:
            return self._score_batch(pixels)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return None

    def _score_batch(self, pixels: Sequence[np.ndarray]) -> list[Scored]:
        rgb = from_pixels(pixels, self.device)
        images = [Scored() for _ in pixels]
        with tf32(self.device, self.precision == "tf32"):
            self._score_own(rgb, images)
        return images

    def _score_own(self, rgb: Tensor, images: Sequence[Scored]) -> None:
        # Large images are streamed in strips to save memory, which cannot be compiled.
        large = rgb.shape[2] * rgb.shape[3] > LARGE_PIXELS
        height, width = rgb.shape[2:]
        features: dict[int, Tensor] = {}
        for columns, net, index in self.heads:
            try:
                check_size(height, width, "image", net.minimum_side)
            except ImageError as error:
                for image in images:
                    image.errors.append(f"{columns[0].removesuffix('.' + net.attributes[0])}: {error}")
                continue
            if index not in features:
                fast, plain = self.towers[index]
                features[index] = (plain if large else fast)(rgb)
            for image, scores in zip(images, net.score(features[index]).tolist(), strict=True):
                for column, score in zip(columns, scores, strict=True):
                    image.add(column, score)

    def _score_foreign(self, pixels: np.ndarray, reference: Reference, image: Scored) -> None:
        """Score one image by other packages' metrics; what one raises becomes the image's error."""
        for name, metric in self.others:
            self._score_one(name, metric, [pixels], image)
        if isinstance(reference, np.ndarray):
            for name, metric in self.full_reference:
                self._score_one(name, metric, [pixels, reference], image)
        elif self.full_reference:
            image.errors.append(f"reference: {reference or 'none was given'}")

    def _score_one(self, name: str, metric: nn.Module, inputs: Sequence[np.ndarray], image: Scored) -> None:
        try:
            scored = metric(*(from_pixels([each], self.device).contiguous() for each in inputs))
            if isinstance(scored, tuple | list | dict):
                raise TypeError(f"the metric returned {kind_of(scored)}; expected one number")
            score = scored.item()
        except Exception as error:  # noqa: BLE001 - other metrics and images still count
            if _is_out_of_memory(error):
                image.errors.append(f"{name}: {self._too_large(inputs[0])}")
                self._free_memory()
            elif isinstance(error, RuntimeError) and any(words in str(error) for words in TOO_SMALL):
                height, width = inputs[0].shape[:2]
                image.errors.append(f"{name}: {width}x{height} pixels are too few for this metric; score larger images")
            else:
                image.errors.append(f"{name}: {type(error).__name__}: {one_line(error)}")
        else:
            image.add(name, score)

    def _too_large(self, pixels: np.ndarray) -> str:
        height, width = pixels.shape[:2]
        return f"{width}x{height} pixels do not fit into the memory of {self.device}"

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def compiled(function: Features) -> Features:
    """Compile a function with `torch.compile`; on a CPU, with its weights frozen and packed for convolutions.

    The first image size gets a graph of its own, which is fastest; the second recompiles for any size. The function
    must not need gradients, and its weights must not change afterwards.
    """
    fast = torch.compile(function)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), freezing(x.device):
            return fast(x)

    return call


def freezing(device: torch.device) -> AbstractContextManager[Any]:
    """Enable Inductor's packing of weights on a CPU, like the environment variable TORCHINDUCTOR_FREEZING.

    As an option of `torch.compile` it has no effect in torch 2.15. Inductor's configuration is private: where it is
    missing, compiled graphs are slower, with equal values.
    """
    try:
        from torch._inductor import config
    except ImportError:
        return nullcontext()
    if device.type != "cpu" or not hasattr(config, "freezing") or not hasattr(config, "patch"):
        return nullcontext()
    patched: AbstractContextManager[Any] = config.patch(freezing=True)
    return patched


def _same_features(first: BlindMetric, second: BlindMetric) -> bool:
    return first.tower is second.tower and first.encodes_like(second)


def _same_tower(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two towers give equal features: equal modules, settings and values."""
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
    """Return class and settings of every module, for example strides and heads."""
    return {
        path: (type(module), {name: value for name, value in vars(module).items() if not name.startswith("_")})
        for path, module in tower.named_modules()
    }
