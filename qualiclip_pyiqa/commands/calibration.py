"""The option `--calibrate DIR`, and the bar that shows what it measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..screen import Screen

if TYPE_CHECKING:
    from ..scoring.building import MetricLike


def add_calibrate_option(parser: argparse.ArgumentParser, option: str) -> None:
    """Add `--calibrate DIR`, which `option` needs."""
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help=f"folder of photographs like those to be scored, by which {option} measures what may be quantised",
    )


def check_calibrate(folder: Path | None, wanted: bool, option: str) -> None:
    """Raise SettingsError if `--calibrate DIR` and the option that needs it are not given together."""
    if wanted and folder is None:
        raise SettingsError(f"{option} needs photographs to calibrate with; pass --calibrate DIR")
    if folder is not None and not wanted:
        raise SettingsError(f"--calibrate has no effect without {option}; leave it out")


@contextmanager
def measuring() -> Iterator[Callable[[int, int], object]]:
    """Show a bar on standard error; yield a function that takes how many convolutions are measured, and of how many."""
    from tqdm import tqdm

    with tqdm(desc="measuring each convolution in int8", file=Screen(), disable=None) as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tick


def int8_metrics(metrics: Mapping[str, MetricLike], photographs: Path) -> dict[str, MetricLike]:
    """Return the same metrics quantised to 8 bits, by the same names.

    Raises:
        SettingsError: a metric cannot be exported or quantised.
    """
    import torch

    from ..export.int8_cache import int8_file
    from ..metrics.exported import ExportedIQA
    from ..scoring.building import blind_metric, blind_only, build_metrics

    named = blind_only(metrics, "in int8")
    made: dict[str, MetricLike] = {}
    for name, metric in build_metrics(named, torch.device("cpu")).items():
        with measuring() as tick:
            made[name] = ExportedIQA(int8_file(blind_metric(metric), name, photographs, tick))
    return made
