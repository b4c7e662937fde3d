"""Weight files: look-up order, hashes, and downloads from servers on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from weight_files import CONTENT, RECORD, SHA256, folder, own_caches, refusal, write, write_hub_cache

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained import download, find, folders, manifest
from qualiclip_pyiqa.pretrained.files import OpenFile, WeightFile, file_sha256
from qualiclip_pyiqa.pretrained.layouts import REQUIRED
from qualiclip_pyiqa.pretrained.manifest import WeightRecord
from qualiclip_pyiqa.pretrained.read import read
from qualiclip_pyiqa.pretrained.verify import provenance, verdict

__all__ = ["folder", "own_caches"]  # fixtures

ROOT = str(Path(__file__).parents[1])


def own_cache() -> Path:
    folder = folders.cache_folder()
    assert folder is not None
    return folder


# The manifest


def test_manifest_is_complete_and_consistent() -> None:
    from qualiclip_pyiqa.metrics.registry import METRICS

    records = manifest.manifest()
    named = {record for spec in METRICS.values() for record in spec.records}
    assert named <= set(records)
    for record in records.values():
        assert record.licence and record.licence_url.startswith("https://") and record.source and record.citation
        assert record.layout in {*REQUIRED, "context-tensor", "params"}
        restricted = any(word in record.licence for word in ("NC", "non-commercial", "none stated"))
        assert record.commercial_use != restricted
        assert bool(record.hf_repo) == bool(record.hf_file)
        assert not (record.by_hand and record.origin)
        for url in record.urls:
            assert url.rsplit("/", 1)[-1] == record.file
            assert record.layout != "openai-clip" or record.sha256 in url
        if record.origin:
            assert len(record.sha256) == len(record.hub_sha256) == 64
            assert record.hf_file == record.file or (len(record.hf_revision) == 40 and record.hf_size)
            prefix = Path(record.file).stem.rpartition("-")[2]  # torch hub's convention
            assert len(prefix) != 8 or record.sha256.startswith(prefix)
    for row in manifest.published():
        assert row["metric"] in METRICS and 0 < row["srcc"] < 1 and row["source"] and isinstance(row["verified"], bool)


@pytest.mark.parametrize("name", ["qualiclip-mini", "qualiclip-mini+"])
def test_embedded_model_is_the_one_of_the_manifest(name: str) -> None:
    record = manifest.manifest()[name]
    file = manifest.data_folder() / record.file
    if not file.exists():
        pytest.skip("no embedded model in this tree")
    assert (record.sha256, record.size) == (file_sha256(file), file.stat().st_size), "update manifest.toml"
    found = read(name, layout="qualiclip-pyiqa")
    assert found.tensors["prompts_features"].dim() == 2
    assert found.metadata["licence"].replace(" ", "-") == record.licence


def test_data_lies_inside_an_installed_package_or_beside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "qualiclip_pyiqa"
    package.mkdir()
    monkeypatch.setattr(manifest, "__file__", str(package / "pretrained" / "manifest.py"))
    assert manifest.data_folder() == tmp_path / "weights"
    (package / "_weights").mkdir()
    assert manifest.data_folder() == package / "_weights"


def test_openai_records_come_from_open_clips_table() -> None:
    assert manifest.openai_record("RN50-quickgelu") is manifest.manifest()["RN50"]
    assert manifest.openai_record("ViT-L-14") is manifest.manifest()["ViT-L-14"]
    assert manifest.openai_record("ViT-B-32") is manifest.manifest()["ViT-B-32"]
    other = manifest.openai_record("RN101")
    assert other.file == "RN101.pt" and len(other.sha256) == 64 and other.licence == "MIT"
    assert other.hf_repo and other.sha256 in other.urls[0] and not other.hub_sha256
    refusal(lambda: manifest.openai_record("ViT-H-14"), "ViT-H-14", "weights=FILE")


# Finding


def test_look_up_order(own_caches: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(RECORD, hf_repo="who/what", hf_file=RECORD.file)
    second = tmp_path / "second"
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", os.pathsep.join((str(folder), str(second))))
    monkeypatch.setattr(find, "data_folder", lambda: tmp_path / "embedded")
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
    assert find.find(explicit) == find.find(str(explicit)) == explicit
    places = []
    for path in in_order:
        assert find.find(record) == path
        found = find.locate(record)
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
    assert find.locate(record) is None


def test_pyiqas_own_downloads_are_found_under_the_name_that_pyiqa_gives_them(own_caches: Path) -> None:
    from pyiqa.archs.arch_util import get_url_from_name

    record = manifest.manifest()["QualiCLIP+_koniq"]
    name = get_url_from_name(record.file).rsplit("/", 1)[-1]
    assert name != record.file  # the plus sign is written as %2B
    file = write(own_caches / "torch" / "hub" / "pyiqa" / name)
    assert find.locate(record.name) == (file, "pyiqa's cache")
    with pytest.raises(WeightsError, match="expected sha256 450292893e96"):  # and held against the manifest
        find.find(record.name)
    with OpenFile(file) as opened:
        assert provenance(WeightFile(file, opened.stamp))["record"] == record.name


def test_a_variable_that_names_no_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path / "typo"))
    find.locate("RN50")
    assert "typo, which is not a folder" in caplog.text


def test_files_that_cannot_be_used_are_errors_not_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal(lambda: find.find("QualiCLP"), "'QualiCLP'", "did you mean 'QualiCLIP'")
    assert "did you mean" not in refusal(
        lambda: find.find("zzz"), "no weight file 'zzz'", "`qualiclip weights list` prints"
    )
    refusal(lambda: find.find(folder / "no.pth"), "no.pth")
    refusal(lambda: find.find(folder), "is a folder")
    for wrong in ("", 3, b"x", ["QualiCLIP"]):
        for use in (find.find, find.locate, read):
            message = refusal(lambda use=use, wrong=wrong: use(wrong))
            assert message == f"weights is {wrong!r}; expected a path or a record's name"
    (folder / "QualiCLIP.pth").mkdir()
    refusal(lambda: find.find("QualiCLIP"), "QualiCLIP.pth", "is a folder")
    (folder / "QualiCLIP.pth").rmdir()
    write(folder / "QualiCLIP.pth", b"")
    refusal(lambda: find.find("QualiCLIP"), "QualiCLIP.pth", "is empty")
    write(folder / "QualiCLIP.pth")
    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:  # as root, who may run the tests, reads every file
        if path.name == "QualiCLIP.pth":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    refusal(lambda: find.find("QualiCLIP"), "QualiCLIP.pth", "Permission denied")


def test_a_path_or_an_unknown_name_is_a_users_file() -> None:
    assert manifest.find_record("RN50") is manifest.manifest()["RN50"] and manifest.find_record(RECORD) is RECORD
    assert manifest.find_record("mine.pth") is None and manifest.find_record(Path("RN50")) is None


# Hashes


def test_wrong_hash(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = write(folder / RECORD.file, b"other content")
    found = hashlib.sha256(b"other content").hexdigest()
    message = refusal(lambda: find.find(RECORD), str(file), SHA256, found, "QUALICLIP_PYIQA_VERIFY=0")
    assert not caplog.text
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    assert find.find(RECORD) == file
    assert SHA256 in caplog.text and found in caplog.text and message.split(";")[0] in caplog.text


def test_first_digits_of_a_hash_are_compared(folder: Path) -> None:
    write(folder / RECORD.file)
    assert find.find(replace(RECORD, sha256=SHA256[:8])).exists()
    refusal(lambda: find.find(replace(RECORD, sha256="603f3273")), "603f3273", SHA256)


def test_a_users_path_with_upstreams_name_is_checked(tmp_path: Path) -> None:
    file = write(tmp_path / "QualiCLIP.pth")
    refusal(lambda: find.find(file), str(file), manifest.manifest()["QualiCLIP"].sha256, SHA256)
    write(tmp_path / "qualiclip-mini.safetensors")  # but the name of one's own training run is free
    assert find.find(tmp_path / "qualiclip-mini.safetensors").exists()


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    file = write(tmp_path / "x")
    assert file_sha256(file) == SHA256
    write(file, b"shorter")
    assert file_sha256(file) == hashlib.sha256(b"shorter").hexdigest()


def test_the_hub_caches_digest_counts_where_the_manifest_knows_none(own_caches: Path) -> None:
    record = replace(RECORD, sha256="", hf_repo="who/what", hf_file=RECORD.file)
    link = write_hub_cache(own_caches, record.hf_repo, record.file, CONTENT)
    assert find.find(record) == link
    assert str(verdict(record, link)).startswith(f"first use: sha256 {SHA256} (announced by the hub")
    write(link.resolve(), b"damaged later")
    refusal(lambda: find.find(record), str(link), SHA256, "the hub", "Hugging Face cache", "not deleted here")
    assert link.exists()


ENTRY = {"sha256": SHA256, "from": "u", "on": "2026-01-01"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        "3",
        '{"test/test-weights.pth": []}',
        '{"test/test-weights.pth": {"sha256": 7}}',
        json.dumps({"test/test-weights.pth": ENTRY | {"sha256": "short"}}),
        json.dumps({"test/test-weights.pth": ENTRY | {"on": "a\nb"}}),
        json.dumps({"another": {}}),
    ],
)
def test_damaged_memory_of_hashes_is_one_line(folder: Path, content: str) -> None:
    write(folder / RECORD.file)
    write(own_cache() / "hashes.json", content.encode())
    refusal(lambda: find.find(replace(RECORD, sha256="")), "hashes.json", "delete it")


def test_a_verdict_is_verified_by_the_manifest_alone(folder: Path) -> None:
    file = write(folder / RECORD.file)
    assert str(verdict(RECORD, file)) == f"verified: sha256 {SHA256} (open_clip's table)"
    unpublished = replace(RECORD, sha256="")
    assert str(verdict(unpublished, file)).startswith("unknown: no hash to compare with")
    write(own_cache() / "hashes.json", json.dumps({f"test/{RECORD.file}": ENTRY}).encode())
    assert str(verdict(unpublished, file)).startswith(f"first use: sha256 {SHA256} (remembered on 2026-01-01 from u")
    write(file, b"other")
    assert str(verdict(RECORD, file)).startswith("WRONG: expected sha256") and verdict(RECORD, file).kind == "wrong"
    assert verdict(unpublished, file).kind == "wrong"


def test_a_conversion_with_the_hubs_hash_is_verified_under_any_name(folder: Path) -> None:
    record = replace(RECORD, sha256="0" * 64, hf_repo="who/what", hf_file="model.safetensors", hf_sha256=SHA256)
    file = write(folder / "test-weights.safetensors")
    assert find.find(record) == file and verdict(record, file).kind == "verified"
    write(file, b"somebody's own conversion")
    assert find.find(record) == file and verdict(record, file).kind == "unknown"
    wrong = write(folder / "model.safetensors", b"not the hub's")
    assert verdict(record, wrong).kind == "wrong"


def test_a_hash_is_of_the_file_that_is_open_whatever_happens_to_its_path(tmp_path: Path) -> None:
    file = write(tmp_path / "x")
    with OpenFile(file) as opened:
        write(tmp_path / "y", b"hostile").replace(file)
        assert opened.sha256() == SHA256
        refusal(opened.check_unchanged, str(file), "changed while it was read")
    # A restored size and time do not deceive the hashes that are kept in the process.
    stat = file.stat()
    assert file_sha256(file) == hashlib.sha256(b"hostile").hexdigest()
    file.write_bytes(b"HOSTILE")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(file) == hashlib.sha256(b"HOSTILE").hexdigest()


@pytest.mark.skipif(sys.platform == "win32", reason="user ids are POSIX")
def test_a_user_without_a_home_finds_what_has_a_place(tmp_path: Path) -> None:
    script = """
import pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained import find
assert cli.main(["weights", "list"]) == 0
assert find.find("qualiclip-mini").exists() and find.locate("RN50") is None
try:
    find.find("QualiCLIP")
except WeightsError as error:
    print(error)
import torch
assert find.locate("RN50") is None
"""
    remove = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "QUALICLIP_PYIQA_WEIGHTS")
    environment = {key: value for key, value in os.environ.items() if key not in remove} | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "put it into a folder named in QUALICLIP_PYIQA_WEIGHTS" in done.stdout.splitlines()[-1]
    assert not list(tmp_path.glob("~*"))


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
        self.commit = "c0ffee"
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
        self.send_header("X-Repo-Commit", self.server.commit)
        length = self.server.announced.get(self.path, len(content))
        if length >= 0:
            self.send_header("Content-Length", str(length))
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
    folder = own_cache()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


FIND = """
import json, sys
from qualiclip_pyiqa.pretrained import find
from qualiclip_pyiqa.pretrained.manifest import WeightRecord
print(find.find(WeightRecord(**json.loads(sys.argv[1]))))
"""


def find_in_child(record: WeightRecord, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """`find.find(record)` in a process of its own, which is online unless told otherwise."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", before + FIND, json.dumps(asdict(record))]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("online")
def test_download_from_a_url(server: Server) -> None:
    path = find.find(from_url(server))
    assert path == own_cache() / RECORD.file and path.read_bytes() == CONTENT
    assert cached() == [RECORD.file] and path.stat().st_mode & 0o044  # not a temporary file's 0600
    find.find(from_url(server))
    assert server.asked == [f"GET /{RECORD.file}"]  # once


@pytest.mark.usefixtures("online")
def test_next_url_after_a_dead_one(server: Server) -> None:
    record = from_url(server)
    dead = (f"{server.address}/gone", "http://127.0.0.1:9/refused")
    assert find.find(replace(record, urls=dead + record.urls)).read_bytes() == CONTENT
    find.find(record).unlink()
    refusal(lambda: find.find(replace(record, urls=dead)), "404", "127.0.0.1:9/refused", "qualiclip-mini")


@pytest.mark.usefixtures("online")
def test_wrong_download_is_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = hashlib.sha256(b"<html>log in first</html>").hexdigest()
    record = from_url(server, b"<html>log in first</html>")
    refusal(lambda: find.find(record), record.file, record.urls[0], SHA256, wrong, "the download was discarded")
    assert cached() == []
    refusal(lambda: find.find(from_url(server, b"")), "is empty")
    assert cached() == []
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    assert find.find(from_url(server, b"as you wish")).read_bytes() == b"as you wish"


@pytest.mark.usefixtures("online")
def test_broken_connection_leaves_nothing(server: Server) -> None:
    record = from_url(server)
    server.announced[f"/{record.file}"] = len(CONTENT) + 7
    refusal(lambda: find.find(record), f"{len(CONTENT)} of {len(CONTENT) + 7} bytes", record.urls[0])
    assert cached() == []


@pytest.mark.usefixtures("online")
def test_trust_on_first_use_is_said_and_remembered(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    record = from_url(server, sha256="")
    path = find.find(record)
    assert "first use" in caplog.text and "nobody has verified" in caplog.text and record.urls[0] in caplog.text
    assert verdict(record, path).kind == "first use"
    path.write_bytes(b"changed")
    refusal(lambda: find.find(record), SHA256, "hashes.json", record.urls[0])
    path.unlink()
    refusal(lambda: find.find(from_url(server, b"changed upstream", sha256="")), SHA256, "hashes.json")
    assert cached() == ["hashes.json"]


@pytest.mark.usefixtures("online")
def test_abandoned_parts_are_cleared_after_a_day(server: Server) -> None:
    old, young = (write(own_cache() / f"{RECORD.file}.{age}.part") for age in ("old", "young"))
    os.utime(old, (time.time() - 90000,) * 2)
    find.find(from_url(server))
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


@pytest.mark.usefixtures("online")
def test_a_download_has_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    record = from_url(server)
    refusal(lambda: find.find(replace(record, size=100)), f"announces {len(CONTENT)} bytes; expected 100")
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    refusal(lambda: find.find(record), f"announces {len(CONTENT)} bytes; expected at most 1000")
    server.announced[f"/{record.file}"] = -1  # and sends without end
    refusal(lambda: find.find(record), "sends more than 1000 bytes")
    refusal(lambda: find.find(replace(record, size=500)), "sends more than 500 bytes")
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
    remembered = json.loads((own_cache() / "hashes.json").read_text())["test/sub+name.bin"]
    assert remembered["sha256"] == SHA256 and "who/what" in remembered["from"]
    assert find.find(HUB_RECORD) == path  # found in the cache from now on, offline
    path.resolve().write_bytes(b"damaged")
    refusal(lambda: find.find(HUB_RECORD), str(path), SHA256, "hashes.json")


def test_two_processes_at_once_through_the_hub(server: Server) -> None:
    server.files[HUB_PATH] = CONTENT
    children = [find_in_child(HUB_RECORD, HF_ENDPOINT=server.address) for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert {out for out, _ in outputs} == {f"{find.find(HUB_RECORD)}\n"}
    assert cached() == ["hashes.json"]


def test_a_hub_that_sends_something_else_is_refused(server: Server, own_caches: Path) -> None:
    server.files[HUB_PATH] = b"x" * len(CONTENT)
    server.etags[HUB_PATH] = SHA256
    child = find_in_child(HUB_RECORD, HF_ENDPOINT=server.address)
    _, err = child.communicate(timeout=60)
    line = err.splitlines()[-1]
    assert child.returncode == 1 and SHA256 in line and hashlib.sha256(b"x" * len(CONTENT)).hexdigest() in line
    # The cache is shared: the file stays, is refused whenever it is found, and the message says where it is.
    (blob,) = (own_caches / "hf" / "hub").rglob("blobs/*")
    assert str(blob) in line and "shared with other programs" in line
    refusal(lambda: find.find(HUB_RECORD), SHA256, str(blob))


REVISION = "0123456789abcdef0123456789abcdef01234567"
PINNED = replace(HUB_RECORD, hf_revision=REVISION, hf_sha256=SHA256, hf_size=len(CONTENT))
PINNED_PATH = f"/who/what/resolve/{REVISION}/sub%2Bname.bin"


def test_a_pinned_file_comes_from_its_revision_and_is_verified(server: Server, own_caches: Path) -> None:
    server.files[HUB_PATH] = b"what somebody pushed to main"
    server.files[PINNED_PATH] = CONTENT
    server.commit = REVISION
    child = find_in_child(PINNED, HF_ENDPOINT=server.address)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and "first use" not in err, err
    path = Path(out.strip())
    assert path.read_bytes() == CONTENT and REVISION in path.parts
    assert all("/main/" not in asked for asked in server.asked) and cached() == []
    assert find.find(PINNED) == path and verdict(PINNED, path).kind == "verified"


def test_a_hub_that_lies_about_a_pinned_file_is_refused(server: Server, own_caches: Path) -> None:
    server.files[PINNED_PATH] = b"x" * len(CONTENT)  # with a digest that fits
    server.commit = REVISION
    child = find_in_child(PINNED, HF_ENDPOINT=server.address)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and SHA256 in err.splitlines()[-1] and "open_clip's table" in err.splitlines()[-1]
    refusal(lambda: find.find(PINNED), SHA256, "open_clip's table")
    assert cached() == []


def test_a_hub_file_that_is_too_large_is_not_fetched(server: Server, own_caches: Path) -> None:
    server.files[PINNED_PATH] = CONTENT + b"more"
    server.commit = REVISION
    child = find_in_child(PINNED, HF_ENDPOINT=server.address)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and f"announces {len(CONTENT) + 4} bytes" in err.splitlines()[-1]
    assert f"GET {PINNED_PATH}" not in server.asked


def test_what_others_cached_from_main_is_found_and_held_against_the_manifest(own_caches: Path) -> None:
    link = write_hub_cache(own_caches, PINNED.hf_repo, PINNED.hf_file, CONTENT)
    assert find.find(PINNED) == link and verdict(PINNED, link).kind == "verified"
    write(link.resolve(), b"something else")
    refusal(lambda: find.find(PINNED), SHA256, "open_clip's table")


def test_a_file_that_the_hub_lacks_comes_from_the_url(server: Server) -> None:
    record = replace(from_url(server), hf_repo="who/what", hf_file="gone.bin")
    child = find_in_child(record, HF_ENDPOINT=server.address)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and Path(out.strip()) == own_cache() / RECORD.file, err


def test_unreachable_network_is_one_line_that_helps() -> None:
    child = find_in_child(replace(manifest.manifest()["QualiCLIP"], urls=("http://127.0.0.1:9/QualiCLIP.pth",)))
    _, err = child.communicate(timeout=60)
    line = err.splitlines()[-1]
    assert child.returncode == 1 and line.startswith("qualiclip_pyiqa.errors.WeightsError: QualiCLIP.pth")
    for part in ("https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/QualiCLIP.pth", "127.0.0.1:9"):
        assert part in line
    assert str(own_cache()) in line and "QUALICLIP_PYIQA_WEIGHTS" in line and "qualiclip-mini" in line


def test_offline_asks_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(from_url(server), hf_repo="who/what", hf_file="sub+name.bin")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(lambda: find.find(record), RECORD.file, "HF_HUB_OFFLINE=1", "qualiclip-mini")
    child = find_in_child(record, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="1")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "HF_HUB_OFFLINE=1" in err.splitlines()[-1]
    assert server.asked == []


def test_a_missing_embedded_file_asks_for_a_reinstall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(download, "data_folder", lambda: tmp_path)
    refusal(lambda: find.find("qualiclip-mini"), "qualiclip-mini.safetensors", "reinstall")


def test_looking_files_up_does_not_import_torch() -> None:
    script = (
        "import sys; from qualiclip_pyiqa.pretrained import find; find.locate('RN50'); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
