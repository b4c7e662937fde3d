"""Run the application until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from ..errors import SettingsError, WeightsError, counted, one_line, reason
from .settings import ServeSettings

logger = logging.getLogger(__name__)

# For a Ray of the server's own, unless the environment says otherwise. Nothing is sent to anybody. The rest is for few
# cores: without threads and loops that this application does not need, since its networks have a thread of their own,
# and with half of a second, not a tenth, between two rounds of the controller. A network's threads that spin while they
# wait for each other would take the cores from decoding and from the proxy: a tenth of the images a second.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "OMP_WAIT_POLICY": "passive",
}


def run_server(settings: ServeSettings, host: str, port: int, address: str | None, ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM; then answer what has been accepted, and stop.

    Args:
        settings: of the server.
        host, port: where to listen.
        address: of a running Ray cluster; None: RAY_ADDRESS, or else a Ray of its own on this machine.
        ready: called when the server answers.

    Raises:
        SettingsError, PromptError, WeightsError: as `Scorer`; or the port is in use, or Ray or the replicas do not
            start.
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
        _start_ray(address)
        if not address:
            check_resources(settings, ray.cluster_resources())
        # After Ray's own handlers, which exit at once.
        kept = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        logging.getLogger("ray.serve").setLevel(LOGGING["log_level"])
        try:
            # Without a limit of the proxy, so that the replica's answer comes first: its requests all end in time.
            serve.start(http_options={"host": host, "port": port, "request_timeout_s": None}, logging_config=LOGGING)
            serve.run(build(settings), name=NAME)
            if not stop.is_set():
                ready()
            stop.wait()
        except Exception as error:  # of Ray, which raises all kinds
            raise WeightsError(f"the server does not start ({one_line(error)[-300:]})") from error
        finally:
            _delete(NAME)
            for number, handler in kept.items():
                signal.signal(number, handler)
    finally:
        ray.shutdown()


def _start_ray(address: str | None) -> None:
    import ray

    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, include_dashboard=None if address else False)
    except Exception as error:  # also bare ones
        problem = f"Ray is not at {address}" if address else "Ray does not start on this machine"
        advice = (
            "start the cluster, or pass another --address" if address else "if the machine is busy, try again later"
        )
        raise SettingsError(f"{problem} ({reason(error)}); {advice}") from error


def check_resources(settings: ServeSettings, resources: Mapping[str, float]) -> None:
    """Refuse replicas that do not fit into a Ray of the server's own, which would wait for them forever.

    Raises:
        SettingsError: they need more cores or GPUs.
    """
    cpus, gpus = settings.resources()
    least = settings.replicas.partition(":")[0]
    count = 1 if least == "auto" else max(1, int(least))
    for each, name, what, option in ((cpus, "CPU", "CPU cores", "--cpus"), (gpus, "GPU", "GPUs", "--gpus")):
        if count * each > (have := resources.get(name, 0)):
            raise SettingsError(
                f"{counted(count, 'replica')} of {each:g} {what} need {count * each:g}, but Ray has {have:g} on this "
                f"machine; pass less as {option} or --replicas"
            )


def _delete(name: str) -> None:
    """Delete the application after it has answered what it has accepted."""
    from ray import serve

    try:
        serve.delete(name)
    except Exception as error:  # noqa: BLE001 - must not hide why the server ends
        logger.warning("the application did not stop properly (%s)", reason(error))


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
