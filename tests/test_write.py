"""safetensors files that reproduce: the same content gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained.write import write_safetensors

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    shared = torch.rand(4)
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "strided": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "trained": torch.nn.Parameter(torch.rand(3)),
        "shared": shared,
        "shared too": shared,
    }


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    tensors, metadata = every_kind(), {"licence": "CC0 é \u0001 \"'", "a": "", "prompts": '[["Good."]]'}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata
    write_safetensors(tmp_path / "none.safetensors", {}, {})
    assert load_file(tmp_path / "none.safetensors") == {}


def test_bytes_do_not_depend_on_order_or_process(tmp_path: Path) -> None:
    tensors, metadata = every_kind(), {str(k): str(k) for k in range(20)}
    write_safetensors(tmp_path / "a", tensors, metadata)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    script = (
        "import sys; from pathlib import Path; from safetensors import safe_open\n"
        "from qualiclip_pyiqa.pretrained.write import write_safetensors\n"
        "with safe_open(sys.argv[1], 'pt') as file:\n"
        "    tensors = {name: file.get_tensor(name) for name in set(file.keys())}\n"
        "    write_safetensors(Path(sys.argv[2]), tensors, file.metadata())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "a", tmp_path / "c"], check=True, env=environment)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3)}, {})
    before = path.read_bytes()
    with pytest.raises(WeightsError, match=r"'bad' has dtype torch.complex64, which cannot be written"):
        write_safetensors(path, {"a": torch.zeros(3), "bad": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(NotImplementedError):  # a tensor without data, when the others are written
        write_safetensors(path, {"a": torch.zeros(3), "meta": torch.zeros(2, device="meta")}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
