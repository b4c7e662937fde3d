"""Read the tensors of a weight file.

No code in a file is executed: safetensors, `torch.load(weights_only=True)`, and data-only readers for OpenAI's
TorchScript archives and for CONTRIQUE's regressors. Archives must have the sha256 of one of OpenAI's, even with
`QUALICLIP_PYIQA_VERIFY=0`. A file is opened once, so the bytes hashed are the bytes read.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError, kind_of, one_line, reason
from . import ridge_pickle
from .files import OpenFile, WeightFile, WeightFolder
from .find import resolve
from .layouts import check_layout, without_training_module
from .manifest import WeightRecord, manifest, openai_hashes, record_of
from .torchscript import read_archive
from .transformers_layout import (
    TransformersConfig,
    is_transformers_clip,
    read_config,
    to_open_clip,
    towers_of,
    weight_files,
)
from .verify import VERIFY_VARIABLE, check_hash, is_torchscript

if TYPE_CHECKING:
    from torch import Tensor

#: Metadata of a file of `qualiclip weights convert`: the sha256 of the file that it was converted from.
CONVERTED_FROM = "converted_from"
# Settings stored beside the tensors in OpenAI's archives.
_ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_MAX_ARCHIVE = 4 * 2**30  # bytes; OpenAI's largest archive has 1.3 GB
_SMALL = 2**26  # bytes of tensors allowed in any file, however small
# The number with which `torch.save` starts files of its old format, as pickle encodes it; at most 15 bytes precede it.
_TORCH_MAGIC = b"\x8a\n" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


@dataclass(frozen=True)
class ReadWeights:
    """Content of a weight file.

    Attributes:
        file: the file that was read.
        tensors: under the file's names, on the CPU, in the file's dtype, memory-mapped if the format allows it. A bare
            context is named `prompt_learner.ctx`; a CLIP in the layout of transformers gets open_clip's names.
        metadata: of safetensors; empty for other formats.
        from_openai: whether the file's hash proves that the weights are OpenAI's, or it says that it was converted from
            one that has such a hash.
        transformers: what the JSON files beside a CLIP in the layout of transformers say; None for other layouts.
        is_safetensors: whether the file is in that format.
    """

    file: WeightFile
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    from_openai: bool
    transformers: TransformersConfig | None = None
    is_safetensors: bool = False


def read(name_or_path: str | Path | WeightRecord, *, layout: str | None = None) -> ReadWeights:
    """Find a weight file, check its hash and read it.

    Args:
        name_or_path: name of a record, a record, or a path to safetensors, a `torch.save` file or OpenAI's archive; the
            format is detected from the content. Or a folder with a CLIP in the layout of transformers.
        layout: a layout of the manifest, or `context` for any kind of context file; None: detected from the content.

    Raises:
        WeightsError: not found, wrong hash, damaged, unsafe, or of another layout.
    """
    path, record = resolve(name_or_path)
    if path.is_dir() and layout in (None, "openai-clip"):
        found = _read_folder(path)
    else:
        found = _read_file(path, record)
        if is_transformers_clip(found.tensors):
            found = _renamed(path.parent, [found], found.file)
    check_layout(path, found.tensors, found.metadata, layout)
    return found


def _read_folder(folder: Path) -> ReadWeights:
    """Read a CLIP in the layout of transformers from the files of a folder."""
    parts = [_read_file(path, None) for path in weight_files(folder)]
    files = tuple(part.file for part in parts)
    file = files[0] if len(files) == 1 else WeightFolder(folder, files[0].stamp, parts=files)
    return _renamed(folder, parts, file)


def _renamed(folder: Path, parts: Sequence[ReadWeights], file: WeightFile) -> ReadWeights:
    """Join the files of a CLIP in the layout of transformers under open_clip's names.

    Args:
        folder: with the JSON files.
        parts: content of the files.
        file: what they are together.
    """
    config = read_config(folder, [towers_of(part.tensors) for part in parts], [part.file.path for part in parts])
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part.tensors.items():
            tensors[key.removeprefix("model.")] = value
    return ReadWeights(file, to_open_clip(file.path, tensors), {}, from_openai=False, transformers=config)


def _read_file(path: Path, record: WeightRecord | None) -> ReadWeights:
    """Read the tensors of one file under its own names, without a check of its layout."""
    with OpenFile(path) as opened:
        if record is not None:
            check_hash(record, opened)
        metadata: dict[str, str] = {}
        sha256 = ""
        loaded: Any
        is_safetensors = _is_safetensors(opened)
        if is_safetensors:
            loaded, metadata = _read_safetensors(opened)
        elif is_torchscript(opened):
            loaded, sha256 = _read_torchscript(opened)
        elif _starts_with(opened, ridge_pickle.START):
            loaded = _read_ridge(opened)
        else:
            loaded = _read_torch(opened)
        opened.check_unchanged()
        sha256 = sha256 or _openai_conversion(opened)
        tensors = without_training_module(_tensors(opened, loaded))
        own = {key: metadata.get(key, "") for key in ("format", "licence", "source")}
        return ReadWeights(
            file=WeightFile(path, opened.stamp, sha256 or opened.known_sha256, **own),
            tensors=tensors,
            metadata=metadata,
            from_openai=any(map(_is_openais, (sha256, metadata.get(CONVERTED_FROM, "")))),
            is_safetensors=is_safetensors,
        )


def stored_format(path: str | Path) -> str:
    """Return the format that a safetensors file's metadata names; "" for a file of another kind or without one.

    Raises:
        WeightsError: the file is missing, unreadable or damaged.
    """
    from safetensors import safe_open

    path, _ = resolve(Path(path))
    with OpenFile(path) as opened:
        if not _is_safetensors(opened):
            return ""
        with _refuse_damaged(opened), safe_open(opened.name, framework="pt") as file:
            return str((file.metadata() or {}).get("format", ""))


def _openai_conversions() -> dict[int, str]:
    """Map size to sha256 for the conversions of OpenAI's weights on the hub."""
    return {r.hf_size: r.hf_sha256 for r in manifest().values() if r.layout == "openai-clip" and r.hf_size}


def _openai_conversion(opened: OpenFile) -> str:
    """Return the sha256 of a file that has the size of a conversion on the hub; "" for others, to save the hashing."""
    return opened.sha256() if opened.stamp.size in _openai_conversions() else ""


def _is_openais(sha256: str) -> bool:
    known = record_of(sha256)
    if not sha256 or (known is not None and known.layout != "openai-clip"):
        return False  # without open_clip's table: its import takes longer than reading an embedded model
    return sha256 in openai_hashes() or sha256 in _openai_conversions().values()


def _tensors(opened: OpenFile, loaded: Any) -> dict[str, Tensor]:
    import torch

    path = opened.path
    if isinstance(loaded, torch.Tensor):
        loaded = {"prompt_learner.ctx": loaded}
    for name in ("params", "state_dict", "model"):  # as saved by the trainers of pyiqa, open_clip and Re-IQA
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds {kind_of(loaded)}; expected tensors by name")
    total = 0
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise WeightsError(f"{path} holds {str(key)[:80]!r} of type {kind}; expected tensors by name")
        total += value.numel() * value.element_size()
    if total > 4 * opened.stamp.size + _SMALL:  # with stride 0, one stored number becomes a tensor of any shape
        raise WeightsError(f"{path} has {opened.stamp.size} bytes but tensors of {total}; it is damaged or hostile")
    # DistributedDataParallel prefixes every name with `module.`.
    return {str(key).removeprefix("module."): value for key, value in loaded.items() if key not in _ARCHIVE_NUMBERS}


def _is_safetensors(opened: OpenFile) -> bool:
    if opened.path.suffix == ".safetensors":
        return True
    opened.file.seek(0)
    return opened.file.read(9)[8:] == b"{"


def _read_safetensors(opened: OpenFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with _refuse_damaged(opened), safe_open(opened.name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)


def _read_torchscript(opened: OpenFile) -> tuple[dict[str, Tensor], str]:
    """Read an archive into memory once; return its state dict and sha256."""
    path = opened.path
    if opened.stamp.size > _MAX_ARCHIVE:
        raise WeightsError(
            f"{path} is a TorchScript archive of {opened.stamp.size} bytes; OpenAI's have at most {_MAX_ARCHIVE}"
        )
    opened.file.seek(0)
    content = bytearray(opened.stamp.size)
    if opened.file.readinto(content) != len(content):
        raise WeightsError(f"{path} changed while it was read; try again")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in openai_hashes():
        expected = next((r.sha256 for r in manifest().values() if r.file == path.name), "that of one of OpenAI's files")
        raise WeightsError(
            f"{path} is a TorchScript archive, of which only OpenAI's are read, even with {VERIFY_VARIABLE}=0: "
            f"expected sha256 {expected}, found {sha256}; save its state dict instead"
        )
    with _refuse_damaged(opened):
        return read_archive(content), sha256


def _starts_with(opened: OpenFile, start: bytes) -> bool:
    opened.file.seek(0)
    return opened.file.read(len(start)) == start


def _read_ridge(opened: OpenFile) -> dict[str, Tensor]:
    """Read a pickled Ridge as data."""
    import torch

    opened.file.seek(0)
    try:
        found = ridge_pickle.read_ridge(opened.file.read(ridge_pickle.MAX_BYTES + 1))
    except ValueError as error:
        raise WeightsError(f"{opened.path} is refused without executing any of it: {error}") from error
    return {"coef": torch.from_numpy(found.coefficients), "intercept": torch.tensor(found.intercept)}


def _read_torch(opened: OpenFile) -> Any:
    import torch

    with _refuse_damaged(opened):
        opened.file.seek(0)
        start = opened.file.read(32)
        if not start.startswith(b"PK") and _TORCH_MAGIC not in start:  # torch.load would unpickle anything
            if re.match(rb"\x80[\x02-\x05]", start):
                raise WeightsError(
                    f"{opened.path} is refused without executing any of it: it is a pickle that neither torch.save "
                    "nor scikit-learn's Ridge wrote (CONTRIQUE's regressions are such); for tensors use safetensors"
                )
            raise ValueError("neither safetensors nor written by torch.save")
        opened.file.seek(0)
        zipped = zipfile.is_zipfile(opened.file)
        opened.file.seek(0)
        if not zipped and start.startswith(b"PK"):
            raise ValueError("it starts as torch.save writes and has no end: it was cut short")
        if not zipped:  # the legacy format cannot be memory-mapped
            return torch.load(opened.file, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(opened.file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it has compressed entries, which torch.save never writes")
        return torch.load(opened.name, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _refuse_damaged(opened: OpenFile) -> Iterator[None]:
    """Turn any exception from a damaged or hostile file into a one-line WeightsError."""
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except Exception as error:
        # torch's message first explains at length how to disable the protection; only one line names the cause.
        unsafe = re.search(r"(?i)unsupported (global|class)[^\n]*|(?<=WeightsUnpickler error:)\s*[^\n]+", str(error))
        if unsafe and isinstance(error, pickle.UnpicklingError):
            raise WeightsError(
                f"{opened.path} is refused without executing any of it: torch's safe unpickler does not accept it "
                f"({one_line(unsafe[0].strip())[:300]})"
            ) from error
        cause = f"{type(error).__name__}: {reason(error)}".replace(opened.name, opened.path.name)
        raise WeightsError(
            f"{opened.path} is damaged or not a weight file ({cause}); expected safetensors or what torch.save writes: "
            "fetch it again, or pass another file"
        ) from error
