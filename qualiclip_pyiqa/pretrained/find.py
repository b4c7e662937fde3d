"""Find the weight file of a record, or a user's own.

Places are searched in this order. The first file that exists is used; if it is unusable, that is an error.

1. the caller's path (`weights=FILE`);
2. each folder in `QUALICLIP_PYIQA_WEIGHTS` (separated as in `PATH`): upstream's file name (`RN50.pt` and `ViT-L-14.pt`
   as OpenAI's archive or a plain state dict), then the same stem with `.safetensors`;
3. the model embedded in this package;
4. this package's cache, `$XDG_CACHE_HOME/qualiclip_pyiqa` (default `~/.cache/qualiclip_pyiqa`);
5. other programs' caches: pyiqa's (`pyiqa/` and `clip/` in torch.hub's folder), open_clip's (`~/.cache/clip`), Hugging
   Face's;
6. a download with huggingface_hub into its cache (HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE apply);
7. a download from the record's other URLs into this package's cache (not with HF_HUB_OFFLINE=1).

Caches in the home directory are skipped for a user without one. For hashes see `verify`: a wrong one raises a
`WeightsError`, or logs a warning with `QUALICLIP_PYIQA_VERIFY=0`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ..errors import WeightsError, did_you_mean
from . import folders
from .download import download, missing_by_hand
from .files import OpenFile
from .folders import FOLDERS_VARIABLE
from .manifest import WeightRecord, data_folder, find_record, manifest
from .verify import check_hash

logger = logging.getLogger(__name__)


class FoundWeights(NamedTuple):
    """A record's file on this machine, and the name of the place where it was found."""

    path: Path
    place: str


def find(name_or_path: str | Path | WeightRecord) -> Path:
    """Find a weight file, download it if it is missing, and check its hash.

    Args:
        name_or_path: name of a record, a record, or a path. A string that is not a record's name is a path.

    Raises:
        WeightsError: no such file or record, an unusable file, a wrong hash, or a failed download.
    """
    path, record = resolve(name_or_path)
    with OpenFile(path) as opened:
        if record is not None:
            check_hash(record, opened)
    return path


def resolve(name_or_path: str | Path | WeightRecord) -> tuple[Path, WeightRecord | None]:
    """Find or download a file without checking it; also return the record whose hash it must have, None if user-made.

    Raises:
        WeightsError: no such file or record, or a failed download.
    """
    record = find_record(name_or_path)
    if record is None:
        path = folders.expanded(str(name_or_path))
        if not path.exists():
            near = did_you_mean(str(name_or_path), manifest())
            raise WeightsError(
                f"no weight file {str(path)!r} and no weight record of that name; expected the path of a file, or a "
                f"name that `qualiclip weights list` prints{near}"
            )
        # The embedded model has no origin: a user may well give their own model its file name.
        return path, next((r for r in manifest().values() if r.file == path.name and (r.origin or r.by_hand)), None)
    found = locate(record)
    if found is None:
        return download(record), record
    logger.debug("%s: %s (%s)", record.name, found.path, found.place)
    return found.path, record


def locate(name_or_record: str | WeightRecord) -> FoundWeights | None:
    """Find a record's file on this machine without checking or downloading it; None if there is none.

    Raises:
        WeightsError: unknown record.

    Example:
        >>> locate("qualiclip-mini").path.name
        'qualiclip-mini.safetensors'
    """
    record = find_record(name_or_record)
    if record is None:
        near = did_you_mean(str(name_or_record), manifest())
        raise WeightsError(f"unknown weight record {name_or_record!r}; expected one of {', '.join(manifest())}{near}")
    for path, place in _places(record):
        if path.exists():
            return FoundWeights(path, place)
    return None


def check_by_hand(*wanted: str | Path | WeightRecord) -> None:
    """Check that the files of a metric which have to be fetched by hand are here, before the first one is read.

    Args:
        wanted: as for `find`; a path, or a record that can be downloaded, passes.

    Raises:
        WeightsError: some are missing; it names all of them.
    """
    records = [record for each in wanted if (record := find_record(each)) is not None and record.by_hand]
    missing = [record for record in dict.fromkeys(records) if locate(record) is None]
    if missing:
        raise missing_by_hand(missing)


def _places(record: WeightRecord) -> Iterator[FoundWeights]:
    for own in folders.named_folders():
        if not own.is_dir():
            logger.warning("%s names %s, which is not a folder", FOLDERS_VARIABLE, own)
        yield FoundWeights(own / record.file, FOLDERS_VARIABLE)
        yield FoundWeights((own / record.file).with_suffix(".safetensors"), FOLDERS_VARIABLE)
    yield FoundWeights(data_folder() / record.file, "embedded")
    if cache := folders.cache_folder():
        yield FoundWeights(cache / record.file, "own cache")
    if hub := folders.torch_hub():
        # pyiqa names a download after its URL, where `+` is escaped as `%2B`.
        for name in dict.fromkeys((record.file, quote(record.file))):
            yield FoundWeights(hub / "pyiqa" / name, "pyiqa's cache")
        yield FoundWeights(hub / "clip" / record.file, "pyiqa's cache")
    if home := folders.home():
        yield FoundWeights(home / ".cache" / "clip" / record.file, "open_clip's cache")
    if record.hf_repo and folders.hugging_face_cache():
        from huggingface_hub import try_to_load_from_cache

        # Other programs download from `main`; the hash tells if the repository has changed since `hf_revision`.
        for revision in dict.fromkeys((record.hf_revision or None, None)):
            cached = try_to_load_from_cache(record.hf_repo, record.hf_file, revision=revision)
            if isinstance(cached, str):
                yield FoundWeights(Path(cached), "Hugging Face cache")
