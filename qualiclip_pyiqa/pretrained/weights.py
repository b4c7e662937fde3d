"""Weight files: which there are (`weights/manifest.toml`), where they lie, whether they are right, what they hold.

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

Hashes. A file is compared with the manifest; where that knows no hash, with the hub's own content digest, taken at the
first download and remembered in `hashes.json` in this package's cache. Where the hub gives none either, the first
download is trusted (which is logged) and its hash remembered. A wrong hash is a `WeightsError`, and with
`QUALICLIP_PYIQA_VERIFY=0` a logged warning. A user's own `.safetensors`, or a plain state dict in the place of
OpenAI's archive, has no known hash to be compared with; `provenance` reports the one it has.

Safety. Reading executes nothing: safetensors and `torch.load(weights_only=True)`. OpenAI's archives are TorchScript,
which is code: they are opened only with a known sha256, whatever `QUALICLIP_PYIQA_VERIFY` says.
"""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import http.client
import json
import logging
import os
import pickle
import re
import sys
import time
import tomllib
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from ..errors import WeightsError
from ..files import replacing

if TYPE_CHECKING:
    from torch import Tensor

OWN_FORMAT = "qualiclip-pyiqa/1"
FOLDERS_VARIABLE = "QUALICLIP_PYIQA_WEIGHTS"
VERIFY_VARIABLE = "QUALICLIP_PYIQA_VERIFY"
EMBEDDED_METRIC = "qualiclip-mini"

_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a layout must hold: keys, or prefixes of keys with a final dot.
_REQUIRED = {
    "openai-clip": ("visual.", "logit_scale"),
    "qualiclip": ("clip_model.visual.", "clip_model.logit_scale", "prompts_features"),
    "context": ("prompt_learner.ctx",),
    "qualiclip-pyiqa": ("visual.", "prompts_features", "logit_scale"),
}
_CONTEXT_LAYOUTS = ("context", "context-tensor", "params")
_OWN_METADATA = ("backbone", "tower", "prompts")
# Numbers that OpenAI's archives keep beside the tensors of the model.
_ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightRecord:
    """One weight file; `sha256` (whole, first digits, or empty) and `size` (bytes, 0: unknown) are those of `file`."""

    name: str
    file: str
    layout: str
    licence: str
    licence_url: str
    commercial_use: bool
    source: str
    citation: str
    hf_repo: str = ""
    hf_file: str = ""
    urls: tuple[str, ...] = ()
    sha256: str = ""
    size: int = 0

    @property
    def origin(self) -> str:
        """The address to fetch the file from by hand; empty for an embedded file."""
        if self.hf_repo:
            return f"https://huggingface.co/{self.hf_repo}/resolve/main/{self.hf_file}"
        return self.urls[0] if self.urls else ""


class Found(NamedTuple):
    """A file of a record on this machine, and in which of the look-up order's places it was found."""

    path: Path
    place: str


def data_folder() -> Path:
    """The folder of the manifest and the embedded model: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_weights"
    return inside if inside.is_dir() else package.parent / "weights"


def cache_folder() -> Path:
    """This package's own cache; made when something is downloaded into it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qualiclip_pyiqa"


@functools.cache
def _manifest_file() -> dict[str, Any]:
    path = data_folder() / "manifest.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); reinstall qualiclip-pyiqa") from error


@functools.cache
def manifest() -> dict[str, WeightRecord]:
    """All records of `weights/manifest.toml` by name."""
    rows = _manifest_file()["weights"].items()
    return {name: WeightRecord(name=name, **{**row, "urls": tuple(row.get("urls", ()))}) for name, row in rows}


def published() -> list[dict[str, Any]]:
    """Scores reported by others: metric, dataset, srcc, source, verified (read at its source) and, in most, plcc."""
    return _manifest_file()["published"]


def is_user_file(name_or_path: str | Path | WeightRecord) -> bool:
    """Whether this is somebody's own file rather than a record of the manifest."""
    return not isinstance(name_or_path, WeightRecord) and (
        isinstance(name_or_path, Path) or name_or_path not in manifest()
    )


def openai_record(backbone: str) -> WeightRecord:
    """The record of OpenAI's weights for an open_clip model name, from open_clip's own table.

    Raises:
        WeightsError: OpenAI released none for this model.
    """
    import open_clip

    config = open_clip.get_pretrained_cfg(backbone, "openai") or {}
    url, repo = config.get("url", ""), config.get("hf_hub", "").strip("/")
    for record in manifest().values():
        if (url and url in record.urls) or (repo and repo == record.hf_repo):
            return record
    if not url and not repo:
        raise WeightsError(f"OpenAI released no weights for backbone {backbone!r}; pass weights=FILE")
    like = manifest()["RN50"]
    parts = url.split("/")
    return WeightRecord(
        name=backbone,
        file=parts[-1] or f"{backbone}.pt",
        layout="openai-clip",
        licence=like.licence,
        licence_url=like.licence_url,
        commercial_use=like.commercial_use,
        source=like.source,
        citation=like.citation,
        hf_repo=repo,
        hf_file=like.hf_file if repo else "",
        urls=(url,) if url else (),
        sha256=parts[-2] if url and _SHA256.fullmatch(parts[-2]) else "",
    )


# Finding


def find(name_or_path: str | Path | WeightRecord) -> Path:
    """The file of a record, or the user's own, after the checks and in the order that this module's docstring gives.

    Args:
        name_or_path: name of a record, a record, or a path; what is no record's name is a path.

    Raises:
        WeightsError: no such file or record, unusable file, wrong hash, or no download possible.
    """
    record = _record(name_or_path)
    if record is None:
        path = Path(str(name_or_path)).expanduser()
        if not path.exists():
            near = difflib.get_close_matches(str(name_or_path), manifest(), n=1, cutoff=0.0)[0]
            raise WeightsError(f"no weight file {str(path)!r}, nor a record of that name; did you mean {near!r}?")
        check_usable(path)
        # A model that somebody trained may well be called as the embedded one is.
        named = next((r for r in manifest().values() if r.file == path.name and r.origin), None)
        if named is not None:
            _check_hash(named, path)
        return path
    found = locate(record)
    if found is None:
        return _download(record)
    check_usable(found.path)
    _check_hash(record, found.path)
    logger.debug("%s: %s (%s)", record.name, found.path, found.place)
    return found.path


def locate(name_or_record: str | WeightRecord) -> Found | None:
    """Where a record's file lies on this machine, unchecked; None if nowhere. Never downloads."""
    record = _record(name_or_record)
    if record is None:
        raise WeightsError(f"no weight record {name_or_record!r}; expected one of {', '.join(manifest())}")
    for path, place in _places(record):
        if path.exists():
            return Found(path, place)
    return None


def _record(name_or_path: str | Path | WeightRecord) -> WeightRecord | None:
    if isinstance(name_or_path, WeightRecord):
        return name_or_path
    return None if isinstance(name_or_path, Path) else manifest().get(name_or_path)


def _places(record: WeightRecord) -> Iterator[tuple[Path, str]]:
    for folder in filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)):
        own = Path(folder).expanduser()
        if not own.is_dir():
            logger.warning("%s names %s, which is no folder", FOLDERS_VARIABLE, own)
        yield own / record.file, FOLDERS_VARIABLE
        yield (own / record.file).with_suffix(".safetensors"), FOLDERS_VARIABLE
    yield data_folder() / record.file, "embedded"
    yield cache_folder() / record.file, "own cache"
    # pyiqa names a download after its URL, in which the hub's library writes `+` as `%2B`.
    for name in dict.fromkeys((record.file, quote(record.file))):
        yield _torch_hub() / "pyiqa" / name, "pyiqa's cache"
    yield _torch_hub() / "clip" / record.file, "pyiqa's cache"
    yield Path.home() / ".cache" / "clip" / record.file, "open_clip's cache"
    if record.hf_repo:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(record.hf_repo, record.hf_file)
        if isinstance(cached, str):
            yield Path(cached), "Hugging Face cache"


def _torch_hub() -> Path:
    # torch takes seconds to import and only an imported torch can have been told another folder.
    if "torch" in sys.modules:
        return Path(sys.modules["torch"].hub.get_dir())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub"


def check_usable(path: Path) -> None:
    """Raise a `WeightsError` for a folder, an empty file or one that may not be read."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; expected a weight file")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from error
    if not first:
        raise WeightsError(f"{path} is empty (0 bytes); delete it and fetch it again")


# Hashes


def file_sha256(path: str | Path) -> str:
    """sha256 of a file in hex; within the process computed again only when size or time of change differ."""
    path = Path(path).resolve()
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_sha256(record: WeightRecord, path: Path) -> tuple[str, str]:
    """The hash (or its first digits) that a record's file must have, and who says so; empty where nobody knows."""
    if unquote(path.name) == record.file and record.sha256:
        if record.layout == "openai-clip" and not _is_torchscript(path):
            return "", ""  # a plain state dict in the archive's place
        return record.sha256, "the manifest"
    remembered = _remembered().get(f"{record.name}/{path.name}")
    if remembered is not None:
        return remembered["sha256"], _said_by(remembered)
    # The Hugging Face cache keeps a file under the digest that the hub gave for it.
    blob = path.resolve()
    if record.hf_repo and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name, "the hub, as recorded in its cache"
    return "", ""


def matches(record: WeightRecord, path: Path) -> bool | None:
    """Whether a file has the hash it must have; None where no hash is known."""
    expected, _ = expected_sha256(record, path)
    return file_sha256(path).startswith(expected) if expected else None


def _check_hash(record: WeightRecord, path: Path) -> None:
    expected, said_by = expected_sha256(record, path)
    if expected:
        _compare(record, path, expected, said_by, str(path), "delete it and fetch it again")


def _compare(record: WeightRecord, path: Path, expected: str, said_by: str, called: str, remedy: str) -> None:
    found = file_sha256(path)
    if found.startswith(expected):
        return
    size = f" and {path.stat().st_size} bytes instead of {record.size}" if record.size else ""
    message = f"{called} is not {record.file}: expected sha256 {expected} ({said_by}), found {found}{size}"
    if os.environ.get(VERIFY_VARIABLE) != "0":
        raise WeightsError(f"{message}; {remedy}, or set {VERIFY_VARIABLE}=0 to use it all the same")
    logger.warning("%s; used all the same because %s=0", message, VERIFY_VARIABLE)


def _hashes_file() -> Path:
    return cache_folder() / "hashes.json"


def _remembered() -> dict[str, dict[str, str]]:
    try:
        return json.loads(_hashes_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{_hashes_file()} cannot be read ({error}); delete it") from error


def _said_by(remembered: Mapping[str, str]) -> str:
    return f"{_hashes_file()}: {remembered['from']}, {remembered['on']}"


def _remember(record: WeightRecord, path: Path, sha256: str, source: str) -> None:
    entry = {"sha256": sha256, "from": source, "on": time.strftime("%Y-%m-%d")}
    target = _hashes_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            known = {**_remembered(), f"{record.name}/{path.name}": entry}
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    except OSError as error:
        logger.warning("the hash of %s cannot be remembered: %s", path, error)


def provenance(path: str | Path) -> dict[str, Any]:
    """What a file is, as plain values: its hash now, whether that is the known one (None: none known), and its terms.

    A file of this package's own format says its licence itself; others get it from the record of their name.
    """
    path = Path(path)
    record = next((r for r in manifest().values() if _is_file_of(r, path)), None)
    metadata: Mapping[str, str] = {}
    if _is_safetensors(path):
        metadata = _safetensors_metadata(path)
    out: dict[str, Any] = {"file": path.name, "path": str(path), "sha256": file_sha256(path)}
    out["verified"] = None if record is None else matches(record, path)
    if metadata.get("format") == OWN_FORMAT and not out["verified"]:
        return {**out, "record": None, **{key: metadata.get(key, "unknown") for key in ("licence", "source")}}
    if record is None:
        return {**out, "record": None, "licence": "unknown", "source": "the user's own file"}
    terms = ("licence", "licence_url", "commercial_use", "source", "citation")
    return {**out, "record": record.name, **{key: getattr(record, key) for key in terms}}


def _is_file_of(record: WeightRecord, path: Path) -> bool:
    if unquote(path.name) == record.file or path.name == Path(record.file).with_suffix(".safetensors").name:
        return True
    folder = f"models--{record.hf_repo.replace('/', '--')}"
    return bool(record.hf_repo) and path.name == record.hf_file and folder in path.parts


# Downloading


def _download(record: WeightRecord) -> Path:
    from huggingface_hub import constants

    failures = []
    if record.hf_repo and not constants.HF_HUB_OFFLINE:
        try:
            return _download_from_hub(record)
        except WeightsError:
            raise
        except Exception as error:  # whatever the HTTP library underneath raises; all of it is reported below
            failures.append(f"hub: {_one_line(error)}")
    if constants.HF_HUB_OFFLINE:
        failures.append("HF_HUB_OFFLINE=1")
    else:
        for url in record.urls:
            try:
                return _download_from_url(record, url)
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{url}: {_one_line(error)}")
    if not record.origin:
        raise WeightsError(f"{data_folder() / record.file} is missing, which belongs to this package; reinstall it")
    by_hand = record.urls[0] if record.layout == "openai-clip" and record.urls else record.origin
    raise WeightsError(
        f"{record.file} is not on this machine and cannot be downloaded ({'; '.join(failures)}); fetch {by_hand} "
        f"elsewhere and put it into {cache_folder()} or a folder named in {FOLDERS_VARIABLE}; "
        f"the metric {EMBEDDED_METRIC} needs no download"
    )


def _download_from_hub(record: WeightRecord) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    digest = get_hf_file_metadata(hf_hub_url(record.hf_repo, record.hf_file)).etag or ""
    path = Path(hf_hub_download(record.hf_repo, record.hf_file))
    source = f"{record.hf_repo} on the hub"
    try:
        _accept(record, path, path, digest if _SHA256.fullmatch(digest) else "", source)
    except WeightsError:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return path


def _download_from_url(record: WeightRecord, url: str) -> Path:
    from tqdm import tqdm

    target = cache_folder() / record.file
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(target)
    with replacing(target) as part:  # of two processes the later one replaces the same bytes
        request = urllib.request.Request(url, headers={"User-Agent": "qualiclip-pyiqa"})
        with urllib.request.urlopen(request, timeout=30) as response, part.open("xb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if length and part.stat().st_size != length:
            raise OSError(f"the connection broke after {part.stat().st_size} of {length} bytes")
        _accept(record, part, target, "", url)
    return target


def _accept(record: WeightRecord, path: Path, target: Path, digest: str, source: str) -> None:
    """Check what was downloaded to `path` and will be known as `target`; remember its hash if the manifest has none."""
    called, remedy = f"what {source} sent", "nothing was kept, try again"
    if not path.stat().st_size:
        raise WeightsError(f"{called} for {record.file} is empty; {remedy}")
    # A download is the file of the record, so no other content is excused from the manifest's hash.
    in_manifest = bool(record.sha256) and target.name == record.file
    remembered = None if in_manifest else _remembered().get(f"{record.name}/{target.name}")
    if in_manifest:
        _compare(record, path, record.sha256, "the manifest", called, remedy)
    elif remembered is not None:
        _compare(record, path, remembered["sha256"], _said_by(remembered), called, remedy)
    else:
        if digest:
            _compare(record, path, digest, source, called, remedy)
        else:
            logger.warning("no hash is known for %s from %s; it is trusted and remembered", record.file, source)
        _remember(record, target, digest or file_sha256(path), source)


def _clear_abandoned(target: Path) -> None:
    """Remove what killed downloads left more than a day ago; a younger part may still be growing."""
    for part in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        if time.time() - part.stat().st_mtime > 86400:
            part.unlink(missing_ok=True)


# Reading


def read(path: str | Path, *, layout: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a weight file on the CPU, memory-mapped where the format allows it, and its metadata.

    Args:
        path: safetensors, a `torch.save` file, or OpenAI's archive; told apart by content.
        layout: one of the manifest's, or `context` for either kind of context file; None to go by the content.

    Returns:
        tensors in the dtype of the file (OpenAI's archives: float16) under the file's own keys; a context file gives
        `prompt_learner.ctx` and what else its `params` hold. Metadata is that of safetensors, else empty.

    Raises:
        WeightsError: not readable, damaged, not safe to open, or of another layout (names the missing keys).
    """
    path = Path(path)
    check_usable(path)
    metadata: dict[str, str] = {}
    loaded: Any
    if _is_safetensors(path):
        loaded, metadata = _read_safetensors(path)
    elif _is_torchscript(path):
        loaded = _read_torchscript(path)
    else:
        loaded = _read_torch(path)
    state = _tensors(path, loaded)
    _check_layout(path, state, metadata, layout)
    return state, metadata


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(loaded, torch.Tensor):
        return {"prompt_learner.ctx": loaded}
    for name in ("params", "state_dict"):  # of pyiqa's trainer, of open_clip's
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected tensors by name")
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path} holds {key!r} of type {type(value).__name__}; expected tensors by name")
    # DistributedDataParallel, under which a model may have been saved, puts `module.` before every name.
    return {str(key).removeprefix("module."): value for key, value in loaded.items() if key not in _ARCHIVE_NUMBERS}


def _check_layout(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], layout: str | None) -> None:
    if layout is None:
        layout = "openai-clip"
        if metadata.get("format", "").startswith("qualiclip-pyiqa"):
            layout = "qualiclip-pyiqa"
        elif "prompts_features" in state:
            layout = "qualiclip"
        elif "prompt_learner.ctx" in state:
            layout = "context"
    required = _REQUIRED["context" if layout in _CONTEXT_LAYOUTS else layout]
    missing = [
        key for key in required if not (any(k.startswith(key) for k in state) if key.endswith(".") else key in state)
    ]
    if layout == "qualiclip-pyiqa":
        if metadata.get("format") != OWN_FORMAT:
            raise WeightsError(
                f"{path} has format {metadata.get('format', 'none')!r}; expected {OWN_FORMAT!r}: update qualiclip-pyiqa"
            )
        missing += [f"metadata {key!r}" for key in _OWN_METADATA if key not in metadata]
    if missing:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise WeightsError(f"{path} is not of layout {layout}: it lacks {', '.join(missing)} (it holds {some}, ...)")


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _safetensors_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with _refuse_damaged(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with _refuse_damaged(path), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)


def _is_torchscript(path: Path) -> bool:
    with _refuse_damaged(path):
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    import torch

    digest = file_sha256(path)
    known = {record.sha256 for record in manifest().values() if record.layout == "openai-clip"}
    if digest not in known and digest not in _openai_hashes():
        expected = next((r.sha256 for r in manifest().values() if r.file == path.name), "that of one of OpenAI's files")
        raise WeightsError(
            f"{path} is a TorchScript archive, which is code, and is opened only with a known hash, whatever "
            f"{VERIFY_VARIABLE} says: expected sha256 {expected}, found {digest}; save its state dict instead"
        )
    with _refuse_damaged(path), warnings.catch_warnings():
        # OpenAI offers no other format, so its deprecation is nothing that a user could act on.
        warnings.simplefilter("ignore", FutureWarning)
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


@functools.cache
def _openai_hashes() -> set[str]:
    """Hashes of all archives that OpenAI released, which their URLs in open_clip's table hold."""
    import open_clip

    urls = (open_clip.get_pretrained_cfg(name, "openai").get("url", "") for name in open_clip.list_models())
    return {part for url in urls for part in url.split("/") if _SHA256.fullmatch(part)}


def _read_torch(path: Path) -> Any:
    import torch

    with _refuse_damaged(path):
        # Only the newer, zipped format can be memory-mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


@contextmanager
def _refuse_damaged(path: Path) -> Iterator[None]:
    """Every way in which a damaged or hostile file fails to open, as one line."""
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except Exception as error:
        reason = _one_line(error)
        if isinstance(error, pickle.UnpicklingError) and re.search(r"(?i)unsupported (global|class)", str(error)):
            raise WeightsError(
                f"{path} is refused, and nothing of it was executed: it is a pickle of other things than tensors "
                f"({reason})"
            ) from error
        raise WeightsError(
            f"{path} is damaged or no weight file ({type(error).__name__}: {reason}); fetch it again"
        ) from error


def _one_line(error: BaseException) -> str:
    text = str(error)
    # torch explains at length how to switch its protection off, before it comes to what it met.
    met = re.search(r"(?i)unsupported (global|class)[^\n]*", text)
    return " ".join((met[0] if met else text).split())[:300].rstrip(". ") or type(error).__name__
