"""The description of a table, in `NAME.meta.json` beside it: how it was scored, and the direction of each score.

It is what `Scorer.describe` returns, with two additions: `continued` lists the descriptions of later runs that added
rows under permitted differences, and `rows_of_unknown_settings` counts the rows that had no description when the table
was resumed. A Parquet table has a copy in the metadata of its schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import SettingsError
from ...files import replacing
from .cells import shown

_CONTINUED = "continued"
UNKNOWN = "rows_of_unknown_settings"
# Fields of a model's description that do not affect its scores.
_IGNORED = frozenset(
    (
        "check",
        "check_detail",
        "citation",
        "commercial_use",
        "direction",
        "file",
        "licence",
        "licence_url",
        "paper",
        "path",
        "record",
        "source",
        "summary",
    )
)
# Fields that may differ with a warning: they affect only which images get a score, or rarely the scores.
_PERMITTED = frozenset(("allow_truncated", "decode_timeout", "max_pixels", "torch", "version"))


def meta_path(table: str | Path) -> Path:
    """Return the path of a table's description.

    Example:
        >>> meta_path("scores.csv").name
        'scores.csv.meta.json'
    """
    table = Path(table)
    return table.with_name(f"{table.name.removesuffix('.part')}.meta.json")


def read_meta(table: str | Path) -> dict[str, Any] | None:
    """Read the description of a table.

    Args:
        table: the path of the table, not of the description.

    Returns:
        The description, or None if there is none. Its `columns` maps every score to its metric's description, which
        contains `lower_better`.

    Raises:
        SettingsError: the description cannot be read.
    """
    table = Path(table)
    path: Path = meta_path(table)
    try:
        text: bytes | None = path.read_bytes()
    except FileNotFoundError:
        path, text = table, _inside(table)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error})") from error
    if text is None:
        return None
    try:
        meta = json.loads(text)
        if isinstance(meta, dict) and isinstance(meta["columns"], dict):
            return meta
    except (ValueError, KeyError, RecursionError):
        pass
    raise SettingsError(
        f"{path} is not the description of a table of scores; restore it from `qualiclip score`, or remove it"
    )


def write_meta(table: Path, meta: Mapping[str, object] | None) -> None:
    """Write a table's description, whole or not at all; with None, remove that of an earlier table."""
    path = meta_path(table)
    if meta is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as part:
        part.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def lower_better_of(meta: Mapping[str, object] | None, column: str) -> bool | None:
    """Return the direction of a score according to its table's description; None if that does not state it."""
    columns = (meta or {}).get("columns")
    described = columns.get(column) if isinstance(columns, dict) else None
    direction = described.get("lower_better") if isinstance(described, dict) else None
    return direction if isinstance(direction, bool) else None


def continue_meta(
    table: Path, before: Mapping[str, object], now: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Compare the settings of the rows in a table with those of a run that resumes it.

    A difference that can change a score is refused: another model, precision, device type or reading rule, or another
    version of pyiqa for its metrics. Other differences are permitted and added to the description.

    Returns:
        The new description, and the permitted differences as text.

    Raises:
        SettingsError: a refused difference; the message lists the first four.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for keys, old, new in _differences(before, json.loads(json.dumps(now)), ()):
        names = _fields(keys)
        if keys[0] not in (_CONTINUED, UNKNOWN) and not _IGNORED & set(names):
            foreign = "pyiqa_version" in names
            (allowed if names[-1:] and names[-1] in _PERMITTED and not foreign else refused).append(
                f"{_spoken(keys)} was {_value(old)}, is now {_value(new)}"
            )
    if refused:
        raise SettingsError(
            f"{table} was started with other settings: {'; '.join(refused[:4])}"
            + (f"; and {len(refused) - 4} more" if len(refused) > 4 else "")
            + "; resume with the same settings, or choose another name"
        )
    meta = dict(before)
    if allowed:
        runs = meta.get(_CONTINUED)
        runs = list(runs) if isinstance(runs, list) else []
        if not any(run == now for run in runs):
            runs.append(dict(now))
        meta[_CONTINUED] = runs
    return meta, allowed


def _differences(old: object, new: object, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), (*keys, str(key)))
    elif old != new:
        yield keys, old, new


def _fields(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of fields among keys, without names that the user chose: of columns and prompted attributes.

    Unlike the path of a weight file, that of the references decides scores, so it is not named as a field.
    """
    if keys[0] == "references":
        return keys[:1]
    if keys[0] == "columns":
        keys = keys[2:]
    return keys[:1] if keys[:1] == ("prompts",) else keys


def _spoken(keys: tuple[str, ...]) -> str:
    """Format `columns, qualiclip, weights, sha256` as "weights sha256 of qualiclip"."""
    if keys[0] == "columns" and len(keys) > 2:
        return f"{' '.join(keys[2:])} of {keys[1]}"
    return " ".join(keys).replace("_", " ")


def _value(value: object) -> str:
    return "absent" if value is None else shown(str(value), 40)


def _inside(table: Path) -> bytes | None:
    """Return the description in a Parquet file's own metadata."""
    if table.suffix != ".parquet" or not table.is_file():
        return None
    from .parquet_rows import ParquetRows

    return ParquetRows(table).meta
