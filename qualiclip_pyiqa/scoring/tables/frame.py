"""Records as a table in memory: a pandas DataFrame or an Arrow table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ...errors import SettingsError
from .cells import write_cells
from .parquet_rows import arrow_table
from .record import Record

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow


@overload
def to_table(
    records: Iterable[Record], meta: Mapping[str, Any], kind: Literal["pandas"] = "pandas"
) -> pd.DataFrame: ...
@overload
def to_table(records: Iterable[Record], meta: Mapping[str, Any], kind: Literal["arrow"]) -> pyarrow.Table: ...
def to_table(records: Iterable[Record], meta: Mapping[str, Any], kind: str = "pandas") -> pd.DataFrame | pyarrow.Table:
    """Collect records in a table with the columns of a table file: path, width, height, scores, error.

    Args:
        records: as from `Scorer.score`.
        meta: as from `Scorer.describe`: its `columns` name the scores, and hold their direction as `lower_better`.
        kind: "pandas" (a DataFrame; `meta` is its `attrs["scores"]`) or "arrow" (the extra `parquet`; `meta` is in the
            metadata of the schema, as in a Parquet file of `qualiclip score`).

    Returns:
        One row per record. A missing score is NaN in pandas and null in Arrow; its reason is in `error`.

    Raises:
        SettingsError: another kind, or pyarrow is not installed.

    Example:
        >>> meta = {"columns": {"niqe": {"lower_better": True}}}
        >>> table = to_table([Record("a.png", 64, 48, {"niqe": 4.5}), Record("b.png", error="b.png is empty")], meta)
        >>> table["niqe"].tolist(), table.attrs["scores"]["columns"]["niqe"]["lower_better"]
        ([4.5, nan], True)
    """
    columns: Sequence[str] = list(meta["columns"])
    if kind == "arrow":
        return arrow_table(records, columns, meta)
    if kind != "pandas":
        raise SettingsError(f"kind is {kind!r}; expected 'pandas' or 'arrow'")
    import pandas as pd  # pyiqa requires it

    rows = [write_cells(record, columns) for record in records]
    cells = {name: [row[name] for row in rows] for name in ("path", "width", "height", *columns, "error")}
    kinds = {"path": object, "width": "Int64", "height": "Int64", "error": object}  # text with any bytes of a path
    frame = pd.DataFrame({name: pd.Series(values, dtype=kinds.get(name, float)) for name, values in cells.items()})
    frame.attrs["scores"] = dict(meta)
    return frame
