"""QualiCLIP and CLIP-IQA for pyiqa.

Importing the package adds its metrics to pyiqa; see `qualiclip_pyiqa_start`, also for QUALICLIP_PYIQA_AUTOLOAD=0.
Public names are listed in `__init__.pyi` and imported on first use, so that neither pyiqa's start-up nor an image
worker waits for torch and open_clip.

Example:
    >>> import pyiqa
    >>> metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
    >>> metric.lower_better, metric.score_range
    (False, '0, 1')
"""

import lazy_loader

import qualiclip_pyiqa_start

_public, _, __all__ = lazy_loader.attach_stub(__name__, __file__)

qualiclip_pyiqa_start.arrange()


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("qualiclip-pyiqa")
    return _public(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
