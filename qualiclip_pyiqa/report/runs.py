"""What a report shows: the scores of a folder or a table, as one run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import PromptError, SettingsError
from ..images.convert import ReadRules, source_name
from ..images.paths import FoundPaths, find_images
from ..metrics.prompts import resolve_prompts
from ..metrics.registry import guess_lower_better
from ..metrics.specs import PromptedMetric, column_belongs, split_spec
from ..metrics.words import BETTER, comparatives
from ..scoring.building import MetricLike, blind_only
from ..scoring.scorer import Scorer
from ..scoring.tables import Record, Table, read_table
from ..scoring.tables.meta import lower_better_of
from ..scoring.tables.read import SUFFIXES

logger = logging.getLogger(__name__)

#: Called with what is being done, how many images are done, and how many there are.
Watch: TypeAlias = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Run:
    """Scores of images, and what decided them.

    Attributes:
        name: of the folder or table, for people.
        source: the folder or table.
        columns: names of the scores.
        lower_better: whether a lower score is better, by column.
        records: one per image, in order.
        meta: description of the scores, see `read_meta`; None if the table has none.
    """

    name: str
    source: Path
    columns: tuple[str, ...]
    lower_better: Mapping[str, bool]
    records: Sequence[Record]
    meta: Mapping[str, Any] | None

    @property
    def rules(self) -> ReadRules:
        """How images were read, so that what the page shows is what was scored."""
        stored = (self.meta or {}).get("images")
        if not isinstance(stored, Mapping):
            return ReadRules()
        flags = ("ignore_orientation", "allow_truncated", "ignore_profile")
        limit = stored.get("max_pixels")
        return ReadRules(
            **{name: stored.get(name) is True for name in flags},
            max_pixels=limit if isinstance(limit, int) and limit > 0 else None,
        )

    def file_of(self, record: Record) -> str | None:
        """Return the path of a record's image file: as stored, or below the table's folder; None if neither exists."""
        if not record.path or "\0" in record.path:
            return None
        folder = self.source if self.source.is_dir() else self.source.parent
        candidates = (record.path, os.path.join(folder, record.path))  # noqa: PTH118 - names as stored
        try:
            return next((path for path in candidates if os.path.isfile(path)), None)  # noqa: PTH113
        except (OSError, ValueError):  # no file system takes such a name
            return None

    def score_range(self, column: str) -> tuple[float, float] | None:
        """Return the range that the description states for a score; None if it states none or an open one."""
        described = (self.meta or {}).get("columns", {}).get(column)
        text = described.get("score_range") if isinstance(described, Mapping) else None
        try:
            low, high = (float(part.strip("~≈ ")) for part in str(text).split(","))
        except ValueError:
            return None
        return (low, high) if -1e9 < low < high < 1e9 else None

    def metric_of(self, column: str) -> tuple[str, str | None]:
        """Return the metric of a column and its attribute, None if the metric has one score."""
        described = (self.meta or {}).get("columns", {}).get(column)
        prompts = described.get("prompts") if isinstance(described, Mapping) else None
        if isinstance(prompts, Mapping) and len(prompts) > 1:
            for attribute in prompts:
                if column.endswith(f".{attribute}"):
                    return column.removesuffix(f".{attribute}"), str(attribute)
        return column, None

    def comparative(self, column: str) -> str:
        """Return what an image with a better score is: "better", "brighter" and so on."""
        described = (self.meta or {}).get("columns", {}).get(column)
        prompts = described.get("prompts") if isinstance(described, Mapping) else None
        if not isinstance(prompts, Mapping):
            return BETTER[0]
        _, attribute = self.metric_of(column)
        found = prompts.get(attribute) if attribute is not None else next(iter(prompts.values()), None)
        try:
            return comparatives(resolve_prompts(found).pairs)[0] if isinstance(found, list) else BETTER[0]
        except PromptError:  # a damaged description
            return BETTER[0]

    def metric_like(self, column: str) -> MetricLike:
        """Return the metric of a column, with the prompts that the description keeps."""
        metric, _ = self.metric_of(column)
        name, written = split_spec(metric)
        described = (self.meta or {}).get("columns", {}).get(column)
        prompts = described.get("prompts") if isinstance(described, Mapping) else None
        if written is None or not isinstance(prompts, Mapping):
            return metric
        return PromptedMetric(metric, name, resolve_prompts(prompts))


@dataclass(frozen=True)
class PlannedRun:
    """A run whose images are known, and scored on demand.

    Attributes:
        run: the run; that of a folder has its images without scores.
        scorer: scores a folder; None for a table.
        paths: the images of a folder that are to be scored, the last of its records.
    """

    run: Run
    scorer: Scorer | None = None
    paths: Sequence[str] = ()

    def scored(self, watch: Watch = lambda what, done, total: None) -> Run:
        """Score the images of a folder; `watch` is called after each."""
        if self.scorer is None:
            return self.run
        records = list(self.run.records[: len(self.run.records) - len(self.paths)])
        for done, record in enumerate(self.scorer.score(self.paths), start=1):
            records.append(record)
            watch("scoring", done, len(self.paths))
        return replace(self.run, records=records)


def plan_runs(
    sources: Sequence[str | Path],
    metrics: Sequence[str] | Mapping[str, MetricLike] = (),
    options: Mapping[str, Any] | None = None,
) -> list[PlannedRun]:
    """Read tables of scores, and list the images of folders.

    Args:
        sources: folders of images, and tables that `qualiclip score` wrote.
        metrics: for a folder the metrics to score by, by name if it is a mapping; for a table the names of the metrics
            or columns to show, all if empty.
        options: further arguments of `Scorer`, for folders, which share one.

    Raises:
        SettingsError: neither a folder with images nor a table of scores; no such score in a table; options without a
            folder.
    """
    paths = [Path(source) for source in sources]
    for path in paths:
        if not os.path.lexists(path) and path.suffix not in SUFFIXES:  # `read_table` explains a missing table
            raise SettingsError(f"{path} does not exist; expected a folder of images, or a table of scores")
    found = {path: _images(path, metrics) for path in paths if path.is_dir()}
    if options and not found:
        raise SettingsError(f"{next(iter(options))} has no effect on the table {paths[0]}; leave it out")
    tables = {path: _read(path, metrics) for path in paths if path not in found}
    if not found:
        return [PlannedRun(tables[path]) for path in paths]
    scorer = Scorer(blind_only(metrics, "for a folder; make the report of a table"), **(options or {}))
    described = scorer.describe()
    return [
        _planned(path, found[path], scorer, described) if path in found else PlannedRun(tables[path]) for path in paths
    ]


def _images(folder: Path, metrics: Sequence[str] | Mapping[str, MetricLike]) -> FoundPaths:
    if not metrics:
        raise SettingsError(f"no metric was given for the folder {folder}; expected names such as 'qualiclip-mini+'")
    found = find_images([str(folder)])
    if not found.paths and not found.unreadable:
        raise SettingsError(f"no images in {folder}; expected a folder of images, or a table of scores")
    return found


def _planned(folder: Path, found: FoundPaths, scorer: Scorer, described: Mapping[str, Any]) -> PlannedRun:
    records = [
        Record(path, error=f"{source_name(path)} cannot be listed ({why}); expected a folder that can be read")
        for path, why in found.unreadable.items()
    ]
    records += [Record(path) for path in found.paths]
    name = folder.name or folder.resolve().name or str(folder)
    run = Run(name, folder, scorer.columns, scorer.lower_better, records, described)
    return PlannedRun(run, scorer, found.paths)


def _read(path: Path, metrics: Iterable[str]) -> Run:
    table = read_table(path)
    columns = _chosen(table, metrics)
    if not columns:
        raise SettingsError(f"{path} has no column of scores; expected a table that `qualiclip score` wrote")
    directions = {}
    guessed = []
    for column in columns:
        known = lower_better_of(table.meta, column)
        if known is None:
            known = guess_lower_better(column)
            guessed.append(f"{column} ({'lower' if known else 'higher'} is better)")
        directions[column] = known
    if guessed:
        logger.warning("%s does not state the direction of %s: guessed by name", path, ", ".join(guessed))
    return Run(path.stem, path, columns, directions, list(table), table.meta)


def _chosen(table: Table, metrics: Iterable[str]) -> tuple[str, ...]:
    wanted = list(metrics)
    for metric in wanted:
        if not any(column_belongs(column, metric) for column in table.columns):
            raise SettingsError(
                f"{table.path} has no score {metric!r}; expected one of {', '.join(table.columns) or '(none)'}"
            )
    return tuple(
        column for column in table.columns if not wanted or any(column_belongs(column, metric) for metric in wanted)
    )
