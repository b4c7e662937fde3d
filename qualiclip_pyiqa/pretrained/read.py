"""Read the tensors of a weight file.

Reading executes nothing of the file: safetensors, `torch.load(weights_only=True)`, and for OpenAI's TorchScript
archives a reader of their data alone. Those archives are read only with a known sha256, whatever
`QUALICLIP_PYIQA_VERIFY` says. A file is opened once, and what is hashed is what is read.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .files import OpenFile, WeightFile
from .find import resolve
from .layouts import check_layout
from .manifest import WeightRecord, manifest, openai_hashes
from .torchscript import read_archive
from .verify import VERIFY_VARIABLE, check_hash, is_torchscript

if TYPE_CHECKING:
    from torch import Tensor

# Numbers that OpenAI's archives keep beside the tensors of the model.
_ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_MAX_ARCHIVE = 4 * 2**30  # bytes; the largest of OpenAI's is 1.3 GB
_SMALL = 2**26  # bytes that the tensors of any file may have, however small it is


@dataclass(frozen=True)
class ReadWeights:
    """What a weight file holds.

    Attributes:
        file: the file, as it was read.
        tensors: by the file's own names, on the CPU, in the file's dtype, memory-mapped where the format allows it. A
            context file gives `prompt_learner.ctx` and what else its `params` hold.
        metadata: of safetensors; empty for other formats.
        from_openai: whether the file's hash proves that these are OpenAI's weights.
    """

    file: WeightFile
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    from_openai: bool


def read(name_or_path: str | Path | WeightRecord, *, layout: str | None = None) -> ReadWeights:
    """Find a weight file, check its hash and read it.

    Args:
        name_or_path: name of a record, a record, or a path to safetensors, a `torch.save` file or OpenAI's archive,
            which are told apart by content.
        layout: one of the manifest's, or `context` for either kind of context file; None to go by the content.

    Raises:
        WeightsError: not found, a wrong hash, damaged, not safe to open, or of another layout (names what it lacks).
    """
    path, record = resolve(name_or_path)
    with OpenFile(path) as opened:
        if record is not None:
            check_hash(record, opened)
        metadata: dict[str, str] = {}
        sha256 = ""
        loaded: Any
        if _is_safetensors(opened):
            loaded, metadata = _read_safetensors(opened)
        elif is_torchscript(opened):
            loaded, sha256 = _read_torchscript(opened)
        else:
            loaded = _read_torch(opened)
        opened.check_unchanged()
        sha256 = sha256 or _openai_conversion(opened)
        tensors = _tensors(opened, loaded)
        check_layout(path, tensors, metadata, layout)
        own = {key: metadata.get(key, "") for key in ("format", "licence", "source")}
        return ReadWeights(
            file=WeightFile(path, opened.stamp, sha256 or opened.known_sha256, **own),
            tensors=tensors,
            metadata=metadata,
            from_openai=sha256 in openai_hashes() or sha256 in _openai_conversions().values(),
        )


def _openai_conversions() -> dict[int, str]:
    """sha256 by size of OpenAI's weights as the hub has them."""
    return {r.hf_size: r.hf_sha256 for r in manifest().values() if r.layout == "openai-clip" and r.hf_size}


def _openai_conversion(opened: OpenFile) -> str:
    """The sha256 of a file with the size of one of OpenAI's on the hub; "" for others, which need not be hashed."""
    return opened.sha256() if opened.stamp.size in _openai_conversions() else ""


def _tensors(opened: OpenFile, loaded: Any) -> dict[str, Tensor]:
    import torch

    path = opened.path
    if isinstance(loaded, torch.Tensor):
        loaded = {"prompt_learner.ctx": loaded}
    for name in ("params", "state_dict"):  # of pyiqa's trainer, of open_clip's
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected tensors by name")
    total = 0
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise WeightsError(f"{path} holds {str(key)[:80]!r} of type {kind}; expected tensors by name")
        total += value.numel() * value.element_size()
    if total > 4 * opened.stamp.size + _SMALL:  # one stored number can be said to be a tensor of any shape
        raise WeightsError(f"{path} has {opened.stamp.size} bytes but tensors of {total}; it is damaged or hostile")
    # DistributedDataParallel, under which a model may have been saved, puts `module.` before every name.
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
    """State dict and sha256 of an archive, both of the same bytes in memory."""
    path = opened.path
    if opened.stamp.size > _MAX_ARCHIVE:
        raise WeightsError(f"{path} is a TorchScript archive of {opened.stamp.size} bytes, which none of OpenAI's has")
    opened.file.seek(0)
    content = bytearray(opened.stamp.size)
    if opened.file.readinto(content) != len(content):
        raise WeightsError(f"{path} changed while it was read; try again")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in openai_hashes():
        expected = next((r.sha256 for r in manifest().values() if r.file == path.name), "that of one of OpenAI's files")
        raise WeightsError(
            f"{path} is a TorchScript archive, and only OpenAI's are read, whatever {VERIFY_VARIABLE} says: expected "
            f"sha256 {expected}, found {sha256}; save its state dict instead"
        )
    with _refuse_damaged(opened):
        return read_archive(content), sha256


def _read_torch(opened: OpenFile) -> Any:
    import torch

    with _refuse_damaged(opened):
        opened.file.seek(0)
        zipped = zipfile.is_zipfile(opened.file)
        opened.file.seek(0)
        if not zipped:  # only the newer, zipped format can be memory-mapped
            return torch.load(opened.file, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(opened.file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch does not write")
        return torch.load(opened.name, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def _refuse_damaged(opened: OpenFile) -> Iterator[None]:
    """Turn every way in which a damaged or hostile file fails to open into one line."""
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except Exception as error:
        reason = _one_line(error).replace(opened.name, opened.path.name)
        if isinstance(error, pickle.UnpicklingError) and re.search(r"(?i)unsupported (global|class)", str(error)):
            raise WeightsError(
                f"{opened.path} is refused, and nothing of it was executed: it is a pickle of other things than "
                f"tensors ({reason})"
            ) from error
        raise WeightsError(
            f"{opened.path} is damaged or not a weight file ({type(error).__name__}: {reason}); fetch it again"
        ) from error


def _one_line(error: BaseException) -> str:
    text = str(error)
    # torch explains at length how to switch its protection off, before it comes to what it met.
    met = re.search(r"(?i)unsupported (global|class)[^\n]*", text)
    return " ".join((met[0] if met else text).split())[:300].rstrip(". ") or type(error).__name__
