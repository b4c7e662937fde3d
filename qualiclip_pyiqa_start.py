"""Makes pyiqa know the metrics of qualiclip_pyiqa: the only module that touches pyiqa's tables and classes.

Python runs `start` at start-up, through `qualiclip_pyiqa.start` (PEP 829) or, before 3.15, `qualiclip_pyiqa.pth`. This
module imports nothing at its top: an interpreter that never imports pyiqa pays a fraction of a millisecond for it.

Two modules of pyiqa are changed, right after they are executed or, if they are there already, at once:

- `pyiqa.default_model_configs`: our metrics are added to `DEFAULT_CONFIGS`, which pyiqa offers no entry point for.
- `pyiqa.models.inference_model`: `InferenceModel.forward` is wrapped, since pyiqa offers no place for a metric to read
  images by its own rules. What is not a tensor (a path, bytes, a PIL image, an array) and is meant for a network of
  ours becomes a tensor by `qualiclip_pyiqa.as_batch`, so that `metric(path)`, the `pyiqa` command and `Scorer` have one
  score for one image. Tensors and other networks go straight to pyiqa's method. The wrapper costs under a microsecond.

QUALICLIP_PYIQA_AUTOLOAD=0 switches `start` off. Then pyiqa is untouched until `qualiclip_pyiqa` is imported, which adds
only the names that pyiqa lacks (`qualiclip-mini`, `clipiqa-sharpness`, ...): the names that both have stay pyiqa's own.
"""

import sys

CONFIGS = "pyiqa.default_model_configs"
INFERENCE = "pyiqa.models.inference_model"
MARK = "_qualiclip_pyiqa"
READS_ITSELF = (
    "metric(path) reads files by pyiqa's rules; pass it tensors of qualiclip_pyiqa.as_batch, and update qualiclip-pyiqa"
)


def start():
    """Run at start-up: `arrange`, unless QUALICLIP_PYIQA_AUTOLOAD=0."""
    if _autoload():
        arrange()


def arrange():
    """Change pyiqa's two modules now, or as soon as they are imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, (change, needed) in _CHANGES.items():
        module = sys.modules.get(name)
        if hasattr(module, needed):  # one that is being imported is changed by the finder
            change(module)


def register_archs():
    """Entry point of pyiqa's group `pyiqa.archs`: our classes under names of our own, imported when first used."""
    from pyiqa.utils.registry import ARCH_REGISTRY

    # pyiqa asks for architectures when it builds a network: the class that it builds them for is there by now.
    if any(isinstance(finder, _Finder) for finder in sys.meta_path) and INFERENCE not in sys.modules:
        _warn(f"does not find {INFERENCE} in this version of pyiqa: {READS_ITSELF}")
    for name in ("OpenCLIPIQA", "OpenQualiCLIP"):
        ARCH_REGISTRY.register_lazy(name, f"qualiclip_pyiqa.archs:{name}", override=True)


def _autoload():
    import os

    return os.environ.get("QUALICLIP_PYIQA_AUTOLOAD") != "0"


def _add_entries(module):
    # Marked on the module, so that an entry the user has changed since is not overwritten.
    if getattr(module, MARK, False):
        return
    setattr(module, MARK, True)
    try:
        from qualiclip_pyiqa.metrics.registry import METRICS

        configs, replace = module.DEFAULT_CONFIGS, _autoload()
        configs.update({name: spec.entry() for name, spec in METRICS.items() if replace or name not in configs})
    except Exception as error:  # noqa: BLE001 - pyiqa must work whatever is wrong with us
        _warn(f"could not add its metrics to pyiqa ({type(error).__name__}: {error}); reinstall it")


def _wrap_forward(module):
    try:
        model = module.InferenceModel
        forward = model.forward
        if getattr(forward, MARK, False):
            return
        from functools import wraps

        from torch import Tensor
    except Exception as error:  # noqa: BLE001 - said below
        _warn(f"could not wrap pyiqa's InferenceModel.forward ({type(error).__name__}: {error}): {READS_ITSELF}")
        return

    @wraps(forward)
    def forward_by_our_rules(self, target, *args, **kwargs):
        if not isinstance(target, Tensor) and _is_ours(getattr(self, "net", None)):
            from qualiclip_pyiqa.images.tensors import as_batch

            target = as_batch(target)
        return forward(self, target, *args, **kwargs)

    setattr(forward_by_our_rules, MARK, True)
    model.forward = forward_by_our_rules


def _is_ours(network):
    base = sys.modules.get("qualiclip_pyiqa.metrics.base")  # without it, no network can be ours
    return base is not None and isinstance(network, base.BlindMetric)


def _warn(message):
    import warnings

    warnings.warn(f"qualiclip_pyiqa {message}", RuntimeWarning, stacklevel=3)


# What is done with a module of pyiqa, and what it has once it is executed.
_CHANGES = {CONFIGS: (_add_entries, "DEFAULT_CONFIGS"), INFERENCE: (_wrap_forward, "InferenceModel")}


class _Finder:
    """Lets the other finders find pyiqa's modules, and changes them once they have been executed."""

    def find_spec(self, name, path=None, target=None):
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

        def exec_module(module):
            module.__dict__.pop(MARK, None)  # a reload makes the table anew
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec
