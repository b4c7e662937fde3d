"""Processes of their own that need not import anything: forks of one server that has imported everything.

They start in a few milliseconds; what is imported in them is not tested.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "qualiclip_pyiqa.commands.cli",
        "qualiclip_pyiqa.commands.evaluate",
        "qualiclip_pyiqa.commands.fit",
        "qualiclip_pyiqa.commands.score",
        "qualiclip_pyiqa.commands.train",
        "qualiclip_pyiqa.commands.tune",
        "qualiclip_pyiqa.evaluation.opinions",
        "qualiclip_pyiqa.loop.validation",
        "qualiclip_pyiqa.scoring.scorer",
        "qualiclip_pyiqa.training.run",
        "captum.attr",
        "kornia",
        "matplotlib.backends.backend_agg",
        "mpl_toolkits.axes_grid1",
        "open_clip",
        "pyiqa",
        "scipy.stats",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
    ]
)


class Fork:
    """A running process.

    Args:
        arguments: of `qualiclip`, as `sys.argv[1:]`.
        before: Python that is executed first.
        command: whether the command is what runs then.
        environment: variables to set.
        stdout, stderr: files to write to.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        before: str = "",
        command: bool = True,
        environment: dict[str, str] | None = None,
        stdout: Path | str = os.devnull,
        stderr: Path | str = os.devnull,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        files = {"stdout": str(stdout), "stderr": str(stderr)}
        self.process = CONTEXT.Process(target=_run, args=(arguments, before, command, variables, files))
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Return the exit status, as `subprocess` counts it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"a process took longer than {seconds:g} seconds")
        return self.process.exitcode


def _run(arguments: list[str], before: str, command: bool, variables: dict[str, str], files: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    encoding, _, told = variables.get("PYTHONIOENCODING", "").partition(":")
    for number, (name, path) in enumerate(files.items(), 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        errors = (told or "strict") if name == "stdout" else "backslashreplace"
        setattr(sys, name, os.fdopen(number, "w", encoding=encoding or None, errors=errors, closefd=False))
    sys.argv[1:] = arguments
    if before:
        exec(before, {"__name__": "before"})
    if command:
        from qualiclip_pyiqa.commands import cli

        sys.exit(cli.main(arguments))
