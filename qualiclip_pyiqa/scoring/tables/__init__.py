"""Tables of scores: CSV, JSON lines or Parquet with the columns `path,width,height,<score>...,error`.

record.py        one row
meta.py          `NAME.meta.json` beside a table: how it was scored, and the direction of each score
cells.py         what cells mean in any format
csv_rows.py, json_rows.py, parquet_rows.py    read and write the cells of one format
read.py          read a table written by this package, pandas or a spreadsheet
frame.py         records as a pandas DataFrame or an Arrow table
write.py         write a table row by row, so that it survives a killed process
"""

from .frame import to_table
from .meta import meta_path, read_meta
from .read import Table, check_suffix, read_table
from .record import Record, utf8
from .write import CsvStream, ScoreTable, write_table

__all__ = [
    "CsvStream",
    "Record",
    "ScoreTable",
    "Table",
    "check_suffix",
    "meta_path",
    "read_meta",
    "read_table",
    "to_table",
    "utf8",
    "write_table",
]
