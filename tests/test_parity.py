"""Every name that pyiqa has too equals pyiqa's own network on the same files (random content, upstream layouts)."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import open_clip
import pyiqa
import pytest
import torch
import upstream

# Two fp32 implementations that fold, fuse and order their sums differently: 2e-6 is seen, 1e-4 is promised.
TOLERANCE = 1e-5

SIZES = [(1, 32, 32), (8, 64, 96), (3, 33, 47), (1, 225, 311), (1, 512, 384)]
RN50_NAMES = [
    "clipiqa",
    "clipiqa+",
    "clipiqa+_rn50_512",
    "qualiclip",
    "qualiclip+",
    "qualiclip+-clive",
    "qualiclip+-flive",
    "qualiclip+-spaq",
]
# Metrics that differ from another one in their context alone need no large picture of their own.
SMALL = SIZES[1:2]
ONLY_CONTEXT = {"clipiqa+", "qualiclip+", "qualiclip+-clive", "qualiclip+-flive", "qualiclip+-spaq"}
LARGE = {"clipiqa+_rn50_512"}  # with the positional table, stretched


@torch.no_grad()
def check(name: str, ours: torch.nn.Module, theirs: torch.nn.Module, sizes: list[tuple[int, int, int]]) -> None:
    scores = []
    for index, (count, height, width) in enumerate(sizes):
        x = upstream.pictures(count, height, width, seed=index)
        expected, found = theirs(x), ours(x)
        assert found.shape == expected.shape == (count, 1)
        assert (found - expected).abs().max() < TOLERANCE, (name, height, width)
        scores.append(expected)
    # The comparison means something only if scores differ between pictures by far more than the tolerance.
    assert torch.cat(scores).std() > 100 * TOLERANCE, name


@pytest.mark.parametrize("name", RN50_NAMES)
def test_equals_pyiqa(name: str, upstream_weights: Path) -> None:
    theirs = upstream.oracle(name, upstream_weights)
    metric = pyiqa.create_metric(name, device="cpu")
    assert type(metric.net).__module__ == "qualiclip_pyiqa.archs"
    sizes = SMALL if name in ONLY_CONTEXT else SIZES
    check(name, metric.net, theirs, sizes + ([(1, 352, 640)] if name in LARGE else []))

    # Weights go both ways: our state dict is what their `params` hold, in names, shapes and values.
    assert {k: v.shape for k, v in metric.net.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(metric.net.state_dict())
    metric.net.load_state_dict(theirs.state_dict())


def test_a_trained_context_goes_both_ways(upstream_weights: Path, tmp_path: Path) -> None:
    theirs = upstream.oracle("qualiclip+", upstream_weights)
    with torch.no_grad():
        theirs.prompt_learner.ctx.add_(0.05 * torch.randn(theirs.prompt_learner.ctx.shape))
    file = tmp_path / "trained.pth"
    torch.save({"params": theirs.state_dict()}, file)
    metric = pyiqa.create_metric("qualiclip+", device="cpu")
    x = upstream.pictures(3, 96, 96)
    with torch.no_grad():
        before, expected = metric.net(x), theirs(x)
        assert (before - expected).abs().max() > 10 * TOLERANCE
        metric.load_weights(str(file))
        assert (metric.net(x) - expected).abs().max() < TOLERANCE

    # `pretrained=` takes the same file, and a context of 16 tokens shared by all prompts takes the place of 14.
    again = pyiqa.create_metric("qualiclip+", device="cpu", pretrained=str(file))
    with torch.no_grad():
        assert (again.net(x) - expected).abs().max() < TOLERANCE


def test_a_fresh_context_equals_pyiqa(upstream_weights: Path) -> None:
    theirs = upstream.oracle("clipiqa+", upstream_weights, pretrained=False)
    ours = pyiqa.create_metric("clipiqa+", device="cpu", pretrained=False).net
    x = upstream.pictures(2, 64, 64)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < TOLERANCE


def test_vit_large_equals_pyiqa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from conftest import CLIPIQA_TEXTS

    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"]["layers"], config["text_cfg"]["layers"] = 6, 3  # a quarter: blocks are alike, and large
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", config)
    state = upstream.random_clip(config)
    file = "CLIPIQA+_ViTL14_512-e66488f2.pth"
    upstream.write_context(tmp_path / file, state, CLIPIQA_TEXTS, per_text=True, bare=False, seed=5)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "ViT-L-14.pt")
    del state
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    try:
        theirs = upstream.oracle("clipiqa+_vitL14_512", tmp_path)
        metric = pyiqa.create_metric("clipiqa+_vitL14_512", device="cpu")
        check("clipiqa+_vitL14_512", metric.net, theirs, [(1, 32, 32), (2, 100, 57), (1, 224, 224), (1, 43, 420)])
    finally:
        shutil.rmtree(tmp_path)
        gc.collect()
