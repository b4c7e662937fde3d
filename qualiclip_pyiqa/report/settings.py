"""What a page says about how its scores were made: the description of a table, once for each metric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

from .runs import Run


def shown_settings(run: Run) -> Mapping[str, Any] | None:
    """Return the description of a run for people: one block for each metric, and no place on anybody's disk.

    The columns of a metric's attributes have one description, which is shown once, under the name of the metric. A file
    is shown by its name and sha256, and a pair of prompts in one line.

    Returns:
        The description, in which `metrics` replaces `columns`; None if the run has none.
    """
    if run.meta is None:
        return None
    columns = run.meta.get("columns")
    if not isinstance(columns, Mapping):
        return run.meta
    blocks: dict[str, Any] = {}
    for column, described in columns.items():
        metric, _ = run.metric_of(column)
        name = metric if blocks.get(metric, described) == described else column
        blocks[name] = described
    shown = {name: _without_folders(_with_short_prompts(described)) for name, described in blocks.items()}
    rest = _without_folders({key: value for key, value in run.meta.items() if key != "columns"})
    return {"metrics": shown, **rest}


def _with_short_prompts(described: Any) -> Any:
    """Write each attribute's pairs of prompts as "Good photo. / Bad photo."."""
    prompts = described.get("prompts") if isinstance(described, Mapping) else None
    if not isinstance(prompts, Mapping):
        return described
    return {**described, "prompts": {attribute: _short_pairs(pairs) for attribute, pairs in prompts.items()}}


def _short_pairs(pairs: Any) -> Any:
    whole = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and all(isinstance(text, str) for text in pair) for pair in pairs
    )
    if not whole:  # a damaged description
        return pairs
    lines = [" / ".join(pair) for pair in pairs]
    return lines[0] if len(lines) == 1 else lines


def _without_folders(value: Any) -> Any:
    """Shorten paths of files to their names, in the fields that hold them and in texts that mention them."""
    for path in sorted(_paths(value), key=len, reverse=True):
        value = _replaced(value, path, _file_name(path))
    return _without_repeated_names(value)


def _file_name(path: str) -> str:
    return (PureWindowsPath(path) if PureWindowsPath(path).drive else PurePath(path)).name or path


def _paths(value: Any) -> set[str]:
    """Return the values of all fields called `path`."""
    if isinstance(value, Mapping):
        own = {each for key, each in value.items() if key == "path" and isinstance(each, str) and each}
        return own.union(*map(_paths, value.values()))
    return set().union(*map(_paths, value)) if isinstance(value, list | tuple) else set()


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return {key: _replaced(each, old, new) for key, each in value.items()}
    return [_replaced(each, old, new) for each in value] if isinstance(value, list | tuple) else value


def _without_repeated_names(value: Any) -> Any:
    """Drop `path` where it has become what `file` says."""
    if isinstance(value, Mapping):
        repeated = "path" in value and value.get("file") == value["path"]
        return {k: _without_repeated_names(each) for k, each in value.items() if not (repeated and k == "path")}
    return [_without_repeated_names(each) for each in value] if isinstance(value, list | tuple) else value
