"""What towers offer: feature maps, blocks and pooled features; and how they are built and frozen."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import upstream
from test_archs import build
from test_backbones import oracle, tower_of
from torch import nn

from qualiclip_pyiqa.errors import PromptError
from qualiclip_pyiqa.towers.backbones import find_backbone, text_tower
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.meta_parameters import parameters_on_meta
from qualiclip_pyiqa.towers.mini import Head, MiniTower
from qualiclip_pyiqa.towers.text import tokenize
from qualiclip_pyiqa.towers.torch_hooks import has_global_hooks, has_hooks

KINDS = ["tiny-resnet", "tiny-resnet-pos", "tiny-vit", "tiny-vit-pos", "qualiclip-mini"]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "tiny-eva", "tiny-siglip", "tiny-convnext", "tiny-fastvit", "tiny-coca"])
def test_a_feature_is_the_head_of_the_feature_map(kind: str, families_folder: Path) -> None:
    tower = build(kind, families_folder).tower
    x = upstream.pictures(2, 64, 100)
    features = tower.forward_features(x)
    assert torch.equal(tower.forward_head(features), tower(x))
    if "resnet" in kind:
        assert features.shape[2:] == (2, 3)  # a pixel of the map for each 32x32 of the image
    elif "vit" in kind and kind != "tiny-fastvit":
        assert features.shape[1] == 1 + (64 // tower.conv1.kernel_size[0]) * (100 // tower.conv1.kernel_size[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny-vit", "tiny-vit-pos"])
def test_a_transformer_can_be_run_block_by_block(kind: str, families_folder: Path) -> None:
    tower, x = build(kind, families_folder).tower, upstream.pictures(2, 64, 100)
    tokens = tower.embed(x)
    assert len(tower.blocks) > 1
    for block in tower.blocks:
        tokens = block(tokens)
    assert torch.allclose(tokens, tower.forward_features(x), atol=1e-6)
    assert len(build("tiny-eva", families_folder).tower.blocks) > 0


@torch.no_grad()
def test_a_text_tower_can_be_run_block_by_block(families_folder: Path) -> None:
    model, state = oracle("tiny-vit", families_folder)
    tower = text_tower(find_backbone("tiny-vit"), state, "file").eval()
    ids = tokenize(["Good photo.", "A rather longer text."])
    tokens = tower.embed(tower.token_embedding(ids))
    for block in tower.blocks:
        tokens = block(tokens, attn_mask=tower.mask(tokens.shape[1]))
    found = tower.forward_head(tokens, ids.argmax(dim=-1))
    assert torch.allclose(found, model.encode_text(ids), atol=1e-5)
    assert torch.allclose(found, tower.encode(ids), atol=1e-5)


@torch.no_grad()
def test_the_mini_towers_maps_are_what_is_pooled() -> None:
    tower = MiniTower().eval()
    x = upstream.pictures(2, 65, 100)
    maps, pooled = list(tower.feature_maps(x)), tower.forward_features(x)
    assert [tuple(each.shape[2:]) for each in maps] == [(33, 50), (17, 25), (9, 13), (5, 7)]
    for number, each in enumerate(maps, 1):
        assert torch.allclose(pooled[f"stage{number}"][:, : each.shape[1]], each.mean(dim=(2, 3)), atol=1e-5)


def test_dropout_is_an_argument_and_acts_in_training_alone() -> None:
    tower = MiniTower(dropout=0.5)
    assert [head.dropout for head in tower.heads if isinstance(head, Head)] == [0.5] * 6
    x = torch.rand(4, 30)
    head = Head(30, 8, 4, dropout=0.5)
    assert not torch.equal(head.train()(x), head(x))
    assert torch.equal(head.eval()(x), head(x))


def test_a_frozen_tower_has_buffers_alone_and_no_state(families_folder: Path) -> None:
    _, state = oracle("tiny-fastvit", families_folder)
    tower = tower_of("tiny-fastvit", state, False)
    values = {name: value.clone() for name, value in tower.state_dict().items()}
    assert any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
    freeze(tower)
    assert not list(tower.parameters()) and not tower.state_dict()
    assert {name for name, _ in tower.named_buffers()} >= {name for name in values if "num_batches" not in name}
    tower.load_state_dict({}, strict=True)
    assert all(torch.equal(value, values[name]) for name, value in tower.named_buffers() if name in values)


def test_a_text_longer_than_the_tower_reads_is_refused() -> None:
    assert tokenize(["word " * 75]).shape == (1, 77)
    with pytest.raises(PromptError, match=r"^'word word .*'\.\.\. has 76 tokens; expected a text of at most 75,"):
        tokenize(["Good photo.", "word " * 76])


def test_the_tokenizer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize(["Good photo."])
    monkeypatch.setattr("open_clip.SimpleTokenizer", lambda **_: pytest.fail("the table was read again"))
    assert torch.equal(tokenize(("Good photo.",)), first)


def test_parameters_take_no_memory_in_one_thread_alone() -> None:
    both, built = threading.Barrier(2), {}

    def other_thread() -> None:
        both.wait(60)
        built["other"] = nn.BatchNorm2d(3)
        both.wait(60)

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(other_thread)
        with parameters_on_meta():
            both.wait(60)
            both.wait(60)
            built["own"] = nn.BatchNorm2d(3)
            with parameters_on_meta():
                pass
            built["nested"] = nn.BatchNorm2d(3)
        waiting.result(60)
    built["later"] = nn.BatchNorm2d(3)
    for name, module in built.items():
        assert (module.weight.device.type == "meta") == (name in ("own", "nested"))
        assert module.running_var.device.type == "cpu" and module.running_var.sum() == 3
        assert isinstance(module.weight, nn.Parameter) and module.weight.requires_grad


@torch.no_grad()
def test_hooks_are_seen(cut_small_pictures: Callable[..., None]) -> None:
    """Modules with hooks get whole images, also where the hook is everybody's."""
    net = build("qualiclip-mini", Path())
    x, module = upstream.pictures(1, 96, 96), nn.Identity()
    cut_small_pictures(32)
    heights: list[int] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], *out: object) -> None:
        if module is net.tower.trunk.stem:
            heights.append(inputs[0].shape[2])

    assert not has_hooks(module) and not has_global_hooks()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        net.tower.trunk.stem.register_forward_hook,
        net.tower.trunk.stem.register_forward_pre_hook,
    ):
        heights.clear()
        handle = register(note)
        net(x)
        handle.remove()
        assert heights == [96]
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(note)
        assert has_hooks(module)
        handle.remove()
    assert not has_hooks(module) and not has_global_hooks()


@pytest.mark.parametrize("kind", [*KINDS, "tiny-eva", "tiny-siglip", "tiny-fastvit", "tiny-bert"])
@torch.no_grad()
def test_another_default_dtype_changes_no_tower(kind: str, families_folder: Path) -> None:
    x = upstream.pictures(2, 64, 100)
    prompts = {} if kind == "qualiclip-mini" else {"prompts": "sharpness"}
    expected = build(kind, families_folder, **prompts)(x)
    torch.set_default_dtype(torch.float64)
    try:
        net = build(kind, families_folder, **prompts)
        found = net(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 2e-6
    assert {value.dtype for value in net.buffers() if value.is_floating_point()} == {torch.float32}


def test_an_embedded_model_is_built_without_what_other_towers_need() -> None:
    """open_clip, timm and torchvision take longer to import than such a model to load."""
    code = """
import sys
from qualiclip_pyiqa import OpenQualiCLIP, Scorer
Scorer({"mini": OpenQualiCLIP("qualiclip-mini")}, device="cpu", workers=0)
print({"open_clip", "timm", "torchvision", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_private_names_of_torch_may_be_gone(families_folder: Path) -> None:
    """Metrics work without any private name that is used here, and without accelerate."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import pyiqa
sys.modules["accelerate"] = None
import torch, torch.utils._python_dispatch
del torch.utils._python_dispatch._get_current_dispatch_mode
import upstream
class Gone:
    def __getattr__(self, name): raise AttributeError(name)
torch.ops.mkldnn = Gone()
from pathlib import Path
from qualiclip_pyiqa.towers import torch_hooks
torch_hooks._OF_MODULE = torch_hooks._GLOBAL = ("_gone",)
import numpy as np
from test_archs import build
from qualiclip_pyiqa.scoring.scorer import Scorer
folder = Path({str(families_folder)!r})
upstream.add_tiny_backbones(folder)
upstream.families(folder / "words")
nets = {{kind: build(kind, folder) for kind in ("tiny-resnet", "tiny-vit", "qualiclip-mini", "tiny-eva", "tiny-bert")}}
(record,) = Scorer(nets, device="cpu", workers=0).score(np.full((40, 60, 3), 99, np.uint8))
assert record.error is None and len(record.scores) == len(nets)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
