"""The scorer as a stage of Ray Data: folders, Parquet with image bytes and object stores, on one machine or a cluster.

    import ray
    from qualiclip_pyiqa.scoring.ray import score_dataset

    photos = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
    score_dataset(photos, ["qualiclip", "clipiqa"]).write_parquet("s3://bucket/scores")

Ray starts a stage again whose worker was killed, from the same rows: nothing is lost and nothing is there twice. Needs
the extra `ray`: pip install "qualiclip-pyiqa[ray]".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from ..errors import ImageError, SettingsError
from .allocator import keep_freed_memory
from .tables import Record

# Rows of a block: what a worker scores at a time, and what is done again if it is killed.
BLOCK = 64
# CPU cores of a worker that has no GPU: beyond four, small batches gain little from more.
CORES = 4


def score_dataset(
    dataset: Any,
    metrics: Any,
    *,
    image: str = "bytes",
    actors: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Any:
    """Score the pictures of a Ray dataset.

    Args:
        dataset: a `ray.data.Dataset` with encoded pictures in the column `image`, or with local paths or URLs in a
            column `path` (text, or bytes where names are not UTF-8); all other columns are kept.
        metrics: what `Scorer` takes.
        image: the column of encoded pictures; it is not in the result.
        actors: workers, one per GPU of the cluster at most; without GPUs as many as find CPU cores. Default: one per
            GPU; without GPUs one per four CPU cores.
        batch_size, device, options: `Scorer`'s, whose defaults are a worker's own.

    Returns:
        A dataset, computed when it is read, with the rows and columns of `dataset` and `width`, `height`, one column
        per score, and `error`.

    Raises:
        SettingsError: neither column is there, a column of the result would be there already, or more workers than
            the cluster has room for; and what `Scorer` raises.
    """
    _ray()
    names = dataset.columns() or []
    if image not in names and "path" not in names:
        raise SettingsError(f"the dataset has the columns {', '.join(names)}; expected {image!r} or 'path'")
    for added in ("width", "height", *_columns(metrics, batch_size=batch_size, **options), "error"):
        if added in names:
            raise SettingsError(f"the dataset has a column {added!r} already; rename it before scoring")
    return _scored(dataset, metrics, image, actors, batch_size=batch_size, device=device, **options)


def _columns(metrics: Any, **options: Any) -> tuple[str, ...]:
    """The names of the scores. Settings and weights are checked here, before the workers build their own."""
    from .scorer import Scorer

    return Scorer(metrics, **{**options, "device": "cpu", "compile": False}).columns


def _scored(dataset: Any, metrics: Any, image: str, actors: int | None, device: str | None, **options: Any) -> Any:
    ray = _ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in nodes)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    most = gpus or max(1, 2 * sum(cores) - 1)
    if actors is None:
        actors = gpus or max(1, sum(cores) // CORES)
    elif not 1 <= actors <= most:  # Ray would wait for ever
        raise SettingsError(f"actors is {actors}; expected 1..{most}, {'one per GPU' if gpus else 'two per CPU core'}")
    threads = max(1, min(max(cores), sum(cores) // actors))
    resources: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": _share(cores, actors)}
    return dataset.map_batches(
        ScoreStage,
        fn_constructor_kwargs={
            "metrics": metrics,
            "image": image,
            "threads": threads,
            "device": device,
            **options,
        },
        batch_format="pyarrow",
        batch_size=BLOCK,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    )


def _share(nodes: Sequence[int], actors: int) -> float:
    """CPU cores of a worker, so that each finds a node, and that one is left for whatever feeds them."""
    total = sum(nodes)
    fitting = (k for k in range(max(nodes), 0, -1) if k * actors < total and sum(n // k for n in nodes) >= actors)
    return next(fitting, 0.5)


class ScoreStage:
    """What `score_dataset` runs in each worker: an Arrow table in, the same rows with scores out."""

    def __init__(self, metrics: Any, image: str, threads: int, workers: int | None = None, **options: Any) -> None:
        import torch

        from .scorer import Scorer

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.image = image
        self.scorer = Scorer(metrics, workers=1 if workers is None else workers, **options)

    def __call__(self, table: Any) -> Any:
        import pyarrow

        paths = table.column("path").to_pylist() if "path" in table.column_names else [None] * len(table)
        paths = [os.fsdecode(path) if isinstance(path, bytes) else path for path in paths]
        if self.image in table.column_names:
            images: Iterable[Any] = [b"" if data is None else data for data in table.column(self.image).to_pylist()]
            table = table.drop_columns([self.image])
        else:
            images = map(_source, paths)
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


def score_paths(
    metrics: list[str], **options: Any
) -> tuple[tuple[str, ...], Callable[[Iterable[str]], Iterator[Record]]]:
    """The engine of `qualiclip score --engine ray`: the names of the scores, and paths to records, in input order."""
    _ray()
    columns = _columns(metrics, **options)

    def score(paths: Iterable[str]) -> Iterator[Record]:
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
        scored = _scored(ray.data.from_arrow(blocks), metrics, "bytes", None, **options)
        scored.context.execution_options.preserve_order = True
        for row in scored.iter_rows():
            scores = {column: row[column] for column in columns if row[column] is not None}
            yield Record(names[row["number"]], row["width"], row["height"], scores, row["error"])

    return columns, score


def expand_urls(arguments: Iterable[str]) -> Iterator[str]:
    """Folders of an object store, given as URLs, become the pictures below them; everything else stays."""
    from pyarrow import fs

    from ..images.paths import is_picture

    for argument in arguments:
        if "://" not in argument:
            yield argument
            continue
        try:
            system, path = fs.FileSystem.from_uri(argument)
            folder = system.get_file_info(path).type == fs.FileType.Directory
            below = system.get_file_info(fs.FileSelector(path, recursive=True)) if folder else []
            pictures = sorted(each.path for each in below if each.is_file and is_picture(each.path))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{argument} cannot be listed ({' '.join(str(error).split())})") from error
        if not folder:
            yield argument
            continue
        root, mark, query = argument.partition("?")
        for picture in pictures:
            name = quote(picture.removeprefix(path).lstrip("/"))  # a path is no URL: it may have spaces, # and %
            yield f"{root.rstrip('/')}/{name}{mark}{query}"


def _source(path: str | None) -> Any:
    """A local path as it is, the bytes behind a URL, or what is wrong with it."""
    if path is None or "://" not in path:
        return b"" if path is None else path
    from pyarrow import fs

    try:
        system, name = fs.FileSystem.from_uri(path)
        with system.open_input_file(name) as file:
            return file.read()
    except (OSError, ValueError) as error:
        return ImageError(f"{path} cannot be read ({' '.join(str(error).split())}); expected a picture file")


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise SettingsError('Ray is not installed: pip install "qualiclip-pyiqa[ray]"') from None
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
