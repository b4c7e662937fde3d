"""Files that are whole or absent, and the encodings and delimiters of text files from other programs."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an unused name beside `path`; the file that the block writes there replaces `path` when it succeeds.

    If the block raises, the new file is removed and `path` is unchanged; a killed process leaves `NAME.*.part`.
    """
    # File systems limit a name to 255 bytes.
    stem = os.fsdecode(os.fsencode(path.name)[:200])
    part = path.with_name(f"{stem}.{secrets.token_hex(6)}.part")
    try:
        yield part
        part.replace(path)
    except BaseException as error:
        with suppress(OSError, ValueError):  # the block's own error matters
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows
        raise


@contextmanager
def writing(name: object) -> Iterator[None]:
    """Re-raise an OSError of the block as one that names what cannot be written, except for a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        why = "it is closed" if error.errno == errno.EBADF else error.strerror or error
        raise OSError(f"{name} cannot be written ({why})") from error


def text_codec(start: bytes) -> tuple[str, str]:
    """Return the encoding and error handler for a text file: UTF-16 with a byte order mark, else UTF-8.

    Bytes that are not UTF-8 are kept as surrogate escapes, since they may belong to file names.

    Args:
        start: the first bytes of the file.
    """
    return ("utf-16", "strict") if start.startswith(UTF16_MARKS) else ("utf-8-sig", "surrogateescape")


def is_utf8(text: str) -> bool:
    """Return whether a text has no byte that was not UTF-8 when it was decoded, see `text_codec`.

    Example:
        >>> is_utf8("café"), is_utf8("café".encode("latin-1").decode(*text_codec(b"")))
        (True, False)
    """
    return not any("\udc80" <= character <= "\udcff" for character in text)


def encoding_hint(*texts: str) -> str:
    """Return what to do about texts of a table that may be wrong since it is not UTF-8, for the end of an error."""
    return "" if all(map(is_utf8, texts)) else "; the table is not UTF-8: save it as UTF-8 and try again"


def best_delimiter(header: Callable[[str], Sequence[str]], wanted: Collection[str]) -> str:
    """Return the delimiter that splits a CSV header into most of the wanted columns, then into most columns.

    Args:
        header: splits the header by a delimiter.
        wanted: names of columns, in lower case.

    Example:
        >>> best_delimiter("name, first;MOS".split, ["mos"])
        ';'
    """

    def found(delimiter: str) -> tuple[int, int]:
        names = header(delimiter)
        return len({name.strip().lower() for name in names}.intersection(wanted)), len(names)

    return max(DELIMITERS, key=found)
