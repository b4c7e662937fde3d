"""A server as `qualiclip serve` starts it: over sockets, in a browser, overloaded, and stopped while it works."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.scoring.scorer import Scorer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytest.importorskip("ray.serve", reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

from ray.exceptions import TaskCancelledError  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from qualiclip_pyiqa.serve.app import ClientsLeave, build  # noqa: E402
from qualiclip_pyiqa.serve.figures import merge, render  # noqa: E402
from qualiclip_pyiqa.serve.settings import ServeSettings, make_settings  # noqa: E402

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
METRIC = "qualiclip-mini:look"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Small enough to be reached, and enough for what a page loads: requests in the replica, and waiting for it.
ONGOING, QUEUED = 6, 4


class Server:
    """The command in a process of its own, with a Ray of its own."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        limits = f"--max-ongoing {ONGOING} --max-queued {QUEUED} --timeout 60 --workers 1 --cpus 1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qualiclip_pyiqa", "serve", METRIC, "--port", str(self.port), *limits.split()],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_TMPDIR": folder},
            start_new_session=True,
        )
        self.said: list[str] = []
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "Ctrl-C stops" in line:
                self.ready.set()
        self.ready.set()

    def connect(self, body: bytes, sent: int) -> socket.socket:
        """Begin a request, and send only so much of its body."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = ("POST /score HTTP/1.1", "Host: localhost", "Content-Type: image/jpeg", f"Content-Length: {len(body)}")
        made.sendall("\r\n".join((*head, "", "")).encode() + body[:sent])
        return made


def of_ray(folder: str) -> list[int]:
    """List the processes of a Ray whose files are in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (path / "cmdline").read_bytes() + (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="qs", ignore_cleanup_errors=True) as made:  # short, for Ray's sockets
        yield made


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    made = Server(folder)
    try:
        assert made.ready.wait(400) and made.process.poll() is None, "".join(made.said)
        yield made
    finally:
        made.process.terminate()
        try:
            made.process.wait(120)
        except subprocess.TimeoutExpired:
            made.process.kill()
        for pid in of_ray(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def hats() -> bytes:
    return (PHOTOS / "hats.jpg").read_bytes()


def test_examples_of_the_docs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for name in ("hats.jpg", "parrots.jpg"):
        shutil.copy(PHOTOS / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- served -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    answers = []
    for line in block.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").splitlines():
        done = subprocess.run([*shlex.split(line), "-sSf"], capture_output=True, timeout=120)
        assert done.returncode == 0, (line, done.stderr)
        answers.append(done.stdout)
    records = list(Scorer(METRIC, device="cpu", workers=0).score(["hats.jpg", "parrots.jpg"]))
    one, mapped = json.loads(answers[0]), json.loads(answers[1])
    assert one["scores"] == pytest.approx(dict(records[0].scores), abs=2e-6)
    assert (one["width"], one["height"], one["map"]) == (768, 512, None)
    assert mapped["scores"] == one["scores"] and mapped["map"]["attribute"] == "sharpness"
    images = json.loads(answers[2])["images"]
    assert [image["name"] for image in images] == ["hats.jpg", "parrots.jpg"]
    for image, record in zip(images, records, strict=True):
        assert image["scores"] == pytest.approx(dict(record.scores), abs=2e-6)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(answers[4])["limits"]["images"] == 16 and json.loads(answers[5]) == {"status": "ok"}


def test_clients_that_leave_are_forgotten(server: Server, hats: bytes) -> None:
    for sent in (0, 1000, len(hats)):  # before, while and after they send an image
        for _ in range(2 * (ONGOING + QUEUED)):
            server.connect(hats, sent).close()
    deadline = time.monotonic() + 120
    while (answer := httpx.post(f"{server.url}/score", content=hats, timeout=120)).status_code == 503:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)
    assert answer.status_code == 200


def test_an_overloaded_server_says_so_and_recovers(server: Server, hats: bytes) -> None:
    burst = [server.connect(hats, len(hats)) for _ in range(6 * (ONGOING + QUEUED))]
    answers = [each.recv(1000).decode() for each in burst]
    for each in burst:
        each.close()
    refused = [answer for answer in answers if answer.startswith("HTTP/1.1 503")]
    answered = [answer for answer in answers if answer.startswith("HTTP/1.1 200")]
    assert refused and len(answered) >= ONGOING and len(refused) + len(answered) == len(answers)  # nothing is lost
    assert all("retry-after: 1\r\n" in answer for answer in refused)
    assert httpx.post(f"{server.url}/score", content=hats, timeout=120).status_code == 200


def test_many_at_once_are_all_answered(server: Server, hats: bytes) -> None:
    answers: list[Any] = [None] * (ONGOING + QUEUED)
    bad = hats[:2000]  # damaged

    def ask(number: int) -> None:
        answers[number] = httpx.post(f"{server.url}/score", content=bad if number % 2 else hats, timeout=120)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status_code for answer in answers]
    assert statuses == [422 if number % 2 else 200 for number in range(len(answers))]
    assert answers[1].json()["error"].startswith("the image is damaged")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


class Opened:
    """The page, and what it complains about and asks for."""

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.context: BrowserContext = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.server = server
        self.page.goto(server.url)

    def drop(self, name: str, data: bytes) -> None:
        """Drop a file on the page, as a mouse does."""
        held = self.page.evaluate_handle(
            """([name, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name));
                return transfer;
            }""",
            [name, list(data)],
        )
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": held})

    def check_access(self) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
        found = axe.Axe().run(self.page).response["violations"]
        assert not found, [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]

    def close(self) -> None:
        self.context.close()
        assert not self.wrong
        assert all(url.startswith((self.server.url, "data:", "blob:")) for url in self.requests)


def test_page(browser: Browser, server: Server, hats: bytes) -> None:
    opened = Opened(browser, server, color_scheme="dark")
    page = opened.page
    page.locator("#metrics", has_text=METRIC).wait_for()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 22)"
    opened.check_access()
    opened.drop("<img src=x>.jpg", hats)
    page.locator("#scores li").first.wait_for()
    assert page.locator("#name").inner_text() == "<img src=x>.jpg"
    assert page.locator("#facts").inner_text() == "768 x 512 pixels"
    assert page.locator("#scores .label").all_inner_texts()[:2] == ["quality", "brightness"]
    words = ["higher is better", "higher is brighter", "higher is sharper", "higher is cleaner"]
    assert page.locator("#scores .rank").all_inner_texts()[:4] == words
    assert not page.locator("#large").is_visible()
    record = next(iter(Scorer(METRIC, device="cpu", workers=0).score([hats])))
    assert page.locator("#scores .number").all_inner_texts() == [f"{score:.3f}" for score in record.scores.values()]
    overlay = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    assert page.locator("#overlay").evaluate(overlay) == [768, 512]
    page.select_option("#attribute", label="sharpness")
    page.locator("#words", has_text="sharpness:").wait_for()
    assert "not on the scale of the image's score" in page.locator("#words").inner_text()
    page.fill("#strength", "30")
    assert page.locator("#overlay").evaluate("image => getComputedStyle(image).opacity") == "0.3"
    opened.check_access()
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 246, 243)"
    opened.check_access()
    opened.close()


def choose(page: Page, path: Path) -> None:
    """Choose a file by the keyboard; on a busy machine the browser now and then drops the key."""
    from playwright.sync_api import TimeoutError as TooLateError

    for tries_left in reversed(range(5)):
        try:
            with page.expect_file_chooser(timeout=10_000) as chosen:
                page.keyboard.press("Enter")
            chosen.value.set_files(path)
            return
        except TooLateError:
            if not tries_left:
                raise
            page.bring_to_front()


def test_page_by_keyboard_and_with_a_bad_file(browser: Browser, server: Server, tmp_path: Path) -> None:
    opened = Opened(browser, server, viewport={"width": 390, "height": 844})
    page = opened.page
    page.wait_for_load_state("networkidle")
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    assert page.evaluate("document.activeElement.id") == "file"
    (tmp_path / "bad.png").write_bytes(b"no image")
    choose(page, tmp_path / "bad.png")
    page.locator("#error:visible").wait_for()
    assert page.locator("#error").inner_text().startswith("the image is not in a supported format; expected JPEG")
    assert not page.locator("#result").is_visible()
    opened.check_access()
    page.set_input_files("#file", PHOTOS / "hats.jpg")
    page.locator("#scores li").first.wait_for()
    assert not page.locator("#error").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.goto(f"{server.url}/docs")
    opened.check_access()
    opened.wrong = [line for line in opened.wrong if "422" not in line]  # the browser logs each refusal
    opened.close()


def test_figures_for_prometheus(server: Server) -> None:
    deadline = time.monotonic() + 120
    while "ray_qualiclip_images_total{" not in (text := httpx.get(f"{server.url}/metrics", timeout=60).text):
        assert time.monotonic() < deadline, text
        time.sleep(2)
    outcomes = re.findall(r'^ray_qualiclip_images_total\{.*outcome="(\w+)".*\} (\d+)', text, flags=re.MULTILINE)
    assert "scored" in dict(outcomes) and "# TYPE ray_qualiclip_images_total counter" in text


def test_head_of_pages_and_of_health(server: Server) -> None:
    for path in ("/", "/health"):
        answer = httpx.head(server.url + path, timeout=60)
        assert (answer.status_code, answer.content) == (200, b"") and int(answer.headers["content-length"]) > 0


def test_the_terminal_has_errors_and_nothing_else(server: Server, folder: str, hats: bytes) -> None:
    """After all that load; and a replica that is killed is an error, whose place is taken by another."""
    assert len(server.said) == 1 and server.said[0].startswith(f"qualiclip: {METRIC} on {server.url}"), server.said
    (replica,) = (pid for pid in of_ray(folder) if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(replica, signal.SIGKILL)
    deadline = time.monotonic() + 240
    while not any(re.search("died|UNHEALTHY", line) for line in server.said):
        assert time.monotonic() < deadline, server.said
        time.sleep(0.5)
    while (answer := httpx.post(f"{server.url}/score", content=hats, timeout=240)).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)


def test_stopping_answers_what_was_accepted(server: Server, folder: str, hats: bytes) -> None:
    late = server.connect(hats, 1000)
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    late.sendall(hats[1000:])
    assert late.recv(100).startswith(b"HTTP/1.1 200 OK")
    late.close()
    assert server.process.wait(120) == 0
    server.reader.join(10)
    assert server.said[-1] == "qualiclip: stopped\n" and "Traceback" not in "".join(server.said)
    deadline = time.monotonic() + 60
    while left := of_ray(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))


def test_the_configuration_of_the_docs_is_valid() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(block)).applications
    settings = make_settings(**application.args)
    assert settings.max_pixels == 20_000_000 and application.import_path == "qualiclip_pyiqa.serve.app:build"
    assert [each.name for each in application.deployments] == [build(application.args)._bound_deployment.name]


def test_ray_passes_settings_by_name() -> None:
    made = build(
        {"metrics": "qualiclip-mini", "max_ongoing": "7", "replicas": 2}
    )._bound_deployment  # as `serve run` does
    assert (made.max_ongoing_requests, made.num_replicas) == (7, 2)
    with pytest.raises(SettingsError, match=r"^max_byte is '7': extra inputs are not permitted$"):
        build({"metrics": "qualiclip-mini", "max_byte": "7"})


@pytest.mark.parametrize(
    ("replicas", "number", "scaling"), [("2", 2, None), ("1:8", None, (1, 8)), ("auto", None, (1, 100))]
)
def test_options_are_passed_on_to_ray(replicas: str, number: int | None, scaling: tuple[int, int] | None) -> None:
    settings = ServeSettings(
        metrics=("qualiclip-mini",), replicas=replicas, cpus=3, gpus=0.5, max_ongoing=9, max_queued=7
    )
    made = build(settings)._bound_deployment
    assert made.max_ongoing_requests == 9 and made.max_queued_requests == 7
    assert made.ray_actor_options["num_cpus"] == 3 and made.ray_actor_options["num_gpus"] == 0.5
    found = made._deployment_config.autoscaling_config
    if scaling is None:
        assert made.num_replicas == number and found is None
    else:
        assert (found.min_replicas, found.max_replicas) == scaling


def test_figures_of_several_nodes_are_one_text() -> None:
    text = """# HELP ray_serve_requests_total Requests.
# TYPE ray_serve_requests_total counter
ray_serve_requests_total{{NodeAddress="{0}"}} {1}
# HELP ray_other Other.
# TYPE ray_other gauge
ray_other 1.0
"""
    families: dict[str, Any] = {}
    merge(text.format("a", 3), families)
    merge(text.format("b", 4), families)
    assert render(families).splitlines() == [
        "# HELP ray_serve_requests_total Requests.",
        "# TYPE ray_serve_requests_total counter",
        'ray_serve_requests_total{NodeAddress="a"} 3.0',
        'ray_serve_requests_total{NodeAddress="b"} 4.0',
    ]


def test_a_client_that_left_is_no_error_of_the_server() -> None:
    async def gone() -> dict[str, Any]:
        raise TaskCancelledError

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send(await receive())

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with ThreadPoolExecutor(1) as thread:  # Playwright has a loop in this one
        thread.submit(lambda: asyncio.run(ClientsLeave(app)({"type": "http"}, gone, send))).result()
    assert sent == [{"type": "http.disconnect"}]
