"""Caches of their own for tests of weight files, and the files they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from qualiclip_pyiqa.errors import WeightsError
from qualiclip_pyiqa.pretrained.manifest import WeightRecord, manifest

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
    manifest()  # read before a test changes the data folder
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


def refusal(call: Callable[[], Any], *parts: str) -> str:
    """The one line of the WeightsError that the call raises; it must contain the parts."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
