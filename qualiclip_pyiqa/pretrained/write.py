"""Write safetensors files reproducibly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WeightsError
from ..files import replacing

if TYPE_CHECKING:
    import torch


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, whole or not at all.

    Equal content gives equal bytes, in any order and on any machine, while safetensors' own writer orders metadata at
    random. Tensors are written one by one, without a second copy of the model in memory. A tensor under two names is
    written twice.

    Args:
        path: replaced if it exists.
        tensors: by name, on any device.
        metadata: text by name.

    Raises:
        WeightsError: unsupported dtype.
        OSError: the file cannot be written; an existing one is unchanged.

    Example:
        >>> import tempfile, torch
        >>> from safetensors import safe_open
        >>> path = Path(tempfile.mkdtemp()) / "tensors.safetensors"
        >>> write_safetensors(path, {"b": torch.ones(2), "a": torch.zeros(3)}, {"licence": "CC0"})
        >>> with safe_open(path, framework="pt") as file:
        ...     print(file.metadata(), file.get_tensor("b"))
        {'licence': 'CC0'} tensor([1., 1.])
    """
    # Widest dtype first, so that every tensor is aligned to its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _type_name(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_little_endian(tensors[name]))


def _type_name(name: str, dtype: torch.dtype) -> str:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    if dtype not in names:
        raise WeightsError(f"tensor {name!r} has dtype {dtype}, which cannot be written; expected one of {[*names]}")
    return names[dtype]


def _little_endian(tensor: torch.Tensor) -> memoryview:
    import torch

    size = tensor.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(integers).numpy().astype(f"<i{size}", copy=False).data.cast("B")
