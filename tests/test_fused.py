"""Convolutions with what follows them: the values, gradients and hooks of the plain ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import upstream
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qualiclip_pyiqa.towers import onednn as fused
from qualiclip_pyiqa.towers.clip import ResNetTower, freeze

# Of features of about one, folded and not: the random layers make 5e-5 of float32's rounding, 1e-2 of a wrong border.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain() -> ResNetTower:
    """Layers of one, two and three blocks, as before they are frozen."""
    torch.manual_seed(0)
    visual = ModifiedResNet(layers=(3, 2, 1, 2), output_dim=32, heads=4, image_size=224, width=8)
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None
    tower = ResNetTower(visual, False, (0.5, 0.4, 0.3), (0.3, 0.2, 0.3))
    with torch.no_grad():
        tower.train()(upstream.pictures(8, 96, 96))
    return tower.eval()


@pytest.fixture
def tower(plain: ResNetTower) -> ResNetTower:
    assert fused._known(), "this PyTorch has no oneDNN, or its operators have changed"
    frozen = freeze(copy.deepcopy(plain))
    assert isinstance(frozen, ResNetTower)
    return frozen


def operators(tower: ResNetTower, x: torch.Tensor) -> int:
    """How many of oneDNN's operators a forward pass calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tower(x)
    return sum(event.name.startswith("mkldnn::_convolution_pointwise") for event in profile.events())


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 33, 101), (3, 224, 224), (1, 640, 33)])
def test_values_are_those_of_the_plain_ones(
    size: tuple[int, int, int], plain: ResNetTower, tower: ResNetTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = upstream.pictures(*size)
    given = x.clone()
    found = tower(x)
    assert operators(tower, x) == 3 + 3 * 8 + 4  # the stem's, three of each block, one shortcut of each layer
    assert torch.equal(x, given) and torch.equal(tower(x), found)
    assert (found - plain(x)).abs().max() < TOLERANCE
    monkeypatch.setattr(fused, "_known", lambda: False)
    assert operators(tower, x) == 0
    assert (found - tower(x)).abs().max() < TOLERANCE
    assert found.abs().mean() > 1000 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("rows", [32, 160, 5])
@pytest.mark.parametrize("size", [(2, 333, 101), (1, 640, 33)])
def test_strips_have_the_values_of_the_whole(
    size: tuple[int, int, int],
    rows: int,
    tower: ResNetTower,
    cut_small_pictures: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = upstream.pictures(*size)
    given = x.clone()
    whole, calls = tower(x), operators(tower, x)
    cut_small_pictures(rows)
    assert (tower(x) - whole).abs().max() < TOLERANCE
    assert torch.equal(x, given)
    assert operators(tower, x) > calls * size[0] * (size[1] // rows) / 2  # not each layer is given rows of every strip
    monkeypatch.setattr(fused, "_known", lambda: False)
    assert (tower(x) - whole).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number_makes_a_feature_that_is_none(value: float, tower: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    x[1, 2, 17, 30] = value
    found = tower(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_weight_that_is_no_number_makes_features_that_are_none(which: str, tower: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    for conv in (tower.conv1.conv, tower.layer2[0].shortcut.conv):
        values = getattr(conv, which)
        kept = values.clone()
        values[0] = torch.nan
        assert tower(x).isnan().all()
        values.copy_(kept)
        assert tower(x).isfinite().all()


@torch.no_grad()
def test_weights_may_change(plain: ResNetTower, tower: ResNetTower, monkeypatch: pytest.MonkeyPatch) -> None:
    x = upstream.pictures(2, 64, 64)
    first = tower(x)
    conv = tower.layer1[0].conv2.conv
    conv.weight.mul_(0)
    assert (tower(x) - first).abs().max() > 100 * TOLERANCE
    conv.weight = freeze(copy.deepcopy(plain)).layer1[0].conv2.conv.weight
    assert torch.equal(tower(x), first)
    rounded = tower.bfloat16().float()(x)
    assert (rounded - first).abs().max() > 100 * TOLERANCE
    monkeypatch.setattr(fused, "_known", lambda: False)
    assert (rounded - tower(x)).abs().max() < TOLERANCE


@torch.no_grad()
def test_hooks_see_what_stays(plain: ResNetTower, tower: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    seen: dict[ResNetTower, list[torch.Tensor]] = {plain: [], tower: []}
    hooks = [
        block.register_forward_hook(lambda _, __, out, each=each: seen[each].append(out))
        for each in seen
        for block in each.layer1
    ]
    plain(x), tower(x)
    for hook in hooks:
        hook.remove()
    assert len(seen[tower]) == 3
    for expected, found in zip(seen[plain], seen[tower], strict=True):
        assert (found - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("where", ["layer1.1", "layer1.1.conv1", "layer1.2"])
def test_what_a_hook_is_given_is_not_written_over(
    where: str, known: bool, tower: ResNetTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(fused, "_known", lambda: False)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = tower.get_submodule(where)
    module.register_forward_pre_hook(lambda _, inputs: pairs.append((inputs[0], inputs[0].clone())))
    module.register_forward_hook(lambda _, __, out: pairs.append((out, out.clone())))
    tower(upstream.pictures(2, 64, 64))
    assert len(pairs) == 2
    for given, copied in pairs:
        assert torch.equal(given, copied)


@torch.no_grad()
def test_copies_and_pickles_hold_each_weight_once(tower: ResNetTower) -> None:
    size = len(pickle.dumps(tower))
    x = upstream.pictures(2, 64, 64)
    expected = tower(x)
    assert tower.conv1._packed.made is not None
    for twin in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert twin.conv1._packed.made is None
        assert torch.equal(twin(x), expected)
    assert len(pickle.dumps(tower)) == size


def test_gradients_and_counters_see_public_operators(plain: ResNetTower, tower: ResNetTower) -> None:
    gradients = []
    for each in (plain, tower):
        x = upstream.pictures(2, 64, 64).requires_grad_()
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x)
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
    counts = []
    for each in (plain, tower):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert operators(tower, x) == 0


def test_another_build_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not fused._known.__wrapped__()
    monkeypatch.undo()
    monkeypatch.delattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", torch.ops.aten.relu, raising=False)
    assert not fused._known.__wrapped__()
