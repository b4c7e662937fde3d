"""Tables of scores: CSV, JSON lines or Parquet with the columns `path,width,height,<score>...,error`.

record.py        one row
meta.py          `NAME.meta.json` beside a table: what scored it, and which direction is better
cells.py         what the cells of any format mean
csv_rows.py, json_rows.py, parquet_rows.py    the cells of one format, read and written
read.py          a whole table, as this package or pandas wrote it
write.py         a table that grows row by row and survives a killed process
"""

from .meta import meta_path, read_meta
from .read import Table, check_suffix, read_table
from .record import Record, utf8
from .write import CsvStream, ScoreTable, write_table, writing

__all__ = [
    "CsvStream",
    "Record",
    "ScoreTable",
    "Table",
    "check_suffix",
    "meta_path",
    "read_meta",
    "read_table",
    "utf8",
    "write_table",
    "writing",
]
