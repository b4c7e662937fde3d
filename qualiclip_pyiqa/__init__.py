"""QualiCLIP and CLIP-IQA for pyiqa. Importing the package registers its metrics; what it offers is imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import qualiclip_pyiqa_start

if TYPE_CHECKING:
    from .archs import OpenCLIPIQA, OpenQualiCLIP
    from .errors import ImageError, PromptError, SettingsError, WeightsError
    from .images import as_batch, load_image
    from .loss import QualityLoss
    from .memory import keep_freed_memory
    from .metrics import METRICS
    from .prompts import prompt_set_names
    from .scoring import Scorer
    from .tables import Record

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
    "as_batch": "images",
    "load_image": "images",
    "QualityLoss": "loss",
    "METRICS": "metrics",
    "keep_freed_memory": "memory",
    "prompt_set_names": "prompts",
    "Scorer": "scoring",
    "Record": "tables",
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
