"""Open weight files, and identify a loaded file later."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import WeightsError

_MAX_HASHES = 256  # cached in this process


class Stamp(NamedTuple):
    """Identifies the content of a file without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # cannot be set by hand, but also changes with permissions and hard links

    def same_content(self, other: Stamp) -> bool:
        """Whether both stamps are of one file with one content; a change of permissions is ignored."""
        return self[:4] == other[:4]

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` still has this content."""
        try:
            return self.same_content(_stamp(path.stat()))
        except OSError:
            return False


class OpenFile:
    """Context manager that opens a weight file once, so that the bytes hashed are the bytes read.

    For libraries that only take a name, `name` leads to the open file itself on Linux. On Windows an open file cannot
    be replaced. Elsewhere `check_unchanged` detects a replacement; on every system it detects writes.

    Raises:
        WeightsError: the path is a folder, an empty file or unreadable.
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
        """The sha256 if this process has computed it, else ""."""
        return _hashes.get(self.stamp) or ""

    def sha256(self) -> str:
        """Hash the whole file, once per process and content."""
        known = _hashes.get(self.stamp)
        if known is None:
            self.file.seek(0)
            known = hashlib.file_digest(self.file, "sha256").hexdigest()
            self.file.seek(0)
            if _stamp(os.fstat(self.file.fileno())) == self.stamp:
                _hashes.put(self.stamp, known)
        return known

    def check_unchanged(self) -> None:
        """Raise a WeightsError if the file was written to or its path was replaced since it was opened."""
        if not self.stamp.matches(self.path):
            raise WeightsError(f"{self.path} changed while it was read; try again")


@dataclass(frozen=True)
class WeightFile:
    """Record of a weight file at the time it was loaded.

    Attributes:
        path: where it was.
        stamp: detects later changes.
        known_sha256: sha256 if it was computed at loading, else "".
        format, licence, source: metadata of a file in this package's own format, else "".
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
        if self.stamp.matches(self.path):
            return False
        try:  # an unpickled metric may find a copy of the file on another machine
            return not self.known_sha256 or file_sha256(self.path) != self.known_sha256
        except WeightsError:
            return True

    @property
    def computed_sha256(self) -> str | None:
        """The sha256 of the bytes that were loaded if this process has computed it, as it does for published files."""
        return self.known_sha256 or _hashes.get(self.stamp)

    def sha256(self) -> str | None:
        """Return the sha256 of the bytes that were loaded; None if the file changed before they were hashed."""
        known = self.computed_sha256
        if known is None:
            try:
                with OpenFile(self.path) as opened:
                    known = opened.sha256() if self.stamp.same_content(opened.stamp) else None
            except WeightsError:
                return None
        return known


@dataclass(frozen=True)
class WeightFolder(WeightFile):
    """Record of a folder whose files together are one model; its sha256 is that of its files' in the form of sha256sum.

    Attributes:
        parts: the files.
    """

    parts: tuple[WeightFile, ...] = ()

    @property
    def changed(self) -> bool:
        return any(part.changed for part in self.parts)

    @property
    def computed_sha256(self) -> str | None:
        return self._joined([part.computed_sha256 for part in self.parts])

    def sha256(self) -> str | None:
        return self._joined([part.sha256() for part in self.parts])

    def _joined(self, hashes: list[str | None]) -> str | None:
        if None in hashes:
            return None
        names = (part.path.relative_to(self.path).as_posix() for part in self.parts)
        lines = "".join(f"{sha256}  {name}\n" for sha256, name in zip(hashes, names, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file in hex, computed once per process and content.

    Raises:
        WeightsError: the path is a folder, an empty file or unreadable.
    """
    with OpenFile(Path(path)) as opened:
        return opened.sha256()


def _stamp(stat: os.stat_result) -> Stamp:
    return Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class _Hashes:
    """Thread-safe cache of the most recent hashes by stamp."""

    def __init__(self) -> None:
        self.known: OrderedDict[Stamp, str] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, stamp: Stamp) -> str | None:
        with self.lock:
            return self.known.get(stamp)

    def put(self, stamp: Stamp, sha256: str) -> None:
        with self.lock:
            self.known[stamp] = sha256
            while len(self.known) > _MAX_HASHES:
                self.known.popitem(last=False)


_hashes = _Hashes()
