"""Load a server on loopback: clients with good and bad images, clients that hang or leave, beside the command's rate.

    python benchmarks/serve.py --images DIR... [--limit 120] [--seconds 60] [--clients 64] [--metric qualiclip-mini+]
        [--sizes WIDTHxHEIGHT...] [--weights DIR] [--serve "--replicas 2 --cpus 1"]

First a `Scorer`, as `qualiclip score` has it, scores the photographs twice; the second pass counts. Then `qualiclip
serve` starts with a Ray of its own, and clients send them, each one request after the other, for so many seconds:

    one at a time   one client
    good            all clients, one image in each request
    forms of 8      all clients, eight images in each request
    mixed           all clients, of whom a quarter sends damaged files, an eighth hangs in the middle of an upload for
                    five seconds and then leaves, and an eighth leaves without waiting for its answer
    good again      as before, after all of that

A request is lost if it has no answer, one that is not 200 or the expected 422 (503 is counted beside it), or the score
of another image. Memory is that of all processes of the server, Ray's included, as the sum of their proportional
shares. The clients share the machine's cores with the server. Without --weights, metrics on CLIP have random content.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from folder import resample, size

from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.scoring.allocator import keep_freed_memory
from qualiclip_pyiqa.scoring.scorer import Scorer

START = 600  # seconds that a server may take to start
WAIT = 120  # seconds that a client waits for an answer
HANG = 5.0  # seconds that a client hangs in an upload
LEAVE = 0.2  # seconds after its request that a client leaves
FORM = 8  # images of a form
TOLERANCE = 2e-6


@dataclass
class Tally:
    """What all clients of a step have seen."""

    seconds: list[float] = field(default_factory=list)  # of answered requests with good images
    images: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Photograph:
    data: bytes
    score: float


class Client:
    """Sends requests on one connection, which it makes again where it has to."""

    def __init__(self, port: int, tally: Tally, hang: float) -> None:
        self.port, self.tally, self.seconds_hanging = port, tally, hang
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)

    def one(self, photograph: Photograph) -> None:
        self._ask([photograph], photograph.data, "application/octet-stream")

    def form(self, photographs: list[Photograph]) -> None:
        mark = b"4f8b1c"
        parts = [
            b'--%s\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n\r\n%s\r\n' % (mark, n, each.data)
            for n, each in enumerate(photographs)
        ]
        body = b"".join(parts) + b"--%s--\r\n" % mark
        self._ask(photographs, body, f"multipart/form-data; boundary={mark.decode()}")

    def bad(self, photograph: Photograph) -> None:
        """Send half of a file, which is to be refused."""
        answer = self._answer(photograph.data[: len(photograph.data) // 2], "image/jpeg")
        if answer is None:
            return
        status, text = answer
        with self.tally.lock:
            self.tally.statuses[status] += 1
            if status not in (422, 503):
                self.tally.lost.append(f"{status} for a damaged file: {text[:200]!r}")

    def hang(self, photograph: Photograph) -> None:
        """Send half of a request, wait and leave."""
        self._leave(photograph.data, len(photograph.data) // 2, self.seconds_hanging)

    def leave(self, photograph: Photograph) -> None:
        """Send a request, and leave soon."""
        self._leave(photograph.data, len(photograph.data), LEAVE)

    def _leave(self, body: bytes, sent: int, wait: float) -> None:
        head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT) as connection:
            connection.sendall(head.encode() + body[:sent])
            time.sleep(wait)
        with self.tally.lock:
            self.tally.left += 1

    def _ask(self, photographs: list[Photograph], body: bytes, kind: str) -> None:
        started = time.perf_counter()
        answer = self._answer(body, kind)
        if answer is None:
            return
        status, text = answer
        seconds = time.perf_counter() - started
        wrong = "" if status == 503 else self._wrong(photographs, status, text)
        with self.tally.lock:
            self.tally.statuses[status] += 1
            if wrong:
                self.tally.lost.append(wrong)
            elif status == 200:
                self.tally.seconds.append(seconds)
                self.tally.images += len(photographs)
        if status == 503:
            time.sleep(1)

    def _answer(self, body: bytes, kind: str) -> tuple[int, str] | None:
        try:
            self.connection.request("POST", "/score", body, {"Content-Type": kind})
            response = self.connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            with self.tally.lock:
                self.tally.lost.append(f"no answer: {type(error).__name__}: {error}")
            return None

    @staticmethod
    def _wrong(photographs: list[Photograph], status: int, text: str) -> str:
        if status != 200:
            return f"{status}: {text[:200]!r}"
        content = json.loads(text)
        images = content.get("images", [content])
        scores = [next(iter(image["scores"].values()), None) for image in images]
        expected = [each.score for each in photographs]
        right = len(scores) == len(expected) and all(
            score is not None and abs(score - wanted) <= TOLERANCE * max(1.0, abs(wanted))
            for score, wanted in zip(scores, expected, strict=True)
        )
        return "" if right else f"scores {scores} instead of {expected}"


@contextmanager
def running(metric: str, options: list[str]) -> Iterator[tuple[int, Path]]:
    """Start a server; yield its port, and the folder that marks its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="qs", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "qualiclip_pyiqa", "serve", metric, "--port", str(port), *options],
            env={**os.environ, "RAY_TMPDIR": folder},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stderr is not None
        ready = threading.Event()

        def listen() -> None:
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr)
                if "Ctrl-C stops" in line:
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        try:
            if not ready.wait(START) or process.poll() is not None:
                raise SystemExit("error: the server did not start")
            yield port, Path(folder)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                process.kill()


def memory(folder: Path) -> float:
    """Return the MiB of all processes of the Ray whose files are in a folder."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (path / "cmdline").read_bytes() + (path / "environ").read_bytes():
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def load(
    port: int, folder: Path, photographs: list[Photograph], seconds: float, kinds: list[str]
) -> tuple[Tally, float, list[float]]:
    """Let a client of each kind work for so many seconds; return the tally, the seconds taken and the memory."""
    tally = Tally()
    used = [memory(folder)]
    end = time.perf_counter() + seconds

    def work(number: int, kind: str) -> None:
        client = Client(port, tally, min(HANG, seconds))
        order = random.Random(number)
        send: Callable[..., None] = getattr(client, kind)
        while time.perf_counter() < end:
            send(order.sample(photographs, FORM) if kind == "form" else order.choice(photographs))

    threads = [threading.Thread(target=work, args=(n, kind)) for n, kind in enumerate(kinds)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, seconds / 4))
        used.append(memory(folder))
    return tally, time.perf_counter() - started, used


def mixed(clients: int) -> list[str]:
    """Return the kinds of a step's clients: half good, a quarter bad, an eighth that hangs and one that leaves."""
    kinds = ["one", "bad", "one", "hang", "one", "bad", "one", "leave"]
    return list(itertools.islice(itertools.cycle(kinds), clients))


def command_rate(metric: str, paths: list[str], passes: int) -> tuple[float, list[float]]:
    """Score files as `qualiclip score` does; return images per second of the last pass, and the scores."""
    scorer = Scorer(metric, device="cpu")
    for _ in range(passes):
        started = time.perf_counter()
        scores = [next(iter(record.scores.values())) for record in scorer.score(paths)]
        seconds = time.perf_counter() - started
    return len(paths) / seconds, scores


def row(step: str, clients: int, result: tuple[Tally, float, list[float]], rate: float) -> dict[str, Any]:
    tally, seconds, used = result
    cut = statistics.quantiles(tally.seconds, n=100) if len(tally.seconds) > 1 else [float("nan")] * 99
    return {
        "step": step,
        "clients": clients,
        "images a second": tally.images / seconds,
        "of the command's": tally.images / seconds / rate,
        "p50, s": cut[49],
        "p99, s": cut[98],
        "answers": ", ".join(f"{count}x {status}" for status, count in sorted(tally.statuses.items())),
        "left": tally.left,
        "lost": len(tally.lost),
        "MiB before": used[0],
        "MiB at most": max(used),
        "MiB after": used[-1],
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--sizes", nargs="+", type=size, metavar="WIDTHxHEIGHT")
    parser.add_argument("--metric", default="qualiclip-mini+")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="of qualiclip serve")
    options = parser.parse_args()
    if options.quick:
        options.limit, options.seconds, options.clients = 8, 0.5, 8
        options.sizes = options.sizes or [(64, 48), (48, 64)]
    keep_freed_memory()
    paths = find_images(options.images).paths
    paths = paths[:: max(1, len(paths) // options.limit)][: options.limit]
    embedded = options.metric.startswith("qualiclip-mini")
    with tempfile.TemporaryDirectory() as copies, nullcontext() if embedded else common.weights(options.weights):
        if options.sizes:
            paths = resample(paths, options.sizes, Path(copies))
        rows = measure(paths, options)
    common.report(options, rows, weights=options.weights.name if options.weights else "embedded" if embedded else None)


def measure(paths: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    rate, scores = command_rate(options.metric, paths, passes=2)
    rows: list[dict[str, Any]] = [{"step": "qualiclip score", "images a second": rate, "of the command's": 1.0}]
    photographs = [Photograph(Path(path).read_bytes(), score) for path, score in zip(paths, scores, strict=True)]
    steps = {
        "one at a time": ["one"],
        "good": ["one"] * options.clients,
        f"forms of {FORM}": ["form"] * options.clients,
        "mixed": mixed(options.clients),
        "good again": ["one"] * options.clients,
    }
    with running(options.metric, shlex.split(options.serve)) as (port, folder):
        load(port, folder, photographs, min(5.0, options.seconds), ["one"] * 2)  # warm-up
        for step, kinds in steps.items():
            if options.quick and step not in ("one at a time", "mixed"):
                continue
            result = load(port, folder, photographs, options.seconds, kinds)
            rows.append(row(step, len(kinds), result, rate))
            for line in result[0].lost[:5]:
                print(f"lost in {step}: {line}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
