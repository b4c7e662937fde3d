"""Write a report: one HTML page with everything in it, that makes no request to any other place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SettingsError, counted
from ..files import replacing, writing
from ..optional import require
from ..scoring.building import MetricLike
from .beside import PreviewFolder, check_folder, files_folder
from .findings import near_duplicates, outliers
from .maps import MAPS_MOST, PageMap, PageMaps
from .previews import INSIDE_BYTES, Preview, decode_each, make_preview, side_for
from .render import Page, render
from .runs import Watch, plan_runs
from .sheet import Sheet, by_column, check_comparable, compare, sheet_of
from .text import link

#: A page holds the previews of at most this many images, unless it is told to; those of more lie beside it.
INSIDE_MOST = 5000
_LEAST_BYTES = 8_000  # of a preview
_MOST_BYTES = 250_000


@dataclass(frozen=True)
class Report:
    """What `write_report` has written.

    Attributes:
        path: the page.
        folder: folder of the previews beside it; None if they are inside.
        images: number of images.
        errors: number of images with an error.
        unscored: errors of images that were scored for this page, rather than read from a table.
        previews: number of images that the page shows.
        notes: what the page lacks and why, in one line each.
    """

    path: Path
    folder: Path | None
    images: int
    errors: int
    unscored: int
    previews: int
    notes: tuple[str, ...]


@dataclass
class _Pictures:
    """Previews, hashes and maps by row."""

    previews: dict[int, Preview] = field(default_factory=dict)
    maps: dict[int, list[PageMap]] = field(default_factory=dict)
    words: dict[int, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_report(
    source: str | Path,
    output: str | Path,
    second: str | Path | None = None,
    *,
    metrics: Sequence[str] | Mapping[str, MetricLike] = (),
    options: Mapping[str, Any] | None = None,
    maps: bool | None = None,
    thumbnails: str | None = None,
    force: bool = False,
    title: str | None = None,
    watch: Watch = lambda what, done, total: None,
) -> Report:
    """Write a page about the scores of a folder or a table, or about what changed between two of them.

    The page is written whole or not at all. Previews beside it are in `NAME_files`.

    Args:
        source: a folder of images, which is scored, or a table that `qualiclip score` wrote.
        output: the page, `*.html`.
        second: a second folder or table to compare with the first.
        metrics: what to score a folder by, which of a table's scores to show.
        options: further arguments of `Scorer`, for folders.
        maps: whether the page has quality maps, which takes about as long as scoring. Default: for at most MAPS_MOST
            images whose metric is one of this package.
        thumbnails: "inside" the page or "beside" it. Default: inside for at most INSIDE_MOST images.
        force: replace an existing page, and its folder of previews.
        title: heading of the page. Default: name of the folder or table.
        watch: called with the name of a step, the images done, and the number of images.

    Raises:
        SettingsError: no such folder or table, nothing to show, nothing in common with the second, an output that
            exists, or Jinja2 or ImageHash are not installed.
        WeightsError: a weight file is missing or damaged.

    Example:
        write_report("photos", "report.html", metrics=["qualiclip-mini+"])
    """
    output = Path(output)
    _check_output(output, thumbnails, force)
    require("jinja2", "report", "A report")
    require("imagehash", "report", "A report")
    sources = [Path(each) for each in (source, second) if each is not None]
    planned = plan_runs(sources, metrics, options)
    if len(planned) == 2:
        check_comparable(*(each.run for each in planned))  # before anything is scored
    runs = [each.scored(watch) for each in planned]
    sheet = sheet_of(runs[0]) if len(runs) == 1 else compare(runs[0], runs[1])
    if not sheet.rows:
        raise SettingsError(f"{source} has no rows; expected a table with at least one image")
    beside = thumbnails == "beside" or (thumbnails is None and len(sheet.rows) > INSIDE_MOST)
    if beside:
        check_folder(files_folder(output), force)
    with PreviewFolder(files_folder(output)) if beside else nullcontext() as folder:
        pictures = _look(sheet, maps, folder, watch, (options or {}).get("device"))
        page = _page(title, sheet, pictures, output.parent, folder)
        with writing(output), replacing(output) as part:
            with part.open("x", encoding="utf-8", newline="\n") as file:
                file.writelines(render(page))
            if folder is not None:
                folder.commit()
    return Report(
        output,
        None if folder is None else folder.folder,
        len(sheet.rows),
        sum(row.error is not None for row in sheet.rows),
        sum(record.error is not None for run in runs if run.source.is_dir() for record in run.records),
        len(pictures.previews),
        tuple(pictures.notes),
    )


def _page(title: str | None, sheet: Sheet, pictures: _Pictures, parent: Path, folder: PreviewFolder | None) -> Page:
    """Gather what the page shows."""
    rows = range(len(sheet.rows))
    return Page(
        title=title or " and ".join(dict.fromkeys(sheet.names)),
        made=datetime.now(UTC).strftime("%d %B %Y").lstrip("0"),
        sheet=sheet,
        order=_order(sheet),
        links=[[None if file is None else link(file, parent) for file in row.files] for row in sheet.rows],
        previews=pictures.previews,
        addresses=None if folder is None else {row: folder.address(row) for row in pictures.previews},
        maps=pictures.maps,
        words=pictures.words,
        outliers=[
            {} if column.run is None else outliers(by_column(sheet.rows, number))
            for number, column in enumerate(sheet.columns)
        ],
        duplicates=near_duplicates([pictures.previews[row].hash if row in pictures.previews else None for row in rows]),
        notes=pictures.notes,
    )


def _check_output(output: Path, thumbnails: str | None, force: bool) -> None:
    if output.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"{output} has suffix {output.suffix!r}; expected a page, *.html")
    if thumbnails not in (None, "inside", "beside"):
        raise SettingsError(f"thumbnails is {thumbnails!r}; expected 'inside' or 'beside'")
    if not output.parent.is_dir():
        raise SettingsError(f"{output} cannot be written: {output.parent} is not a folder")
    if output.is_dir():
        raise SettingsError(f"{output} cannot be written: it is a folder")
    if output.exists() and not force:
        raise SettingsError(f"{output} exists already; pass --force to replace it, or choose another name")
    if thumbnails == "beside":
        check_folder(files_folder(output), force)


def _look(sheet: Sheet, maps: bool | None, folder: PreviewFolder | None, watch: Watch, device: str | None) -> _Pictures:
    """Decode every image once, for its preview, hash and maps."""
    found = _Pictures()
    shown = [number for number, row in enumerate(sheet.rows) if row.file is not None]
    side = side_for(len(shown))
    share = _MOST_BYTES if folder else INSIDE_BYTES // max(1, len(shown))
    most_bytes = min(_MOST_BYTES, max(_LEAST_BYTES, share))
    wanted = maps if maps is not None else len(shown) <= MAPS_MOST
    if not wanted and maps is None:
        found.notes.append(f"no maps, since there are more than {MAPS_MOST} images (--maps)")
    by_run: dict[int, list[int]] = {}
    for number in shown:
        row = sheet.rows[number]
        by_run.setdefault(max(run for run, file in enumerate(row.files) if file is not None), []).append(number)
    done = 0
    for index, numbers in by_run.items():
        run = sheet.runs[index]
        mapped = PageMaps(run, list(enumerate(sheet.columns)), index, maps is True, device) if wanted else None
        paths = [sheet.rows[number].files[index] or "" for number in numbers]

        def use(place: int, pixels: np.ndarray, numbers: list[int] = numbers, mapped: PageMaps | None = mapped) -> None:
            number = numbers[place]
            preview = make_preview(pixels, side, most_bytes)
            if folder is not None:
                folder.write(number, preview.data)
                preview = replace(preview, data=b"")
            found.previews[number] = preview
            if mapped and (made := mapped.maps(pixels, sheet.rows[number].values)):
                found.maps[number] = made

        failed = 0
        for place, error in decode_each(paths, run.rules, use):
            done += 1
            failed += error is not None and sheet.rows[numbers[place]].error is None
            watch("reading images", done, len(shown))
        if failed:
            found.notes.append(f"{counted(failed, 'image')} of {run.name} can no longer be read")
        if mapped is not None:
            found.notes += mapped.notes
            found.words |= mapped.words
    absent = sum(row.file is None and row.record.error is None for row in sheet.rows)
    if absent:
        found.notes.append(f"no picture of {counted(absent, 'image')} whose file was not found")
    return found


def _order(sheet: Sheet) -> list[int]:
    """Return the rows from worst to best by the first column, those without a score last: the page's first view."""
    sign = -1 if sheet.columns[0].lower_better else 1

    def key(number: int) -> tuple[bool, float]:
        value = sheet.rows[number].values[0]
        return value is None, 0.0 if value is None else sign * value

    return sorted(range(len(sheet.rows)), key=key)
