"""A request that cannot be answered in time is refused at once, and every refusal says when to try again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from test_serve import png  # noqa: E402

from qualiclip_pyiqa.serve import uploads  # noqa: E402
from qualiclip_pyiqa.serve.http import make_app  # noqa: E402
from qualiclip_pyiqa.serve.pace import WINDOW, Pace  # noqa: E402
from qualiclip_pyiqa.serve.service import Service  # noqa: E402
from qualiclip_pyiqa.serve.settings import make_settings  # noqa: E402


def test_the_pace_is_of_the_last_images_while_there_is_work() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.wait(5) == 0  # nothing is measured
    with pace.images(1):
        now += 2
    now += 1000  # without work
    assert pace.wait(5) == 10
    with pace.images(3):
        assert pace.ahead == 3 and pace.wait(1) == 8
        now += 2  # three images in two seconds
    assert pace.ahead == 0 and pace.wait(1) == 1
    with pytest.raises(TimeoutError), pace.images(1):
        now += 4  # time without an answer counts, the image does not
        raise TimeoutError
    assert pace.ahead == 0 and pace.wait(1) == 2
    for _ in range(WINDOW + 1):
        with pace.images(1):
            now += 0.5
    assert pace.wait(1) == pytest.approx(0.5)


class Slow:
    """A service whose network needs so many seconds for an image, one after the other."""

    def __init__(self, timeout: float) -> None:
        self.service = Service(make_settings(metrics="qualiclip-mini", workers=1, timeout=timeout, max_images=8))
        self.seconds = 0.0
        self.scored = 0
        score, turn = self.service.score_one, asyncio.Lock()

        async def one(pixels: np.ndarray) -> Any:
            async with turn:
                await asyncio.sleep(self.seconds)
                self.scored += 1
                return await score(pixels)

        self.service.score_one = one
        self.app = make_app(lambda: self.service, lambda: "")

    async def ask(self, count: int, **body: Any) -> list[tuple[Any, float]]:
        """Send requests at once; return their answers and seconds."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:

            async def one() -> tuple[Any, float]:
                started = time.perf_counter()
                answer = await client.post("/score", **(body or {"content": png()}))
                return answer, time.perf_counter() - started

            return await asyncio.gather(*(one() for _ in range(count)))


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow(timeout=2)
    yield made
    made.service.close()


def test_what_cannot_be_answered_in_time_is_refused_at_once(slow: Slow) -> None:
    async def work() -> None:
        await slow.service.warm_up()
        slow.seconds = 0.1
        await slow.ask(10)  # measured
        answers = await slow.ask(100)
        statuses = [answer.status_code for answer, _ in answers]
        assert set(statuses) == {200, 503} and 3 <= statuses.count(200) <= 20
        refused = [(answer, seconds) for answer, seconds in answers if answer.status_code == 503]
        early = [answer for answer, _ in refused if "before this request" in answer.json()["error"]]
        assert len(early) > 0.8 * len(refused)  # few wait in vain, those that the pace misjudges
        assert all(answer.headers["retry-after"].isdigit() for answer, _ in refused)
        assert max(seconds for _, seconds in answers) < 2 + 8  # a busy machine
        assert slow.service.uploads.pace.ahead == 0 and slow.service.uploads.held == 0
        ((answer, _),) = await slow.ask(1)
        assert answer.status_code == 200  # and it goes on

    asyncio.run(work())


def test_a_request_with_nothing_before_it_is_always_tried(slow: Slow) -> None:
    async def work() -> None:
        await slow.service.warm_up()
        slow.seconds = 30
        ((answer, _),) = await slow.ask(1)
        assert answer.status_code == 503 and answer.headers["retry-after"].isdigit()
        assert answer.json() == {"error": "no answer within 2 seconds; try again later"}
        assert slow.service.uploads.pace.wait(1) > 0.5
        slow.service.uploads.pace._ends.clear()
        slow.service.uploads.pace._ends.extend([-1e6, 0])  # as if an image took ages
        slow.seconds = 0
        ((answer, _),) = await slow.ask(1)
        assert answer.status_code == 200

    asyncio.run(work())


def test_the_images_of_a_form_count(slow: Slow) -> None:
    async def work() -> None:
        await slow.service.warm_up()
        slow.seconds = 0.25
        await slow.ask(3)
        slow.seconds = 0.1
        form = [("image", ("a.png", png()))] * 7
        answers = await slow.ask(3, files=form)
        statuses = [answer.status_code for answer, _ in answers]
        assert statuses.count(200) == 1, [answer.text for answer, _ in answers]
        words = [answer.json()["error"] for answer, _ in answers if answer.status_code == 503]
        assert all(word.startswith("7 images before this request and its own need about ") for word in words)

    asyncio.run(work())


def test_uploads_beyond_memory_say_when_to_try_again(slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "HELD_BYTES", 1000)
    ((answer, _),) = asyncio.run(slow.ask(1, content=b"0" * 1001))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json() == {"error": "the server holds as many uploads as it can; try again later"}
