"""Which of the evaluated images a metric of `qualiclip fit` was fitted on, by the hashes in the metric's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ImageError, WeightsError
from ..images.convert import source_name
from ..images.identity import hash_file
from ..pretrained.files import file_sha256
from ..pretrained.fitted import load_fitted


def used_to_fit(
    settings: Mapping[str, Any] | None, columns: Sequence[str], images: Sequence[Path]
) -> dict[str, list[str] | None]:
    """Find the images whose content a fitted metric has seen, under whatever name.

    Args:
        settings: as from `Scorer.describe`.
        columns: the scores that are evaluated.
        images: the files, each once; one that cannot be read counts as new, since it has no score.

    Returns:
        The images that were used to fit it, by column of a fitted metric; None where the file of the metric is not at
        hand: an exported metric, or scores of a file that was moved or replaced. Other metrics are absent.

    Raises:
        WeightsError: a metric's file is damaged.
    """
    described = (settings or {}).get("columns")
    if not isinstance(described, Mapping):
        return {}
    own = {column: described[column] for column in columns if isinstance(described.get(column), Mapping)}
    fitted = {column: each for column, each in own.items() if "fit" in each}
    hashes = _hashes(images) if fitted else {}
    found: dict[str, list[str] | None] = {}
    for column, each in fitted.items():
        seen = _seen(each.get("weights"))
        found[column] = None if seen is None else [str(path) for path, sha256 in hashes.items() if sha256 in seen]
    return found


def fit_warnings(used: Mapping[str, list[str] | None], images: int) -> dict[str, str]:
    """Return a line for each fitted metric whose figures are not, or not surely, those of new images.

    Args:
        used: from `used_to_fit`.
        images: number of images that are evaluated.

    Example:
        >>> fit_warnings({"my.safetensors": ["a.png", "b.png"], "other.safetensors": []}, 40)["my.safetensors"]
        '2 of these 40 images were used to fit my.safetensors: its figures are not of new images; ...'
    """
    found: dict[str, str] = {}
    for column, seen in used.items():
        name = source_name(column)
        if seen is None:
            found[column] = (
                f"whether any of these {images} images were used to fit {name} is not known, since the file that "
                "`qualiclip fit` wrote is not at hand; evaluate it with -m FILE"
            )
        elif seen:
            found[column] = (
                f"{len(seen)} of these {images} images were used to fit {name}: its figures are not of new images; "
                "evaluate it on others, or use those that `qualiclip fit` printed"
            )
    return found


def _seen(weights: object) -> set[str] | None:
    """Return the hashes in a metric's file, if it is still the one described."""
    path, sha256 = (weights.get("path"), weights.get("sha256")) if isinstance(weights, Mapping) else (None, None)
    if not isinstance(path, str):
        return None
    try:
        same = file_sha256(Path(path)) == sha256
    except WeightsError:
        return None
    return {bytes(row).hex() for row in load_fitted(path).images.numpy()} if same else None


def _hashes(images: Sequence[Path]) -> dict[Path, str]:
    found: dict[Path, str] = {}
    for path in images:
        try:
            found[path] = hash_file(path)
        except ImageError:  # the evaluation reports it
            continue
    return found
