"""How a server starts and stops: what Ray raises and logs becomes one line, or nothing."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="the extra serve is not installed")
serve = pytest.importorskip("ray.serve", reason="the extra serve is not installed")

from qualiclip_pyiqa.commands import cli  # noqa: E402
from qualiclip_pyiqa.errors import SettingsError  # noqa: E402
from qualiclip_pyiqa.serve.app import build  # noqa: E402
from qualiclip_pyiqa.serve.run import check_resources  # noqa: E402
from qualiclip_pyiqa.serve.settings import make_settings  # noqa: E402


class FakeRay:
    """Stands for the functions of Ray that a server calls; `fails` maps a function to what it raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: dict[str, BaseException] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for module, name in ((ray, "init"), (ray, "shutdown"), (serve, "start"), (serve, "run"), (serve, "delete")):
            monkeypatch.setattr(module, name, self._stand_in(name))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0})
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def _stand_in(self, name: str) -> Any:
        def call(*_: Any, **options: Any) -> None:
            self.calls.append((name, options))
            if name in self.fails:
                raise self.fails[name]

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    level = logging.getLogger("ray.serve").level
    yield FakeRay(monkeypatch)
    logging.getLogger("ray.serve").setLevel(level)


def serve_command(*options: str) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return cli.main(["serve", "qualiclip-mini", "--port", str(port), *options])


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup. This could happen because some of the raylet\nfailed."),
        RuntimeError("The current node timed out during startup. This could"),
        ray.exceptions.RaySystemError("The current node timed out during startup. This could"),
        TimeoutError("The current node timed out during startup. This could"),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(
    fake: FakeRay, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails["init"] = error
    assert serve_command() == 2
    said = capsys.readouterr().err
    assert said.startswith("qualiclip: Ray does not start on this machine (") and "The current node timed out" in said
    assert said.endswith("); if the machine is busy, try again later\n") and said.count("\n") == 1
    assert fake.names == ["init", "shutdown"]  # nothing of it is left


def test_a_cluster_that_is_not_there_is_one_line(fake: FakeRay, capsys: pytest.CaptureFixture[str]) -> None:
    fake.fails["init"] = ConnectionError("Could not find any running Ray instance.")
    assert serve_command("--address", "auto") == 2
    assert capsys.readouterr().err == (
        "qualiclip: Ray is not at auto (Could not find any running Ray instance); start the cluster, or pass another "
        "--address\n"
    )


@pytest.mark.parametrize("step", ["start", "run"])
@pytest.mark.parametrize("kind", [Exception, RuntimeError, TimeoutError, ray.exceptions.RayError])
def test_a_server_that_does_not_start_is_one_line(
    fake: FakeRay, step: str, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails = {step: kind("no\nreplica"), "delete": ray.exceptions.RayError("no controller")}
    assert serve_command() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "qualiclip: the server does not start (no replica)"
    assert "Traceback" not in "".join(lines) and fake.names[-2:] == ["delete", "shutdown"]


def test_the_proxy_has_no_limit_of_time_that_could_answer_first(fake: FakeRay) -> None:
    fake.fails["run"] = RuntimeError("as soon as it has started")
    serve_command("--timeout", "5")
    options = dict(fake.calls)["start"]
    assert options["http_options"]["request_timeout_s"] is None


def test_threads_wait_without_spinning(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the networks, whose processes inherit it."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    fake.fails["init"] = RuntimeError("as soon as it has started")
    serve_command()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    serve_command()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_only_errors_of_ray_are_logged(fake: FakeRay) -> None:
    fake.fails["run"] = RuntimeError("as soon as it has started")
    serve_command()
    assert dict(fake.calls)["start"]["logging_config"]["log_level"] == "ERROR"
    assert not logging.getLogger("ray.serve").isEnabledFor(logging.WARNING)
    assert logging.getLogger("ray.serve").isEnabledFor(logging.ERROR)
    config = build({"metrics": "qualiclip-mini"})._bound_deployment._deployment_config.logging_config
    assert config["log_level"] == "ERROR"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"cpus": 3}, "1 replica of 3 CPU cores need 3, but Ray has 2 on this machine; pass less as --cpus or --repl"),
        ({"cpus": 1, "replicas": 3}, "3 replicas of 1 CPU cores need 3, but Ray has 2 on this machine"),
        ({"cpus": 1, "replicas": "3:9"}, "3 replicas of 1 CPU cores need 3, but Ray has 2 on this machine"),
        (
            {"cpus": 1, "gpus": 0.5},
            "1 replica of 0.5 GPUs need 0.5, but Ray has 0 on this machine; pass less",
        ),
    ],
)
def test_replicas_that_do_not_fit_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_resources(make_settings(metrics="qualiclip-mini", **{"gpus": 0, **values}), {"CPU": 2.0})
    assert str(error.value)[: len(line)] == line


@pytest.mark.parametrize("replicas", ["2", "0:9", "1:9", "auto"])
def test_replicas_that_fit_are_started(replicas: str) -> None:
    check_resources(make_settings(metrics="qualiclip-mini", cpus=1, gpus=0, replicas=replicas), {"CPU": 2.0})


def test_the_command_refuses_replicas_that_do_not_fit(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert serve_command("--cpus", "3", "--gpus", "0") == 2
    assert capsys.readouterr().err.startswith("qualiclip: 1 replica of 3 CPU cores need 3") and "run" not in fake.names
