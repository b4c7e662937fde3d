"""QualiCLIP and CLIP-IQA for pyiqa. Importing the package registers its metrics; what it offers is imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import qualiclip_pyiqa_start

if TYPE_CHECKING:
    from .errors import ImageError, PromptError, SettingsError, WeightsError
    from .images.tensors import as_batch, load_image
    from .metrics.loss import QualityLoss
    from .metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP
    from .metrics.prompts import prompt_set_names
    from .metrics.registry import METRICS
    from .scoring.allocator import keep_freed_memory
    from .scoring.scorer import Scorer
    from .scoring.tables import Record

__all__ = [
    "METRICS",
    "ImageError",
    "OpenCLIPIQA",
    "OpenQualiCLIP",
    "PromptError",
    "QualityLoss",
    "Record",
    "Scorer",
    "SettingsError",
    "WeightsError",
    "as_batch",
    "keep_freed_memory",
    "load_image",
    "prompt_set_names",
]

_ROOMS = {
    "OpenCLIPIQA": "archs",
    "OpenQualiCLIP": "archs",
    "ImageError": "errors",
    "PromptError": "errors",
    "SettingsError": "errors",
    "WeightsError": "errors",
    "as_batch": "images.tensors",
    "load_image": "images.tensors",
    "QualityLoss": "metrics.loss",
    "METRICS": "metrics.registry",
    "keep_freed_memory": "scoring.allocator",
    "prompt_set_names": "metrics.prompts",
    "Scorer": "scoring.scorer",
    "Record": "scoring.tables",
}

qualiclip_pyiqa_start.arrange()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qualiclip-pyiqa")
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
