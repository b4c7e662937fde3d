"""Makes pyiqa know the metrics of qualiclip_pyiqa; the only place that touches pyiqa's config dict and registry.

Python runs `start` at start-up, through `qualiclip_pyiqa.start` (PEP 829) or, before 3.15, `qualiclip_pyiqa.pth`. So
this module imports nothing: it costs an interpreter that never imports pyiqa a fraction of a millisecond.
"""

import sys

TARGET = "pyiqa.default_model_configs"
MARK = "_qualiclip_pyiqa_entries"


def start():
    """The start-up hook: `arrange`, unless QUALICLIP_PYIQA_AUTOLOAD=0."""
    import os

    if os.environ.get("QUALICLIP_PYIQA_AUTOLOAD") != "0":
        arrange()


def arrange():
    """Add our entries to pyiqa's config dict now, or as soon as pyiqa is imported. Doing it twice changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    module = sys.modules.get(TARGET)
    if module is not None and hasattr(module, "DEFAULT_CONFIGS"):
        _add_entries(module)


def register_archs():
    """Entry point of pyiqa's group `pyiqa.archs`: our classes under names of our own, imported when first used."""
    from pyiqa.utils.registry import ARCH_REGISTRY

    for name in ("OpenCLIPIQA", "OpenQualiCLIP"):
        ARCH_REGISTRY.register_lazy(name, f"qualiclip_pyiqa.archs:{name}", override=True)


def _add_entries(module):
    # Marked on the module, so that an entry the user has changed since is not overwritten.
    if getattr(module, MARK, False):
        return
    setattr(module, MARK, True)
    try:
        from qualiclip_pyiqa.metrics.registry import METRICS

        module.DEFAULT_CONFIGS.update({name: spec.entry() for name, spec in METRICS.items()})
    except Exception as error:  # pyiqa must work whatever is wrong with us
        import warnings

        warnings.warn(
            f"qualiclip_pyiqa could not add its metrics to pyiqa ({type(error).__name__}: {error}); reinstall it",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder:
    """Lets the other finders find pyiqa's table, and adds our entries once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                break
        else:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            module.__dict__.pop(MARK, None)  # a reload makes the table anew
            execute(module)
            _add_entries(module)

        spec.loader.exec_module = exec_module
        return spec
