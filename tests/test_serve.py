"""The server's app without Ray: what it accepts, refuses and answers, and its limits of memory and time."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.images import advice
from qualiclip_pyiqa.images.convert import ReadRules, read_pixels
from qualiclip_pyiqa.images.formats import PLUGINS, usable_formats
from qualiclip_pyiqa.images.worker_process import TimedOutError
from qualiclip_pyiqa.scoring.scorer import Scorer

testclient = pytest.importorskip("starlette.testclient", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from qualiclip_pyiqa.serve import decoding, uploads  # noqa: E402
from qualiclip_pyiqa.serve.decoding import Decoding  # noqa: E402
from qualiclip_pyiqa.serve.http import make_app  # noqa: E402
from qualiclip_pyiqa.serve.service import Service  # noqa: E402
from qualiclip_pyiqa.serve.settings import ServeSettings, make_settings  # noqa: E402

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
LOOK = "qualiclip-mini:look"
UNKNOWN = f"is not in a supported format; expected {', '.join(usable_formats()[:8])} or another of GET /describe"


def png(width: int = 64, height: int = 48, seed: int = 0, high: int = 255) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, high, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    return make_settings(
        metrics=[LOOK, "entropy"], workers=1, max_bytes=300_000, max_pixels=100_000, max_images=3, timeout=20
    )


@pytest.fixture(scope="module")
def service(settings: ServeSettings) -> Iterator[Service]:
    made = Service(settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Any]:
    with testclient.TestClient(make_app(lambda: service, lambda: "# figures\n")) as made:
        made.portal.call(service.warm_up)
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    (record,) = Scorer([LOOK, "entropy"], device="cpu", workers=0).score([png()])
    return dict(record.scores)


def test_a_body_is_one_image(client: Any, expected: dict[str, float]) -> None:
    for headers in ({"content-type": "image/png"}, {}, {"content-type": "application/octet-stream"}):
        answer = client.post("/score", content=png(), headers=headers)
        assert answer.status_code == 200
        content = answer.json()
        assert (content["width"], content["height"], content["name"]) == (64, 48, None)
        assert content["scores"] == pytest.approx(expected, abs=2e-6) and list(content["scores"])[-1] == "entropy"
        assert content["lower_better"] == dict.fromkeys(expected, False)
        # What describes an image is not called better.
        words = dict(zip(("quality", "brightness", "noisiness"), ("better", "brighter", "cleaner"), strict=True))
        assert {name: content["meanings"][f"{LOOK}.{name}"] for name in words} == {
            name: f"higher is {word}" for name, word in words.items()
        }
        assert content["meanings"]["entropy"] == "higher is better" and list(content["meanings"]) == list(expected)
        assert content["error"] is None and content["map"] is None


def test_a_form_is_several_images_in_order(client: Any, expected: dict[str, float]) -> None:
    files = [
        ("image", ("a.png", png())),
        ("image", ("<b>\n.png", b"nothing")),
        ("other", ("c.png", png(40, 64))),
    ]
    answer = client.post("/score", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["images"]
    assert first["name"] == "a.png" and first["scores"] == pytest.approx(expected, abs=2e-6)
    assert second["error"].endswith(UNKNOWN) and "\n" not in second["error"]
    assert second["scores"] == {} and second["width"] is None
    assert (third["name"], third["width"], third["height"]) == ("c.png", 40, 64)


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ({"content": b""}, 400, "the body is empty; expected an image"),
        ({"content": b"%!PS-Adobe"}, 422, f"the image {UNKNOWN}"),
        ({"content": png()[:200]}, 422, "the image is damaged"),
        ({"content": png(31, 64)}, 422, "the image is 31x64 pixels; the smallest that can be scored is 32x32"),
        (
            {"content": png(100, 1001, high=1)},
            422,
            "the image is too large and may be a decompression bomb (100x1001, limit",
        ),
        ({"content": b"0" * 300_001}, 413, "the body is too large; at most 300000 bytes are accepted"),
        ({"content": iter([b"0" * 200_000] * 2)}, 413, "the body is too large; at most 300000 bytes are accepted"),
        ({"json": {}}, 415, "the body is of type application/json; expected an image, or a form (multipart/form-data)"),
        (
            {"files": [("image", ("a.png", b"1"))] * 4},
            400,
            "the form cannot be read (Too many files. Maximum number of files is 3); expected 1 to 3 files, such as",
        ),
        (
            {"files": [("image", ("a.png", b"1"))], "data": {"map": "png"}},
            400,
            "the form's field map is not a file; options belong into the URL's query",
        ),
        ({"files": [("image", ("a.png", b"1"))] * 2}, 422, f"a.png {UNKNOWN}"),
        ({"data": {"image": "1"}, "files": {}}, 422, f"the image {UNKNOWN}"),
        (
            {"content": b"--x--", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "the form has no file; expected 1 to 3 files, such as those of: curl -F image=@FILE -F image=@FILE",
        ),
        (
            {"content": b"?", "headers": {"content-type": "multipart/form-data"}},
            400,
            "the form cannot be read (Missing boundary in multipart); expected 1 to 3 files, such as those of: curl -F",
        ),
        (
            {"content": b"?", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "the form cannot be read (Invalid multipart data); expected 1 to 3 files, such as those of: curl -F",
        ),
        ({"content": png(), "params": {"map": "gif"}}, 400, "map is 'gif'; expected 'values' or 'png'"),
        ({"content": png(), "params": {"map": "png", "metric": "x"}}, 400, "metric is 'x'; expected one of qualiclip"),
        (
            {"content": png(), "params": {"map": "png", "attribute": "sharpnes"}},
            400,
            "qualiclip-mini:look has no attribute 'sharpnes'; expected one of quality, brightness, sharpness,",
        ),
        (
            {"content": png(), "params": {"map": "png", "metric": "entropy"}},
            400,
            "entropy has no quality map here; metrics that have one: qualiclip-mini:look",
        ),
    ],
)
def test_bad_input_is_one_line(client: Any, service: Service, body: dict[str, Any], status: int, line: str) -> None:
    answer = client.post("/score", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error[: len(line)]) == (status, line)
    assert "\n" not in error and service.uploads.held == 0 and service.decoding._held == 0
    assert client.post("/score", content=png()).status_code == 200


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/score?attribute=foo", "attribute chooses a quality map, and has no effect without map=values or map=png"),
        ("/score?attribute=sharpness", "attribute chooses a quality map, and has no effect without map="),
        ("/score?metric=entropy", "metric chooses a quality map, and has no effect without map="),
        ("/score?bogus=1", "'bogus' is not an option of /score; expected map, metric, attribute"),
        (
            "/score?map=png&atribute=x",
            "'atribute' is not an option of /score; expected map, metric, attribute; did",
        ),
        ("/score?map=png&map=values", "map is given 2 times; expected once"),
        ("/map?attribute=sharpness&attribute=quality", "attribute is given 2 times; expected once"),
        ("/map?map=png", "'map' is not an option of /map; expected metric, attribute"),
        ("/map?attribute=", "qualiclip-mini:look has no attribute ''; expected one of quality,"),
    ],
)
def test_options_without_effect_are_refused(client: Any, path: str, line: str) -> None:
    answer = client.post(path, content=png())
    assert (answer.status_code, answer.json()["error"][: len(line)]) == (400, line)


def test_options_of_descriptions(client: Any) -> None:
    answer = client.get("/describe?metric=entropy")
    assert answer.status_code == 400
    assert answer.json() == {"error": "'metric' is not an option of /describe; expected none"}
    assert client.get("/health?probe=1").status_code == 200  # what probes and proxies append is no wish


def test_unknown_paths_and_methods(client: Any) -> None:
    answer = client.get("/nothing")
    assert answer.status_code == 404
    assert answer.json() == {"error": "/nothing does not exist; GET /docs describes what does"}
    answer = client.post("/score/", content=png(), follow_redirects=False)
    assert answer.status_code == 404
    assert answer.json()["error"] == "/score/ does not exist; did you mean '/score'?; GET /docs describes what does"
    answer = client.get("/score")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json() == {"error": "/score does not answer GET; expected POST; GET /docs describes requests"}
    answer = client.delete("/health")
    assert answer.status_code == 405 and "does not answer DELETE; expected GET" in answer.json()["error"]
    assert client.get("/assets/..%2Fhttp.py").status_code == 404
    assert client.get("/assets/none.js").json()["error"].startswith("/assets/none.js does not exist")


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/describe", "/metrics", "/openapi.json", "/assets/page.js"])
def test_head_is_get_without_a_body(client: Any, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"") and get.content
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


def test_head_of_what_is_only_posted(client: Any) -> None:
    answer = client.head("/score")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_a_map_says_how_it_relates_to_the_score_and_what_makes_it_mislead(client: Any) -> None:
    for body, attribute, own_scale, large in (
        (png(1030, 64), "sharpness", True, True),
        (png(1000, 64), "quality", False, False),
    ):
        answer = client.post(f"/score?map=values&attribute={attribute}", content=body).json()["map"]
        assert answer["own_scale"] == own_scale == ("not on the scale of the image's score" in answer["relation"])
        assert (answer["note"] is not None) == large
        assert not large or answer["note"].startswith("far larger than the photographs that the model was fitted to")


def photo(form: str) -> bytes:
    file = io.BytesIO()
    Image.open(PHOTOS / "hats.jpg").resize((240, 160)).save(file, form)
    return file.getvalue()


OPERATOR = ("allow_truncated", "max_pixels", "MAX_IMAGE_PIXELS", "decode_timeout", "--", "pip install", "pillow")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            photo("JPEG")[:-500],
            "the image is damaged (truncated: its image data end too early); expected a whole image",
        ),
        (
            png(100, 1001, high=1),
            "the image is too large and may be a decompression bomb (100x1001, limit 100000 pixels)",
        ),
        (
            b"\xff\x0a" + bytes(100),
            "the image is a JPEG XL image, which cannot be opened here; expected another format",
        ),
    ],
)
def test_advice_for_the_operator_is_not_a_clients(
    client: Any, data: bytes, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if data.startswith(b"\xff\x0a") and importlib.util.find_spec("pillow_jxl"):
        pytest.skip("pillow-jxl-plugin is installed")
    (form,) = client.post("/score", files=[("image", ("image.jpg", data))]).json()["images"]
    for answer in (client.post("/score", content=data), client.post("/map", content=data)):
        assert answer.status_code == 422 and answer.json() == {"error": line}
    assert form["error"] == line.replace("the image", "image.jpg", 1)


def test_a_decoder_that_is_too_slow_is_not_the_clients_to_change(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> Any:
        raise TimedOutError

    monkeypatch.setattr("qualiclip_pyiqa.images.worker_process.WorkerProcess.decode", late)
    answer = client.post("/score", content=png())
    assert answer.status_code == 422 and answer.json() == {"error": "the image was not decoded within 10 seconds"}


def test_all_advice_is_removed() -> None:
    for line in (advice.TRUNCATED, advice.MAX_PIXELS, advice.PILLOW, advice.DECODE_TIMEOUT):
        assert any(word in line for word in OPERATOR) and advice.without_advice(f"a.png is bad{line}") == "a.png is bad"
    for what, package in PLUGINS.values():
        line = advice.without_advice(f"a.png is {what}, which needs {package}")
        assert line == f"a.png is {what}, which cannot be opened here; expected another format"


def test_maps(client: Any, service: Service) -> None:
    photo = Image.open(PHOTOS / "hats.jpg").resize((240, 160))
    file = io.BytesIO()
    photo.save(file, "PNG")
    wish = {"map": "values", "attribute": "sharpness"}
    found = client.post("/score", content=file.getvalue(), params=wish).json()["map"]
    again = service.maps.map(read_pixels(file.getvalue()), LOOK, "sharpness")
    assert found["attribute"] == "sharpness" and found["metric"] == LOOK and found["png"] is None
    assert np.allclose(found["values"], again.values, rtol=1e-5) and np.shape(found["values"]) == (5, 8)
    found = client.post("/score", content=file.getvalue(), params={**wish, "map": "png"}).json()["map"]
    assert found["values"] is None
    drawn = base64.b64decode(found["png"].removeprefix("data:image/png;base64,"))
    answer = client.post("/map", content=file.getvalue(), params={"attribute": "sharpness"})
    assert answer.headers["content-type"] == "image/png" and answer.content == drawn
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.size == (240, 160) and image.mode == "RGBA"
        opacity = np.asarray(image)[..., 3]
    whole = again.enlarged()
    level = np.clip((whole - again.low) / (again.high - again.low), 0, 1)
    assert np.allclose(opacity, 229.5 * (1 - level), atol=1) and np.ptp(opacity) > 60  # the worse, the more is covered
    assert client.post("/map", files=[("a", ("a.png", png()))] * 2).status_code == 400
    assert client.post("/map", content=b"no").json() == {"error": f"the image {UNKNOWN}"}


def test_descriptions(client: Any) -> None:
    about = client.get("/describe").json()
    assert about["limits"] == {"bytes": 300_000, "pixels": 100_000, "images": 3, "seconds": 20, "decode_seconds": 10}
    assert about["metrics"][0]["maps"][:3] == ["quality", "brightness", "sharpness"]
    assert about["metrics"][1] == {"name": "entropy", "maps": []}
    assert "PNG" in about["formats"] and "EPS" not in about["formats"]
    assert ("JXL" in about["formats"]) == (importlib.util.find_spec("pillow_jxl") is not None)
    assert client.get("/health").json() == {"status": "ok"} and client.get("/metrics").text == "# figures\n"
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/score", "/map", "/describe", "/health", "/metrics"}
    docs = client.get("/docs")
    for words in ("POST /score", "multipart/form-data", "ImageAnswer", "quality map", "Figures for Prometheus"):
        assert words in docs.text
    for page in (docs, client.get("/")):
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "http:" not in page.text and "https:" not in page.text
        for link in {part.split('"')[0] for part in page.text.split('href="')[1:] + page.text.split('src="')[1:]}:
            if not link.startswith(("#", "data:")):
                assert client.get(f"/{link}").status_code == 200, link


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))  # type: ignore[arg-type]


def test_a_decoder_that_does_not_come_back_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(self: Any, thread: int, number: int, source: bytes) -> np.ndarray | ImageError:
        if source == b"hang":
            release.wait(30)
        return np.zeros((64, 64, 3), np.uint8)

    monkeypatch.setattr("qualiclip_pyiqa.images.workers.Decoder._decode", hang)
    made = Decoding(1, ReadRules(), 10)

    async def work() -> None:
        async def decode(data: bytes) -> tuple[int, ...]:
            async with made.pixels(data) as pixels:
                return pixels.shape

        gone = asyncio.create_task(decode(b"hang"))
        waiting = [asyncio.create_task(decode(b"")) for _ in range(5)]
        await asyncio.sleep(0.05)
        gone.cancel()  # its client left: the others are decoded once its process is free
        waiting[-1].cancel()
        release.set()
        assert await asyncio.gather(*waiting[:-1]) == [(64, 64, 3)] * 4
        assert made._decoder.pending == 0 and made._held == 0 and not made._waiting
        assert made._slots._value == 2

    run(work)
    made.close()


def test_pixels_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DECODED_BYTES", 2 * 64 * 48 * 3)
    made = Decoding(1, ReadRules(), 10)
    held: list[int] = []

    async def work() -> None:
        end = asyncio.Event()

        async def hold() -> None:
            async with made.pixels(png()):
                held.append(1)
                await end.wait()

        tasks = [asyncio.create_task(hold()) for _ in range(12)]
        for _ in range(200):
            await asyncio.sleep(0.01)
            if len(held) >= 4:
                break
        await asyncio.sleep(0.1)
        assert 2 <= len(held) <= 4  # two fill the limit; two more may have been on their way
        end.set()
        await asyncio.gather(*tasks)
        assert len(held) == 12 and made._held == 0

    run(work)
    made.close()


def test_time_runs_out(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.uploads, "timeout", 0.2)

    async def never(pixels: np.ndarray) -> Any:
        await asyncio.sleep(30)

    monkeypatch.setattr(service, "score_one", never)
    answer = client.post("/score", content=png())
    assert answer.status_code == 503 and answer.json() == {"error": "no answer within 0.2 seconds; try again later"}
    assert int(answer.headers["retry-after"]) >= 1

    async def slow() -> bytes:
        sent: list[Any] = []

        async def receive() -> Any:
            if sent or hasattr(receive, "asked"):
                await asyncio.sleep(30)
            receive.asked = True  # type: ignore[attr-defined]
            return {"type": "http.request", "body": b"1", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": []}
        await client.app(scope, receive, send)
        assert sent[0]["status"] == 408
        body: bytes = sent[1]["body"]
        return body

    assert client.portal.call(slow) == b'{"error":"the upload did not end within 0.2 seconds"}'
    monkeypatch.setattr(uploads, "IDLE", 0.1)
    assert client.portal.call(slow) == b'{"error":"the upload stopped for 0.1 seconds"}'
    assert service.uploads.held == 0 and service.decoding._held == 0


def test_a_batch_of_many_sizes(service: Service, client: Any, expected: dict[str, float]) -> None:
    images = [read_pixels(png(width, 48, seed)) for seed, width in enumerate((64, 40, 64, 52))]
    scored = client.portal.call(service.score_batch, images)
    alone = Scorer([LOOK, "entropy"], device="cpu", workers=0).score(images)
    for found, record in zip(scored, alone, strict=True):
        assert found.scores == pytest.approx(record.scores, abs=2e-6)
    assert scored[0].scores == pytest.approx(expected, abs=2e-6)


def test_outcomes_are_counted(client: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(service, "count", counted.append)
    client.post("/score", files=[("a", ("a.png", png())), ("b", ("b.png", b"no"))])
    client.post("/map", content=png())
    assert sorted(counted) == ["mapped", "refused", "scored"]


def test_a_server_whose_decoders_do_not_start_is_unhealthy(client: Any, service: Service) -> None:
    service.decoding.failure = SettingsError("decoding processes fail to start")
    try:
        answer = client.get("/health")
        assert answer.status_code == 503 and answer.json() == {"error": "decoding processes fail to start"}
    finally:
        service.decoding.failure = None


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"max_bytes": 0}, "max_bytes is 0: input should be greater than or equal to 1"),
        ({"replicas": "3:2"}, "replicas is '3:2': expected a number of at least 1, MIN:MAX or auto"),
        ({"replicas": 0}, "replicas is 0: expected a number of at least 1, MIN:MAX or auto"),
        ({"workers": 0}, "workers is 0: input should be greater than or equal to 1"),
        ({"timeout": "soon"}, "timeout is 'soon': input should be a valid number"),
        ({"max_byte": 3}, "max_byte is 3: extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError) as error:
        make_settings(metrics="qualiclip-mini", **values)
    assert str(error.value)[: len(line)] == line and "\n" not in str(error.value)


def test_settings_from_text() -> None:
    made = ServeSettings(metrics="qualiclip-mini", max_bytes="5", cpus="2", replicas=3)  # type: ignore[arg-type]
    assert (made.metrics, made.max_bytes, made.replicas) == (("qualiclip-mini",), 5, "3")
    assert made.resources()[0] == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("qualiclip-min", "unknown metric 'qualiclip-min'; did you mean 'qualiclip-mini'?"),
        ("qualiclip-mini qualiclip-mini", "METRIC qualiclip-mini is given twice"),
        ("psnr", "psnr needs a reference image"),
        ("qualiclip-mini --port 0", "--port is 0; expected 1 to 65535"),
        ("qualiclip-mini --replicas 2:1", "replicas is '2:1': expected a number of at least 1"),
        ("qualiclip-mini --workers 0", "workers is 0: input should be greater than or equal to 1"),
        (
            "qualiclip-mini --port {used}",
            "127.0.0.1:{used} cannot be listened on (Address already in use); pass another",
        ),
        ("qualiclip-mini --host 203.0.113.7", "203.0.113.7:8000 cannot be listened on (Cannot assign requested"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        used = held.getsockname()[1]
        assert cli.main(["serve", *arguments.format(used=used).split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"qualiclip: {line.format(used=used)}") and said.count("\n") == 1
