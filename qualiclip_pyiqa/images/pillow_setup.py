"""Repeat this process's Pillow setup in decoding workers, so that a file has the same pixels in both.

The setup is what plug-ins registered (for example openers and decoders of HEIF), which a worker imports by name, and
settings. Other changes, such as a patched function of Pillow, are not detected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias, TypedDict

from PIL import Image

from .formats import is_pillows, opened_formats

Setting: TypeAlias = bool | int | float | str | None

# Pillow's settings that affect how files are read. `ReadRules` replaces LOAD_TRUNCATED_IMAGES.
SETTINGS = {
    "PIL.Image": ("MAX_IMAGE_PIXELS",),
    "PIL.ImageFile": ("MAXBLOCK", "SAFEBLOCK"),
    "PIL.AvifImagePlugin": ("DECODE_CODEC_CHOICE", "DEFAULT_MAX_THREADS"),
    "PIL.BmpImagePlugin": ("USE_RAW_ALPHA",),
    "PIL.GifImagePlugin": ("LOADING_STRATEGY",),
    "PIL.PngImagePlugin": ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"),
    "PIL.TiffImagePlugin": ("MAX_SAMPLESPERPIXEL", "READ_LIBTIFF"),
}


class PillowSetup(TypedDict):
    """Plug-ins and settings of Pillow, JSON-ready. Classes and functions are named as `module:qualified.name`.

    Attributes:
        openers: format -> opener, and the function that recognises its files, or None.
        decoders: name -> class.
        settings: module -> name -> value.
    """

    openers: dict[str, tuple[str, str | None]]
    decoders: dict[str, str]
    settings: dict[str, dict[str, Setting]]


def read_setup() -> PillowSetup:
    """Read the setup of this process.

    Raises:
        LookupError: a plug-in that another process cannot import, such as a class defined in a notebook.
    """
    openers = {
        name: (_name(Image.OPEN[name][0]), _name(accept) if (accept := Image.OPEN[name][1]) else None)
        for name in opened_formats()
        if name in Image.OPEN and not is_pillows(Image.OPEN[name][0])
    }
    decoders = {name: _name(decoder) for name, decoder in Image.DECODERS.items() if not is_pillows(decoder)}
    settings = {module: _values(module, names) for module, names in SETTINGS.items() if module in sys.modules}
    plugins = [*(opener for opener, _ in openers.values()), *decoders.values()]
    packages = {name.partition(":")[0].partition(".")[0] for name in plugins}
    for module in list(sys.modules):
        if module.partition(".")[0] in packages:  # plug-ins name their settings in capitals, as Pillow does
            settings[module] = _values(module, [name for name in vars(sys.modules[module]) if name.isupper()])
    return {
        "openers": openers,
        "decoders": decoders,
        "settings": {name: each for name, each in settings.items() if each},
    }


def apply_setup(setup: PillowSetup) -> None:
    """Apply the setup of another process to this one.

    Raises:
        Exception: whatever importing a plug-in raises.
    """
    if setup["openers"] or setup["decoders"]:
        Image.init()  # else Pillow's own plug-ins would register over these when they are imported later
    for name, (opener, accept) in setup["openers"].items():
        Image.register_open(name, _find(opener), _find(accept) if accept else None)
    for name, decoder in setup["decoders"].items():
        Image.register_decoder(name, _find(decoder))
    for module, values in setup["settings"].items():
        if module in SETTINGS:
            import_module(module)
        if module in sys.modules:  # of a plug-in's package, only the modules that the plug-in imported
            vars(sys.modules[module]).update(values)


def _name(registered: Any) -> str:
    module, path = getattr(registered, "__module__", None), getattr(registered, "__qualname__", "")
    name = f"{module}:{path}"
    try:
        found = None if module == "__main__" else _find(name)
    except (ImportError, AttributeError):
        found = None
    if found is not registered:
        raise LookupError(f"{name} cannot be imported by another process")
    return name


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    return attrgetter(path)(import_module(module))


def _values(module: str, names: Iterable[str]) -> dict[str, Setting]:
    found = {name: getattr(sys.modules[module], name, None) for name in names if hasattr(sys.modules[module], name)}
    return {name: value for name, value in found.items() if isinstance(value, Setting)}
