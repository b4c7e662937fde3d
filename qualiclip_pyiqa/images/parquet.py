"""Read encoded images from Parquet files, as Hugging Face's `datasets` and Ray Data store them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from ..errors import ImageError, SettingsError, one_line
from ..optional import require

_BATCH = 16  # images in memory at a time
_NAMES = ("image", "bytes")  # preferred columns if several hold images


class ParquetImages:
    """The images of one Parquet file: a column of `{bytes, path}`, or a column of bytes named `image` or `bytes`.

    Args:
        path: the file.

    Attributes:
        names: one per row, `FILE#ROW`, counted from 0.

    Raises:
        SettingsError: not a Parquet file, no column of images, or several of which none is named `image` or `bytes`.
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
            raise SettingsError(
                f"{path} cannot be read ({one_line(error)}); expected a Parquet file of images"
            ) from error
        found = [field.name for field in schema if _holds_images(pyarrow, field)]
        column = next((name for name in _NAMES if name in found), None)
        if column is None and len(found) != 1:
            raise SettingsError(
                f"{path} has {'several columns' if found else 'no column'} of images among "
                f"{', '.join(schema.names)}; expected one of {{bytes, path}}, or one of bytes named 'image'"
            )
        self._column: str = column or found[0]
        self.names = [f"{path}#{row}" for row in range(sum(self._groups))]

    def read(self, rows: Iterable[int]) -> Iterator[bytes | str | ImageError]:
        """Yield the encoded image of each row, in file order, or its path if the row has no bytes.

        Only the row groups that are needed are read. If the file becomes unreadable, the remaining rows are errors.
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
                yield ImageError(f"{self.path} cannot be read ({one_line(error)})")

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
    """Return whether a path is an existing Parquet file, judging by its suffix."""
    return path.endswith(".parquet") and Path(path).is_file()


def _holds_images(pyarrow: ModuleType, field) -> bool:  # type: ignore[no-untyped-def]
    types, kind = pyarrow.types, field.type

    def binary(kind: object) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if types.is_struct(kind):
        inner = {each.name: each.type for each in kind}
        return {"bytes", "path"} <= inner.keys() and binary(inner["bytes"])
    return field.name in _NAMES and bool(binary(kind))
