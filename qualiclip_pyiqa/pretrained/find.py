"""Find the file of a weight record, or a user's own.

A file is looked for in this order. The first that exists is taken; if it cannot be used, that is an error.

1. the caller's own path (`weights=FILE`);
2. the folders in `QUALICLIP_PYIQA_WEIGHTS` (separated as in `PATH`), each by upstream's file name (`RN50.pt` and
   `ViT-L-14.pt` as OpenAI's archive or as a plain state dict), then as `.safetensors` under the same stem;
3. embedded in this package;
4. this package's cache, `$XDG_CACHE_HOME/qualiclip_pyiqa` (by default `~/.cache/qualiclip_pyiqa`);
5. caches that others filled: pyiqa's (`pyiqa/` and `clip/` in torch.hub's folder), open_clip's (`~/.cache/clip`), the
   Hugging Face cache;
6. a download through huggingface_hub into its cache (so HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work);
7. the record's further URLs, into this package's cache (not with HF_HUB_OFFLINE=1).

A cache whose folder cannot be named, since the user has no home, is skipped. `verify` says what hashes are compared
with; a wrong one is a `WeightsError`, or with `QUALICLIP_PYIQA_VERIFY=0` a logged warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ..errors import WeightsError, did_you_mean
from . import folders
from .download import download
from .files import OpenFile
from .folders import FOLDERS_VARIABLE
from .manifest import WeightRecord, data_folder, manifest
from .verify import check_hash

logger = logging.getLogger(__name__)


class FoundWeights(NamedTuple):
    """A file of a record on this machine, and in which of the look-up order's places it was found."""

    path: Path
    place: str


def find(name_or_path: str | Path | WeightRecord) -> Path:
    """Find the file of a record or the user's own, download it where it is missing, and check its hash.

    Args:
        name_or_path: name of a record, a record, or a path; what is no record's name is a path.

    Raises:
        WeightsError: no such file or record, an unusable file, a wrong hash, or no download possible.
    """
    path, record = resolve(name_or_path)
    with OpenFile(path) as opened:
        if record is not None:
            check_hash(record, opened)
    return path


def resolve(name_or_path: str | Path | WeightRecord) -> tuple[Path, WeightRecord | None]:
    """Find or download a file, unchecked, and the record whose hash it must have; None for a user's own file.

    Raises:
        WeightsError: no such file or record, or no download possible.
    """
    record = _record(name_or_path)
    if record is None:
        path = folders.expanded(str(name_or_path))
        if not path.exists():
            near = did_you_mean(str(name_or_path), manifest())
            raise WeightsError(f"no weight file {str(path)!r}, nor a weight record of that name{near}")
        # A model that somebody trained may well be called as the embedded one is.
        return path, next((r for r in manifest().values() if r.file == path.name and r.origin), None)
    found = locate(record)
    if found is None:
        return download(record), record
    logger.debug("%s: %s (%s)", record.name, found.path, found.place)
    return found.path, record


def locate(name_or_record: str | WeightRecord) -> FoundWeights | None:
    """Where a record's file lies on this machine, unchecked; None if nowhere. Never downloads.

    Raises:
        WeightsError: no record has this name.

    Example:
        >>> locate("qualiclip-mini").path.name
        'qualiclip-mini.safetensors'
    """
    record = _record(name_or_record)
    if record is None:
        near = did_you_mean(str(name_or_record), manifest())
        raise WeightsError(f"unknown weight record {name_or_record!r}; expected one of {', '.join(manifest())}{near}")
    for path, place in _places(record):
        if path.exists():
            return FoundWeights(path, place)
    return None


def _record(name_or_path: str | Path | WeightRecord) -> WeightRecord | None:
    if isinstance(name_or_path, WeightRecord):
        return name_or_path
    return None if isinstance(name_or_path, Path) else manifest().get(name_or_path)


def _places(record: WeightRecord) -> Iterator[FoundWeights]:
    for folder in filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)):
        own = folders.expanded(folder)
        if not own.is_dir():
            logger.warning("%s names %s, which is not a folder", FOLDERS_VARIABLE, own)
        yield FoundWeights(own / record.file, FOLDERS_VARIABLE)
        yield FoundWeights((own / record.file).with_suffix(".safetensors"), FOLDERS_VARIABLE)
    yield FoundWeights(data_folder() / record.file, "embedded")
    if cache := folders.cache_folder():
        yield FoundWeights(cache / record.file, "own cache")
    if hub := folders.torch_hub():
        # pyiqa names a download after its URL, in which the hub's library writes `+` as `%2B`.
        for name in dict.fromkeys((record.file, quote(record.file))):
            yield FoundWeights(hub / "pyiqa" / name, "pyiqa's cache")
        yield FoundWeights(hub / "clip" / record.file, "pyiqa's cache")
    if home := folders.home():
        yield FoundWeights(home / ".cache" / "clip" / record.file, "open_clip's cache")
    if record.hf_repo and folders.hugging_face_cache():
        from huggingface_hub import try_to_load_from_cache

        # Others download from `main`; the bytes are the same unless the repository changed, which the hash tells.
        for revision in dict.fromkeys((record.hf_revision or None, None)):
            cached = try_to_load_from_cache(record.hf_repo, record.hf_file, revision=revision)
            if isinstance(cached, str):
                yield FoundWeights(Path(cached), "Hugging Face cache")
