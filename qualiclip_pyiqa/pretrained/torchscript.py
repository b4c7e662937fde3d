"""Read the tensors of OpenAI's TorchScript archives without executing any code in them, and without torch.jit.

An archive is a zip of `code/` (the program, searched only for the names of each class's parameters and buffers),
`data.pkl` (the pickled module tree) and `data/KEY` (the bytes of each storage, uncompressed).
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

_CLASS = re.compile(r"^class (\w+)\(Module\):(.*?)(?=^class |\Z)", re.MULTILINE | re.DOTALL)
_NAMES = re.compile(r"^ +__(?:parameters|buffers)__ = \[(.*?)\]", re.MULTILINE | re.DOTALL)
_MAX_UNPACKED = 2**28  # bytes of code and module tree
_DTYPES = {
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Module:
    """Stand-in for an instance of any class in the archive: attributes, no code."""

    qualified_name: ClassVar[str] = ""

    def __setstate__(self, state: Any) -> None:
        self.attributes: dict[str, Any] = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Unpickles modules, tensors and plain values only; any other global is refused."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str, str, int], Tensor]) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (_Module,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): _untagged,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"unsupported global {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or dtype not in _DTYPES.values():
            raise pickle.UnpicklingError(f"unsupported persistent id {str(pid)[:80]}")
        return self.storage(str(dtype), str(key), int(numel))


def _untagged(value: Any, _tag: str) -> Any:
    return value


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # raises outside the storage


def read_archive(content: bytearray) -> dict[str, Tensor]:
    """Read the state dict of a TorchScript archive.

    Args:
        content: the whole file; the tensors are views of it.

    Returns:
        Parameters and buffers by name, on the CPU, in the file's dtype.

    Raises:
        pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError, ...: a damaged archive, or one with objects
            other than modules and tensors.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        code = {name: entry for name, entry in entries.items() if name.endswith(".py")}
        if sum(entry.file_size for entry in (*code.values(), entries["data.pkl"])) > _MAX_UNPACKED:
            raise ValueError(f"more than {_MAX_UNPACKED} bytes of code and module tree")
        names = _tensor_names((name, archive.read(entry).decode()) for name, entry in code.items())
        root = _Unpickler(
            io.BytesIO(archive.read(entries["data.pkl"])),
            lambda dtype, key, numel: _storage(content, entries[f"data/{key}"], dtype, numel),
        ).load()
    if not isinstance(root, _Module):
        raise ValueError(f"it holds a {type(root).__name__}, not a module")
    return dict(_walk(root, "", names, 0))


def _storage(content: bytearray, entry: zipfile.ZipInfo, dtype: str, numel: int) -> Tensor:
    import torch

    name_length, extra_length = struct.unpack_from("<HH", content, entry.header_offset + 26)
    start = entry.header_offset + 30 + name_length + extra_length
    kind = getattr(torch, dtype)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"storage {entry.filename} is compressed, which torch never does")
    if not 0 <= numel * kind.itemsize <= entry.file_size or start + entry.file_size > len(content):
        raise ValueError(f"storage {entry.filename} is shorter than its tensor")
    return torch.frombuffer(content, dtype=kind, count=numel, offset=start) if numel else torch.empty(0, dtype=kind)


def _tensor_names(sources: Iterator[tuple[str, str]]) -> dict[str, set[str]]:
    """Collect the names of each class's parameters and buffers from the code: attributes may be other tensors too."""
    names = {}
    for file, source in sources:
        module = file.removeprefix("code/").removesuffix(".py").replace("/", ".")
        for name, body in _CLASS.findall(source):
            names[f"{module}.{name}"] = {
                each.strip(" \"'") for listed in _NAMES.findall(body) for each in listed.split(",") if each.strip()
            }
    return names


def _walk(module: _Module, prefix: str, names: dict[str, set[str]], depth: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    if depth > 100:
        raise ValueError("modules nested too deeply")
    own = names[module.qualified_name]
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor) and name in own:
            yield prefix + name, value
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{name}.", names, depth + 1)
