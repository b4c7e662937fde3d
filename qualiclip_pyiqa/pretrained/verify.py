"""What is known of the hash of a weight file, and by whom: the manifest, the hub, or the first download.

A file is *verified* only by a hash of the manifest or of open_clip's table. Where those know none, the hash of the
first download is remembered in `hashes.json` in this package's cache, and later files are held against that: *first
use*. A user's own file has no known hash.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import WeightsError
from ..files import replacing
from . import folders
from .files import OpenFile, WeightFile
from .layouts import OWN_FORMAT
from .manifest import SHA256, WeightRecord, manifest, record_of

VERIFY_VARIABLE = "QUALICLIP_PYIQA_VERIFY"
VERIFIED, FIRST_USE, UNKNOWN, WRONG = "verified", "first use", "unknown", "wrong"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownHash:
    """The hash that a file must have.

    Attributes:
        sha256: whole, or its first digits.
        said_by: who says so, for people.
        verifies: whether it was known before the file was first downloaded.
    """

    sha256: str
    said_by: str
    verifies: bool


@dataclass(frozen=True)
class Verdict:
    """How a file's hash compares with the known one.

    Attributes:
        kind: `verified`, `first use`, `unknown` or `wrong`.
        sha256: the file's.
        known: what it was compared with; None where no hash is known.
    """

    kind: str
    sha256: str
    known: KnownHash | None

    def __str__(self) -> str:
        if self.known is None:
            return f"unknown: no hash to compare with; found sha256 {self.sha256}"
        if self.kind == WRONG:
            return f"WRONG: expected sha256 {self.known.sha256} ({self.known.said_by}), found {self.sha256}"
        return f"{self.kind}: sha256 {self.sha256} ({self.known.said_by})"


def known_hash(record: WeightRecord, path: Path, opened: OpenFile | None = None) -> KnownHash | None:
    """The hash that a record's file at `path` must have; None where nobody knows one, as for a user's own conversion.

    Args:
        opened: the file, if it is open already.
    """
    name = unquote(path.name)
    if name == record.file and record.sha256:
        if record.layout == "openai-clip" and not _is_archive(path, opened):
            return None  # a plain state dict in the archive's place
        return published_hash(record, record.sha256)
    if name == record.hf_file and record.hub_sha256:
        return published_hash(record, record.hub_sha256)
    remembered = _remembered().get(f"{record.name}/{path.name}")
    if remembered is not None:
        return _as_known(remembered)
    # The Hugging Face cache keeps a file under the digest that the hub gave for it.
    blob = path.resolve()
    if record.hf_repo and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
        return KnownHash(blob.name, "what the hub said at the download, as its cache recorded", verifies=False)
    return None


def published_hash(record: WeightRecord, sha256: str) -> KnownHash:
    """A hash that the record itself holds."""
    said_by = "the manifest" if record.name in manifest() else "open_clip's table"
    return KnownHash(sha256, said_by, verifies=True)


def verdict(record: WeightRecord, path: Path) -> Verdict:
    """Hash a record's file and compare.

    Raises:
        WeightsError: the file or `hashes.json` cannot be read.
    """
    with OpenFile(path) as opened:
        known = known_hash(record, path, opened)
        return _verdict(record, known, opened.sha256())


def _verdict(record: WeightRecord, known: KnownHash | None, sha256: str) -> Verdict:
    if any(map(sha256.startswith, record.known_hashes)):  # whatever its name
        return Verdict(VERIFIED, sha256, published_hash(record, sha256))
    if known is None:
        return Verdict(UNKNOWN, sha256, None)
    if not sha256.startswith(known.sha256):
        return Verdict(WRONG, sha256, known)
    return Verdict(VERIFIED if known.verifies else FIRST_USE, sha256, known)


def check_hash(record: WeightRecord, opened: OpenFile) -> None:
    """Refuse a record's open file that has not the hash it must have; nothing is hashed where none is known.

    Raises:
        WeightsError: a wrong hash; a logged warning with `QUALICLIP_PYIQA_VERIFY=0`.
    """
    known = known_hash(record, opened.path, opened)
    if known is not None and _verdict(record, known, opened.sha256()).kind == WRONG:
        refuse_hash(record, opened, known, str(opened.path), _remedy(opened.path))


def refuse_hash(record: WeightRecord, opened: OpenFile, known: KnownHash, called: str, remedy: str) -> None:
    """Raise a WeightsError that says which hash was expected and found; log it with `QUALICLIP_PYIQA_VERIFY=0`."""
    expected = record.hub_size if known.sha256 == record.hub_sha256 else record.size
    size = f" and {opened.stamp.size} bytes instead of {expected}" if expected else ""
    message = (
        f"{called} is not {record.file}: expected sha256 {known.sha256} ({known.said_by}), "
        f"found {opened.sha256()}{size}"
    )
    if os.environ.get(VERIFY_VARIABLE) != "0":
        raise WeightsError(f"{message}; {remedy}, or set {VERIFY_VARIABLE}=0 to use it all the same")
    logger.warning("%s; used all the same because %s=0", message, VERIFY_VARIABLE)


def _remedy(path: Path) -> str:
    if "blobs" in path.resolve().parts:
        return (
            "it lies in the Hugging Face cache, which other programs use too, so it is not deleted here: delete "
            f"{path.resolve()} and fetch it again"
        )
    return "delete it and fetch it again"


def _is_archive(path: Path, opened: OpenFile | None) -> bool:
    if opened is not None:
        return is_torchscript(opened)
    with OpenFile(path) as own:
        return is_torchscript(own)


def is_torchscript(opened: OpenFile) -> bool:
    """Return whether an open file is a TorchScript archive, such as OpenAI's."""
    opened.file.seek(0)
    try:
        with zipfile.ZipFile(opened.file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False
    finally:
        opened.file.seek(0)
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


# What earlier downloads were


def _hashes_file() -> Path | None:
    folder = folders.cache_folder()
    return None if folder is None else folder / "hashes.json"


def _remembered() -> dict[str, dict[str, str]]:
    path = _hashes_file()
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({' '.join(str(error).split())[:80]}); delete it") from error
    if not isinstance(known, dict) or not all(map(_is_entry, known.values())):
        raise WeightsError(f"{path} is damaged: expected a sha256, `from` and `on` for each file; delete it")
    return known


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("sha256", "from", "on"))
        and SHA256.fullmatch(value["sha256"]) is not None
        and re.fullmatch(r"\d{4}-\d\d-\d\d", value["on"]) is not None
    )


def _as_known(entry: Mapping[str, str]) -> KnownHash:
    return KnownHash(
        entry["sha256"], f"remembered on {entry['on']} from {entry['from']} in {_hashes_file()}", verifies=False
    )


def remembered_hash(record: WeightRecord, name: str) -> KnownHash | None:
    """The hash of the first download of a record under a file name; None if there was none."""
    entry = _remembered().get(f"{record.name}/{name}")
    return None if entry is None else _as_known(entry)


def remember(record: WeightRecord, name: str, sha256: str, source: str) -> None:
    """Keep the hash of a first download in `hashes.json`; log a warning where it cannot be kept."""
    entry = {"sha256": sha256, "from": source, "on": time.strftime("%Y-%m-%d")}
    target = _hashes_file()
    if target is None:
        logger.warning("the hash of %s cannot be remembered: this user has no cache folder", name)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            known = {**_remembered(), f"{record.name}/{name}": entry}
            part.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        logger.warning("the hash of %s cannot be remembered: %s", name, error)


# What a loaded file is


def provenance(file: WeightFile) -> dict[str, Any]:
    """What a loaded file is, as plain values: its hash, how that compares with the known one, and its terms.

    A file of this package's own format says its licence itself; others get it from the record of their hash or name.

    Returns:
        `file`, `path`, `sha256` (None, with a warning, where the file changed before it was hashed), `check`
        (`verified`, `first use`, `unknown`, `wrong`), `check_detail`, `record` (None for a user's own file), `licence`,
        `source` and, for a record, `licence_url`, `commercial_use` and `citation`.

    Example:
        >>> from qualiclip_pyiqa.pretrained.read import read
        >>> said = provenance(read("qualiclip-mini").file)
        >>> said["check"], said["licence"]
        ('verified', 'CC-BY-SA-4.0')
    """
    sha256 = file.sha256()
    out: dict[str, Any] = {"file": file.path.name, "path": str(file.path), "sha256": sha256}
    if sha256 is None:
        logger.warning("%s changed after it was loaded, so its hash is no longer that of the model", file.path)
        changed = {"check": UNKNOWN, "check_detail": "the file changed after it was loaded", "record": None}
        return out | changed | _own_terms(file)
    record = record_of(sha256)
    if record is None:  # by its name
        record = next((r for r in manifest().values() if _is_file_of(r, file.path)), None)
    found = Verdict(UNKNOWN, sha256, None)
    if record is not None:
        known = None if file.changed else known_hash(record, file.path)
        found = _verdict(record, known, sha256)
    out |= {"check": found.kind, "check_detail": str(found)}
    if record is None or (file.format == OWN_FORMAT and found.kind != VERIFIED):
        return out | {"record": None} | _own_terms(file)
    terms = ("licence", "licence_url", "commercial_use", "source", "citation")
    return {**out, "record": record.name, **{key: getattr(record, key) for key in terms}}


def _own_terms(file: WeightFile) -> dict[str, str]:
    own = file.format == OWN_FORMAT
    return {
        "licence": (file.licence if own else "") or "unknown",
        "source": (file.source or "unknown") if own else "the user's own file",
    }


def _is_file_of(record: WeightRecord, path: Path) -> bool:
    if unquote(path.name) == record.file or path.name == Path(record.file).with_suffix(".safetensors").name:
        return True
    folder = f"models--{record.hf_repo.replace('/', '--')}"
    return bool(record.hf_repo) and path.name == record.hf_file and folder in path.parts
