"""Download a record's weight file: with huggingface_hub into its cache, or from a URL into this package's cache.

Files in caches shared with other programs are never deleted.
"""

from __future__ import annotations

import glob
import http.client
import logging
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ..errors import WeightsError, reason
from ..files import replacing
from . import folders
from .files import OpenFile
from .manifest import EMBEDDED_METRIC, SHA256, WeightRecord, data_folder
from .verify import KnownHash, published_hash, refuse_hash, remember, remembered_hash

# Cuts off a server that never stops sending; OpenAI's largest model is 1.7 GB.
MAX_BYTES = 8 * 2**30

logger = logging.getLogger(__name__)


def download(record: WeightRecord) -> Path:
    """Download a record's file, check its hash, and return its path.

    Raises:
        WeightsError: no source can be reached (the message names the addresses and where to put the file by hand), the
            file cannot be downloaded at all, or the download has the wrong hash.
    """
    from huggingface_hub import constants

    if record.by_hand:
        raise missing_by_hand([record])
    failures = []
    offline = constants.HF_HUB_OFFLINE
    if offline:
        failures.append("HF_HUB_OFFLINE=1")
    if record.hf_repo and not offline:
        try:
            return _download_from_hub(record)
        except WeightsError:
            raise
        except Exception as error:  # noqa: BLE001 - any exception of the HTTP library; reported below
            failures.append(f"hub: {reason(error)}")
    for url in () if offline else record.urls:
        try:
            return _download_from_url(record, url)
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url}: {reason(error)}")
    if not record.origin:
        raise WeightsError(f"{data_folder() / record.file} is missing; it is part of this package, so reinstall it")
    by_hand = record.urls[0] if record.layout == "openai-clip" and record.urls else record.origin
    raise WeightsError(
        f"{record.file} is not on this machine and cannot be downloaded ({'; '.join(failures)}); fetch {by_hand} "
        f"elsewhere and put it into {_folders()} (of this package's metrics, {EMBEDDED_METRIC} needs no download)"
    )


def missing_by_hand(records: Sequence[WeightRecord]) -> WeightsError:
    """Return the error that files are missing which have to be fetched by hand; it says where to get each."""
    sources: dict[str, list[str]] = {}
    for record in records:
        sources.setdefault(record.by_hand, []).append(record.file)
    are, them = ("is", "it") if len(records) == 1 else ("are", "them")
    if len(sources) == 1:
        get = f"get {them} from {records[0].by_hand}"
    else:
        get = f"get {'; '.join(f'{_joined(names)} from {source}' for source, names in sources.items())}"
    return WeightsError(
        f"{_joined([record.file for record in records])} {are} not on this machine and cannot be downloaded by this "
        f"package; {get}; then put {them} into {_folders()}"
    )


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _folders() -> str:
    """Name the folders for files that are fetched by hand."""
    cache = folders.cache_folder()
    return f"{f'{cache} or ' if cache else ''}a folder named in {folders.FOLDERS_VARIABLE}"


def _download_from_hub(record: WeightRecord) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    if folders.hugging_face_cache() is None:
        raise OSError("the user has no home directory, so no Hugging Face cache; set HF_HOME")
    revision = record.hf_revision or None
    announced = get_hf_file_metadata(hf_hub_url(record.hf_repo, record.hf_file, revision=revision))
    _check_size(announced.size or 0, record.hub_size)
    path = Path(hf_hub_download(record.hf_repo, record.hf_file, revision=revision))
    digest = announced.etag or ""
    source = f"{record.hf_repo} on the hub"
    remedy = f"it is in the Hugging Face cache, shared with other programs: delete {path.resolve()} and try again"
    _accept(record, path, path.name, digest if SHA256.fullmatch(digest) else "", source, remedy)
    return path


def _download_from_url(record: WeightRecord, url: str) -> Path:
    from tqdm import tqdm

    cache = folders.cache_folder()
    if cache is None:
        raise OSError("the user has no home directory, so no cache folder; set XDG_CACHE_HOME")
    target = cache / record.file
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    with replacing(target) as part:  # of two concurrent downloads, the later replaces the same bytes
        request = urllib.request.Request(url, headers={"User-Agent": "qualiclip-pyiqa"})
        with urllib.request.urlopen(request, timeout=30) as response, part.open("xb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            _check_size(length, record.size)
            received = 0
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
                while block := response.read(1 << 20):
                    received += len(block)
                    if received > (length or record.size or MAX_BYTES):
                        raise OSError(f"the server sends more than {length or record.size or MAX_BYTES} bytes")
                    file.write(block)
                    bar.update(len(block))
        if length and received != length:
            raise OSError(f"the connection broke after {received} of {length} bytes")
        _accept(record, part, target.name, "", url, "the download was discarded, try again")
    return target


def _check_size(announced: int, known: int) -> None:
    """Refuse a download whose announced size is too large; one that is too small fails its hash."""
    if announced > (known or MAX_BYTES):
        raise OSError(f"the server announces {announced} bytes; expected {known or f'at most {MAX_BYTES}'}")


def _accept(record: WeightRecord, path: Path, name: str, digest: str, source: str, remedy: str) -> None:
    """Check the hash of a download; remember it if the manifest has none.

    Args:
        path: the downloaded file.
        name: its final name.
        digest: sha256 announced by the hub, or "".
        source, remedy: where it came from and what to do if it is wrong, for messages.
    """
    called = f"the download from {source}"
    if not path.stat().st_size:
        raise WeightsError(f"{called} for {record.file} is empty; {remedy}")
    # Unlike a file found on disk, a download is never a user's own conversion, so the manifest's hash always holds.
    in_manifest = record.sha256 if name == record.file else record.hub_sha256 if name == record.hf_file else ""
    known = published_hash(record, in_manifest) if in_manifest else remembered_hash(record, name)
    first_use = known is None
    if known is None and digest:
        known = KnownHash(digest, source, published=False)
    with OpenFile(path) as opened:
        sha256 = opened.sha256()
        if known is not None and not sha256.startswith(known.sha256):
            refuse_hash(record, opened, known, called, remedy)
    if first_use:
        logger.warning(
            "first use of %s from %s: it has no published hash, so nobody has verified it; its sha256 %s is "
            "remembered, and later copies are compared with it",
            record.file,
            source,
            sha256,
        )
        remember(record, name, sha256, source)


def _clear_abandoned(target: Path) -> None:
    """Delete partial files of killed downloads after a day; a younger one may still be growing."""
    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        if time.time() - part.stat().st_mtime > 86400:
            part.unlink(missing_ok=True)
