"""`qualiclip score --maps DIR`: draw the maps of every image that is scored."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ImageError, SettingsError, reason
from ..images.convert import source_name
from . import READ_RULES, read_options, say

if TYPE_CHECKING:
    from ..explain.folder import MapFolder
    from ..scoring.building import MetricLike
    from ..scoring.tables import Record

Sources: TypeAlias = Callable[[Sequence[str]], Iterator[str | bytes | ImageError]]


class Maps:
    """The folder of `--maps`: a map that fails is a message, and loses no row of the table.

    Args:
        folder: of the drawings.
        sources: yields the images of names.
        force: replace drawings that exist.

    Attributes:
        written, failed: number of images.
    """

    def __init__(self, folder: MapFolder, sources: Sources, force: bool) -> None:
        from ..scoring.building import columns_of

        self.folder, self.sources, self.force = folder, sources, force
        self._columns = [name for each in folder.mappers for name in columns_of(each.metric, each.network)]
        self.written = self.failed = 0

    def check(self, names: Iterable[str]) -> None:
        """Raise SettingsError if the maps of one of these images exist and may not be replaced."""
        there = None if self.force else self.folder.existing(names)
        if there is not None:
            raise SettingsError(
                f"{self.folder.path(there)} exists already; pass --force to replace maps, or choose another folder"
            )

    def wants(self, record: Record) -> bool:
        """Whether every metric that has maps scored an image."""
        return all(column in record.scores for column in self._columns)

    def complete(self, name: str) -> None:
        """Draw what an earlier run left out: the maps of an image, or its row of the index."""
        drawing = self.folder.path(name)
        if drawing.exists():
            self.folder.index.add(name, drawing)
        else:
            self.write(name)

    def write(self, name: str) -> None:
        """Draw the maps of an image that was scored."""
        try:
            source = next(iter(self.sources([name])))
            if isinstance(source, ImageError):
                raise source
            self.folder.write(name, source)
            self.written += 1
        except (ImageError, SettingsError, OSError, MemoryError, RuntimeError) as error:
            self.failed += 1
            say(f"qualiclip: no map of {source_name(name)}: {reason(error)}")


def maps_of(arguments: argparse.Namespace, metrics: Mapping[str, MetricLike], sources: Sources) -> Maps:
    """Return the folder of `--maps`, with mappers of all metrics but full-reference ones, which have no maps."""
    from ..explain.folder import INDEX, MapFolder
    from ..explain.mapper import Mapper
    from ..explain.quality_map import check_scale
    from ..scoring.building import needs_reference

    without = ", ".join(name for name, each in metrics.items() if needs_reference(each))
    mapped = {name: each for name, each in metrics.items() if not needs_reference(each)}
    if not mapped:
        raise SettingsError(f"--maps has no effect on {without}: full-reference metrics have no maps; leave it out")
    scale = None if arguments.map_range is None else check_scale(*arguments.map_range)
    if arguments.output is not None and arguments.output.resolve() == (arguments.maps / INDEX).resolve():
        raise SettingsError(f"{arguments.output} is the index of --maps {arguments.maps}; choose another name")
    device = arguments.device.split(",")[0] if arguments.device else None
    reading = read_options(arguments, READ_RULES)
    mappers = [Mapper({name: each}, device=device) for name, each in mapped.items()]
    folder = MapFolder(arguments.maps, mappers, reading, scale)
    if without:
        say(f"no maps of {without}: full-reference metrics have none")
    return Maps(folder, sources, bool(arguments.force))
