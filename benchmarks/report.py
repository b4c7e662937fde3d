"""Size and speed of a report's page in chromium: many images inside the page, and many more beside it.

    python benchmarks/report.py [--inside 5000] [--beside 50000] [--photos DIR] [--chromium PATH]

The images are crops of photographs in 256x192, JPEG, each different; seven columns of scores are drawn at random. A
row has the page's size, the time to write it (decoding and hashing included), the time from navigation to first paint
(median of three), until all of it is read, and to sort by another column until the next frame is drawn (median of
three). Needs Playwright's Python package and chromium.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import common
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.report.page import write_report
from qualiclip_pyiqa.scoring.tables import Record, write_table

SIZE = (256, 192)
COLUMNS = ("quality", "brightness", "sharpness", "noisiness", "colorfulness", "contrast", "compression")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
SORT = """(column) => new Promise((done) => {
    const started = performance.now();
    const select = document.getElementById("sort");
    select.value = column;
    select.dispatchEvent(new Event("change"));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - started)));
})"""


def crops(photos: Path, folder: Path, count: int) -> list[str]:
    """Write crops of photographs, each at a place and size of its own."""
    draw = random.Random(0)
    opened = [Image.open(path).convert("RGB") for path in find_images([str(photos)]).paths[:60]]
    made = []
    for number in range(count):
        photo = opened[number % len(opened)]
        width = draw.randint(min(photo.width, SIZE[0]) // 2, photo.width)
        height = min(photo.height, width * 3 // 4)
        left, top = draw.randint(0, photo.width - width), draw.randint(0, photo.height - height)
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo.resize(SIZE, box=(left, top, left + width, top + height)).save(path, quality=90)
        made.append(str(path))
    return made


def write_scores(path: Path, images: list[str]) -> None:
    draw = random.Random(1)
    records = [Record(image, *SIZE, {f"look.{name}": draw.random() for name in COLUMNS}) for image in images]
    meta: dict[str, Any] = {"columns": {f"look.{name}": {"lower_better": False} for name in COLUMNS}}
    write_table(path, [f"look.{name}" for name in COLUMNS], records, meta)


def measure(
    open_page: Callable[[], Page], folder: Path, photos: Path, count: int, where: str, loads: int
) -> dict[str, Any]:
    images = crops(photos, folder, count)
    write_scores(folder / "scores.csv", images)
    started = time.perf_counter()
    write_report(folder / "scores.csv", folder / "report.html", maps=False, thumbnails=where)
    seconds = time.perf_counter() - started
    page = open_page()
    started = time.perf_counter()
    page.goto((folder / "report.html").as_uri(), wait_until="load", timeout=300_000)
    loaded = time.perf_counter() - started
    sorts = [page.evaluate(SORT, str(column)) for column in (1, 2, 3)]
    shown = page.locator("#cards li").count()
    page.context.close()
    return {
        "images": count,
        "thumbnails": where,
        "page, MB": (folder / "report.html").stat().st_size / 1e6,
        "seconds to write": seconds,
        "first paint, ms": first_paint(open_page, folder / "report.html", loads),
        "loaded, ms": 1000 * loaded,
        "sorted, ms": sorted(sorts)[1],
        "cards in the document": shown,
    }


def first_paint(open_page: Callable[[], Page], path: Path, loads: int) -> float:
    """Return the median of so many fresh loads, in milliseconds."""
    times = []
    for _ in range(loads):
        page = open_page()
        page.goto(path.as_uri(), wait_until="load", timeout=300_000)
        while not (painted := page.evaluate(FIRST_PAINT)):
            page.wait_for_timeout(20)
        times.append(painted)
        page.context.close()
    return float(median(times))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--inside", type=int, default=5000)
    parser.add_argument("--beside", type=int, default=50_000)
    parser.add_argument("--photos", type=Path, default=Path(__file__).parents[1] / "examples" / "photos")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    options = parser.parse_args()
    loads = 3
    if options.quick:
        options.inside, options.beside, loads = 30, 40, 1
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=FLAGS)

        def open_page() -> Page:
            return browser.new_context(viewport={"width": 1366, "height": 860}).new_page()

        for count, where in ((options.inside, "inside"), (options.beside, "beside")):
            if count:
                with TemporaryDirectory() as folder:
                    rows.append(measure(open_page, Path(folder), options.photos, count, where, loads))
        browser.close()
    common.report(options, rows, weights="none")


if __name__ == "__main__":
    main()
