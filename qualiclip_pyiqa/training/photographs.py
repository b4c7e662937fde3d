"""List, select and read the photographs of a training run."""

from __future__ import annotations

import csv
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ImageError, SettingsError
from ..images.convert import read_size
from ..images.paths import list_images
from ..images.tensors import load_image
from ..screen import Screen
from ..towers.statistics import log_energies
from .config import Config

log = logging.getLogger(__name__)

LEAVE_OUT = "leave it out (--exclude)"


def list_photographs(folder: Path, exclude: Path | None = None) -> list[Path]:
    """List the images under a folder that may be trained on, sorted by path.

    Args:
        folder: searched as every command searches one, see `images.paths.list_images`. If it holds a `manifest.csv`,
            the images that `read_held_out` names are left out; those that are not there (not downloaded, say) are
            counted in a warning.
        exclude: a text file with one more path to leave out per line, relative to the folder.

    Raises:
        SettingsError: no such folder, a folder or list that cannot be read, an `exclude` that names a file which is
            not among the images, or no image left.
    """
    names = {path: path.relative_to(folder).as_posix() for path in sorted(list_images(folder))}
    held_out = read_held_out(folder)
    excluded = set() if exclude is None else _read_lines(exclude)
    if missing := sorted(excluded - set(names.values())):  # a wrong path must not put an image into the training
        raise SettingsError(
            f"{exclude}: {missing[0]} is not an image in {folder}; expected paths relative to that folder"
        )
    if missing := sorted(held_out - set(names.values())):
        log.warning("%d held-out images of manifest.csv are not in %s, such as %s", len(missing), folder, missing[0])
    paths = [path for path, name in names.items() if name not in held_out | excluded]
    if not paths:
        raise SettingsError(f"{folder} has no images to train on; expected files such as .jpg or .png")
    return paths


def read_held_out(folder: Path) -> set[str]:
    """Read the held-out images of a folder: those with 1 in column `held_out` of its `manifest.csv`.

    Returns:
        paths relative to the folder, from column `file`; none without a `manifest.csv`, and none, with a warning,
        where it is another table.

    Raises:
        SettingsError: the file cannot be read.
    """
    path = folder / "manifest.csv"
    if not path.is_file():
        return set()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if not {"file", "held_out"} <= set(table.fieldnames or ()):
                log.warning("%s has no columns file and held_out, so no image is held out by it", path)
                return set()
            return {row["file"] for row in table if row["held_out"] == "1"}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"{path} cannot be read ({error}); expected a CSV table in UTF-8") from error


def _read_lines(path: Path) -> set[str]:
    try:
        return {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); expected text in UTF-8, one path per line") from error


def split_photographs(
    config: Config, pristine: Path, exclude: Path | None, seed: int, quiet: bool = False
) -> tuple[list[Path], list[Path]]:
    """Divide photographs into those to train on, repeated as `config.repeat` says, and those to validate on.

    Args:
        pristine, exclude: see `list_photographs`. Photographs smaller than `config.smallest_photograph` are left out.
        seed: determines the split.
        quiet: no progress bar and no warnings.

    Raises:
        SettingsError: too few photographs, or `repeat` names what is not there. ImageError: one cannot be opened.
    """
    paths, smallest = list_photographs(pristine, exclude), config.smallest_photograph
    watched = tqdm(paths, desc="photographs", file=Screen(), leave=False, disable=quiet or None)
    large = [path for path in watched if shorter_side(path) >= smallest]
    if len(large) < len(paths) and not quiet:
        log.warning("left out %d photographs with a side under %d pixels", len(paths) - len(large), smallest)
    if len(large) < config.validation + config.stacks:
        raise SettingsError(
            f"{pristine} has {len(large)} photographs of at least {smallest} pixels a side; "
            f"expected {config.validation} to validate on and at least {config.stacks} to train on"
        )
    for name in config.repeat:
        if not (pristine / name).exists():
            raise SettingsError(f"repeat names {name!r}, which is not in {pristine}; expected folders in it")
    random.Random(f"split {seed}").shuffle(large)
    validation, kept = large[: config.validation], large[config.validation :]
    folders = [path.relative_to(pristine).parts[0] for path in kept]
    times = [int(config.repeat.get(folder, 1)) for folder in folders]
    return [path for path, count in zip(kept, times, strict=True) for _ in range(count)], validation


def shorter_side(path: Path, remedy: str = LEAVE_OUT) -> int:
    """Read the shorter side of an image in pixels, from the file's header alone; `remedy` ends the error message."""
    try:
        return min(read_size(path))
    except ImageError as error:
        raise ImageError(f"{error}; {remedy}") from None


def read_photograph(path: Path) -> Tensor:
    """Decode one file to (3, H, W) uint8 RGB."""
    try:
        return (load_image(path) * 255).round().to(torch.uint8)
    except ImageError as error:
        raise ImageError(f"{error}; {LEAVE_OUT}") from None


def random_crop(image: Tensor, size: int, rng: random.Random) -> Tensor:
    """Cut a square at a random place of an image: (..., H, W) -> (..., size, size), a view."""
    top, left = (rng.randint(0, side - size) for side in image.shape[-2:])
    return image[..., top : top + size, left : left + size]


def read_energies(paths: Sequence[Path], silent: bool = False) -> Tensor:
    """Compute `towers.mini.log_energies` of photographs as they are -> (N, ENERGIES)."""
    watched = tqdm(paths, desc="undistorted", unit="image", file=Screen(), leave=False, disable=silent or None)
    return torch.cat([log_energies(read_photograph(path)[None].float() / 255) for path in watched])
