"""Opinion scores from a CSV file or from one of pyiqa's data sets."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SettingsError

# Names that the columns of published data sets have, in lower case; the first that is there is taken.
IMAGE_COLUMNS = ("image", "image_name", "img_name", "img_path", "img", "filename", "file_name", "file", "name", "path")
OPINION_COLUMNS = ("mos", "dmos", "mos_zscore", "mean_opinion_score", "opinion", "rating", "score")
LOWER_BETTER = ("dmos",)
# pyiqa's loaders whose rows end with a picture and its opinion score. Others have histograms or pairs of pictures.
LOADERS = ("GeneralNRDataset", "GeneralFRDataset", "LIVEChallengeDataset")


@dataclass
class Ratings:
    """Rated pictures.

    Attributes:
        paths, opinions: file and opinion score of each picture.
        lower_better: whether a lower opinion score is better, as with DMOS.
        groups: group of each picture; empty where none was asked for.
        columns: which columns, or which data set and split, were read, for people.
        because: how the direction is known, for people.
    """

    paths: list[Path]
    opinions: list[float]
    lower_better: bool
    groups: list[str] = field(default_factory=list)
    columns: str = ""
    because: str = ""

    def __str__(self) -> str:
        direction = "lower" if self.lower_better else "higher"
        return f"{len(self.paths)} pictures ({self.columns}; {direction} opinion scores are better, {self.because})"


def read_ratings(
    table: Path,
    folder: Path,
    image_column: str | None = None,
    opinion_column: str | None = None,
    group_column: str | None = None,
    lower_better: bool | None = None,
) -> Ratings:
    """Ratings from a CSV file with a header.

    Args:
        table: the file.
        folder: where the pictures are.
        image_column, opinion_column: columns; None: found by the names that are usual. A picture's name without a
            suffix means the only picture of that stem.
        group_column: a column to divide the pictures by.
        lower_better: None: by the column's name, so where it is `dmos`. KADID-10k's own `dmos` is higher when better.

    Raises:
        SettingsError: no such file or column, a rating that is no number, or a picture that is not there.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{table} cannot be read ({reason}); expected a CSV file with a header") from error
    names = [name for name in (rows[0] if rows else {}) if name is not None]
    image = _column(table, names, image_column, IMAGE_COLUMNS, "picture names", "--image-column")
    opinion = _column(table, names, opinion_column, OPINION_COLUMNS, "opinion scores", "--mos-column")
    if group_column is not None and group_column not in names:
        raise SettingsError(f"{table} has no column {group_column!r}; it has {', '.join(names)}")
    because = "as told"
    if lower_better is None:
        lower_better = opinion.strip().lower() in LOWER_BETTER
        because = f"as the column is called {opinion.strip()}; otherwise pass --{'no-' * lower_better}lower-better"
    opinions = []
    for number, row in enumerate(rows, 2):
        try:
            opinions.append(float(row[opinion]))
        except (TypeError, ValueError):
            raise SettingsError(f"{table}, line {number}: {opinion} is {row[opinion]!r}; expected a number") from None
        if not math.isfinite(opinions[-1]):
            raise SettingsError(f"{table}, line {number}: {opinion} is {row[opinion]!r}; expected a finite number")
    return Ratings(
        paths=_paths(table, folder, [row[image] or "" for row in rows]),
        opinions=opinions,
        lower_better=lower_better,
        groups=[row[group_column] or "" for row in rows] if group_column is not None else [],
        columns=f"{image.strip()}, {opinion.strip()}",
        because=because,
    )


def pyiqa_ratings(name: str, root: Path | None = None) -> Ratings:
    """A data set that pyiqa knows (`livec`, `koniq10k`, ...), by its own configuration and loader.

    Where the data set has splits, these are the pictures of the test split unless pyiqa's configuration names another.

    Args:
        name: as in pyiqa's `default_dataset_configs.yml`.
        root: what takes the place of `./datasets` in it; None: the working directory's `datasets`.

    Raises:
        SettingsError: an unknown name, a data set whose opinions are no single score, or files that are not there.
    """
    from pyiqa import get_dataset_info
    from pyiqa.data import build_dataset

    known = get_dataset_info()
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise SettingsError(f"pyiqa knows no data set {name!r}; did you mean {near!r}?")
    options = {"phase": "test"} | known[name]  # pyiqa's loaders would take the training split
    if options["type"] not in LOADERS:
        raise SettingsError(
            f"pyiqa's data set {name} is read by its {options['type']}; expected one of {', '.join(LOADERS)}: "
            "for others make a CSV file and pass --ratings"
        )
    for key, value in options.items():
        if root is not None and isinstance(value, str) and value.startswith("./datasets"):
            options[key] = str(root / Path(value).relative_to("datasets"))
    try:
        rows = build_dataset(options).paths_mos
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise SettingsError(
            f"pyiqa cannot read its data set {name} ({error}); expected it in {root or 'datasets'}"
        ) from error
    split = f"its {options['phase']} split" if "split_index" in options else "all of it"
    if not rows:
        raise SettingsError(f"pyiqa's data set {name} has no pictures in {split}")
    paths = [Path(row[-2]) for row in rows]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise SettingsError(f"{missing} is not there, which pyiqa's data set {name} rates")
    return Ratings(
        paths,
        [float(row[-1]) for row in rows],
        bool(options.get("lower_better", False)),
        columns=f"{name}, {split}",
        because="as pyiqa says" if "lower_better" in options else "since pyiqa says nothing else",
    )


def _column(table: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, option: str) -> str:
    if wanted is not None:
        if wanted not in names:
            raise SettingsError(f"{table} has no column {wanted!r}; it has {', '.join(names) or 'none'}")
        return wanted
    by_name = {name.strip().lower(): name for name in reversed(names)}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None:
        raise SettingsError(
            f"which column of {table} has the {what}? It has {', '.join(names) or 'none'}; pass {option}"
        )
    return found


def _paths(table: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    stems: dict[str, list[Path]] | None = None
    paths = []
    for name in names:
        path = folder / name
        if not path.is_file() and not Path(name).suffix:
            if stems is None:
                stems = {}
                for each in sorted(folder.rglob("*")):
                    stems.setdefault(each.stem, []).append(each)
            same = stems.get(Path(name).name, [])
            path = same[0] if len(same) == 1 else path
        if not path.is_file():
            raise SettingsError(f"{path} is not there, which {table} rates")
        paths.append(path)
    return paths
