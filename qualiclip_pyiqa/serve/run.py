"""Run the application until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

from ..errors import SettingsError, WeightsError, one_line, reason
from .settings import ServeSettings

# For a Ray of the server's own, unless the environment says otherwise. Nothing is sent to anybody. The rest is for few
# cores: without threads and loops that this application does not need, since its networks have a thread of their own,
# and with half of a second, not a tenth, between two rounds of the controller.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def run_server(settings: ServeSettings, host: str, port: int, address: str | None, ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM; then answer what has been accepted, and stop.

    Args:
        settings: of the server.
        host, port: where to listen.
        address: of a running Ray cluster; None: RAY_ADDRESS, or else a Ray of its own on this machine.
        ready: called when the server answers.

    Raises:
        SettingsError, PromptError, WeightsError: as `Scorer`; or the port is in use, or no such cluster.
    """
    settings.scorer("cpu")  # finds mistakes before anything is started
    _check_port(host, port)
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    from .app import LOGGING, NAME, build

    address = address or os.environ.get("RAY_ADDRESS")
    stop = threading.Event()
    try:
        try:
            ray.init(
                address=address or "local", logging_level=logging.ERROR, include_dashboard=None if address else False
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(f"Ray does not start, or is not at {address or 'local'} ({reason(error)})") from error
        # After Ray's own handlers, which exit at once.
        kept = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(
                http_options={"host": host, "port": port, "request_timeout_s": settings.timeout + 30},
                logging_config=LOGGING,
            )
            serve.run(build(settings), name=NAME)
            if not stop.is_set():
                ready()
            stop.wait()
        except RuntimeError as error:
            raise WeightsError(f"the server does not start ({one_line(error)[-300:]})") from error
        finally:
            serve.delete(NAME)  # waits for what has been accepted
            for number, handler in kept.items():
                signal.signal(number, handler)
    finally:
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is in use, which Ray Serve reports only in its log."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); pass another --port"
        ) from error
