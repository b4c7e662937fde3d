"""Turn a report's content into HTML, piece by piece: first what is seen at once, bulky data last."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

import numpy as np

from ..errors import visible
from ..metrics.words import opposite
from ..optional import require
from .findings import DUPLICATE_BITS, OUTLIER_COUNT, OUTLIER_Z
from .maps import PageMap
from .previews import Preview, preview_suffix
from .settings import shown_settings
from .sheet import CHANGE, Column, Sheet, common_prefix
from .text import page_json, visible_values

SCRIPTS = (
    "format.js",
    "store.js",
    "theme.js",
    "previews.js",
    "ranges.js",
    "histograms.js",
    "gallery.js",
    "picture.js",
    "scatter.js",
    "csv.js",
    "main.js",
)
_FIRST_CHUNK = 60  # previews of the first view
_CHUNK = 200
_LEAST_SCALE = 0.2  # of a score's range: so that even images do not look full of faults


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: heading.
        made: date.
        sheet: rows and columns.
        order: rows from worst to best by the first column, which is how the page opens.
        links: addresses of each row's files, one for each run.
        previews: by row.
        addresses: of previews beside the page, by row; None if they are inside.
        maps: by row.
        words: meaning and relation of the maps, by column.
        outliers: robust z-scores by row, for each column.
        duplicates: groups of rows.
        notes: what the page lacks.
    """

    title: str
    made: str
    sheet: Sheet
    order: Sequence[int]
    links: Sequence[Sequence[str | None]]
    previews: Mapping[int, Preview]
    addresses: Mapping[int, str] | None
    maps: Mapping[int, Sequence[PageMap]]
    words: Mapping[int, tuple[str, str]]
    outliers: Sequence[Mapping[int, float]]
    duplicates: Sequence[Sequence[int]]
    notes: Sequence[str]


def asset(name: str) -> str:
    """Return the text of a file in `assets/`."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def render(page: Page) -> Iterator[str]:
    """Yield the page in pieces."""
    jinja2 = require("jinja2", "report", "A report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        loader=jinja2.FunctionLoader(asset),
    )
    markup = jinja2.utils.markupsafe.Markup
    style = asset("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(asset(name) for name in SCRIPTS) + "\n})();"
    slots = _slots(page)
    pieces: Iterator[str] = environment.get_template("page.html").generate(
        policy=_policy(style, script),
        style=markup(style),
        script=markup(script),
        data=markup(page_json(_data(page, slots))),
        chunks=(markup(chunk) for chunk in _chunks(page, slots)),
        maps=(markup(chunk) for chunk in _map_chunks(page)),
        title=page.title,
        facts=_facts(page),
        errors=[
            (row.record.path or f"row {number}", row.error)
            for number, row in enumerate(page.sheet.rows, start=1)
            if row.error is not None
        ],
        settings=[
            (name, visible_values(shown_settings(run)))
            for name, run in zip(page.sheet.names, page.sheet.runs, strict=True)
        ],
        notes=page.notes,
        compared=len(page.sheet.runs) == 2,
        scatter=len(page.sheet.columns) > 1,
        version=version("qualiclip-pyiqa"),
        json=lambda value: json.dumps(value, ensure_ascii=False),
        outlier_z=OUTLIER_Z,
        outlier_count=OUTLIER_COUNT,
        duplicate_bits=DUPLICATE_BITS,
    )
    yield from pieces


def _policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy: this style, this script, and images from inside or beside the page."""
    hashes = {
        name: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for name, text in (("style-src", style), ("script-src", script))
    }
    return "; ".join(
        (
            "default-src 'none'",
            *(f"{name} {value}" for name, value in hashes.items()),
            "img-src data: 'self' file:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _slots(page: Page) -> dict[int, int]:
    """Number the previews inside the page in the order in which the page first shows them."""
    if page.addresses is not None:
        return {}
    shown = (row for row in page.order if row in page.previews)
    return {row: slot for slot, row in enumerate(shown)}


def _facts(page: Page) -> list[str]:
    rows = page.sheet.rows
    errors = sum(row.error is not None for row in rows)
    scores = len({column.source for column in page.sheet.columns})
    facts = [f"{len(rows):,} image{'s' if len(rows) != 1 else ''}", f"{scores} score{'s' if scores != 1 else ''}"]
    if errors:
        facts.append(f"{errors:,} with an error")
    return [*facts, page.made]


def _data(page: Page, slots: Mapping[int, int]) -> dict[str, Any]:
    """Return what the script needs at once."""
    rows, sheet = page.sheet.rows, page.sheet
    paths = [row.record.path or f"row {number + 1}" for number, row in enumerate(rows)]
    start = common_prefix(paths)
    address = common_prefix([each for links in page.links for each in links if each])
    side = [page.previews.get(number) for number in range(len(rows))]
    return {
        "title": visible(page.title),
        "runs": [visible(name) for name in sheet.names],
        "joined": sheet.joined,
        "columns": [_column(sheet, column) for column in sheet.columns],
        "pairs": sheet.pairs,
        "folder": start,
        "shownFolder": visible(start),
        "paths": [path[len(start) :] for path in paths],
        "names": {number: visible(path[len(start) :]) for number, path in enumerate(paths) if not path.isprintable()},
        "linkStart": address,
        "links": [[None if each is None else each[len(address) :] for each in links] for links in page.links],
        "sizes": [[row.record.width or 0, row.record.height or 0] for row in rows],
        "values": [[row.values[number] for row in rows] for number in range(len(sheet.columns))],
        "errors": {number: row.error for number, row in enumerate(rows) if row.error is not None},
        "shownErrors": {number: visible(row.error) for number, row in enumerate(rows) if row.error is not None},
        "outliers": [{row: round(z, 2) for row, z in found.items()} for found in page.outliers],
        "duplicates": page.duplicates,
        "previewType": _type(),
        "previewSlots": [slots.get(number, -1) for number in range(len(rows))] if slots else None,
        "previewAddresses": None
        if page.addresses is None
        else [page.addresses.get(number) for number in range(len(rows))],
        "previewSizes": [None if each is None else [each.width, each.height] for each in side],
        "chunks": [_FIRST_CHUNK, _CHUNK],
        "mapWords": {column: list(words) for column, words in page.words.items()},
        "mapNotes": _map_notes(page),
        "mapped": sorted(page.maps),
        "mapScales": _map_scales(page),
        "outlierZ": OUTLIER_Z,
    }


def _column(sheet: Sheet, column: Column) -> dict[str, Any]:
    more = sheet.runs[column.run or 0].comparative(column.source)
    return {
        "name": column.name,
        "shown": visible(column.name),
        "label": visible(column.label),
        **_grouped(sheet, column),
        "lowerBetter": column.lower_better,
        "more": more,
        "less": opposite(more),
        "run": column.run,
        "limits": column.limits,
    }


def _grouped(sheet: Sheet, column: Column) -> dict[str, str]:
    """Return how menus show a column: by its attribute in the group of its metric, or by its name if it has none."""
    metric, attribute = sheet.runs[column.run or 0].metric_of(column.source)
    if attribute is None:
        return {"group": "", "option": visible(column.name)}
    if len(sheet.runs) > 1:  # a closed menu shows the option alone, so that this has to tell the runs apart
        attribute += f" · {CHANGE if column.run is None else sheet.names[column.run]}"
    return {"group": visible(metric), "option": visible(attribute)}


def _type() -> str:
    return "image/webp" if preview_suffix() == "webp" else "image/jpeg"


def _chunks(page: Page, slots: Mapping[int, int]) -> Iterator[str]:
    """Yield previews as JSON arrays of base64: few at first, for the first view."""
    rows = list(slots)
    starts = [0, *range(_FIRST_CHUNK, len(rows), _CHUNK)]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        if end > start:
            yield page_json([_base64(page.previews[row].data) for row in rows[start:end]])


def _map_scales(page: Page) -> dict[int, list[float]]:
    """Return by column the ends of the scale that all maps share: quantiles of all values, some way apart."""
    values: dict[int, list[np.ndarray]] = {}
    for maps in page.maps.values():
        for each in maps:
            levels = np.frombuffer(each.data, np.uint8).astype(np.float32) / 255
            values.setdefault(each.column, []).append(each.low + (each.high - each.low) * levels)
    scales = {}
    for column, parts in values.items():
        low, high = (float(end) for end in np.quantile(np.concatenate(parts), (0.02, 0.98)))
        limits = page.sheet.columns[column].limits
        least = _LEAST_SCALE * (limits[1] - limits[0]) if limits else 1e-6
        middle, half = (low + high) / 2, max(high - low, least) / 2
        scales[column] = [round(middle - half, 6), round(middle + half, 6)]
    return scales


def _map_notes(page: Page) -> list[str]:
    """Return the notes of all maps, each once."""
    return list(dict.fromkeys(each.note for maps in page.maps.values() for each in maps if each.note is not None))


def _map_chunks(page: Page) -> Iterator[str]:
    """Yield the maps of each row, in the order of `mapped`."""
    numbers = {note: number for number, note in enumerate(_map_notes(page))}
    for row in sorted(page.maps):
        yield page_json([_map(each, numbers) for each in page.maps[row]])


def _map(made: PageMap, notes: Mapping[str, int]) -> dict[str, Any]:
    return {
        **({} if made.note is None else {"note": notes[made.note]}),
        "column": made.column,
        "height": made.height,
        "width": made.width,
        "low": round(made.low, 6),
        "high": round(made.high, 6),
        "extent": [round(each, 5) for each in made.extent],
        "data": _base64(made.data),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
