"""Opinion scores of images, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import SettingsError, did_you_mean
from ..images.convert import source_name
from ..images.identity import image_key
from .names import FileNames

# Names that these columns have in published data sets, in lower case; the first that is there is taken.
IMAGE_COLUMNS = ("image", "image_name", "img_name", "img_path", "img", "filename", "file_name", "file", "name", "path")
OPINION_COLUMNS = ("mos", "dmos", "mos_zscore", "mean_opinion_score", "opinion", "rating", "score")
LOWER_BETTER = ("dmos",)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass
class Ratings:
    """Opinion scores, one per row of a table. An image that several rows rate is there several times.

    Attributes:
        paths, opinions: file and opinion score of each row.
        lower_better: whether a lower opinion score is better, as with DMOS.
        groups: group of each row; empty where none was asked for.
        columns: which columns, or which data set and split, were read; for people.
        because: how the direction is known; for people.
    """

    paths: list[Path]
    opinions: list[float]
    lower_better: bool
    groups: list[str] = field(default_factory=list)
    columns: str = ""
    because: str = ""

    @cached_property
    def images(self) -> list[Path]:
        """Image of each row: files that are the same have the path of the first row, however the rows spell it."""
        first: dict[str, Path] = {}
        return [first.setdefault(image_key(str(path)), path) for path in self.paths]

    def mean_opinions(self, group: str | None = None) -> dict[Path, float]:
        """Average the opinion scores of each image.

        Args:
            group: rows of this group only.

        Returns:
            Mean opinion score by image, in the order of the rows.
        """
        rows: dict[Path, list[float]] = {}
        for number, (image, opinion) in enumerate(zip(self.images, self.opinions, strict=True)):
            if group is None or self.groups[number] == group:
                rows.setdefault(image, []).append(opinion)
        return {
            image: opinions[0] if len(opinions) == 1 else math.fsum(opinions) / len(opinions)
            for image, opinions in rows.items()
        }

    def __str__(self) -> str:
        direction = "lower" if self.lower_better else "higher"
        images = len(set(self.images))
        count = (
            f"{images} images"
            if images == len(self.paths)
            else (f"{len(self.paths)} rows of {images} images, whose opinion scores are averaged")
        )
        return f"{count} ({self.columns}; {direction} opinion scores are better, {self.because})"


def read_ratings(
    table: Path,
    folder: Path | None,
    image_column: str | None = None,
    opinion_column: str | None = None,
    group_column: str | None = None,
    lower_better: bool | None = None,
    among: Sequence[str] | None = None,
) -> Ratings:
    """Read ratings from a CSV file with a header.

    Commas, semicolons and tabs between cells are recognised, as are UTF-8 and UTF-16 with a byte order mark. Image
    names may have either separator of folders, another case than the file, or no suffix where one image has that stem.

    Args:
        table: the file.
        folder: folder of the images. None: `among` names them.
        image_column, opinion_column: names of columns, in any case. None: the usual names are looked for.
        group_column: column to divide the images by.
        lower_better: whether lower opinion scores are better. None: decided by the column's name, so true for `dmos`.
            KADID-10k's own `dmos` is higher when better.
        among: paths that the names are looked for in instead of on disk; with `folder` only those below it. Without
            `folder` a name is that of the one path that ends with it.

    Raises:
        SettingsError: no such file or column; a rating that is not a number; an image that is missing or ambiguous; a
            name without suffix in several rows, which is rarely an image's.
    """
    if among is None and folder is not None and not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; expected that of the images that {table} rates")
    names, delimiter, rows = _read(table, image_column, opinion_column)
    image = _column(table, names, delimiter, image_column, IMAGE_COLUMNS, "image names", "--image-column")
    opinion = _column(table, names, delimiter, opinion_column, OPINION_COLUMNS, "opinion scores", "--mos-column")
    group = None if group_column is None else _named(table, names, group_column)
    because = "as told"
    if lower_better is None:
        lower_better = names[opinion].strip().lower() in LOWER_BETTER
        because = f"by the column's name, {names[opinion].strip()}; otherwise pass --{'no-' * lower_better}lower-better"
    return Ratings(
        paths=_paths(table, folder, among, [(line, cells[image].strip()) for line, cells in rows]),
        opinions=[_number(table, line, names[opinion], cells[opinion]) for line, cells in rows],
        lower_better=lower_better,
        groups=[] if group is None else [cells[group] for _, cells in rows],
        columns=f"{names[image].strip()}, {names[opinion].strip()}",
        because=because,
    )


def _read(table: Path, *wanted: str | None) -> tuple[list[str], str, list[tuple[int, list[str]]]]:
    """The header, the delimiter, and the rows with the number of their last line."""
    try:
        data = table.read_bytes()
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        # File names may hold bytes that are not UTF-8.
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise _unreadable(table, error.strerror or error) from error
    except UnicodeDecodeError as error:
        raise _unreadable(table, error) from error
    try:
        names, delimiter = _header(text, wanted)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        next(reader, None)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise _unreadable(table, error) from error
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(names) :]):
            raise SettingsError(
                f"{table}, line {line} has {len(cells)} cells; expected {len(names)}, as the header has "
                "(put names that hold the separator in quotes)"
            )
        cells += [""] * (len(names) - len(cells))
    return names, delimiter, rows


def _unreadable(table: Path, reason: object) -> SettingsError:
    return SettingsError(f"{table} cannot be read ({reason}); expected a CSV file with a header")


def _header(text: str, wanted: Iterable[str | None]) -> tuple[list[str], str]:
    """Column names, split by the delimiter that gives most of the columns that are looked for, then most columns."""
    known = {*IMAGE_COLUMNS, *OPINION_COLUMNS, *(name.strip().lower() for name in wanted if name)}

    def split(delimiter: str) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])

    def fitting(delimiter: str) -> tuple[int, int]:
        names = split(delimiter)
        return len({name.strip().lower() for name in names} & known), len(names)

    best = max(DELIMITERS, key=fitting)
    return split(best), best


def _named(table: Path, names: Sequence[str], wanted: str) -> int:
    """Index of a column by its name, or by its name in another case."""
    alike = [k for k, name in enumerate(names) if name.strip().lower() == wanted.strip().lower()]
    found = [k for k in alike if names[k] == wanted] or alike
    if not found:
        raise SettingsError(
            f"{table} has no column {wanted!r}{did_you_mean(wanted, names)}; it has {', '.join(names) or 'none'}"
        )
    if len(found) > 1:
        raise SettingsError(f"{table} has {len(found)} columns {names[found[0]]!r}; expected one")
    return found[0]


def _column(
    table: Path,
    names: Sequence[str],
    delimiter: str,
    wanted: str | None,
    usual: Sequence[str],
    what: str,
    option: str,
) -> int:
    if wanted is not None:
        return _named(table, names, wanted)
    lower = [name.strip().lower() for name in names]
    found = next((name for name in usual if name in lower), None)
    if found is None:
        has = ", ".join(names) or "none"
        raise SettingsError(
            f"{table}, line 1 is no header, but looks like data ({has}); put one before it, such as image,mos"
            if any(_is_number(name) for name in names)
            else f"{table} has no column that is usual for {what}, but {has} (separated by {DELIMITERS[delimiter]}); "
            f"pass {option} NAME"
        )
    return _named(table, names, found)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(table: Path, line: int, column: str, cell: str) -> float:
    column = column.strip()
    try:
        number = float(cell)
    except ValueError:
        comma = " with a decimal point" if _is_number(cell.replace(",", ".")) else ""
        raise SettingsError(f"{table}, line {line}: {column} is {cell!r}; expected a number{comma}") from None
    if not math.isfinite(number):
        raise SettingsError(f"{table}, line {line}: {column} is {cell!r}; expected a finite number")
    return number


def _paths(
    table: Path, folder: Path | None, among: Sequence[str] | None, names: Sequence[tuple[int, str]]
) -> list[Path]:
    files = FileNames(folder, among)
    lines: dict[str, int] = {}  # line of each name that is a stem
    paths = []
    for line, name in names:
        if not name:
            raise SettingsError(f"{table}, line {line} names no image")
        path, by_stem = files.find(name, f"{table}, line {line}")
        if by_stem and lines.setdefault(name, line) != line:
            raise SettingsError(
                f"{table} has several rows of {source_name(name)} (lines {lines[name]} and {line}), all of "
                f"{source_name(path)}: is it the column of the rated images? "
                "If not, pass --image-column; if they are repeated ratings, write the names with their suffix"
            )
        paths.append(path)
    return paths
