"""Opinion scores of pyiqa's data sets, by its own configurations and loaders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import SettingsError, did_you_mean
from .ratings import Ratings

# pyiqa's loaders whose rows end with an image and its opinion score. Others have histograms or pairs of images.
LOADERS = ("GeneralNRDataset", "GeneralFRDataset", "LIVEChallengeDataset")


def pyiqa_ratings(name: str, root: Path | None = None) -> Ratings:
    """Read a data set that pyiqa knows (`livec`, `koniq10k`, ...) by pyiqa's own configuration and loader.

    Where the data set has splits, these are the images of the test split unless pyiqa's configuration names another.

    Args:
        name: as in pyiqa's `default_dataset_configs.yml`.
        root: what takes the place of `./datasets` in it. None: `datasets` in the working directory.

    Raises:
        SettingsError: an unknown name, a data set whose opinions are not single scores, missing files, or a version of
            pyiqa that keeps its rows in another form.
    """
    from pyiqa import get_dataset_info
    from pyiqa.data import build_dataset

    known = get_dataset_info()
    if name not in known:
        raise SettingsError(f"pyiqa knows no data set {name!r}{did_you_mean(name, known)}")
    options = {"phase": "test"} | known[name]  # pyiqa's loaders would take the training split
    if options["type"] not in LOADERS:
        raise SettingsError(
            f"pyiqa reads its data set {name} by its {options['type']}; expected one of {', '.join(LOADERS)}: "
            "for others make a CSV file and pass --ratings"
        )
    if options.get("split_file"):  # which pyiqa unpickles
        raise SettingsError(
            f"pyiqa's configuration of {name} has its splits in {options['split_file']}, a pickle, which "
            "could run code; make a CSV file and pass --ratings"
        )
    for key, value in options.items():
        if root is not None and isinstance(value, str) and value.startswith("./datasets"):
            options[key] = str(root / Path(value).relative_to("datasets"))
    try:
        dataset = build_dataset(options)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise SettingsError(
            f"pyiqa cannot read its data set {name} ({error}); expected it in {root or 'datasets'}"
        ) from error
    paths, opinions = _rows(dataset, name)
    split = f"its {options['phase']} split" if "split_index" in options else "all of it"
    if not paths:
        raise SettingsError(f"pyiqa's data set {name} has no images in {split}")
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise SettingsError(f"{missing} is not there, but pyiqa's data set {name} rates it")
    return Ratings(
        paths,
        opinions,
        bool(options.get("lower_better", False)),
        columns=f"{name}, {split}",
        because="as pyiqa says" if "lower_better" in options else "since pyiqa says nothing else",
    )


def _rows(dataset: Any, name: str) -> tuple[list[Path], list[float]]:
    """Image and opinion score of each row, which pyiqa keeps in no documented place."""
    import pyiqa

    try:
        rows = dataset.paths_mos
        paths = [Path(os.fspath(row[-2])) for row in rows]
        return paths, [float(row[-1]) for row in rows]
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise SettingsError(
            f"pyiqa {pyiqa.__version__} keeps the rows of its data set {name} in another form "
            f"({type(error).__name__}: {error}); make a CSV file and pass --ratings"
        ) from error
