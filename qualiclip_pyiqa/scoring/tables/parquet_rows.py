"""Parquet tables. Their text must be UTF-8, so other file names are stored with backslash escapes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from ...errors import one_line
from ...optional import require
from .cells import check_names, not_scores, write_cells
from .record import Record, utf8

if TYPE_CHECKING:
    import pyarrow

_BATCH = 10_000  # rows converted at a time
_META_KEY = b"qualiclip_pyiqa"


def require_pyarrow() -> ModuleType:
    """Import pyarrow and pyarrow.parquet, or raise SettingsError."""
    require("pyarrow.parquet", "parquet", "a Parquet table")
    return require("pyarrow", "parquet", "a Parquet table")


class ParquetRows:
    """A Parquet file. Columns of nested or binary types, such as a data set's images, are not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pyarrow = require_pyarrow()
        try:
            with self._open() as file:
                schema = file.schema_arrow
        except (self._pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise not_scores(path, one_line(error)) from error
        self.names = check_names(path, schema.names)
        self.unread: Mapping[str, str] = {
            field.name: f"of type {field.type}"
            for field in schema
            if field.name != "path" and not self._is_scalar(field.type)
        }
        self.meta: bytes | None = (schema.metadata or {}).get(_META_KEY)

    def rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        number = 0
        try:
            with self._open() as file:
                for batch in file.iter_batches(_BATCH, columns=[n for n in self.names if n not in self.unread]):
                    for cells in batch.to_pylist():
                        number += 1
                        yield f"row {number}", cells
        except (self._pyarrow.ArrowException, OSError, UnicodeError) as error:
            raise not_scores(self.path, f"after row {number}: {one_line(error)}") from error

    def _open(self):  # type: ignore[no-untyped-def]  # pyarrow has no types
        return self._pyarrow.parquet.ParquetFile(self.path)

    def _is_scalar(self, kind: object) -> bool:
        types = self._pyarrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type  # type: ignore[attr-defined]
        checks = (
            types.is_integer,
            types.is_floating,
            types.is_decimal,
            types.is_null,
            types.is_string,
            types.is_large_string,
        )
        return any(check(kind) for check in checks)


def write_parquet(
    file: BinaryIO, columns: Sequence[str], records: Iterable[Record], meta: Mapping[str, object] | None
) -> None:
    """Write a whole file, with `meta` in the metadata of its schema, so that it stays with a file that is moved."""
    pyarrow = require_pyarrow()
    with pyarrow.parquet.ParquetWriter(file, _schema(columns, meta)) as writer:
        rows = iter(records)
        while batch := list(islice(rows, _BATCH)):
            writer.write_table(arrow_table(batch, columns, meta))


def arrow_table(records: Iterable[Record], columns: Sequence[str], meta: Mapping[str, object] | None) -> pyarrow.Table:
    """Return records as an Arrow table, as `write_parquet` writes it."""
    cells = [
        {utf8(name): utf8(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in (write_cells(record, columns) for record in records)
    ]
    return require_pyarrow().Table.from_pylist(cells, schema=_schema(columns, meta))


def _schema(columns: Sequence[str], meta: Mapping[str, object] | None) -> pyarrow.Schema:
    pyarrow = require_pyarrow()
    text, side, score = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    return pyarrow.schema(
        [("path", text), ("width", side), ("height", side), *((utf8(c), score) for c in columns), ("error", text)],
        metadata=None if meta is None else {_META_KEY: json.dumps(meta).encode()},
    )
