"""What a scorer is given: images, and the reference of each for full-reference metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import ImageError, SettingsError, counted
from ..images.convert import source_name
from ..images.paths import images_by_stem, list_images
from ..images.tensors import Source

#: Images for `Scorer.score`. An `ImageError` stands for an image that the caller could not get.
Images: TypeAlias = "Iterable[Source | ImageError] | Source"
#: References for `Scorer.score`: one for every image, one for each, or a folder of them.
References: TypeAlias = "Images | ReferenceFolder"


class ReferenceFolder:
    """Finds the reference of an image by the image's name.

    The reference of `PATH/sub/a.png`, found below the folder PATH, is `FOLDER/sub/a.png`; that of an image which lies
    below none of `below` is `FOLDER/a.png`. Without such a file it is the one image there that differs in the suffix
    alone. Images of one name from different folders, which would all get that file, are refused.

    Args:
        folder: of the references.
        below: folders in which images were searched.

    Example:
        >>> ReferenceFolder("examples/photos").reference_of("restored/hats.png")
        'examples/photos/hats.jpg'
    """

    def __init__(self, folder: str | os.PathLike[str], below: Iterable[str] = ()) -> None:
        self.folder = os.fsdecode(folder)
        self._prefixes = [os.path.join(each, "") for each in below]  # noqa: PTH118 - as `find_images` joins names
        self._listed: dict[str, dict[str, list[str]] | ImageError] = {}
        self._paired: dict[str, int] = {}  # the hash of the image's path by the name of its reference

    def check(self, images: Iterable[str]) -> None:
        """Raise SettingsError if two images go by the same name."""
        paired: dict[str, str] = {}
        for path in images:
            other = paired.setdefault(self._wanted(path), path)
            if other != path:
                raise SettingsError(
                    f"{source_name(other)} and {source_name(path)} would both have the reference "
                    f"{source_name(self._wanted(path))}; name the folder that holds both, or score one at a time"
                )

    def _wanted(self, path: str) -> str:
        below = next((path.removeprefix(each) for each in self._prefixes if path.startswith(each)), "")
        if os.path.isabs(below) or below.startswith(os.pardir):  # noqa: PTH117 - found by another
            below = ""
        return os.path.join(self.folder, below or os.path.basename(path))  # noqa: PTH118, PTH119

    def reference_of(self, image: Source | ImageError) -> str | ImageError:
        """Return the path of an image's reference, or the error to report in its place."""
        if not isinstance(image, str | os.PathLike):
            return ImageError(f"{source_name(image)} has no name by which to find one in {source_name(self.folder)}")
        path = os.fsdecode(image)
        wanted = self._wanted(path)
        if self._paired.setdefault(wanted, hash(path)) != hash(path):
            return ImageError(
                f"{source_name(wanted)} is that of another image of this name already; pass the folder that holds both"
            )
        if os.path.lexists(wanted):
            return wanted
        folder, name = os.path.split(wanted)
        if folder not in self._listed:
            self._listed[folder] = _list(folder)
        listed = self._listed[folder]
        if isinstance(listed, ImageError):
            return listed
        found = listed.get(Path(name).stem, [])
        if len(found) == 1:
            return os.path.join(folder, found[0])  # noqa: PTH118
        if found:
            names = ", ".join(map(source_name, found))
            return ImageError(
                f"{source_name(wanted)} does not exist, and {len(found)} images have that name with another suffix "
                f"({names}); expected one"
            )
        return ImageError(
            f"{source_name(wanted)} does not exist, nor an image of that name with another suffix; expected one"
        )


def pair(
    images: Images, references: References | None
) -> Iterator[tuple[Source | ImageError, Source | ImageError | None]]:
    """Iterate over images, each with its reference: a source, or an `ImageError` if there is none.

    Without `references`, None takes the place of each.

    Raises:
        SettingsError: `images` or `references` is neither an image nor an iterable, they are not equally many, or a
            folder is empty or cannot be listed.
    """
    if references is None:
        for image in each_image(images):
            yield image, None
    elif isinstance(references, ReferenceFolder) or _is_folder(references):
        folder = references
        if not isinstance(folder, ReferenceFolder):
            folder = ReferenceFolder(folder, [os.fsdecode(images)] if _is_folder(images) else [])
        for image in each_image(images):
            yield image, folder.reference_of(image)
    elif _is_single(references):
        for image in each_image(images):
            yield image, references
    else:
        yield from _in_order(images, references)


def _in_order(images: Images, references: Images) -> Iterator[tuple[Source | ImageError, Source | ImageError]]:
    """Pair images and references that come in the same order."""
    if isinstance(images, Sized) and isinstance(references, Sized) and not _is_single(images):
        _check_counts(len(images), len(references))
    others = each_image(references, "references")
    count = 0
    for count, image in enumerate(each_image(images), start=1):
        try:
            reference = next(others)
        except StopIteration:
            _check_counts(count, count - 1, "at least ")
        yield image, ImageError("none was given for this image") if reference is None else reference
    if next(others, others) is not others:
        _check_counts(count, count + 1, more="at least ")


def _check_counts(images: int, references: int, least: str = "", more: str = "") -> None:
    if images != references:
        raise SettingsError(
            f"{least}{counted(images, 'image')}, but {more}{counted(references, 'reference')}; expected one for each, "
            "in the same order, or one alone for all"
        )


def describe_references(references: References) -> dict[str, str]:
    """Return what the references are, JSON-ready: their `path`, if they have one, and `pairing`."""
    if isinstance(references, ReferenceFolder) or _is_folder(references):
        folder = references.folder if isinstance(references, ReferenceFolder) else os.fsdecode(references)
        return {"path": os.path.realpath(folder), "pairing": "by name"}
    if isinstance(references, str | os.PathLike):
        return {"path": os.path.realpath(os.fsdecode(references)), "pairing": "one for all images"}
    return {"pairing": "one for all images" if _is_single(references) else "one for each image, in order"}


def each_image(images: Images, what: str = "images") -> Iterator[Source | ImageError]:
    """Iterate over images; a single image is one item, though paths, arrays and tensors are iterable."""
    if _is_folder(images):
        found = list_images(Path(os.fsdecode(images)))
        if not found:
            raise SettingsError(f"no images in {source_name(images)}; expected a folder of images, or an image")
        return map(str, found)
    if _is_single(images):
        return iter([images])
    try:
        return iter(images)  # type: ignore[arg-type]  # mypy does not see that a path is single
    except TypeError:
        raise SettingsError(
            f"{what} is of type {type(images).__name__}; expected an iterable of images, or one image"
        ) from None


def _is_folder(images: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(images, str | os.PathLike) and os.path.isdir(images)  # noqa: PTH112 - '' is no Path


def _is_single(images: object) -> TypeGuard[Source]:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, str | bytes | bytearray | os.PathLike | Image.Image)


def _list(folder: str) -> dict[str, list[str]] | ImageError:
    try:
        return images_by_stem(folder)
    except OSError as error:
        return ImageError(
            f"{source_name(folder)} cannot be listed ({error.strerror or error}); expected a folder that can be read"
        )
