"""A folder with a drawing of the maps of each of many images."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..figures import check_figure, save_figure
from ..files import writing
from ..images.convert import source_name
from ..images.identity import image_key
from ..images.tensors import Source, load_image
from .drawing import draw_maps
from .index import MapIndex
from .mapper import Mapper
from .quality_map import QualityMap, check_scale

INDEX = "maps.csv"


class MapFolder:
    """Draws the maps of images by some metrics to a folder, one PNG file for each image, and `maps.csv` (`MapIndex`).

    A file's name is the letters and digits of the image's, and a hash of its path, as equal names may come from
    different folders.

    Args:
        folder: made if it is missing.
        mappers: one for each metric.
        reading: options of `load_image`.
        scale: ends of the colour bar of all maps; None: those of each map's own values.

    Raises:
        SettingsError: matplotlib is not installed, `folder` is a file or has another `maps.csv`, or a scale whose first
            end is not the lower one.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        mappers: Sequence[Mapper],
        reading: dict[str, Any] | None = None,
        scale: tuple[float, float] | None = None,
    ) -> None:
        self.folder, self.mappers, self.reading = folder, mappers, reading or {}
        self.scale = None if scale is None else check_scale(*scale)
        check_figure(folder / "map.png")
        if folder.exists() and not folder.is_dir():
            raise SettingsError(f"{folder} is a file; expected a folder for the maps")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.index = MapIndex(folder / INDEX)

    def path(self, name: str) -> Path:
        """Return the file of an image's maps."""
        key = image_key(name).encode("utf-8", "surrogateescape")
        return self.folder / f"{safe_stem(name)}-{hashlib.sha256(key).hexdigest()[:12]}.png"

    def existing(self, names: Iterable[str]) -> str | None:
        """Return the first of these images whose maps exist already."""
        return next((name for name in names if self.path(name).exists()), None)

    def write(self, name: str, source: Source) -> Path:
        """Map an image and draw its maps.

        Args:
            name: of the image: its path, or another text that is its own.
            source: the image.

        Raises:
            ImageError: the image cannot be read.
            SettingsError: a metric has no maps of this kind.
            OSError: the file cannot be written.
        """
        rgb = load_image(source, **self.reading)
        maps: list[QualityMap] = [each for mapper in self.mappers for each in mapper.maps(rgb[None])[0]]
        if self.scale is not None:
            maps = [each.scaled(*self.scale) for each in maps]
        save_figure(draw_maps(rgb, maps, title=source_name(name)), self.path(name))
        self.index.add(name, self.path(name))
        return self.path(name)


def safe_stem(name: str) -> str:
    """Return the letters and digits of an image's name, in any script; all else becomes an underscore.

    Example:
        >>> safe_stem("in/Ünïcode $1 写真.png"), safe_stem("-?.png")
        ('Ünïcode_1_写真', 'image')
    """
    text = unicodedata.normalize("NFC", Path(name).stem)
    # Marks are parts of letters, in the scripts of India for example.
    kept = (each if each == "-" or unicodedata.category(each)[0] in "LMN" else "_" for each in text)
    words = "_".join(word for word in "".join(kept).split("_") if word)
    # File systems limit a name to 255 bytes.
    return words[:60].encode()[:180].decode(errors="ignore").strip("_-") or "image"
