"""`qualiclip serve`: score images over HTTP, and on a page in the browser."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import SettingsError
from ..metrics.registry import LOOK_METRIC
from ..optional import require
from . import Commands, a_number, add_read_options, check_different, read_options, say

# Options of `ServeSettings`, besides those of reading.
_OPTIONS = (
    "precision", "compile", "batch_size", "batch_wait", "replicas", "cpus", "gpus",
    "max_bytes", "max_images", "timeout", "max_ongoing", "max_queued",
)  # fmt: skip


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="score images over HTTP, and on a page in the browser",
        description="Serve metrics over HTTP with Ray Serve: POST an image to /score; / is a page for people, /docs "
        "describes the rest. There is no authentication: beyond this machine, put a proxy in front of it. "
        "SIGINT and SIGTERM stop it after what it has accepted. docs/serving.md has limits, clusters and examples.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "metrics",
        metavar="METRIC",
        nargs="*",
        help=f"NR metric of pyiqa, or a file, with or without prompts (clipiqa:look) (default: {LOOK_METRIC})",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--replicas", metavar="N", help="a number, MIN:MAX, or auto (default: 1)")
    parser.add_argument("--cpus", type=a_number, metavar="N", help="CPU cores of a replica (default: 4, or all)")
    parser.add_argument("--gpus", type=a_number, metavar="N", help="GPUs of a replica (default: 1 if there is one)")
    parser.add_argument("--address", help="running Ray cluster, such as auto (default: a Ray of its own)")
    parser.add_argument("--precision", help="fp32 (default), tf32, bf16 or fp16")
    parser.add_argument("--compile", action="store_const", const=True, help="use torch.compile")
    parser.add_argument("--batch-size", type=int, metavar="N", help="maximum number of images per batch")
    parser.add_argument(
        "--batch-wait", type=a_number, metavar="SECONDS", help="time an image waits for others (default: 0)"
    )
    parser.add_argument("--max-bytes", type=int, metavar="N", help="of a request (default: 33554432)")
    parser.add_argument("--max-images", type=int, metavar="N", help="of a request (default: 16)")
    parser.add_argument(
        "--timeout", type=a_number, metavar="SECONDS", help="time for a request, upload included (default: 60)"
    )
    parser.add_argument("--max-ongoing", type=int, metavar="N", help="requests in a replica (default: 64)")
    parser.add_argument(
        "--max-queued", type=int, metavar="N", help="requests waiting for a replica; more get 503 (default: 64)"
    )
    add_read_options(parser, timeout=10, pixels=50)


def run(arguments: argparse.Namespace) -> int:
    for module in ("ray.serve", "python_multipart"):
        require(module, "serve", "qualiclip serve")
    from ..serve.run import run_server
    from ..serve.settings import make_settings

    metrics = arguments.metrics or [LOOK_METRIC]
    check_different("METRIC", metrics)
    if not 1 <= arguments.port <= 65535:
        raise SettingsError(f"--port is {arguments.port}; expected 1 to 65535")
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None
    }
    settings = make_settings(metrics=metrics, **options, **read_options(arguments))
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host

    def ready() -> None:
        say(f"qualiclip: {', '.join(metrics)} on http://{host}:{arguments.port} (Ctrl-C stops)")

    run_server(settings, arguments.host, arguments.port, arguments.address, ready)
    say("qualiclip: stopped")
    return 0
