"""Opinion scores of images, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..errors import SettingsError, counted, did_you_mean
from ..files import DELIMITERS, best_delimiter, encoding_hint, text_codec
from ..images.convert import source_name
from ..images.identity import image_key
from .agreement import LARGEST
from .names import FileNames

# Column names in published data sets, in lower case; the first one found is used.
IMAGE_COLUMNS = ("image", "image_name", "img_name", "img_path", "img", "filename", "file_name", "file", "name", "path")
OPINION_COLUMNS = ("mos", "dmos", "mos_zscore", "mean_opinion_score", "opinion", "rating", "score")
LOWER_BETTER = ("dmos",)


@dataclass
class Ratings:
    """Opinion scores, one per row of a table; an image that several rows rate appears several times.

    Attributes:
        paths, opinions: file and opinion score of each row.
        lower_better: whether a lower opinion score is better, as with DMOS.
        groups: group of each row; empty if no group column was chosen.
        columns: the columns, or the data set and split, that were read; for display.
        because: the source of the direction; for display.
    """

    paths: list[Path]
    opinions: list[float]
    lower_better: bool
    groups: list[str] = field(default_factory=list)
    columns: str = ""
    because: str = ""

    @cached_property
    def images(self) -> list[Path]:
        """The image of each row; different spellings of one path become that of the first row."""
        first: dict[str, Path] = {}
        return [first.setdefault(image_key(str(path)), path) for path in self.paths]

    def mean_opinions(self, group: str | None = None) -> dict[Path, float]:
        """Average the opinion scores of each image.

        Args:
            group: use only the rows of this group.

        Returns:
            Mean opinion score by image, in row order.
        """
        rows: dict[Path, list[float]] = {}
        for number, (image, opinion) in enumerate(zip(self.images, self.opinions, strict=True)):
            if group is None or self.groups[number] == group:
                rows.setdefault(image, []).append(opinion)
        return {
            image: opinions[0] if len(opinions) == 1 else math.fsum(opinions) / len(opinions)
            for image, opinions in rows.items()
        }

    def averaged(self) -> Ratings:
        """Return one row per image with its mean opinion score, in the order of the rows and without groups."""
        means = self.mean_opinions()
        return replace(self, paths=list(means), opinions=list(means.values()), groups=[])

    def __str__(self) -> str:
        direction = "lower" if self.lower_better else "higher"
        images = len(set(self.images))
        count = (
            counted(images, "image")
            if images == len(self.paths)
            else f"{len(self.paths)} rows of {counted(images, 'image')}, whose opinion scores are averaged"
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

    The delimiter (comma, semicolon or tab) and the encoding (UTF-8, or UTF-16 with a byte order mark) are detected.
    Image names may use / or \\, differ from the file in case, or lack the suffix if only one image has that stem.

    Args:
        table: the file.
        folder: folder of the images. None: search `among` only.
        image_column, opinion_column: names of columns, in any case. None: one of the usual names.
        group_column: column to divide the images by.
        lower_better: whether lower opinion scores are better. None: true for a column called `dmos`, else false. In
            KADID-10k, higher `dmos` is better.
        among: paths to search instead of the disk; with `folder`, only those below it. Without `folder`, a name matches
            the one path that ends with it.

    Raises:
        SettingsError: no such file or column; a rating that is not a number; an image that is missing or ambiguous;
            several rows with the same name without suffix, which is rarely the rated image.
    """
    if among is None and folder is not None and not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; expected the folder of the images rated in {table}")
    names, delimiter, rows = _read(table, image_column, opinion_column)
    image = _column(table, names, delimiter, image_column, IMAGE_COLUMNS, "image names", "--image-column")
    opinion = _column(table, names, delimiter, opinion_column, OPINION_COLUMNS, "opinion scores", "--mos-column")
    group = None if group_column is None else _named(table, names, group_column)
    because = "as passed"
    if lower_better is None:
        lower_better = names[opinion].strip().lower() in LOWER_BETTER
        because = f"judging by the column name {names[opinion].strip()}; else pass --{'no-' * lower_better}lower-better"
    return Ratings(
        paths=_paths(table, folder, among, [(line, cells[image].strip()) for line, cells in rows]),
        opinions=[_number(table, line, names[opinion], cells[opinion]) for line, cells in rows],
        lower_better=lower_better,
        groups=[] if group is None else [cells[group] for _, cells in rows],
        columns=f"{names[image].strip()}, {names[opinion].strip()}",
        because=because,
    )


def _read(table: Path, *wanted: str | None) -> tuple[list[str], str, list[tuple[int, list[str]]]]:
    """Return the header, the delimiter, and the rows with the numbers of their last lines."""
    try:
        data = table.read_bytes()
        text = data.decode(*text_codec(data))
    except OSError as error:
        raise _unreadable(table, error.strerror or error) from error
    except UnicodeDecodeError as error:
        raise _unreadable(table, error) from error
    if not text.strip():
        raise SettingsError(f"{table} is empty; expected a CSV file with a header, such as image,mos")
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
                f"{table}, line {line} has {counted(len(cells), 'cell')}; expected {len(names)} as in the header "
                "(quote names that contain the delimiter)"
            )
        cells += [""] * (len(names) - len(cells))
    return names, delimiter, rows


def _unreadable(table: Path, reason: object) -> SettingsError:
    return SettingsError(f"{table} cannot be read ({reason}); expected a CSV file with a header")


def _header(text: str, wanted: Iterable[str | None]) -> tuple[list[str], str]:
    """Return the column names and the delimiter."""

    def split(delimiter: str) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])

    usual = (*IMAGE_COLUMNS, *OPINION_COLUMNS, *(name.strip().lower() for name in wanted if name))
    delimiter = best_delimiter(split, usual)
    return split(delimiter), delimiter


def _named(table: Path, names: Sequence[str], wanted: str) -> int:
    """Return the index of a column by its name, else by its name in another case."""
    alike = [k for k, name in enumerate(names) if name.strip().lower() == wanted.strip().lower()]
    found = [k for k in alike if names[k] == wanted] or alike
    if not found:
        raise SettingsError(
            f"{table} has no column {wanted!r}{did_you_mean(wanted, names)}; its columns: {_joined(names)}"
            f"{encoding_hint(*names)}"
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
        has = _joined(names)
        raise SettingsError(
            f"{table}, line 1 looks like data, not a header ({has}); insert one, such as image,mos"
            if any(_is_number(name) for name in names)
            else f"{table} has no usual column of {what}; its columns, separated by {DELIMITERS[delimiter]}: {has}; "
            f"pass {option} NAME{encoding_hint(*names)}"
        )
    return _named(table, names, found)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(map(source_name, names)) or "none"


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
        raise SettingsError(
            f"{table}, line {line}: {column} is {cell!r}; expected a number{comma}{encoding_hint(cell)}"
        ) from None
    if not math.isfinite(number):
        raise SettingsError(f"{table}, line {line}: {column} is {cell!r}; expected a finite number")
    if abs(number) > LARGEST:
        raise SettingsError(
            f"{table}, line {line}: {column} is {cell!r}; expected a number between {-LARGEST:g} and {LARGEST:g}"
        )
    return number


def _paths(
    table: Path, folder: Path | None, among: Sequence[str] | None, names: Sequence[tuple[int, str]]
) -> list[Path]:
    files = FileNames(folder, among)
    lines: dict[str, int] = {}  # of names without suffix
    paths = []
    for line, name in names:
        if not name:
            raise SettingsError(f"{table}, line {line} has no image name")
        path, by_stem = files.find(name, f"{table}, line {line}")
        if by_stem and lines.setdefault(name, line) != line:
            raise SettingsError(
                f"{table} has several rows named {source_name(name)} (lines {lines[name]} and {line}), all matching "
                f"{source_name(path)}; if another column names the rated images, pass --image-column; "
                "if these are repeated ratings, add the suffix to the names"
            )
        paths.append(path)
    return paths
