"""Quantised metrics kept on disk, so that `qualiclip score --precision int8` exports and measures once.

A file per metric, folder of photographs and version, in the folder `int8` of this package's cache; safe to delete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from ..errors import SettingsError
from ..images.paths import list_images
from ..metrics.base import BlindMetric
from ..optional import require
from ..pretrained import folders
from .graph import card_of, exportable
from .write import export_metric

MAX_FILES = 8  # the oldest are deleted


def int8_file(
    metric: BlindMetric | None, name: str, photographs: Path, tick: Callable[[int, int], object] = lambda *_: None
) -> Path:
    """Return the ONNX file of a metric quantised by photographs, from the cache or made now.

    Args:
        metric: network; None for another package's metric.
        name: what the user calls it, for error messages.
        photographs, tick: see `quantise`.

    Raises:
        SettingsError: as `export_metric`, or for a user without a cache.
    """
    require("onnxruntime", "onnx", "precision int8")
    base = folders.cache_folder()
    if base is None:
        raise SettingsError("precision int8 keeps its file in a cache; set XDG_CACHE_HOME to a folder for it")
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in list_images(photographs)]
    versions = [version(each) for each in ("qualiclip-pyiqa", "onnxruntime", "onnx")]
    described = card_of(exportable(metric, name), "float").to_json()
    key = hashlib.sha256(json.dumps([described, files, versions, str(torch.__version__)]).encode()).hexdigest()[:32]
    path = base / "int8" / f"{key}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        assert metric is not None
        export_metric(metric, path, name, int8=photographs, tick=tick)
        _bound(path)
    return path


def _bound(newest: Path) -> None:
    """Delete the oldest files beyond `MAX_FILES`."""
    with suppress(OSError):  # another process deletes them too
        others = sorted(newest.parent.glob("*.onnx"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[MAX_FILES:]:
            if path != newest:
                path.unlink()
