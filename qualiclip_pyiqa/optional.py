"""Import packages that only some commands need: the extras in pyproject.toml."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .errors import SettingsError


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: module to import, such as `pyarrow.parquet`.
        extra: extra of this package that installs it, such as `parquet`.
        what: subject of the error message, such as `"a Parquet table"`.

    Raises:
        SettingsError: the package is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SettingsError(f'{what} needs {package}: pip install "qualiclip-pyiqa[{extra}]" ({error})') from error
