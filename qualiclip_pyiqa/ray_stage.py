"""The scorer as a stage of Ray Data: folders, Parquet with image bytes and object stores, on one machine or a cluster.

    import ray
    from qualiclip_pyiqa.ray_stage import score_dataset

    photos = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
    score_dataset(photos, ["qualiclip", "clipiqa"]).write_parquet("s3://bucket/scores")

Ray starts a stage again whose worker was killed, from the same rows: nothing is lost and nothing is there twice. Needs
the extra `ray`: pip install "qualiclip-pyiqa[ray]".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .errors import ImageError, SettingsError
from .memory import keep_freed_memory
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
        actors: workers. Default: one per GPU of the cluster; without GPUs one per four CPU cores.
        batch_size, device, options: `Scorer`'s, whose defaults are a worker's own.

    Returns:
        A dataset, computed when it is read, with the rows and columns of `dataset` and `width`, `height`, one column
        per score, and `error`.

    Raises:
        SettingsError: neither column is there, or a column of the result would be there already.
    """
    ray = _ray()
    names = dataset.columns() or []
    if image not in names and "path" not in names:
        raise SettingsError(f"the dataset has the columns {', '.join(names)}; expected {image!r} or 'path'")
    taken = sorted({"width", "height", "error"}.intersection(names))
    if taken:
        raise SettingsError(f"the dataset has a column {taken[0]!r} already; rename it before scoring")
    cluster = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(cluster.get("GPU", 0))
    cores = int(cluster.get("CPU", 1))
    actors = actors or gpus or max(1, cores // CORES)
    threads = max(1, cores // actors)
    # A worker on the CPU takes its cores but one for whatever feeds it; Ray waits for ever if none is left.
    resources: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": max(0.5, (cores - 1) // actors)}
    return dataset.map_batches(
        ScoreStage,
        fn_constructor_kwargs={
            "metrics": metrics,
            "image": image,
            "threads": threads,
            "batch_size": batch_size,
            "device": device,
            **options,
        },
        batch_format="pyarrow",
        batch_size=BLOCK,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    )


class ScoreStage:
    """What `score_dataset` runs in each worker: an Arrow table in, the same rows with scores out."""

    def __init__(self, metrics: Any, image: str, threads: int, workers: int | None = None, **options: Any) -> None:
        import torch

        from .scoring import Scorer

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
    from .scoring import Scorer

    # Settings and weights are checked here, before a cluster is asked; the workers build their own.
    columns = Scorer(metrics, **{**options, "device": "cpu", "compile": False}).columns

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
        scored = score_dataset(ray.data.from_arrow(blocks), metrics, **options)
        scored.context.execution_options.preserve_order = True
        for row in scored.iter_rows():
            scores = {column: row[column] for column in columns if row[column] is not None}
            yield Record(names[row["number"]], row["width"], row["height"], scores, row["error"])

    return columns, score


def expand_urls(arguments: Iterable[str]) -> Iterator[str]:
    """Folders of an object store, given as URLs, become the pictures below them; everything else stays."""
    from pyarrow import fs

    from .discover import is_picture

    for argument in arguments:
        if "://" not in argument:
            yield argument
            continue
        try:
            system, path = fs.FileSystem.from_uri(argument)
            folder = system.get_file_info(path).type == fs.FileType.Directory
            below = system.get_file_info(fs.FileSelector(path, recursive=True)) if folder else []
        except (OSError, ValueError) as error:
            raise SettingsError(f"{argument} cannot be listed ({error})") from error
        if folder:
            root = argument.rstrip("/").removesuffix(path.rstrip("/"))
            yield from sorted(root + each.path for each in below if each.is_file and is_picture(each.path))
        else:
            yield argument


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
