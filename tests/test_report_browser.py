"""Reports in a real browser: mouse, keyboard, phone, dark theme, screen readers' rules, hostile names, no network."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_pages import HOSTILE, hostile_table, save, write_scores

from qualiclip_pyiqa.report.page import write_report
from qualiclip_pyiqa.scoring.tables import Record

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (apt-get install chromium)")
stats = pytest.importorskip("scipy.stats")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


class Opened:
    """A page, and what it has complained about and asked for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1366, height: int = 860, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, **context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.locator("#cards li, #moved li").first.wait_for()

    def close(self) -> None:
        self.context.close()
        assert not self.wrong
        assert self.requests and all(url.startswith(("file:", "data:", "blob:")) for url in self.requests)

    def names(self) -> list[str]:
        return self.page.locator("#cards .name").all_inner_texts()

    def settle(self) -> None:
        """Wait until a change has been drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def check_access(self) -> None:
        found = axe.Axe().run(self.page).response["violations"]
        assert not found, [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    table = hostile_table(folder)
    records = [
        Record(save(folder / "images" / f"photo {number:02d}.png", number), 96, 64, {"good": number / 20, "bad": 0.1})
        for number in range(7, 19)
    ]
    later = write_scores(folder / "later.csv", records, {"good": False, "bad": True})
    return {
        "table": table,
        "page": write_report(table, folder / "page.html").path,
        "beside": write_report(table, folder / "beside.html", thumbnails="beside").path,
        "compared": write_report(table, folder / "compared.html", later).path,
    }


@pytest.fixture
def opened(browser: Browser, pages: dict[str, Path]) -> Iterator[Opened]:
    made = Opened(browser, pages["page"], height=1700)  # room for all cards
    yield made
    made.close()


def test_opens_worst_first_and_sorts(opened: Opened) -> None:
    page = opened.page
    first = opened.names()
    assert len(first) == 21 and first[0] == "photo 12.png" and first[-1] == "script>.png"
    assert page.locator("#status").inner_text() == "21 images, good: worst first"
    page.click("#direction")
    opened.settle()
    assert opened.names()[0] == "photo 19.png" and opened.names()[-1] == "script>.png"
    page.select_option("#sort", "bad")  # lower is better
    page.click("#direction")
    opened.settle()
    values = [float(text) for text in page.locator("#cards .value").all_inner_texts()[:-1]]
    assert values == sorted(values, reverse=True) and opened.names()[0] == "photo 12.png"
    page.select_option("#sort", "name")
    opened.settle()
    assert opened.names()[-1] == "right\\u202egnp.exe.png"
    page.fill("#search", "PHOTO 1")
    opened.settle()
    assert len(opened.names()) == 10 and page.locator("#reset").is_visible()
    shown = page.locator("#cards li:first-child img")
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 96


def test_brush_by_mouse_and_by_keys(opened: Opened) -> None:
    page = opened.page
    chart = page.locator(".histogram").first.locator(".chart")
    box = chart.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + 20)
    page.mouse.move(box["x"] + 1.2 * box["width"], box["y"] + 20)
    page.mouse.up()
    opened.settle()
    brushed = opened.names()
    assert 0 < len(brushed) < 21 and "photo 19.png" in brushed and "photo 12.png" not in brushed
    assert page.locator("#status").inner_text().startswith(f"{len(brushed)} of 21 images")
    page.mouse.click(box["x"] + 5, box["y"] + 20)
    opened.settle()
    assert len(opened.names()) == 21
    low = page.get_by_label("lowest good")
    low.focus()
    low.press("ArrowRight")
    opened.settle()
    assert len(opened.names()) == 19  # without the worst, and the one without a score
    assert low.get_attribute("aria-valuetext") == "0.023"
    low.press("Home")
    opened.settle()
    assert len(opened.names()) == 21


def test_picture_by_keyboard_alone(opened: Opened) -> None:
    page = opened.page
    page.locator("#cards button").first.focus()
    for key in ("ArrowRight", "End", "Home", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#picture").is_visible()
    name = page.locator("#picture-name").inner_text()
    page.keyboard.press("ArrowRight")
    after = page.locator("#picture-name").inner_text()
    assert after != name
    page.keyboard.press("ArrowLeft")
    assert page.locator("#picture-name").inner_text() == name
    assert page.locator("#profile li").count() == 2
    assert page.locator("#full").evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
    page.keyboard.press("Escape")
    assert not page.locator("#picture").is_visible()
    assert page.evaluate("document.activeElement.querySelector('.name')?.innerText") == name
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator("#profile b").first.inner_text().startswith("outlier, \N{MINUS SIGN}")
    assert page.locator("#profile .rank").first.inner_text().startswith("better than 0 %")


def test_near_duplicates_and_errors(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("button", name="Near-duplicates 2").click()
    opened.settle()
    assert sorted(opened.names()) == sorted([HOSTILE[0], "photo 19.png"])
    page.locator("#cards button").last.click()
    page.locator("#similar button").click()
    assert page.locator("#picture-name").inner_text() == HOSTILE[0]
    assert (
        page.locator("#picture-links a").get_attribute("href")
        == "./images/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E.png"
    )
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Errors").click()
    assert "</script><img src=x onerror=alert(2)> \\u202e broken & 'bad'" in page.locator("#panel-errors").inner_text()
    page.keyboard.press("ArrowRight")
    assert "score range" in page.locator("#panel-settings").inner_text()
    assert "<b>&</b>" in page.locator("#panel-settings").inner_text()


def test_csv_is_the_table(opened: Opened, pages: dict[str, Path], tmp_path: Path) -> None:
    with opened.page.expect_download() as waiting:
        opened.page.click("#download")
    waiting.value.save_as(tmp_path / "down.csv")

    def read(path: Path) -> list[list[str]]:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.reader(file))

    theirs, ours = read(tmp_path / "down.csv"), read(pages["table"])
    assert theirs == ours


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_access_in_both_themes(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    made = Opened(browser, pages["page"], color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    at_first = made.page.evaluate(background)
    assert (at_first == "rgb(19, 21, 22)") == (scheme == "dark")
    made.check_access()
    made.page.locator("#cards button").first.click()
    made.check_access()
    made.page.keyboard.press("Escape")
    for tab in ("Compare", "Errors", "Settings"):
        made.page.get_by_role("tab", name=tab).click()
        made.check_access()
    made.page.click("#theme")
    assert made.page.evaluate(background) != at_first
    made.close()


def test_phone(browser: Browser, pages: dict[str, Path]) -> None:
    made = Opened(browser, pages["beside"], 390, 844, has_touch=True, is_mobile=True)
    assert made.page.evaluate("document.documentElement.scrollWidth") <= 390
    made.page.locator("#cards button").first.tap()
    box = made.page.locator("#picture").bounding_box()
    assert box and (box["width"], box["height"]) == (390, 844)
    made.check_access()
    assert made.page.locator("#full").evaluate("image => image.decode().then(() => image.naturalWidth)") == 96
    made.page.set_viewport_size({"width": 390, "height": 480})  # so short that the part below the image scrolls
    above = made.page.locator("#view").bounding_box()
    assert above and above["y"] >= 40  # below the buttons
    made.page.locator("#picture .picture").evaluate("part => part.scrollTo(0, part.scrollHeight)")
    assert made.page.locator("#picture .picture").evaluate("part => part.scrollTop") > 100
    for button in ("#previous", "#next", "#close"):  # they stay where a thumb finds them
        box = made.page.locator(button).bounding_box()
        assert box and box["y"] >= 0 and box["y"] + box["height"] <= 480
    name = made.page.locator("#picture-name").text_content()
    made.page.locator("#next").tap()
    assert made.page.locator("#picture-name").text_content() != name
    made.page.locator("#close").tap()
    assert not made.page.locator("#picture").is_visible()
    assert any("beside_files/000/" in url for url in made.requests)
    made.close()


def test_two_runs(browser: Browser, pages: dict[str, Path]) -> None:
    made = Opened(browser, pages["compared"])
    page = made.page
    assert page.get_by_role("tab", name="What changed").get_attribute("aria-selected") == "true"
    assert page.locator("#moved .by").first.inner_text() == "+0.580"  # 0.02 to 12 / 20
    before = [0.02 if number == 12 else 0.5 + number / 100 for number in range(7, 19)]
    expected = stats.spearmanr(before, range(7, 19)).statistic
    assert page.locator("#srcc b").inner_text() == f"{expected:.3f}"
    assert page.locator("#srcc").inner_text().endswith("of 12 images")
    box = page.locator("#scatter").bounding_box()
    assert box
    page.mouse.move(box["x"] + 60, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 60)
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + box["height"] - 50)
    page.mouse.up()
    made.settle()
    assert page.locator("#srcc").inner_text() == "SRCC not defined of 1 image"  # the one that was at 0.02
    assert page.locator(".histogram.filtered").count() == 2
    made.check_access()
    made.close()


def test_thousands_of_images_are_few_elements(browser: Browser, tmp_path: Path) -> None:
    save(tmp_path / "one.png", 1)
    records = [Record(f"{number:04d}.png", 96, 64, {"a": number / 3000}) for number in range(3000)]
    made = Opened(
        browser, write_report(write_scores(tmp_path / "s.csv", records, {"a": False}), tmp_path / "r.html").path
    )
    assert made.page.locator("#cards li").count() < 60
    made.page.locator("#cards button").first.focus()
    made.page.keyboard.press("End")
    made.settle()
    assert made.page.evaluate("document.activeElement.querySelector('.name').innerText") == "2999.png"
    assert made.page.evaluate("document.activeElement.parentElement.getAttribute('aria-posinset')") == "3000"
    assert made.page.locator("#cards li").count() < 60
    made.close()


def write_attributes(table: Path, scores: Sequence[Mapping[str, float]]) -> Path:
    """Write scores of two attributes of a metric, and of any others, with the description of the attributes."""
    records = [
        Record(save(table.parent / "images" / f"{number}.png", number), 96, 64, each)
        for number, each in enumerate(scores)
    ]
    write_scores(table, records, dict.fromkeys(scores[0], False))
    meta = table.with_name(f"{table.name}.meta.json")
    described = json.loads(meta.read_text())
    prompts = {"quality": [["Good photo.", "Bad photo."]], "brightness": [["Bright photo.", "Dark photo."]]}
    for name in ("m:look.quality", "m:look.brightness"):
        described["columns"][name]["prompts"] = prompts
    meta.write_text(json.dumps(described))
    return table


def test_menus_of_two_runs_name_the_run(browser: Browser, tmp_path: Path) -> None:
    before = [{"m:look.quality": 0.5, "m:look.brightness": 0.5}] * 2
    after = [{"m:look.quality": 0.9, "m:look.brightness": 0.8}, {"m:look.quality": 0.4, "m:look.brightness": 0.3}]
    one, two = write_attributes(tmp_path / "before.csv", before), write_attributes(tmp_path / "after.csv", after)
    made = Opened(browser, write_report(one, tmp_path / "r.html", two, maps=False).path)
    page = made.page
    chosen = "menu => menu.selectedOptions[0].textContent"
    assert page.locator("#across").evaluate(chosen) == "quality · before"
    assert page.locator("#up").evaluate(chosen) == "quality · after"
    expected = [f"{score} · {run}" for score in ("quality", "brightness") for run in ("change", "before", "after")]
    assert page.locator("#across option").all_text_contents() == expected
    assert page.locator("#across optgroup").get_attribute("label") == "m:look"

    def moved() -> list[tuple[str, str, bool]]:
        items = page.locator("#moved li").all()
        quiet = page.locator("#srcc").evaluate("node => getComputedStyle(node).color")
        colour = "node => getComputedStyle(node).color"
        return [
            (
                item.locator(".by").inner_text(),
                item.locator(".from").inner_text().rpartition(" · ")[2],
                item.locator(".by").evaluate(colour) != quiet,
            )
            for item in items
        ]

    assert moved() == [("+0.400", "better", True), ("\N{MINUS SIGN}0.100", "worse", True)]
    page.select_option("#across", label="brightness · before")
    page.select_option("#up", label="brightness · after")
    # More brightness is not better: a word, but no colour of praise or warning.
    assert moved() == [("+0.300", "brighter", False), ("\N{MINUS SIGN}0.200", "darker", False)]
    made.check_access()
    made.close()


def test_equal_scores(browser: Browser, tmp_path: Path) -> None:
    names = ("same", "two", "beyond")
    records = [
        Record(save(tmp_path / f"{number}.png", number), 96, 64, dict(zip(names, (0.834, number // 2, 7), strict=True)))
        for number in range(4)
    ]
    table = write_scores(tmp_path / "s.csv", records, dict.fromkeys(names, False))
    page = write_report(table, tmp_path / "r.html", maps=False).path
    made = Opened(browser, page)
    ends = [chart.locator(".ends > span").all_inner_texts() for chart in made.page.locator(".histogram").all()]
    # A chart of one value is as wide as the score's range, which is 0 to 1; a score beyond it has a chart around it.
    assert ends == [["0.000", "1.000"], ["0.000", "1.000"], ["6.500", "7.500"]]
    made.page.locator("#cards button").first.click()
    ranks = made.page.locator("#profile .rank").all_inner_texts()
    assert ranks == ["equal to all others", "better than 17 % of the others", "equal to all others"]
    made.close()
    # A change that all images share is within what a change can be.
    records = [replace(record, scores={**record.scores, "same": 0.134}) for record in records]
    later = write_scores(tmp_path / "later.csv", records, dict.fromkeys(names, False))
    made = Opened(browser, write_report(table, tmp_path / "c.html", later, maps=False).path)
    first = made.page.locator(".histogram").first.locator(".ends > span")
    assert first.all_inner_texts() == ["\N{MINUS SIGN}1.000", "1.000"]
    made.close()


def test_an_image_too_small_to_score_is_not_called_unreadable(browser: Browser, tmp_path: Path) -> None:
    records = [Record(save(tmp_path / "fine.png", 1), 96, 64, {"a": 0.5})]
    small = save(tmp_path / "small.png", 2, (16, 16))
    records.append(Record(small, error="small.png is 16x16 pixels; the smallest that can be scored is 32x32"))
    table = write_scores(tmp_path / "s.csv", records, {"a": False})
    made = Opened(browser, write_report(table, tmp_path / "r.html", maps=False).path)
    card = made.page.locator("#cards button", has_text="small.png")
    assert card.locator(".missing").inner_text() == "no score"
    card.click()
    assert "the smallest that can be scored is 32x32" in made.page.locator("#picture-error").inner_text()
    made.close()


def test_charts_of_two_metrics_are_told_apart(browser: Browser, tmp_path: Path) -> None:
    others = [f"a-metric-with-a-long-name-{number}" for number in range(5)]
    names = ["qualiclip-mini+", "m:look.quality", "m:look.brightness", *others]
    table = write_attributes(tmp_path / "s.csv", [dict.fromkeys(names, number / 9) for number in range(9)])
    made = Opened(browser, write_report(table, tmp_path / "r.html", maps=False).path, width=1280)
    titles = made.page.locator(".histogram h3")
    expected = [["qualiclip-mini+"], ["m:look", "quality"], ["m:look", "brightness"], *([name] for name in others)]
    assert [text.split() for text in titles.all_inner_texts()] == expected
    full = made.page.locator(".histogram h3 bdi[title]").evaluate_all("all => all.map((each) => each.title)")
    assert full == names
    assert not titles.evaluate_all("all => all.some((each) => each.scrollWidth > each.clientWidth)")
    made.check_access()
    made.close()


def test_maps_of_a_large_image_are_noted(browser: Browser, tmp_path: Path) -> None:
    for name, width in (("large", 1040), ("usual", 1000)):
        save(tmp_path / "photos" / f"{name}.png", width, (width, 64))
    made = write_report(
        tmp_path / "photos",
        tmp_path / "r.html",
        metrics=["qualiclip-mini:sharpness"],
        options={"device": "cpu", "workers": 0},
        maps=True,
    )
    opened = Opened(browser, made.path)
    for name in ("large", "usual"):
        opened.page.locator("#cards button", has_text=name).click()
        opened.page.locator("#map-of").select_option(index=1)
        assert "not on the scale of the image's score" in opened.page.locator("#map-words").inner_text()
        note = opened.page.locator("#map-note")
        assert note.is_visible() == (name == "large")
        if name == "large":
            assert note.inner_text().startswith("Far larger than the photographs that the model was fitted to")
            opened.check_access()
        opened.page.keyboard.press("Escape")
    opened.close()


def test_menus_group_the_attributes_of_a_metric(browser: Browser, tmp_path: Path) -> None:
    names = ("m:look.quality", "m:look.brightness", "piqe")
    table = write_attributes(tmp_path / "s.csv", [dict.fromkeys(names, number / 9) for number in range(9)])
    made = Opened(browser, write_report(table, tmp_path / "r.html", maps=False).path, color_scheme="dark")
    for menu in ("#sort", "#across"):
        group = made.page.locator(f"{menu} optgroup")
        assert group.get_attribute("label") == "m:look"
        assert group.locator("option").all_text_contents() == ["quality", "brightness"]
        assert "piqe" in made.page.locator(f"{menu} > option").all_text_contents()
    made.page.select_option("#sort", label="brightness")
    made.settle()
    assert made.page.locator("#status").inner_text() == "9 images, brightness: lowest first"
    # A canvas knows no light-dark(): its lines have the colour of the dark theme.
    made.page.get_by_role("tab", name="Compare").click()
    made.settle()
    # Counted in the page, from where a million numbers would take seconds to come.
    count = """canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const near = (at) => [51, 56, 59].every((value, k) => Math.abs(data[at + k] - value) <= 2);
        let found = 0;
        for (let at = 0; at < data.length; at += 4) found += near(at);
        return found;
    }"""
    assert made.page.locator("canvas#scatter").evaluate(count) > 0
    made.check_access()
    made.close()
