"""Reading weight files: layouts, metadata, damage, and nothing hostile ever runs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
import sys
import warnings
import zipfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from weight_files import CLIP_STATE, folder, own_caches, refusal, write, write_hub_cache

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained import find, manifest
from qualiclip_pyiqa.pretrained import read as module
from qualiclip_pyiqa.pretrained.files import file_sha256
from qualiclip_pyiqa.pretrained.layouts import OWN_FORMAT
from qualiclip_pyiqa.pretrained.model import load_model
from qualiclip_pyiqa.pretrained.read import read
from qualiclip_pyiqa.pretrained.torchscript import read_archive
from qualiclip_pyiqa.pretrained.verify import provenance

__all__ = ["folder", "own_caches"]  # fixtures

# Reading


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir '{self.marker}'",)


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "bare.pth", "x.pt", "x.safetensors", "script.pt"])
def test_hostile_pickles_are_refused_and_not_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")  # which must not matter
    marker, file = tmp_path / "executed", tmp_path / kind
    content = {**CLIP_STATE, "payload": Payload(marker)}
    if kind.startswith("bare"):
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=not kind.startswith("legacy"))
    if kind.startswith("script"):  # dressed up as TorchScript, which torch.jit.load would execute
        with zipfile.ZipFile(file, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/constants.pkl", pickle.dumps(Payload(marker)))
            archive.writestr(f"{root}/code/__torch__.py", "")
    message = refusal(lambda: read(file), str(file))
    assert not marker.exists()
    if not kind.startswith(("x.safetensors", "script")):
        assert "is refused without executing any of it" in message
        assert "system" in message or kind.startswith("bare")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("content", [{"a": 1}, CLIP_STATE, len])
def test_a_pickle_that_torch_did_not_write_is_refused_in_one_plain_line(
    content: Any, protocol: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    message = refusal(lambda: read(file), str(file))
    assert "is refused without executing any of it" in message and "torch.save" in message
    assert "weights_only" not in message and len(message) < len(str(file)) + 200
    assert not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_torch_cannot_read_safely_is_refused_in_one_plain_line(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save(CLIP_STATE, file, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: read(file), str(file))
    assert "is refused without executing any of it" in message and "Unsupported operand" in message
    assert "weights_only" not in message and len(message) < len(str(file)) + 200


def test_the_old_format_of_torch_is_read_whatever_its_protocol(tmp_path: Path) -> None:
    for protocol in (2, 3):
        file = tmp_path / f"{protocol}.pth"
        torch.save(CLIP_STATE, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert set(read(file).tensors) == set(CLIP_STATE)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"not found", b"\x80", b"PK\3\4 cut short", b"(lp0\n."])
def test_other_files_are_said_to_be_no_weight_file(
    content: bytes, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    message = refusal(lambda: read(file), str(file))
    assert "is damaged or not a weight file" in message and "weights_only" not in message
    assert not recwarn.list


class Block(torch.nn.Module):
    """As in OpenAI's archives: a tensor that is neither parameter nor buffer, and a loose number."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.ModuleList([torch.nn.Linear(2, 3).half(), torch.nn.BatchNorm1d(3)])
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        self.mask = torch.full((4, 4), float("-inf")).triu_(1)
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("strided", torch.arange(12.0).view(3, 4).T[1:, ::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual[1](self.visual[0](x.half()).float()) * self.logit_scale + self.mask.sum() * 0


@pytest.fixture
def archive(folder: Path) -> Path:
    """A TorchScript archive in the place of OpenAI's RN50.pt, whose hash nobody knows."""
    file = folder / "RN50.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since torch 2.15
        torch.jit.trace(Block().eval(), torch.rand(1, 2)).save(str(file))
    return file


@pytest.fixture
def known_archive(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with its hash in the manifest."""
    known = replace(manifest.manifest()["RN50"], sha256=file_sha256(archive))
    monkeypatch.setitem(manifest.manifest(), "RN50", known)
    return archive


def test_torchscript_needs_a_known_hash_whatever_verify_says(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = file_sha256(archive)
    refusal(lambda: find.find("RN50"), str(archive), manifest.manifest()["RN50"].sha256, digest)
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    refusal(lambda: read("RN50"), str(archive), "TorchScript", "even with QUALICLIP_PYIQA_VERIFY=0", digest)
    refusal(lambda: read(archive), str(archive), "TorchScript", "even with QUALICLIP_PYIQA_VERIFY=0", digest)


def test_openais_archive_is_read_as_torch_reads_it_but_without_it(
    known_archive: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = dict(torch.jit.load(known_archive, map_location="cpu").state_dict())
    assert "mask" not in expected and expected.pop("context_length") == 77
    monkeypatch.delattr(torch.jit, "load")
    recwarn.clear()
    found = read("RN50", layout="openai-clip")
    assert list(found.tensors) == list(expected) and not found.metadata and found.from_openai and not recwarn.list
    for key, value in found.tensors.items():
        assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype, key
    assert found.tensors["visual.0.weight"].dtype == torch.float16
    assert provenance(found.file)["check"] == "verified"


def test_an_archive_that_is_replaced_after_its_hash_was_checked_is_not_read(
    known_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is of the very bytes that are read."""
    hostile = write(tmp_path / "hostile.pt", known_archive.read_bytes()[:-1] + b"x")
    original = module.check_hash
    monkeypatch.setattr(module, "check_hash", lambda *a: (original(*a), hostile.replace(known_archive)))
    refusal(lambda: read("RN50"), str(known_archive), "changed while it was read")


@pytest.mark.parametrize("damage", ["global", "persistent", "short", "compressed", "no class", "recursive"])
def test_archives_that_are_no_modules_and_tensors_are_refused(damage: str, known_archive: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.pt"
    marker = tmp_path / "executed"
    with zipfile.ZipFile(known_archive) as old, zipfile.ZipFile(hostile, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("/data.pkl") and damage == "global":
                content = pickle.dumps(Payload(marker))
            if entry.filename.endswith("/data.pkl") and damage == "persistent":
                content = b"\x80\x02(X\x01\x00\x00\x00aX\x01\x00\x00\x00bX\x01\x00\x00\x00cX\x01\x00\x00\x00dK\x01tQ."
            if entry.filename.endswith("/data.pkl") and damage == "recursive":
                content = b"\x80\x02c__torch__.Block\nBlock\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."
            if "/data/" in entry.filename and damage == "short":
                content = content[:1]
            if "/code/" in entry.filename and damage == "no class":
                content = b""
            kind = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
            new.writestr(entry.filename, content, kind)
    content = bytearray(hostile.read_bytes())
    with pytest.raises((ValueError, KeyError, pickle.UnpicklingError)):
        read_archive(content)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_state_dict_may_stand_for_openais_archive(zipped: bool, folder: Path) -> None:
    file = folder / "RN50.pt"
    torch.save(CLIP_STATE, file, _use_new_zipfile_serialization=zipped)
    found = read("RN50", layout="openai-clip")
    assert torch.equal(found.tensors["visual.conv1.weight"], torch.ones(2, 3)) and not found.from_openai
    said = provenance(found.file)
    assert (said["check"], said["record"], said["licence"]) == ("unknown", "RN50", "MIT")
    file.unlink()
    save_file(CLIP_STATE, folder / "RN50.safetensors")
    assert set(read("RN50").tensors) == set(CLIP_STATE)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_tensors_are_memory_mapped(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save(CLIP_STATE, file) if name == "a.pth" else save_file(CLIP_STATE, file)
    found = read(file)
    assert found.tensors and str(file) in Path("/proc/self/maps").read_text()


def own_metadata(**more: str) -> dict[str, str]:
    return {"format": OWN_FORMAT, "backbone": "mini", "tower": "{}", "prompts": "[]"} | more


def test_layouts(tmp_path: Path) -> None:
    context = torch.randn(2, 16, 8)
    params = {"params": {"prompt_learner.ctx": context, "prompt_learner.token_prefix": torch.zeros(2, 1, 8)}}
    torch.save(context, tmp_path / "bare.pth")
    torch.save(params, tmp_path / "params.pth")
    save_file(params["params"], tmp_path / "params.safetensors")
    for name in ("bare.pth", "params.pth", "params.safetensors"):
        for layout in (None, "context", "params"):
            assert torch.equal(read(tmp_path / name, layout=layout).tensors["prompt_learner.ctx"], context)
    whole = {f"clip_model.{key}": value for key, value in CLIP_STATE.items()}
    torch.save({**whole, "prompts_features": torch.eye(2)}, tmp_path / "qualiclip.pth")
    assert "clip_model.logit_scale" in read(tmp_path / "qualiclip.pth", layout="qualiclip").tensors
    own = {**CLIP_STATE, "prompts_features": torch.eye(2)}
    save_file(own, tmp_path / "own.safetensors", own_metadata(licence="MIT"))
    found = read(tmp_path / "own.safetensors")
    assert set(found.tensors) == set(own) and found.metadata["licence"] == "MIT"

    refusal(lambda: read(tmp_path / "bare.pth", layout="openai-clip"), "lacks visual., logit_scale")
    refusal(lambda: read(tmp_path / "qualiclip.pth", layout="context"), "lacks prompt_learner.ctx", "clip_model.")
    torch.save(whole, tmp_path / "no_features.pth")
    refusal(lambda: read(tmp_path / "no_features.pth", layout="qualiclip"), "lacks prompts_features")
    save_file(own, tmp_path / "new.safetensors", own_metadata() | {"format": "qualiclip-pyiqa/2"})
    refusal(lambda: read(tmp_path / "new.safetensors"), "'qualiclip-pyiqa/2'", "update")
    save_file(own, tmp_path / "poor.safetensors", {"format": OWN_FORMAT, "backbone": "mini"})
    refusal(lambda: read(tmp_path / "poor.safetensors"), "metadata 'tower'", "metadata 'prompts'")
    for name, content in (("list.pth", [torch.eye(2)]), ("mixed.pth", {**CLIP_STATE, "epoch": 3})):
        torch.save(content, tmp_path / name)
        refusal(lambda name=name: read(tmp_path / name), name, "expected tensors by name")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    torch.save(CLIP_STATE, tmp_path / "whole.pth")
    save_file(CLIP_STATE, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        cut = write(tmp_path / f"cut-{name}", content[:-40])
        refusal(lambda cut=cut: read(cut), str(cut), "damaged", "fetch it again, or pass another file")
        assert name != "whole.pth" or "it was cut short" in refusal(lambda cut=cut: read(cut), str(cut))
    for name in ("page.pth", "page.safetensors"):
        page = write(tmp_path / name, b"<!doctype html><title>404</title>")
        refusal(lambda page=page: read(page), str(page), "damaged or not a weight file")


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=80), st.sampled_from(["x.pth", "x.safetensors"]))
def test_no_bytes_raise_anything_else(tmp_path: Path, content: bytes, name: str) -> None:
    refusal(lambda: read(write(tmp_path / name, content)), name)


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["x.pth", "x.safetensors"]))
def test_flipped_bits_are_read_or_refused(tmp_path: Path, data: st.DataObject, name: str) -> None:
    file = tmp_path / name
    torch.save(CLIP_STATE, file) if name.endswith("pth") else save_file(CLIP_STATE, file)
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.unlink()  # a former example's tensors may still be mapped
    write(file, bytes(content))
    try:
        read(file)
    except WeightsError as error:
        assert "\n" not in str(error)


def test_provenance(tmp_path: Path, folder: Path, own_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(CLIP_STATE, tmp_path / "mine.safetensors", {"licence": "CC0-1.0", "source": "me"})
    foreign = provenance(read(tmp_path / "mine.safetensors").file)
    assert (foreign["licence"], foreign["record"], foreign["check"]) == ("unknown", None, "unknown")
    own = {**CLIP_STATE, "prompts_features": torch.eye(2)}
    save_file(own, tmp_path / "mine.safetensors", own_metadata(licence="CC0-1.0", source="me"))
    mine = provenance(read(tmp_path / "mine.safetensors").file)
    assert (mine["licence"], mine["source"], mine["record"]) == ("CC0-1.0", "me", None)
    whole = {f"clip_model.{key}": value for key, value in CLIP_STATE.items()} | {"prompts_features": torch.eye(2)}
    torch.save(whole, folder / "QualiCLIP.pth")
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    upstream = provenance(read("QualiCLIP").file)
    assert upstream["record"] == "QualiCLIP" and upstream["check"] == "wrong"
    assert upstream["sha256"] == file_sha256(folder / "QualiCLIP.pth")
    assert upstream["licence"] == "CC-BY-NC-4.0" and upstream["commercial_use"] is False
    save_file(CLIP_STATE, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    link = write_hub_cache(own_caches, "timm/resnet101_clip.openai", "open_clip_model.safetensors", content)
    other = provenance(read(manifest.openai_record("RN101")).file)
    assert other["path"] == str(link) and other["record"] is None  # a model that the manifest does not list
    known = replace(manifest.manifest()["RN50"], hf_sha256=file_sha256(link), hf_size=len(content))
    monkeypatch.setitem(manifest.manifest(), "RN50", known)
    hub = provenance(read(link).file)
    assert hub["record"] == "RN50" and hub["check"] == "verified"
    json.dumps([foreign, mine, upstream, other, hub])


# Metadata of this package's own files


MINI = {"widths": [4], "depths": [1], "hidden": 8, "dim": 2, "blocks": [["energies"], ["sharpness"]]}
PROMPTS = [["Fine.", "Poor."], ["Crisp.", "Soft."]]


def write_own(file: Path, **metadata: Any) -> Path:
    """A file of this package's own format with a tower that is not the metadata's."""
    texts = {"tower": json.dumps(MINI), "prompts": json.dumps(PROMPTS)}
    tensors = {**CLIP_STATE, "prompts_features": torch.eye(4)}
    file.unlink(missing_ok=True)  # which may still be mapped
    save_file(tensors, file, own_metadata(**texts | metadata))
    return file


WRONG_METADATA = [
    ({"tower": "{"}, "'tower' is not JSON"),
    ({"tower": "[" * 100_000}, "'tower' is not JSON"),
    ({"tower": "[]"}, "'tower' is []; expected a JSON object"),
    (
        {"tower": '{"timm_model_name": "hf-hub:attacker/model"}', "backbone": "RN50"},
        "unknown keyword 'timm_model_name'",
    ),
    ({"tower": '{"vision": {"timm_model_name": "hf-hub:a/b"}}', "backbone": "RN50"}, "unknown keyword 'vision'"),
    ({"tower": '{"text": {}}', "backbone": "ViT-B-32"}, "unknown keyword 'text'"),
    ({"tower": '{"name": "x"}', "backbone": "ViT-B-32"}, "unknown keyword 'name'"),
    ({"tower": '{"mean": [0, 0]}', "backbone": "RN50"}, "'tower.mean' is [0, 0]; expected three numbers"),
    ({"tower": '{"mean": [0, 0, true]}', "backbone": "RN50"}, "expected three numbers"),
    ({"tower": '{"mean": [0, 0, NaN]}', "backbone": "RN50"}, "expected three numbers"),
    ({"tower": '{"std": [1, 1, 0]}', "backbone": "RN50"}, "expected three positive numbers"),
    ({"tower": '{"quick_gelu": 1}', "backbone": "RN50"}, "expected true or false"),
    ({"tower": "{}", "backbone": "hf-hub:attacker/model"}, "unknown backbone 'hf-hub:attacker/model'"),
    ({"tower": "{}", "backbone": "RN5"}, "did you mean 'RN50'"),
    ({"tower": "{}"}, "'tower' lacks widths, depths, hidden, dim, blocks"),
    ({"tower": json.dumps(MINI | {"layers": 3})}, "unknown keyword 'layers'"),
    ({"tower": json.dumps(MINI | {"widths": [10**9]})}, "'tower.widths' is [1000000000]; expected 1 to 8 integers"),
    ({"tower": json.dumps(MINI | {"widths": [4] * 1000, "depths": [1] * 1000})}, "'tower.widths'"),
    ({"tower": json.dumps(MINI | {"depths": [1, 1]})}, "'tower.depths' is [1, 1]; expected 1 integers"),
    ({"tower": json.dumps(MINI | {"dim": 1.5})}, "'tower.dim' is 1.5; expected an integer"),
    ({"tower": json.dumps(MINI | {"hidden": True})}, "'tower.hidden' is True"),
    ({"tower": json.dumps(MINI | {"blocks": [["stage2"]]})}, "'tower.blocks' is ['stage2']"),
    ({"tower": json.dumps(MINI | {"blocks": [[["energies"]]]})}, "'tower.blocks'"),
    ({"temperature": "warm"}, "'temperature' is 'warm'; expected a positive number"),
    ({"temperature": "nan"}, "'temperature'"),
    ({"temperature": "-1"}, "'temperature'"),
    ({"prompts": "good, bad"}, "'prompts' is not JSON"),
    ({"prompts": "{}"}, "'prompts' is {}; expected a list of [positive, negative] pairs"),
    ({"prompts": '[["a"]]'}, "expected a list of [positive, negative] pairs"),
    ({"prompts": '[["a", 3]]'}, "expected a list of [positive, negative] pairs"),
    ({"prompts": '[["a", "b"]]'}, "holds 4 prompt features; expected 2"),
    ({"format": "qualiclip-pyiqa/9"}, "update qualiclip-pyiqa"),
]


@pytest.mark.parametrize(("metadata", "said"), WRONG_METADATA)
def test_wrong_metadata_is_one_line_and_asks_nobody(
    metadata: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)  # no address is looked up
    monkeypatch.setattr(socket.socket, "connect", None)
    refusal(lambda: load_model(write_own(tmp_path / "x.safetensors", **metadata), "RN50"), "x.safetensors", said)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"logit_scale": torch.tensor([1.0, 2.0])}, "'logit_scale' is of shape (2,)"),
        ({"logit_scale": torch.tensor(float("nan"))}, "'logit_scale' is nan"),
        ({"logit_scale": torch.tensor(1000.0)}, "'logit_scale' is 1000"),
        ({"logit_scale": torch.tensor(3)}, "'logit_scale' is of type int64"),
        ({"prompts_features": torch.ones(4)}, "'prompts_features' has shape (4,)"),
    ],
)
def test_tensors_that_make_no_model_are_one_line(tensors: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    texts = {"tower": json.dumps(MINI), "prompts": json.dumps(PROMPTS)}
    state = {**CLIP_STATE, "prompts_features": torch.eye(4), **tensors}
    save_file(state, tmp_path / "x.safetensors", own_metadata(**texts))
    refusal(lambda: load_model(tmp_path / "x.safetensors", "RN50"), "x.safetensors", said)


def test_a_file_cannot_ask_for_a_network_larger_than_itself(tmp_path: Path) -> None:
    giant = MINI | {"widths": [2048] * 8, "depths": [32] * 8}
    file = write_own(tmp_path / "x.safetensors", tower=json.dumps(giant))
    model = load_model(file, "RN50")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(lambda: model.image_tower(pos_embedding=False), "lacks")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kB; its parameters are 80 GB


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=10), each, max_size=4),
    max_leaves=8,
)
_TOWER = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys((*MINI, "pairs", "mean", "std", "quick_gelu", "vision", "name"), _JSON),
)
_METADATA = st.fixed_dictionaries(
    {},
    optional={
        "backbone": st.sampled_from(["mini", "mobile", "RN50", "ViT-B/32", "convnext_base", "", "hf-hub:a/b"])
        | st.text(max_size=20),
        "tower": (_TOWER | _JSON).map(json.dumps) | st.text(max_size=20),
        "prompts": _JSON.map(json.dumps) | st.text(max_size=20),
        "temperature": (st.floats() | st.integers()).map(str) | st.text(max_size=10),
        "licence": st.text(max_size=20),
        "format": st.text(max_size=20),
    },
)


@settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_METADATA)
def test_no_metadata_raises_anything_else(tmp_path: Path, metadata: dict[str, str]) -> None:
    file = write_own(tmp_path / "x.safetensors", **metadata)
    try:
        load_model(file, "RN50").image_tower(pos_embedding=False)
    except WeightsError as error:
        assert "\n" not in str(error)


# Sizes


def test_bombs_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "header.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refusal(lambda: read(file), "header.safetensors", "damaged")
    torch.save(CLIP_STATE, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    refusal(lambda: read(tmp_path / "bomb.pth"), "bomb.pth", "compressed entries")
    torch.save(
        {"visual.x": torch.zeros(1).expand(10**6, 10**6), "logit_scale": torch.tensor(1.0)}, tmp_path / "wide.pth"
    )
    refusal(lambda: read(tmp_path / "wide.pth"), "wide.pth", "tensors of 4000000000004")


# Models


def test_openais_archive_has_quickgelu_under_any_spelling_of_its_backbone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash proves what the name of a configuration does not say."""
    import open_clip

    config = {**open_clip.get_model_config("tiny-resnet"), "quick_gelu": False}
    (tmp_path / "plain-resnet.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    save_file(torch.load(tiny_folder / "tiny-resnet.pt"), tmp_path / "model.safetensors")
    plain = load_model(tmp_path / "model.safetensors", "plain-resnet")
    assert (plain.openai, plain.activation, plain.tower_definition().quick_gelu) == (False, "GELU", False)
    file = tmp_path / "model.safetensors"
    known = replace(manifest.manifest()["ViT-B-32"], hf_sha256=file_sha256(file), hf_size=file.stat().st_size)
    monkeypatch.setitem(manifest.manifest(), "ViT-B-32", known)
    proven = load_model(file, "plain-resnet")
    assert (proven.openai, proven.activation, proven.tower_definition().quick_gelu) == (True, "QuickGELU", True)


def test_a_model_knows_what_it_was_read_from(tmp_path: Path) -> None:
    model = load_model("qualiclip-mini", "RN50")
    assert (model.backbone, model.temperature, model.activation) == ("mobile", 1.0, "none")
    assert model.origin.file.sha256() == manifest.manifest()["qualiclip-mini"].sha256
    assert not hasattr(model.origin, "state") and "Tensor" not in repr(model)
    with pytest.raises(FrozenInstanceError):
        model.backbone = "RN50"  # type: ignore[misc]
    again = model.origin.reload()
    assert again.origin == model.origin and again.state.keys() == model.state.keys()


def test_a_copy_of_a_file_with_a_known_hash_is_the_same_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", find.find("qualiclip-mini").read_bytes())
    unknown, origin = load_model(file, "mobile").origin, load_model(file, "mobile").origin
    known = replace(origin, file=replace(origin.file, known_sha256=file_sha256(file)))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert known.reload().backbone == "mobile"
    refusal(replace(unknown, file=replace(unknown.file, known_sha256="")).reload, "a.safetensors", "changed after")
    file.chmod(0o600)  # new permissions are not another content
    assert not load_model(file, "mobile").file.changed
