"""Verify the hashes of weight files, and describe a loaded file's provenance.

A file is *verified* by a hash in the manifest or in open_clip's table. If they have none, the hash of the first
download is remembered in `hashes.json` in this package's cache and later copies are compared with it: *first use*.
A user's own file has no known hash.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import WeightsError, reason
from ..files import replacing
from . import folders
from .files import OpenFile, WeightFile
from .layouts import OWN_FORMATS
from .manifest import SHA256, WeightRecord, manifest, record_of

VERIFY_VARIABLE = "QUALICLIP_PYIQA_VERIFY"
VERIFIED, FIRST_USE, UNKNOWN, WRONG = "verified", "first use", "unknown", "wrong"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownHash:
    """The hash that a file must have.

    Attributes:
        sha256: whole, or its first digits.
        source: where the hash comes from, for messages.
        published: whether it was known before the first download.
    """

    sha256: str
    source: str
    published: bool


@dataclass(frozen=True)
class Verdict:
    """Result of comparing a file's hash with the known one.

    Attributes:
        kind: `verified`, `first use`, `unknown` or `wrong`.
        sha256: of the file.
        known: the hash compared with; None if none is known.
    """

    kind: str
    sha256: str
    known: KnownHash | None

    def __str__(self) -> str:
        if self.known is None:
            return f"unknown: no hash to compare with; found sha256 {self.sha256}"
        if self.kind == WRONG:
            return f"WRONG: expected sha256 {self.known.sha256} ({self.known.source}), found {self.sha256}"
        return f"{self.kind}: sha256 {self.sha256} ({self.known.source})"


def known_hash(record: WeightRecord, opened: OpenFile) -> KnownHash | None:
    """Return the hash that an open file of a record must have; None if unknown, as for a user's own conversion."""
    name = unquote(opened.path.name)
    if name == record.file and record.sha256:
        if record.layout == "openai-clip" and not is_torchscript(opened):
            return None  # a plain state dict instead of the archive
        return published_hash(record, record.sha256)
    if name == record.hf_file and record.hub_sha256:
        return published_hash(record, record.hub_sha256)
    remembered = remembered_hash(record, opened.path.name)
    if remembered is not None:
        return remembered
    # The Hugging Face cache names a blob by the digest that the hub announced.
    blob = opened.path.resolve()
    if record.hf_repo and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
        return KnownHash(blob.name, "announced by the hub at the download, as its cache recorded", published=False)
    return None


def published_hash(record: WeightRecord, sha256: str) -> KnownHash:
    """Wrap one of the record's own hashes."""
    source = "the manifest" if record.name in manifest() else "open_clip's table"
    return KnownHash(sha256, source, published=True)


def verdict(record: WeightRecord, path: Path) -> Verdict:
    """Hash a record's file and compare it with the known hash.

    Raises:
        WeightsError: the file or `hashes.json` cannot be read.
    """
    with OpenFile(path) as opened:
        return _compare(record, known_hash(record, opened), opened.sha256())


def _compare(record: WeightRecord, known: KnownHash | None, sha256: str) -> Verdict:
    if any(map(sha256.startswith, record.known_hashes)):  # under any file name
        return Verdict(VERIFIED, sha256, published_hash(record, sha256))
    if known is None:
        return Verdict(UNKNOWN, sha256, None)
    if not sha256.startswith(known.sha256):
        return Verdict(WRONG, sha256, known)
    return Verdict(VERIFIED if known.published else FIRST_USE, sha256, known)


def check_hash(record: WeightRecord, opened: OpenFile) -> None:
    """Refuse a record's open file if its hash is wrong; hash nothing if no hash is known.

    Raises:
        WeightsError: wrong hash; with `QUALICLIP_PYIQA_VERIFY=0` only a warning is logged.
    """
    known = known_hash(record, opened)
    if known is not None and _compare(record, known, opened.sha256()).kind == WRONG:
        refuse_hash(record, opened, known, str(opened.path), _remedy(opened.path))


def refuse_hash(record: WeightRecord, opened: OpenFile, known: KnownHash, called: str, remedy: str) -> None:
    """Raise a WeightsError with the expected and the found hash; with `QUALICLIP_PYIQA_VERIFY=0` only log it."""
    expected = record.hub_size if known.sha256 == record.hub_sha256 else record.size
    size = f" and {opened.stamp.size} bytes instead of {expected}" if expected not in (0, opened.stamp.size) else ""
    message = (
        f"{called} is not {record.file}: expected sha256 {known.sha256} ({known.source}), found {opened.sha256()}{size}"
    )
    if os.environ.get(VERIFY_VARIABLE) != "0":
        raise WeightsError(f"{message}; {remedy}, or set {VERIFY_VARIABLE}=0 to use it anyway")
    logger.warning("%s; used anyway because %s=0", message, VERIFY_VARIABLE)


def _remedy(path: Path) -> str:
    if "blobs" in path.resolve().parts:
        return (
            "it is in the Hugging Face cache, shared with other programs, so it is not deleted here: delete "
            f"{path.resolve()} and fetch it again"
        )
    return "delete it and fetch it again"


def is_torchscript(opened: OpenFile) -> bool:
    """Whether an open file is a TorchScript archive, such as OpenAI's."""
    opened.file.seek(0)
    try:
        with zipfile.ZipFile(opened.file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False
    finally:
        opened.file.seek(0)
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


# Hashes of first downloads


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
        raise WeightsError(f"{path} cannot be read ({reason(error, 80)}); delete it") from error
    if not isinstance(known, dict) or not all(map(_is_entry, known.values())):
        raise WeightsError(f"{path} is damaged: expected `sha256`, `from` and `on` for each file; delete it")
    return known


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("sha256", "from", "on"))
        and SHA256.fullmatch(value["sha256"]) is not None
        and re.fullmatch(r"\d{4}-\d\d-\d\d", value["on"]) is not None
    )


def remembered_hash(record: WeightRecord, name: str) -> KnownHash | None:
    """Return the hash of the first download of a record under a file name; None if there was none."""
    entry = _remembered().get(f"{record.name}/{name}")
    if entry is None:
        return None
    source = f"remembered on {entry['on']} from {entry['from']} in {_hashes_file()}"
    return KnownHash(entry["sha256"], source, published=False)


def remember(record: WeightRecord, name: str, sha256: str, source: str) -> None:
    """Write the hash of a first download to `hashes.json`; log a warning if that fails."""
    entry = {"sha256": sha256, "from": source, "on": time.strftime("%Y-%m-%d")}
    target = _hashes_file()
    if target is None:
        logger.warning("the hash of %s cannot be remembered: the user has no cache folder", name)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            known = {**_remembered(), f"{record.name}/{name}": entry}
            part.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        logger.warning("the hash of %s cannot be remembered: %s", name, error)


# Provenance of a loaded file


def provenance(file: WeightFile) -> dict[str, Any]:
    """Describe a loaded file in plain values: its hash, the verdict on it, and its terms.

    The licence comes from the record with the file's hash or name, or, for a user's model in this package's own
    format, from the file's metadata.

    Returns:
        `file`, `path`, `sha256` (None, with a warning, if the file changed before it was hashed), `check` (`verified`,
        `first use`, `unknown`, `wrong`), `check_detail`, `record` (None for a user's own file), `licence`, `source`;
        for a record also `licence_url`, `commercial_use` and `citation`.

    Example:
        >>> from qualiclip_pyiqa.pretrained.read import read
        >>> found = provenance(read("qualiclip-mini").file)
        >>> found["check"], found["licence"]
        ('verified', 'CC-BY-SA-4.0')
    """
    sha256 = file.sha256()
    out: dict[str, Any] = {"file": file.path.name, "path": str(file.path), "sha256": sha256}
    if sha256 is None:
        logger.warning("%s changed after it was loaded, so the model's hash can no longer be computed", file.path)
        changed = {"check": UNKNOWN, "check_detail": "the file changed after it was loaded", "record": None}
        return out | changed | _own_terms(file)
    record = record_of(sha256) or next((r for r in manifest().values() if _is_file_of(r, file.path)), None)
    found = Verdict(UNKNOWN, sha256, None)
    if record is not None:
        known = None
        if not file.changed:
            with OpenFile(file.path) as opened:
                known = known_hash(record, opened)
        found = _compare(record, known, sha256)
    out |= {"check": found.kind, "check_detail": str(found)}
    if record is None or (file.format in OWN_FORMATS and found.kind != VERIFIED):
        return out | {"record": None} | _own_terms(file)
    terms = ("licence", "licence_url", "commercial_use", "source", "citation")
    return {**out, "record": record.name, **{key: getattr(record, key) for key in terms}}


def _own_terms(file: WeightFile) -> dict[str, str]:
    own = file.format in OWN_FORMATS
    return {
        "licence": (file.licence if own else "") or "unknown",
        "source": (file.source or "unknown") if own else "the user's own file",
    }


def _is_file_of(record: WeightRecord, path: Path) -> bool:
    """Whether a file has the name under which a record's file is looked up."""
    if unquote(path.name) == record.file or path.name == Path(record.file).with_suffix(".safetensors").name:
        return True
    folder = f"models--{record.hf_repo.replace('/', '--')}"
    return bool(record.hf_repo) and path.name == record.hf_file and folder in path.parts
