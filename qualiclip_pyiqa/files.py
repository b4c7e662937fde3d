"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody has. What the block writes there becomes `path`, at once, if all goes well.

    Otherwise nothing of it stays and `path` is as it was; a killed process leaves `NAME.*.part`.
    """
    # A name may have 255 bytes.
    stem = os.fsdecode(os.fsencode(path.name)[:200])
    part = path.with_name(f"{stem}.{secrets.token_hex(6)}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
