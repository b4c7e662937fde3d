"""How errors of reading an image end where another setting would accept it: advice for whoever chose the settings.

A client of a server did not: `without_advice` shows it the same error without these words.
"""

from __future__ import annotations

from .formats import PLUGINS

TRUNCATED = ", or allow_truncated (on the command line --allow-truncated) to score what is there"
MAX_PIXELS = "; to read it anyway, raise max_pixels (on the command line --max-pixels) or PIL.Image.MAX_IMAGE_PIXELS"
PILLOW = "; to read it anyway, raise PIL.Image.MAX_IMAGE_PIXELS too"
DECODE_TIMEOUT = "; if it needs longer, raise decode_timeout (--decode-timeout)"


def without_advice(line: str) -> str:
    """Remove advice from an error's line.

    Example:
        >>> without_advice("a.png was not decoded within 10 seconds" + DECODE_TIMEOUT)
        'a.png was not decoded within 10 seconds'
    """
    for advice in (TRUNCATED, MAX_PIXELS, PILLOW, DECODE_TIMEOUT):
        line = line.replace(advice, "")
    for _, package in PLUGINS.values():
        line = line.replace(f", which needs {package}", ", which cannot be opened here; expected another format")
    return line
