"""Score with Ray Data: folders, Parquet with image bytes and object stores, on one machine or a cluster.

    import ray
    from qualiclip_pyiqa.scoring.ray import score_dataset

    photos = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
    score_dataset(photos, ["qualiclip", "clipiqa"]).write_parquet("s3://bucket/scores")

If a worker is killed, Ray runs its rows again: none is lost or duplicated. Needs the extra `ray`:
pip install "qualiclip-pyiqa[ray]".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..errors import ImageError, SettingsError, one_line
from ..optional import require
from .allocator import keep_freed_memory
from .tables import Record

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

    from .building import Metrics
    from .scorer import Scorer

# Rows that a worker scores at a time; if it is killed, they are scored again.
BLOCK = 64
# CPU cores per worker without a GPU; small batches gain little from more.
CORES = 4


def score_dataset(
    dataset: Dataset,
    metrics: Metrics,
    *,
    image: str = "bytes",
    actors: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Dataset:
    """Score the images of a Ray dataset.

    Args:
        dataset: images in the column `image`, or else local paths or URLs in a column `path` (text, or bytes for names
            that are not UTF-8). Other columns are kept.
        metrics: as for `Scorer`.
        image: column of images, which is dropped from the result. An image is encoded bytes, a path or URL, an array as
            from `ray.data.read_images`, or a structure `{bytes, path}` as Hugging Face's `datasets` writes to Parquet,
            whose path is used if it has no bytes.
        actors: number of workers: at most one per GPU of the cluster, or without GPUs, two per CPU core. Default: one
            per GPU, or without GPUs, one per four CPU cores.
        batch_size, device, options: as for `Scorer`, with the defaults of the worker's machine.

    Returns:
        A lazy dataset: the rows and columns of `dataset`, `width`, `height`, one column per score, and `error` (null,
        or the reason for a missing score). `Scorer(metrics).lower_better` is the direction of each score,
        `Scorer(metrics).describe()` everything else that affects it.

    Raises:
        SettingsError: the dataset lacks both columns or already has a column of the result, the cluster has no room for
            that many workers, or Ray is missing; and as for `Scorer`.
    """
    _ray()
    names = dataset.columns() or []
    if image not in names and "path" not in names:
        raise SettingsError(
            f"the dataset has the columns {', '.join(names)}; expected {image!r} or 'path'; pass image= to name the "
            "column of images"
        )
    columns = _checked(metrics, batch_size=batch_size, device=device, **options).columns
    for added in ("width", "height", *columns, "error"):
        if added in names:
            raise SettingsError(f"the dataset already has a column {added!r}; rename it before scoring")
    return _scored(dataset, metrics, image, actors, batch_size=batch_size, device=device, **options)


class RayScorer:
    """Scores paths and URLs on a Ray cluster, for `qualiclip score --engine ray`.

    Args:
        metrics, options: as for `Scorer`.
    """

    def __init__(self, metrics: Metrics, **options: Any) -> None:
        _ray()
        self._metrics, self._options = metrics, options
        scorer = _checked(metrics, **options)
        #: Names of the scores.
        self.columns = scorer.columns
        #: Column -> whether a lower score means a better image.
        self.lower_better = scorer.lower_better
        #: Column -> what an image with a higher score is, and one with a lower score.
        self.comparatives = scorer.comparatives
        device = "cuda" if _gpus(options.get("device")) else "cpu"
        self._description = {**scorer.describe(), "device": device}

    def describe(self) -> dict[str, Any]:
        """Return everything that affects the scores, as `Scorer.describe`."""
        return self._description

    def score(self, paths: Iterable[str]) -> Iterator[Record]:
        """Yield one record per path, in input order."""
        import pyarrow

        ray = _ray()
        names = list(paths)
        blocks = [
            pyarrow.table(
                {
                    "number": list(range(start, min(start + BLOCK, len(names)))),
                    "path": pyarrow.array(map(os.fsencode, names[start : start + BLOCK]), pyarrow.binary()),
                }
            )
            for start in range(0, len(names), BLOCK)
        ]
        scored = _scored(ray.data.from_arrow(blocks), self._metrics, "bytes", None, **self._options)
        scored.context.execution_options.preserve_order = True
        for row in scored.iter_rows():
            scores = {column: row[column] for column in self.columns if row[column] is not None}
            yield Record(names[row["number"]], row["width"], row["height"], scores, row["error"])


class ScoreStage:
    """A worker: takes an Arrow table, and returns its rows with scores."""

    def __init__(self, metrics: Metrics, image: str, threads: int, workers: int | None = None, **options: Any) -> None:
        import torch

        from .scorer import Scorer

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.image = image
        self.scorer = Scorer(metrics, workers=1 if workers is None else workers, **options)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        if self.image in table.column_names:
            images = map(_image, table.column(self.image).to_pylist())
            table = table.drop_columns([self.image])
        else:
            images = map(_fetch, table.column("path").to_pylist())
        records = list(self.scorer.score(images))
        added = {
            "width": pyarrow.array([record.width for record in records], pyarrow.int32()),
            "height": pyarrow.array([record.height for record in records], pyarrow.int32()),
            **{
                column: pyarrow.array([record.scores.get(column) for record in records], pyarrow.float64())
                for column in self.scorer.columns
            },
            "error": pyarrow.array([record.error for record in records], pyarrow.string()),
        }
        for name, values in added.items():
            table = table.append_column(name, values)
        return table


def expand_urls(arguments: Iterable[str]) -> Iterator[str]:
    """Replace URLs of folders in an object store by the URLs of the images below them; keep all other arguments.

    As on a disk, hidden entries and files without an image's suffix are skipped.
    """
    fs = require("pyarrow.fs", "ray", "a URL")

    from ..images.formats import has_image_suffix
    from ..images.paths import is_hidden

    for argument in arguments:
        if "://" not in argument:
            yield argument
            continue
        try:
            system, path = fs.FileSystem.from_uri(argument)
            folder = system.get_file_info(path).type == fs.FileType.Directory
            below = system.get_file_info(fs.FileSelector(path, recursive=True)) if folder else []
            names = sorted(each.path.removeprefix(path).lstrip("/") for each in below if each.is_file)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{argument} cannot be listed ({one_line(error)})") from error
        if not folder:
            yield argument
            continue
        root, mark, query = argument.partition("?")
        for name in names:
            if has_image_suffix(name) and not any(map(is_hidden, name.split("/"))):
                # Unlike a URL, a path may contain spaces, # and %.
                yield f"{root.rstrip('/')}/{quote(name)}{mark}{query}"


def _checked(metrics: Metrics, **options: Any) -> Scorer:
    """Build a scorer in this process, to find wrong settings and missing weights before workers start."""
    from .building import blind_only
    from .scorer import Scorer

    return Scorer(blind_only(metrics, "with Ray"), **{**options, "device": "cpu", "compile": False})


def _scored(
    dataset: Dataset, metrics: Metrics, image: str, actors: int | None, device: str | None, **options: Any
) -> Dataset:
    ray = _ray()
    gpus = _gpus(device)
    cores = [int(node.get("CPU", 0)) for node in _nodes()]
    most = gpus or max(1, 2 * sum(cores) - 1)
    if actors is None:
        actors = gpus or max(1, sum(cores) // CORES)
    elif not 1 <= actors <= most:  # Ray would wait forever
        raise SettingsError(f"actors is {actors}; expected 1..{most}, {'one per GPU' if gpus else 'two per CPU core'}")
    threads = max(1, min(max(cores), sum(cores) // actors))
    resources: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": _share(cores, actors)}
    return dataset.map_batches(
        ScoreStage,
        fn_constructor_kwargs={"metrics": metrics, "image": image, "threads": threads, "device": device, **options},
        batch_format="pyarrow",
        batch_size=BLOCK,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    )


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each live node of the cluster."""
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


def _gpus(device: str | None) -> int:
    """Return the number of GPUs that workers may use."""
    return 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in _nodes())


def _share(nodes: Sequence[int], actors: int) -> float:
    """Return the CPU cores per worker: each worker must fit on a node, and one core is left for reading the data."""
    total = sum(nodes)
    fitting = (k for k in range(max(nodes), 0, -1) if k * actors < total and sum(n // k for n in nodes) >= actors)
    return next(fitting, 0.5)


def _image(cell: object) -> str | bytes | np.ndarray | ImageError:
    """Convert a cell of the column of images to a source for `Scorer.score`, or to the error of its row."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str):
        return _fetch(cell)
    if isinstance(cell, bytes | np.ndarray):
        return cell
    found = "null" if cell is None else f"{type(cell).__name__} value"
    return ImageError(f"{found} instead of an image; expected bytes, a path, a URL, {{bytes, path}} or an array")


def _fetch(path: str | bytes | None) -> str | bytes | ImageError:
    """Return a local path, the bytes behind a URL, or the error of its row."""
    if path is None:
        return ImageError("null instead of a path; expected a path or URL")
    path = os.fsdecode(path)
    if "://" not in path:
        return path
    from pyarrow import fs

    try:
        system, name = fs.FileSystem.from_uri(path)
        with system.open_input_file(name) as file:
            return file.read()
    except (OSError, ValueError) as error:
        return ImageError(f"{path} cannot be read ({one_line(error)}); expected an image file")


def _ray() -> Any:
    ray = require("ray", "ray", "scoring with Ray")
    require("ray.data", "ray", "scoring with Ray")
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
