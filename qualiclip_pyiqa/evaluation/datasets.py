"""Read the opinion scores of pyiqa's data sets through its configurations and loaders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import SettingsError, did_you_mean
from .ratings import Ratings

# pyiqa's loaders whose rows end with an image and its opinion score; others have histograms or pairs of images.
LOADERS = ("GeneralNRDataset", "GeneralFRDataset", "LIVEChallengeDataset")


def pyiqa_ratings(name: str, root: Path | None = None) -> Ratings:
    """Read a data set of pyiqa (`livec`, `koniq10k`, ...) through pyiqa's configuration and loader.

    If the data set has splits, read the test split, unless pyiqa's configuration names another.

    Args:
        name: as in pyiqa's `default_dataset_configs.yml`.
        root: folder that replaces `./datasets` in it. None: `datasets` in the working directory.

    Raises:
        SettingsError: an unknown name, opinions that are not single scores, missing files, or a version of pyiqa that
            stores its rows differently.
    """
    from pyiqa import get_dataset_info
    from pyiqa.data import build_dataset

    known = get_dataset_info()
    if name not in known:
        usable = [each for each, options in known.items() if options.get("type") in LOADERS]
        raise SettingsError(
            f"pyiqa has no data set {name!r}; expected one of {', '.join(sorted(usable))}{did_you_mean(name, known)}"
        )
    options = {"phase": "test"} | known[name]  # pyiqa's loaders default to the training split
    if options["type"] not in LOADERS:
        raise SettingsError(
            f"pyiqa's data set {name} uses the loader {options['type']}; expected one of {', '.join(LOADERS)}: "
            "write its opinion scores to a CSV file and pass --ratings"
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
        raise SettingsError(f"{missing} does not exist; expected every image of pyiqa's data set {name}")
    return Ratings(
        paths,
        opinions,
        bool(options.get("lower_better", False)),
        columns=f"{name}, {split}",
        because="as pyiqa states" if "lower_better" in options else "as pyiqa does not state otherwise",
    )


def _rows(dataset: Any, name: str) -> tuple[list[Path], list[float]]:
    """Return the image and opinion score of each row, from an undocumented attribute of pyiqa's data sets."""
    import pyiqa

    try:
        rows = dataset.paths_mos
        paths = [Path(os.fspath(row[-2])) for row in rows]
        return paths, [float(row[-1]) for row in rows]
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise SettingsError(
            f"pyiqa {pyiqa.__version__} stores the rows of its data set {name} in an unknown form "
            f"({type(error).__name__}: {error}); write its opinion scores to a CSV file and pass --ratings"
        ) from error
