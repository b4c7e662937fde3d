"""Statistics of image files by a tower, computed once and cached on disk.

A file of the cache belongs to a tower, an image's content, the rules of reading, the kind of device and the version of
torch, and holds a hash of all that and of its numbers. One that is damaged is computed again; any may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ImageError, counted
from ..files import replacing
from ..images.convert import source_name
from ..images.identity import hash_file
from ..metrics.base import BlindMetric
from ..metrics.fitted import count_statistics
from ..pretrained import folders
from ..scoring.scorer import Scorer
from ..scoring.tables import Record
from ..towers.base import STATISTICS_VERSION

_NAME = "statistics"
_HASH_BYTES = 32

#: Wraps an iterable of records, given their number, for example in a progress bar.
Watch: TypeAlias = Callable[[Iterable[Record], int], Iterable[Record]]
Statistics: TypeAlias = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of images.

    Attributes:
        values: (n, S), by image.
        hashes: sha256 of each image's file.
    """

    values: Statistics
    hashes: list[str]


class StatisticsMetric(BlindMetric):
    """A frozen tower's statistics as the scores of a metric, one attribute for each, so that a `Scorer` computes them.

    Shape:
        x: as for any metric -> (N, S), float32.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__(_NAME, paper="none", score_range="-inf, inf")
        self.tower = tower
        self.count = count_statistics(tower)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.count)))

    def encode(self, rgb: Tensor) -> Tensor:
        statistics: Tensor = self.tower.statistics(rgb)  # type: ignore[operator]
        return statistics

    def rate(self, features: Tensor) -> Tensor:
        return features


def default_cache() -> Path | None:
    """Return the folder of cached statistics in this package's cache; None for a user without a cache folder."""
    cache = folders.cache_folder()
    return None if cache is None else cache / _NAME


def compute_statistics(
    tower: nn.Module,
    settings: Mapping[str, Any],
    paths: Sequence[Path],
    cache: Path | None,
    watch: Watch,
    **options: Any,
) -> ImageStatistics:
    """Compute statistics of images, or take them from the cache.

    Images are computed one by one, so that values do not depend on which other images a batch holds.

    Args:
        tower: a frozen tower with the method `statistics`.
        settings: what decides the tower's result beside its tensors, in plain values.
        paths: image files; identical files are computed once.
        cache: folder, created if it does not exist; None: no cache.
        watch: wraps the records of images that are not in the cache.
        options: of `Scorer`: `device`, `workers` and the rules of reading.

    Raises:
        ImageError: images that cannot be read or have statistics that are not finite. All others are computed and
            cached before.
        OSError: the cache cannot be read or written.
    """
    metric = StatisticsMetric(tower)
    scorer = Scorer(metric, batch_size=1, **options)
    device = scorer.networks[0].device.type
    shelf = None if cache is None else _Shelf(cache, _key(tower, settings, scorer, device), metric.count)
    errors: dict[Path, str] = {}
    hashes: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        try:
            hashes[path] = hash_file(path)
        except ImageError as error:
            errors[path] = str(error)
    found: dict[str, Statistics] = {}
    todo: dict[str, Path] = {}
    for path, sha256 in hashes.items():
        if sha256 in found or sha256 in todo:
            continue
        cached = None if shelf is None else shelf.read(sha256)
        if cached is None:
            todo[sha256] = path
        else:
            found[sha256] = cached
    records = watch(scorer.score(todo.values()), len(todo)) if todo else ()
    for (sha256, path), record in zip(todo.items(), records, strict=True):
        if record.error is not None:
            errors[path] = _first(record.error, path)
            continue
        if hash_file(path) != sha256:
            errors[path] = f"{source_name(path)} changed while it was read; try again"
            continue
        found[sha256] = np.array(list(record.scores.values()), np.float32)
        if shelf is not None:
            shelf.write(sha256, found[sha256])
    if errors:
        raise ImageError(
            f"{len(errors)} of {counted(len(set(paths)), 'image')} cannot be used: {next(iter(errors.values()))}"
            f"{'' if len(errors) == 1 else '; ...'}; mend them, or take them out of the ratings"
        )
    return ImageStatistics(np.stack([found[hashes[path]] for path in paths]), [hashes[path] for path in paths])


def _first(error: str, path: Path) -> str:
    """Shorten an error that lists all statistics which are not finite."""
    if error.startswith(f"{_NAME}."):
        return f"{source_name(path)} has statistics that are not finite"
    return error


def _key(tower: nn.Module, settings: Mapping[str, Any], scorer: Scorer, device: str) -> str:
    """Hash everything but the image that decides statistics."""
    found = hashlib.sha256()
    plain = {
        "statistics": STATISTICS_VERSION,
        "tower": type(tower).__name__,
        "settings": dict(settings),
        "rules": asdict(scorer.rules),
        "device": device,
        "torch": str(torch.__version__),
    }
    found.update(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tower.named_buffers()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class _Shelf:
    """The part of the cache that belongs to one key: a file for each image.

    A file holds the sha256 of key, image hash and numbers, then the numbers, float32 in little-endian order.
    """

    def __init__(self, cache: Path, key: str, count: int) -> None:
        self.folder, self.key, self.count = cache / key[:32], key, count
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, "created", error) from error

    def read(self, sha256: str) -> Statistics | None:
        """Return an image's statistics; None, with a warning if the file is damaged, if there are none."""
        path = self.folder / sha256
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, "read", error) from error
        numbers = content[_HASH_BYTES:]
        if len(numbers) != 4 * self.count or content[:_HASH_BYTES] != self._digest(sha256, numbers):
            logger.warning("%s is damaged; its image is computed again", path)
            return None
        return np.frombuffer(numbers, "<f4").astype(np.float32)

    def write(self, sha256: str, values: Statistics) -> None:
        numbers = values.astype("<f4").tobytes()
        path = self.folder / sha256
        try:
            with replacing(path) as part:
                part.write_bytes(self._digest(sha256, numbers) + numbers)
        except OSError as error:
            raise _unusable(path, "written", error) from error

    def _digest(self, sha256: str, numbers: bytes) -> bytes:
        return hashlib.sha256(f"{self.key} {sha256} ".encode() + numbers).digest()


def _unusable(path: Path, what: str, error: OSError) -> OSError:
    return OSError(
        f"the cache {path} cannot be {what} ({error.strerror or error}); delete it, or pass --no-cache to do without"
    )
