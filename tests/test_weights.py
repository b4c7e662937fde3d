"""Weight files: look-up order, hashes, downloads from servers on this machine, and nothing hostile ever runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained import weights
from qualiclip_pyiqa.pretrained.weights import WeightRecord

CONTENT = b"the right content" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TERMS = {"licence": "MIT", "licence_url": "u", "commercial_use": True, "source": "s", "citation": "c"}
RECORD = WeightRecord(name="test", file="test-weights.pth", layout="params", sha256=SHA256, **TERMS)
CLIP_STATE = {"visual.conv1.weight": torch.ones(2, 3), "logit_scale": torch.tensor(4.6)}


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every cache of this test under one folder; no embedded file."""
    home = tmp_path / "home"
    for variable, folder in (("HOME", home), ("XDG_CACHE_HOME", home / "xdg"), ("TORCH_HOME", home / "torch")):
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.delenv("QUALICLIP_PYIQA_VERIFY", raising=False)
    monkeypatch.delenv("QUALICLIP_PYIQA_WEIGHTS", raising=False)
    weights.manifest()  # read before a test changes the data folder
    return home


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, named in QUALICLIP_PYIQA_WEIGHTS."""
    path = tmp_path / "mine"
    path.mkdir()
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(path))
    return path


def write(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_hub_cache(home: Path, repo: str, file: str, content: bytes) -> Path:
    """What huggingface_hub leaves behind: a snapshot that links to a blob named by its digest."""
    base = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
    blob = write(base / "blobs" / hashlib.sha256(content).hexdigest(), content)
    write(base / "refs" / "main", b"c0ffee")
    link = base / "snapshots" / "c0ffee" / file
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    return link


def refusal(call: Any, *parts: str) -> str:
    """The one line of the WeightsError that the call raises; it must contain the parts."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# The manifest


def test_manifest_is_complete_and_consistent() -> None:
    from qualiclip_pyiqa.metrics.registry import METRICS

    records = weights.manifest()
    named = {record for spec in METRICS.values() for record in spec.records}
    assert named <= set(records)
    for record in records.values():
        assert record.licence and record.licence_url.startswith("https://") and record.source and record.citation
        assert record.layout in {"openai-clip", "qualiclip", "context-tensor", "params", "qualiclip-pyiqa"}
        assert record.commercial_use != any(word in record.licence for word in ("NC", "non-commercial"))
        assert bool(record.hf_repo) == bool(record.hf_file)
        for url in record.urls:
            assert url.rsplit("/", 1)[-1] == record.file
            assert record.layout != "openai-clip" or record.sha256 in url
        if record.origin:
            assert len(record.sha256) == 64
            prefix = Path(record.file).stem.rpartition("-")[2]  # torch hub's convention
            assert len(prefix) != 8 or record.sha256.startswith(prefix)
    for row in weights.published():
        assert row["metric"] in METRICS and 0 < row["srcc"] < 1 and row["source"] and isinstance(row["verified"], bool)


def test_embedded_model_is_the_one_of_the_manifest() -> None:
    record = weights.manifest()["qualiclip-mini"]
    file = weights.data_folder() / record.file
    if not file.exists():
        pytest.skip("no embedded model in this tree")
    assert (record.sha256, record.size) == (weights.file_sha256(file), file.stat().st_size), "update manifest.toml"
    state, metadata = weights.read(weights.find("qualiclip-mini"), layout="qualiclip-pyiqa")
    assert state["prompts_features"].dim() == 2 and metadata["licence"].replace(" ", "-") == record.licence


def test_data_lies_inside_an_installed_package_or_beside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "qualiclip_pyiqa"
    package.mkdir()
    monkeypatch.setattr(weights, "__file__", str(package / "weights.py"))
    assert weights.data_folder() == tmp_path / "weights"
    (package / "_weights").mkdir()
    assert weights.data_folder() == package / "_weights"


def test_openai_records_come_from_open_clips_table() -> None:
    assert weights.openai_record("RN50-quickgelu") is weights.manifest()["RN50"]
    assert weights.openai_record("ViT-L-14") is weights.manifest()["ViT-L-14"]
    other = weights.openai_record("ViT-B-32")
    assert other.file == "ViT-B-32.pt" and len(other.sha256) == 64 and other.licence == "MIT"
    assert other.hf_repo and other.sha256 in other.urls[0]
    refusal(lambda: weights.openai_record("ViT-H-14"), "ViT-H-14", "weights=FILE")


# Finding


def test_look_up_order(own_caches: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(RECORD, hf_repo="who/what", hf_file=RECORD.file)
    second = tmp_path / "second"
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", os.pathsep.join((str(folder), str(second))))
    monkeypatch.setattr(weights, "data_folder", lambda: tmp_path / "embedded")
    in_order = [
        write(folder / record.file),
        write(folder / "test-weights.safetensors"),
        write(second / record.file),
        write(second / "test-weights.safetensors"),
        write(tmp_path / "embedded" / record.file),
        write(own_caches / "xdg" / "qualiclip_pyiqa" / record.file),
        write(own_caches / "torch" / "hub" / "pyiqa" / record.file),
        write(own_caches / "torch" / "hub" / "clip" / record.file),
        write(own_caches / ".cache" / "clip" / record.file),
        write_hub_cache(own_caches, record.hf_repo, record.file, CONTENT),
    ]
    explicit = write(tmp_path / "explicit.pth", b"anything")
    assert weights.find(explicit) == weights.find(str(explicit)) == explicit
    places = []
    for path in in_order:
        assert weights.find(record) == path
        found = weights.locate(record)
        assert found is not None
        places.append(found.place)
        path.unlink()
    assert list(dict.fromkeys(places)) == [
        "QUALICLIP_PYIQA_WEIGHTS",
        "embedded",
        "own cache",
        "pyiqa's cache",
        "open_clip's cache",
        "Hugging Face cache",
    ]
    assert weights.locate(record) is None


def test_pyiqas_own_downloads_are_found_under_the_name_that_pyiqa_gives_them(own_caches: Path) -> None:
    from pyiqa.archs.arch_util import get_url_from_name

    record = weights.manifest()["QualiCLIP+_koniq"]
    name = get_url_from_name(record.file).rsplit("/", 1)[-1]
    assert name != record.file  # the plus sign is written as %2B
    file = write(own_caches / "torch" / "hub" / "pyiqa" / name)
    assert weights.locate(record.name) == (file, "pyiqa's cache")
    with pytest.raises(WeightsError, match="expected sha256 450292893e96"):  # and held against the manifest
        weights.find(record.name)
    assert weights.provenance(file)["record"] == record.name


def test_a_variable_that_names_no_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path / "typo"))
    weights.locate("RN50")
    assert "typo, which is no folder" in caplog.text


def test_files_that_cannot_be_used_are_errors_not_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(lambda: weights.find("QualiCLP"), "'QualiCLP'", "did you mean 'QualiCLIP'")
    refusal(lambda: weights.find(folder / "no.pth"), "no.pth")
    refusal(lambda: weights.find(folder), "is a folder")
    (folder / "QualiCLIP.pth").mkdir()
    refusal(lambda: weights.find("QualiCLIP"), "QualiCLIP.pth", "is a folder")
    (folder / "QualiCLIP.pth").rmdir()
    write(folder / "QualiCLIP.pth", b"")
    refusal(lambda: weights.find("QualiCLIP"), "QualiCLIP.pth", "is empty")
    write(folder / "QualiCLIP.pth")
    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:  # as root, who may run the tests, reads every file
        if path.name == "QualiCLIP.pth":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    refusal(lambda: weights.find("QualiCLIP"), "QualiCLIP.pth", "Permission denied")


def test_what_is_a_users_file() -> None:
    assert not weights.is_user_file("RN50") and not weights.is_user_file(RECORD)
    assert weights.is_user_file("mine.pth") and weights.is_user_file(Path("RN50"))


# Hashes


def test_wrong_hash(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = write(folder / RECORD.file, b"other content")
    found = hashlib.sha256(b"other content").hexdigest()
    message = refusal(lambda: weights.find(RECORD), str(file), SHA256, found, "QUALICLIP_PYIQA_VERIFY=0")
    assert not caplog.text
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    assert weights.find(RECORD) == file
    assert SHA256 in caplog.text and found in caplog.text and message.split(";")[0] in caplog.text


def test_first_digits_of_a_hash_are_compared(folder: Path) -> None:
    write(folder / RECORD.file)
    assert weights.find(replace(RECORD, sha256=SHA256[:8])).exists()
    refusal(lambda: weights.find(replace(RECORD, sha256="603f3273")), "603f3273", SHA256)


def test_a_users_path_with_upstreams_name_is_checked(tmp_path: Path) -> None:
    file = write(tmp_path / "QualiCLIP.pth")
    refusal(lambda: weights.find(file), str(file), weights.manifest()["QualiCLIP"].sha256, SHA256)
    write(tmp_path / "qualiclip-mini.safetensors")  # but the name of one's own training run is free
    assert weights.find(tmp_path / "qualiclip-mini.safetensors").exists()


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    file = write(tmp_path / "x")
    assert weights.file_sha256(file) == SHA256
    write(file, b"shorter")
    assert weights.file_sha256(file) == hashlib.sha256(b"shorter").hexdigest()


def test_the_hub_caches_digest_counts_where_the_manifest_knows_none(own_caches: Path) -> None:
    record = replace(RECORD, sha256="", hf_repo="who/what", hf_file=RECORD.file)
    link = write_hub_cache(own_caches, record.hf_repo, record.file, CONTENT)
    assert weights.find(record) == link and weights.matches(record, link)
    write(link.resolve(), b"damaged later")
    refusal(lambda: weights.find(record), str(link), SHA256, "the hub")


def test_damaged_memory_of_hashes_is_said(folder: Path) -> None:
    write(folder / RECORD.file)
    write(weights.cache_folder() / "hashes.json", b"{")
    refusal(lambda: weights.find(replace(RECORD, sha256="")), "hashes.json", "delete it")


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
    message = refusal(lambda: weights.read(file), str(file))
    assert not marker.exists()
    if kind in ("zip.pth", "legacy.pth", "x.pt"):
        assert "refused" in message and "system" in message


def test_torchscript_needs_a_known_hash_whatever_verify_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Linear(2, 2).half()
            self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x) * self.logit_scale

    file = folder / "RN50.pt"
    with pytest.warns(FutureWarning) if torch.__version__ >= "2.15" else pytest.MonkeyPatch.context():
        torch.jit.script(Archive()).save(str(file))
    digest = weights.file_sha256(file)
    refusal(lambda: weights.find("RN50"), str(file), weights.manifest()["RN50"].sha256, digest)
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    refusal(lambda: weights.read(weights.find("RN50")), str(file), "TorchScript", "whatever", digest)
    known = {"RN50": replace(weights.manifest()["RN50"], sha256=digest)}
    monkeypatch.setattr(weights, "manifest", lambda: known)
    monkeypatch.delenv("QUALICLIP_PYIQA_VERIFY")
    state, metadata = weights.read(weights.find("RN50"), layout="openai-clip")
    assert set(state) == {"visual.weight", "visual.bias", "logit_scale"} and not metadata
    assert state["visual.weight"].dtype == torch.float16


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_state_dict_may_stand_for_openais_archive(zipped: bool, folder: Path) -> None:
    torch.save(CLIP_STATE, folder / "RN50.pt", _use_new_zipfile_serialization=zipped)
    path = weights.find("RN50")
    state, _ = weights.read(path, layout="openai-clip")
    assert torch.equal(state["visual.conv1.weight"], torch.ones(2, 3))
    assert weights.provenance(path)["verified"] is None
    path.unlink()
    save_file(CLIP_STATE, folder / "RN50.safetensors")
    assert set(weights.read(weights.find("RN50"))[0]) == set(CLIP_STATE)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_tensors_are_memory_mapped(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save(CLIP_STATE, file) if name == "a.pth" else save_file(CLIP_STATE, file)
    state, _ = weights.read(file)
    assert state and str(file) in Path("/proc/self/maps").read_text()


def own_metadata(**more: str) -> dict[str, str]:
    return {"format": weights.OWN_FORMAT, "backbone": "mini", "tower": "{}", "prompts": "[]", **more}


def test_layouts(tmp_path: Path) -> None:
    context = torch.randn(2, 16, 8)
    params = {"params": {"prompt_learner.ctx": context, "prompt_learner.token_prefix": torch.zeros(2, 1, 8)}}
    torch.save(context, tmp_path / "bare.pth")
    torch.save(params, tmp_path / "params.pth")
    save_file(params["params"], tmp_path / "params.safetensors")
    for name in ("bare.pth", "params.pth", "params.safetensors"):
        for layout in (None, "context", "params"):
            assert torch.equal(weights.read(tmp_path / name, layout=layout)[0]["prompt_learner.ctx"], context)
    whole = {f"clip_model.{key}": value for key, value in CLIP_STATE.items()}
    torch.save({**whole, "prompts_features": torch.eye(2)}, tmp_path / "qualiclip.pth")
    assert "clip_model.logit_scale" in weights.read(tmp_path / "qualiclip.pth", layout="qualiclip")[0]
    own = {**CLIP_STATE, "prompts_features": torch.eye(2)}
    save_file(own, tmp_path / "own.safetensors", own_metadata(licence="MIT"))
    state, metadata = weights.read(tmp_path / "own.safetensors")
    assert set(state) == set(own) and metadata["licence"] == "MIT"

    refusal(lambda: weights.read(tmp_path / "bare.pth", layout="openai-clip"), "lacks visual., logit_scale")
    refusal(
        lambda: weights.read(tmp_path / "qualiclip.pth", layout="context"), "lacks prompt_learner.ctx", "clip_model."
    )
    torch.save(whole, tmp_path / "no_features.pth")
    refusal(lambda: weights.read(tmp_path / "no_features.pth", layout="qualiclip"), "lacks prompts_features")
    save_file(own, tmp_path / "new.safetensors", own_metadata() | {"format": "qualiclip-pyiqa/2"})
    refusal(lambda: weights.read(tmp_path / "new.safetensors"), "'qualiclip-pyiqa/2'", "update")
    save_file(own, tmp_path / "poor.safetensors", {"format": weights.OWN_FORMAT, "backbone": "mini"})
    refusal(lambda: weights.read(tmp_path / "poor.safetensors"), "metadata 'tower'", "metadata 'prompts'")
    for name, content in (("list.pth", [torch.eye(2)]), ("mixed.pth", {**CLIP_STATE, "epoch": 3})):
        torch.save(content, tmp_path / name)
        refusal(lambda name=name: weights.read(tmp_path / name), name, "expected tensors by name")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    torch.save(CLIP_STATE, tmp_path / "whole.pth")
    save_file(CLIP_STATE, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        cut = write(tmp_path / f"cut-{name}", content[:-40])
        refusal(lambda cut=cut: weights.read(cut), str(cut), "damaged")
    for name in ("page.pth", "page.safetensors"):
        page = write(tmp_path / name, b"<!doctype html><title>404</title>")
        refusal(lambda page=page: weights.read(page), str(page), "damaged or no weight file")


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=80), st.sampled_from(["x.pth", "x.safetensors"]))
def test_no_bytes_raise_anything_else(tmp_path: Path, content: bytes, name: str) -> None:
    refusal(lambda: weights.read(write(tmp_path / name, content)), name)


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
        weights.read(file)
    except WeightsError as error:
        assert "\n" not in str(error)


def test_provenance(tmp_path: Path, folder: Path, own_caches: Path) -> None:
    save_file(CLIP_STATE, tmp_path / "mine.safetensors", own_metadata(licence="CC0-1.0", source="me"))
    mine = weights.provenance(tmp_path / "mine.safetensors")
    assert mine["licence"] == "CC0-1.0" and mine["source"] == "me" and mine["record"] is None
    torch.save(CLIP_STATE, tmp_path / "foreign.pth")
    assert weights.provenance(tmp_path / "foreign.pth")["licence"] == "unknown"
    upstream = weights.provenance(write(folder / "QualiCLIP.pth"))
    assert upstream["record"] == "QualiCLIP" and upstream["verified"] is False and upstream["sha256"] == SHA256
    assert upstream["licence"] == "CC-BY-NC-4.0" and upstream["commercial_use"] is False
    save_file(CLIP_STATE, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    link = write_hub_cache(own_caches, "timm/resnet50_clip.openai", "open_clip_model.safetensors", content)
    hub = weights.provenance(link)
    assert hub["record"] == "RN50" and hub["verified"] is True
    json.dumps([mine, upstream, hub])


# Downloading


class Server(ThreadingHTTPServer):
    """Serves `files` by path as the Hugging Face hub does, and keeps the paths asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.announced: dict[str, int] = {}  # a length other than the true one
        self.asked: list[str] = []
        self.stall = threading.Event()  # set: send half and wait
        self.half_sent = threading.Event()
        self.release = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        content = self.server.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        digest = hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{self.server.etags.get(self.path, digest)}"')
        self.send_header("X-Repo-Commit", "c0ffee")
        self.send_header("Content-Length", str(self.server.announced.get(self.path, len(content))))
        self.end_headers()
        if not body:
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if self.server.stall.is_set():
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.release.wait(30)
        self.wfile.write(content[half:])

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield running
        finally:
            running.release.set()
            running.shutdown()
            thread.join()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def from_url(server: Server, content: bytes = CONTENT, **more: Any) -> WeightRecord:
    server.files[f"/{RECORD.file}"] = content
    return replace(RECORD, urls=(f"{server.address}/{RECORD.file}",), **more)


def cached() -> list[str]:
    folder = weights.cache_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


FIND = """
import json, sys
from qualiclip_pyiqa import weights
print(weights.find(weights.WeightRecord(**json.loads(sys.argv[1]))))
"""


def find_in_child(record: WeightRecord, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """`weights.find(record)` in a process of its own, which is online unless told otherwise."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(weights.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, "-c", before + FIND, json.dumps(asdict(record))]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("online")
def test_download_from_a_url(server: Server) -> None:
    path = weights.find(from_url(server))
    assert path == weights.cache_folder() / RECORD.file and path.read_bytes() == CONTENT
    assert cached() == [RECORD.file] and path.stat().st_mode & 0o044  # not a temporary file's 0600
    weights.find(from_url(server))
    assert server.asked == [f"GET /{RECORD.file}"]  # once


@pytest.mark.usefixtures("online")
def test_next_url_after_a_dead_one(server: Server) -> None:
    record = from_url(server)
    dead = (f"{server.address}/gone", "http://127.0.0.1:9/refused")
    assert weights.find(replace(record, urls=dead + record.urls)).read_bytes() == CONTENT
    weights.find(record).unlink()
    refusal(lambda: weights.find(replace(record, urls=dead)), "404", "127.0.0.1:9/refused", "qualiclip-mini")


@pytest.mark.usefixtures("online")
def test_wrong_download_is_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = hashlib.sha256(b"<html>log in first</html>").hexdigest()
    record = from_url(server, b"<html>log in first</html>")
    refusal(lambda: weights.find(record), record.file, record.urls[0], SHA256, wrong, "nothing was kept")
    assert cached() == []
    refusal(lambda: weights.find(from_url(server, b"")), "is empty")
    assert cached() == []
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    assert weights.find(from_url(server, b"as you wish")).read_bytes() == b"as you wish"


@pytest.mark.usefixtures("online")
def test_broken_connection_leaves_nothing(server: Server) -> None:
    record = from_url(server)
    server.announced[f"/{record.file}"] = len(CONTENT) + 7
    refusal(lambda: weights.find(record), f"{len(CONTENT)} of {len(CONTENT) + 7} bytes", record.urls[0])
    assert cached() == []


@pytest.mark.usefixtures("online")
def test_trust_on_first_use_is_said_and_remembered(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    record = from_url(server, sha256="")
    path = weights.find(record)
    assert "trusted" in caplog.text and record.urls[0] in caplog.text
    assert weights.matches(record, path)
    path.write_bytes(b"changed")
    refusal(lambda: weights.find(record), SHA256, "hashes.json", record.urls[0])
    path.unlink()
    refusal(lambda: weights.find(from_url(server, b"changed upstream", sha256="")), SHA256, "hashes.json")
    assert cached() == ["hashes.json"]


@pytest.mark.usefixtures("online")
def test_abandoned_parts_are_cleared_after_a_day(server: Server) -> None:
    old, young = (write(weights.cache_folder() / f"{RECORD.file}.{age}.part") for age in ("old", "young"))
    os.utime(old, (time.time() - 90000,) * 2)
    weights.find(from_url(server))
    assert cached() == [RECORD.file, young.name]


def test_killed_download_leaves_no_final_file(server: Server) -> None:
    record = from_url(server)
    server.stall.set()
    child = find_in_child(record)
    assert server.half_sent.wait(30)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert RECORD.file not in cached()
    server.stall.clear()
    server.release.set()
    again = find_in_child(record)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0 and Path(out.strip()).read_bytes() == CONTENT, err


def test_two_processes_at_once(server: Server) -> None:
    record = from_url(server)
    server.stall.set()
    children = [find_in_child(record) for _ in range(2)]
    assert server.half_sent.wait(30)
    deadline = time.monotonic() + 30
    while len(server.asked) < 2 and time.monotonic() < deadline:  # both are in the middle of it
        time.sleep(0.01)
    server.release.set()
    for child in children:
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        assert Path(out.strip()).read_bytes() == CONTENT
    assert len(server.asked) == 2 and cached() == [RECORD.file]


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_full_disk_leaves_nothing(server: Server) -> None:
    record = from_url(server)
    limit = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(CONTENT) // 3},) * 2)\n"
    )
    child = find_in_child(record, limit)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "WeightsError" in err and "File too large" in err.splitlines()[-1]
    assert cached() == []


HUB_RECORD = replace(RECORD, sha256="", hf_repo="who/what", hf_file="sub+name.bin")
HUB_PATH = "/who/what/resolve/main/sub%2Bname.bin"


def test_download_through_the_hub_remembers_its_digest(server: Server, own_caches: Path) -> None:
    server.files[HUB_PATH] = CONTENT
    child = find_in_child(HUB_RECORD, HF_ENDPOINT=server.address)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    path = Path(out.strip())
    assert path.read_bytes() == CONTENT and path.is_relative_to(own_caches / "hf" / "hub")
    remembered = json.loads((weights.cache_folder() / "hashes.json").read_text())["test/sub+name.bin"]
    assert remembered["sha256"] == SHA256 and "who/what" in remembered["from"]
    assert weights.find(HUB_RECORD) == path  # found in the cache from now on, offline
    path.resolve().write_bytes(b"damaged")
    refusal(lambda: weights.find(HUB_RECORD), str(path), SHA256, "hashes.json")


def test_two_processes_at_once_through_the_hub(server: Server) -> None:
    server.files[HUB_PATH] = CONTENT
    children = [find_in_child(HUB_RECORD, HF_ENDPOINT=server.address) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert {out for out, _ in outputs} == {f"{weights.find(HUB_RECORD)}\n"}
    assert cached() == ["hashes.json"]


def test_a_hub_that_sends_something_else_is_refused(server: Server, own_caches: Path) -> None:
    server.files[HUB_PATH] = b"x" * len(CONTENT)
    server.etags[HUB_PATH] = SHA256
    child = find_in_child(HUB_RECORD, HF_ENDPOINT=server.address)
    _, err = child.communicate(timeout=60)
    line = err.splitlines()[-1]
    assert child.returncode == 1 and SHA256 in line and hashlib.sha256(b"x" * len(CONTENT)).hexdigest() in line
    assert weights.locate(HUB_RECORD) is None
    assert not [path for path in (own_caches / "hf" / "hub").rglob("blobs/*")]


def test_a_file_that_the_hub_lacks_comes_from_the_url(server: Server) -> None:
    record = replace(from_url(server), hf_repo="who/what", hf_file="gone.bin")
    child = find_in_child(record, HF_ENDPOINT=server.address)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and Path(out.strip()) == weights.cache_folder() / RECORD.file, err


def test_unreachable_network_is_one_line_that_helps() -> None:
    child = find_in_child(replace(weights.manifest()["QualiCLIP"], urls=("http://127.0.0.1:9/QualiCLIP.pth",)))
    _, err = child.communicate(timeout=60)
    line = err.splitlines()[-1]
    assert child.returncode == 1 and line.startswith("qualiclip_pyiqa.errors.WeightsError: QualiCLIP.pth")
    for part in ("https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/QualiCLIP.pth", "127.0.0.1:9"):
        assert part in line
    assert str(weights.cache_folder()) in line and "QUALICLIP_PYIQA_WEIGHTS" in line and "qualiclip-mini" in line


def test_offline_asks_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(from_url(server), hf_repo="who/what", hf_file="sub+name.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(lambda: weights.find(record), RECORD.file, "HF_HUB_OFFLINE=1", "qualiclip-mini")
    child = find_in_child(record, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="1")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "HF_HUB_OFFLINE=1" in err.splitlines()[-1]
    assert server.asked == []


def test_a_missing_embedded_file_asks_for_a_reinstall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "data_folder", lambda: tmp_path)
    refusal(lambda: weights.find("qualiclip-mini"), "qualiclip-mini.safetensors", "reinstall")


def test_looking_files_up_does_not_import_torch() -> None:
    script = "import sys; from qualiclip_pyiqa import weights; weights.locate('RN50'); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(weights.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
