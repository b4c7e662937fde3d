"""Weight files while they are open, and as they were when they were loaded."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import WeightsError

_REMEMBERED = 256  # hashes kept in this process


class Stamp(NamedTuple):
    """What tells one content of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # nobody can set it, but new permissions or a hard link change it too

    def is_of(self, path: Path) -> bool:
        """Return whether this is the stamp of what lies at `path` now, new permissions aside."""
        try:
            return _stamp(path.stat())[:4] == self[:4]
        except OSError:
            return False


class OpenFile:
    """A weight file that is opened once, so that what is hashed is what is read, whatever happens to its path.

    A context manager. On Linux `name` leads to the open file itself, for libraries that take a name only; on Windows an
    open file cannot be replaced; elsewhere `check_unchanged` detects a replacement, as it detects everywhere that
    somebody wrote to the file.

    Raises:
        WeightsError: a folder, an empty file, or one that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise WeightsError(f"{path} is a folder; expected a weight file")
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise WeightsError(
                f"{path} cannot be read ({error.strerror}); check the file and its permissions"
            ) from error
        self.stamp = _stamp(os.fstat(self.file.fileno()))
        if not self.stamp.size:
            self.file.close()
            raise WeightsError(f"{path} is empty (0 bytes); delete it and fetch it again")
        itself = Path(f"/proc/self/fd/{self.file.fileno()}")
        self.name = str(itself if itself.exists() else path)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def known_sha256(self) -> str:
        """The sha256, if this process has computed it; "" otherwise."""
        return _hashes.get(self.stamp) or ""

    def sha256(self) -> str:
        """Hash the whole file; within the process, once for each content."""
        known = _hashes.get(self.stamp)
        if known is None:
            self.file.seek(0)
            known = hashlib.file_digest(self.file, "sha256").hexdigest()
            self.file.seek(0)
            if _stamp(os.fstat(self.file.fileno())) == self.stamp:
                _hashes.put(self.stamp, known)
        return known

    def check_unchanged(self) -> None:
        """Raise a WeightsError if the file was written to, or its path leads elsewhere, since it was opened."""
        if not self.stamp.is_of(self.path):
            raise WeightsError(f"{self.path} changed while it was read; try again")


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when it was loaded.

    Attributes:
        path: where it lay.
        stamp: what tells a later change.
        known_sha256: its sha256 where it was computed at loading; "" otherwise.
        format, licence, source: what a file of this package's own format says of itself; "" otherwise.
    """

    path: Path
    stamp: Stamp
    known_sha256: str = ""
    format: str = ""
    licence: str = ""
    source: str = ""

    @property
    def changed(self) -> bool:
        """Whether the file was changed, replaced or removed since it was loaded."""
        if self.stamp.is_of(self.path):
            return False
        try:  # a metric may have been pickled and sent to a machine with a copy of the file
            return not self.known_sha256 or file_sha256(self.path) != self.known_sha256
        except WeightsError:
            return True

    def sha256(self) -> str | None:
        """The sha256 of the bytes that were loaded; None if it was not computed before the file changed."""
        known = self.known_sha256 or _hashes.get(self.stamp)
        if known is None:
            try:
                with OpenFile(self.path) as opened:
                    known = opened.sha256() if opened.stamp[:4] == self.stamp[:4] else None
            except WeightsError:
                return None
        return known


def file_sha256(path: str | Path) -> str:
    """sha256 of a file in hex, as it is now; within the process computed once for each content.

    Raises:
        WeightsError: a folder, an empty file, or one that cannot be read.
    """
    with OpenFile(Path(path)) as opened:
        return opened.sha256()


def _stamp(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class _Hashes:
    """The newest hashes by stamp, for all threads."""

    def __init__(self) -> None:
        self.known: OrderedDict[Stamp, str] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, stamp: Stamp) -> str | None:
        with self.lock:
            return self.known.get(stamp)

    def put(self, stamp: Stamp, sha256: str) -> None:
        with self.lock:
            self.known[stamp] = sha256
            while len(self.known) > _REMEMBERED:
                self.known.popitem(last=False)


_hashes = _Hashes()
