"""Prompt features on disk: they save the text tower, and no damaged, foreign or missing file changes a score."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qualiclip_pyiqa import OpenCLIPIQA
from qualiclip_pyiqa.pretrained import prompt_cache
from qualiclip_pyiqa.pretrained.files import file_sha256
from qualiclip_pyiqa.pretrained.write import write_safetensors
from qualiclip_pyiqa.towers import backbones

PAIR, OTHER = "Clear photo./Foggy photo.", "Sharp photo./Blurry photo."
Build = Callable[..., OpenCLIPIQA]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qualiclip_pyiqa" / "prompts"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose text encoder was built."""
    files: list[str] = []
    original = backbones.text_encoder

    def text_encoder(backbone: backbones.Backbone, state: dict[str, Tensor], what: str) -> object:
        files.append(what)
        return original(backbone, state, what)

    monkeypatch.setattr(backbones, "text_encoder", text_encoder)
    return files


@pytest.fixture
def build(tiny_folder: Path, cache: Path) -> Build:
    def build(prompts: str = PAIR, file: Path = tiny_folder / "tiny-resnet.pt") -> OpenCLIPIQA:
        file_sha256(file)  # as when a published file is read
        return OpenCLIPIQA("clipiqa", backbone="tiny-resnet", weights=file, prompts=prompts)

    return build


def test_known_texts_need_no_text_tower(build: Build, cache: Path, built: list[str]) -> None:
    features = build().prompt_features
    assert len(built) == 1
    assert torch.equal(build().prompt_features, features)
    assert len(built) == 1
    metric = build()
    metric.set_prompts([("Clear photo.", "Foggy photo."), ("Sharp photo.", "Blurry photo.")])
    assert len(built) == 2
    assert torch.equal(metric.prompt_features[:2], features)
    assert torch.equal(build(OTHER).prompt_features, metric.prompt_features[2:])
    assert len(built) == 2
    assert len(list(cache.iterdir())) == 1


def test_features_do_not_depend_on_the_cache(build: Build, cache: Path) -> None:
    build(OTHER)
    after = build("look").prompt_features
    for path in cache.iterdir():
        path.unlink()
    assert torch.equal(build("look").prompt_features, after)


def test_another_model_has_its_own_features(
    build: Build, cache: Path, built: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    features = build().prompt_features
    state = torch.load(tiny_folder / "tiny-resnet.pt", weights_only=True)
    state["text_projection"] = state["text_projection"].roll(1, dims=1)
    torch.save(state, tmp_path / "other.pt")
    assert not torch.allclose(build(file=tmp_path / "other.pt").prompt_features, features)
    assert len(list(cache.iterdir())) == 2


def test_a_file_is_not_hashed_for_the_cache(cache: Path, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.pt"
    file.write_bytes((tiny_folder / "tiny-resnet.pt").read_bytes())
    metric = OpenCLIPIQA("clipiqa", backbone="tiny-resnet", weights=file, prompts=PAIR)
    assert metric.origin.file.computed_sha256 is None
    assert not cache.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Give the texts each other's features, with the old digest."""
    with safe_open(path, "pt") as file:
        metadata, rows = file.metadata(), file.get_tensor("features")
    write_safetensors(path, {"features": rows.flip(0).contiguous()}, metadata)


def foreign(path: Path) -> None:
    write_safetensors(path, {"features": torch.zeros(2, 32)}, {"texts": "3"})


def enlarge(path: Path) -> None:
    os.truncate(path, prompt_cache._MAX_BYTES + 1)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, flip, swap, foreign, enlarge, folder])
def test_a_damaged_file_is_never_believed(
    damage: Callable[[Path], None],
    build: Build,
    cache: Path,
    built: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    features = build().prompt_features
    (path,) = cache.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(build().prompt_features, features)
    assert len(built) == 2
    assert f"{path} is not used" in caplog.text
    if damage is not folder:
        assert torch.equal(build().prompt_features, features)
        assert len(built) == 2  # the file was replaced by a whole one


def test_a_cache_that_cannot_be_written_is_no_error(build: Build, cache: Path, built: list[str]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert torch.equal(build().prompt_features, build().prompt_features)
    assert len(built) == 2
    assert cache.is_file()


def test_a_read_only_cache_is_read(
    build: Build, cache: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = build().prompt_features

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Permissions do not stop root, who runs the tests in containers.
    monkeypatch.setattr(prompt_cache, "write_safetensors", refuse)
    build(OTHER)
    assert torch.equal(build().prompt_features, features)
    assert len(built) == 2


def test_no_home_is_no_error(build: Build, built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qualiclip_pyiqa.pretrained.folders.user_cache", lambda: None)
    assert torch.equal(build().prompt_features, build().prompt_features)
    assert len(built) == 2


def test_the_cache_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_TEXTS", 3)
    monkeypatch.setattr(prompt_cache, "MAX_FILES", 2)

    def features(texts: list[str]) -> list[Tensor]:
        return [torch.full((4,), float(len(text))) for text in texts]

    def refuse(texts: list[str]) -> list[Tensor]:
        raise AssertionError(texts)

    for texts in (["a", "bb"], ["ccc", "dddd"]):
        prompt_cache.cached_features({"model": "1"}, texts, features)
    assert prompt_cache.cached_features({"model": "1"}, ["bb", "dddd"], refuse)["bb"].tolist() == [2.0] * 4
    with pytest.raises(AssertionError, match="a"):  # the oldest is gone
        prompt_cache.cached_features({"model": "1"}, ["a"], refuse)
    abandoned = cache / "killed.safetensors.1234.part"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    for number, path in enumerate(cache.glob("*.safetensors")):
        os.utime(path, (number, number))
    for model in "23":
        prompt_cache.cached_features({"model": model}, ["a"], features)
    assert len(list(cache.iterdir())) == 2
    for model in "23":
        prompt_cache.cached_features({"model": model}, ["a"], refuse)


def _fill(number: int, ready: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    for step in range(30):
        text = f"{number} {step}"
        found = prompt_cache.cached_features(
            {"model": "shared"}, ["common", text], lambda texts: [torch.full((8,), float(len(text))) for text in texts]
        )
        assert found["common"].tolist() == [6.0] * 8
        assert found[text].tolist() == [float(len(text))] * 8


def test_processes_that_write_at_once_spoil_nothing(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    workers = [context.Process(target=_fill, args=(number, ready)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    (path,) = cache.iterdir()
    assert path.suffix == ".safetensors"
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("features")) > 2
