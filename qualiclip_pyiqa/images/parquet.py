"""Encoded images inside Parquet files, as Hugging Face's `datasets` and Ray Data store them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from ..errors import ImageError, SettingsError
from ..optional import require

_BATCH = 16  # images held at a time
_NAMES = ("image", "bytes")  # the column that is meant where several would do


class ParquetImages:
    """The images of one Parquet file: a column of `{bytes, path}`, or of bytes and called `image` or `bytes`.

    Args:
        path: the file.

    Attributes:
        names: one per row, `FILE#ROW` with rows counted from 0.

    Raises:
        SettingsError: not a Parquet file, or no such column, or several that are not called `image`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._parquet: ModuleType = require("pyarrow.parquet", "parquet", "a Parquet file of images")
        pyarrow = require("pyarrow", "parquet", "a Parquet file of images")
        self._errors = (pyarrow.ArrowException, OSError)
        try:
            with self._parquet.ParquetFile(path) as file:
                schema, self._groups = file.schema_arrow, self._row_groups(file)
        except self._errors as error:
            raise SettingsError(f"{path} cannot be read ({_line(error)}); expected a Parquet file of images") from error
        found = [field.name for field in schema if _holds_images(pyarrow, field)]
        column = next((name for name in _NAMES if name in found), None)
        if column is None and len(found) != 1:
            raise SettingsError(
                f"{path} has {'several columns' if found else 'no column'} of images among "
                f"{', '.join(schema.names)}; expected one of {{bytes, path}}, or of bytes and called 'image'"
            )
        self._column: str = column or found[0]
        self.names = [f"{path}#{row}" for row in range(sum(self._groups))]

    def read(self, rows: Iterable[int]) -> Iterator[bytes | str | ImageError]:
        """Yield the encoded images of these rows, in the file's order; a path where the row has no more than that.

        Row groups without any of them are not read. Where the file cannot be read on, the rest are errors.
        """
        wanted = sorted(set(rows))
        done = 0
        try:
            with self._parquet.ParquetFile(self.path) as file:
                start = 0
                for group, count in enumerate(self._groups):
                    chosen = {row - start for row in wanted[done:] if row < start + count}
                    for row, cell in enumerate(self._cells(file, group) if chosen else ()):
                        if row in chosen:
                            yield self._source(cell)
                            done += 1
                    start += count
        except self._errors as error:
            for _ in wanted[done:]:
                yield ImageError(f"{self.path} cannot be read ({_line(error)})")

    def _row_groups(self, file) -> list[int]:  # type: ignore[no-untyped-def]  # pyarrow has no types
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

    def _cells(self, file, group: int) -> Iterator[object]:  # type: ignore[no-untyped-def]
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[self._column]):
            yield from batch.column(0).to_pylist()

    def _source(self, cell: object) -> bytes | str:
        data, path = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (cell, None)
        if isinstance(data, bytes):
            return data
        return str(Path(self.path).parent / path) if path else b""


def is_parquet(path: str) -> bool:
    return path.endswith(".parquet") and Path(path).is_file()


def _holds_images(pyarrow: ModuleType, field) -> bool:  # type: ignore[no-untyped-def]
    types, kind = pyarrow.types, field.type

    def binary(kind: object) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if types.is_struct(kind):
        inner = {each.name: each.type for each in kind}
        return {"bytes", "path"} <= inner.keys() and binary(inner["bytes"])
    return field.name in _NAMES and bool(binary(kind))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
