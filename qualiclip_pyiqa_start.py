"""Adds the metrics of qualiclip_pyiqa to pyiqa. Only this module changes pyiqa's tables and classes.

Python calls `start` at start-up, through `qualiclip_pyiqa.start` (PEP 829) or, before 3.15, `qualiclip_pyiqa.pth`.
Nothing but sys is imported at the top, so an interpreter that never imports pyiqa loses a fraction of a millisecond.

Two modules of pyiqa are changed, at once if they are imported already, else right after they are executed:

- `pyiqa.default_model_configs`: our metrics are added to `DEFAULT_CONFIGS`, for which pyiqa has no entry point.
- `pyiqa.models.inference_model`: `InferenceModel.forward` is wrapped, as pyiqa has no hook for reading images. Inputs
  other than tensors (paths, bytes, PIL images, arrays) to our networks are read by `qualiclip_pyiqa.as_batch`, so
  `metric(path)`, the `pyiqa` command and `Scorer` agree. Tensors and other networks go straight to pyiqa's method. The
  wrapper costs less than a microsecond. `InferenceModel.__init__` is wrapped too: where our table has no range of
  scores, as for `fitted`, the network's file decides range and direction.

QUALICLIP_PYIQA_AUTOLOAD=0 disables `start`. pyiqa is then unchanged until `qualiclip_pyiqa` is imported, which adds
only the metrics whose names pyiqa lacks (`qualiclip-mini`, `clipiqa-sharpness`, ...).
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # type checkers take it for true; importing `typing` would cost time
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

CONFIGS = "pyiqa.default_model_configs"
INFERENCE = "pyiqa.models.inference_model"
MARK = "_qualiclip_pyiqa"
READS_ITSELF = (
    "metric(path) reads files by pyiqa's rules; pass it tensors of qualiclip_pyiqa.as_batch, and update qualiclip-pyiqa"
)


def start() -> None:
    """Call `arrange` at start-up, unless QUALICLIP_PYIQA_AUTOLOAD=0."""
    if _autoload():
        arrange()


def arrange() -> None:
    """Change pyiqa's two modules now or as soon as they are imported. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, (change, needed) in _CHANGES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, needed):  # else it is still being imported, and the finder changes it
            change(module)


def register_archs() -> None:
    """Register our classes with pyiqa, to be imported on first use (entry point of its group `pyiqa.archs`)."""
    from pyiqa.utils.registry import ARCH_REGISTRY

    # pyiqa loads this entry point when it builds a network, so its InferenceModel must have been imported by now.
    if any(isinstance(finder, _Finder) for finder in sys.meta_path) and INFERENCE not in sys.modules:
        _warn(f"does not find {INFERENCE} in this version of pyiqa: {READS_ITSELF}")
    for name in (
        "ContriqueIQA",
        "DeepPromptIQA",
        "FaceNorm",
        "FittedIQA",
        "OpenCLIPIQA",
        "OpenQualiCLIP",
        "RankingAwareIQA",
        "ReIQA",
    ):
        ARCH_REGISTRY.register_lazy(name, f"qualiclip_pyiqa.archs:{name}", override=True)


def register_losses() -> None:
    """Register our losses with pyiqa, to be imported on first use (entry point of its group `pyiqa.losses`)."""
    from pyiqa.utils.registry import LOSS_REGISTRY

    for name in ("QualityLoss", "QualityPerceptualLoss"):
        LOSS_REGISTRY.register_lazy(name, f"qualiclip_pyiqa.loop.option_files:{name}", override=True)


def register_metrics() -> None:
    """Register our metric of validations with pyiqa (entry point of its group `pyiqa.metrics`)."""
    from pyiqa.utils.registry import METRIC_REGISTRY

    name = "calculate_quality"
    METRIC_REGISTRY.register_lazy(name, f"qualiclip_pyiqa.loop.option_files:{name}", override=True)


def _autoload() -> bool:
    import os

    return os.environ.get("QUALICLIP_PYIQA_AUTOLOAD") != "0"


def _add_entries(module: ModuleType) -> None:
    # Only once per module, so as not to overwrite an entry that the user has changed since.
    if getattr(module, MARK, False):
        return
    setattr(module, MARK, True)
    try:
        from qualiclip_pyiqa.metrics.registry import METRICS

        configs, replace = module.DEFAULT_CONFIGS, _autoload()
        configs.update({name: spec.entry() for name, spec in METRICS.items() if replace or name not in configs})
    except Exception as error:  # noqa: BLE001 - our failure must not break pyiqa
        _warn(f"could not add its metrics to pyiqa ({type(error).__name__}: {error}); reinstall it")


def _wrap_forward(module: ModuleType) -> None:
    try:
        model = module.InferenceModel
        forward, init = model.forward, model.__init__
        if getattr(forward, MARK, False):
            return
        from functools import wraps

        from torch import Tensor
    except Exception as error:  # noqa: BLE001 - our failure must not break pyiqa
        _warn(f"could not wrap pyiqa's InferenceModel.forward ({type(error).__name__}: {error}): {READS_ITSELF}")
        return

    @wraps(forward)
    def forward_by_our_rules(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, Tensor) and _is_ours(getattr(self, "net", None)):
            from qualiclip_pyiqa.images.tensors import as_batch

            target = as_batch(target)
        return forward(self, target, *args, **kwargs)

    setattr(forward_by_our_rules, MARK, True)
    model.forward = forward_by_our_rules

    @wraps(init)
    def init_with_the_network_s_range(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        network: Any = getattr(self, "net", None)
        if _is_ours(network) and getattr(self, "score_range", None) is None:
            self.score_range, self.lower_better = network.score_range, network.lower_better

    model.__init__ = init_with_the_network_s_range


def _is_ours(network: object) -> bool:
    base = sys.modules.get("qualiclip_pyiqa.metrics.base")  # imported by every network of ours
    return base is not None and isinstance(network, base.BlindMetric)


def _warn(message: str) -> None:
    import warnings

    warnings.warn(f"qualiclip_pyiqa {message}", RuntimeWarning, stacklevel=3)


# Module of pyiqa -> the change, and an attribute that the module has once it is executed.
_CHANGES: dict[str, tuple[Callable[[ModuleType], None], str]] = {
    CONFIGS: (_add_entries, "DEFAULT_CONFIGS"),
    INFERENCE: (_wrap_forward, "InferenceModel"),
}


class _Finder:
    """Meta path finder that delegates to the others and changes pyiqa's modules right after they are executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _CHANGES:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                break
        else:
            return None
        change, _ = _CHANGES[name]
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            module.__dict__.pop(MARK, None)  # a reload rebuilds the table
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec
