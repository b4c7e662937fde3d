"""Convolutions by oneDNN's operators: the values of PyTorch's public functions, and only where nothing can go wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream
from open_clip.modified_resnet import ModifiedResNet
from test_archs import build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.towers import onednn
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.resnet import ResNetTower

# Features are about one, folded and not: float32 rounding of the random layers gives 5e-5, a wrong border 1e-2.
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
def frozen(plain: ResNetTower) -> ResNetTower:
    """As a metric has it."""
    tower = freeze(copy.deepcopy(plain))
    assert isinstance(tower, ResNetTower)
    return tower


@pytest.fixture
def packed(frozen: ResNetTower) -> ResNetTower:
    """As a scorer has it."""
    tower = copy.deepcopy(frozen)
    assert onednn.use_onednn(tower), "this PyTorch has no oneDNN, or its operators have changed"
    return tower


@pytest.fixture
def fresh_trial() -> Iterator[None]:
    """The operators are tried again, in the test and after it."""
    onednn._operators_agree.cache_clear()
    yield
    onednn._operators_agree.cache_clear()


def operators(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> int:
    """How many of oneDNN's operators a call uses."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(x)
    return sum(event.name.startswith("mkldnn::_convolution_pointwise") for event in profile.events())


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 33, 101), (3, 224, 224), (1, 640, 33)])
def test_values_are_those_of_the_public_functions(
    size: tuple[int, int, int], plain: ResNetTower, frozen: ResNetTower, packed: ResNetTower
) -> None:
    x = upstream.pictures(*size)
    given = x.clone()
    found = packed(x)
    assert operators(packed, x) == 3 + 3 * 8 + 4  # the stem's, three of each block, one shortcut of each layer
    assert torch.equal(x, given) and torch.equal(packed(x), found)
    assert (found - plain(x)).abs().max() < TOLERANCE
    assert operators(frozen, x) == 0
    assert (found - frozen(x)).abs().max() < TOLERANCE
    assert torch.equal(x, given)
    assert found.abs().mean() > 1000 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("rows", [32, 160, 5])
@pytest.mark.parametrize("size", [(2, 333, 101), (1, 640, 33)])
def test_strips_have_the_values_of_the_whole(
    size: tuple[int, int, int],
    rows: int,
    frozen: ResNetTower,
    packed: ResNetTower,
    cut_small_pictures: Callable[..., None],
) -> None:
    x = upstream.pictures(*size)
    given = x.clone()
    whole, calls = packed(x), operators(packed, x)
    cut_small_pictures(rows)
    assert (packed(x) - whole).abs().max() < TOLERANCE
    assert torch.equal(x, given)
    assert operators(packed, x) > calls * size[0] * (size[1] // rows) / 2  # some layers get no rows of some strips
    assert (frozen(x) - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_scorer_uses_them_and_a_metric_never_does(tiny_folder: Path) -> None:
    net, image = build("tiny-resnet", tiny_folder), upstream.pictures(1, 64, 96)
    (network,) = Scorer({"x": net}, device="cpu", workers=0).networks
    ((_, copied, _),) = network.heads
    assert operators(copied.features, image) > 0 and copied.tower is not net.tower
    assert operators(net, image) == 0
    for options in ({"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}):
        (network,) = Scorer({"x": net}, device="cpu", workers=0, **options).networks
        ((_, copied, _),) = network.heads
        assert all(each.kernel is None for each in copied.tower.modules() if hasattr(each, "kernel"))


@torch.no_grad()
def test_what_happens_to_a_metric_does_not_reach_a_scorer_and_shows_in_the_metric(tiny_folder: Path) -> None:
    """Weights are changed through `.data`, which leaves no trace in a tensor's version."""
    net, image = build("tiny-resnet", tiny_folder), upstream.pictures(1, 64, 96)
    pixels = (image[0].movedim(0, -1) * 255).round().byte().numpy()
    scorer = Scorer({"x": net}, device="cpu", workers=0)
    (before,), score = scorer.score([pixels]), net(image)
    net.tower.layer1[0].conv2.conv.weight.data.mul_(0)
    (after,) = scorer.score([pixels])
    assert after.scores == before.scores
    assert (net(image) - score).abs() > 1e-5
    net = copy.deepcopy(net).double()
    assert (net.float()(image) - score).abs() > 1e-5


def test_forward_mode_differentiation(tiny_folder: Path, cut_small_pictures: Callable[..., None]) -> None:
    net = build("tiny-resnet", tiny_folder).double()
    torch.manual_seed(0)
    x, direction = upstream.pictures(1, 64, 96).double(), torch.randn(1, 3, 64, 96).double() / 100
    step = 1e-4
    with torch.no_grad():
        expected = (net(x + step * direction) - net(x - step * direction)) / (2 * step)
    assert expected.abs() > 1e-6

    def close(found: torch.Tensor) -> bool:
        return bool((found - expected).abs() < 1e-4 * expected.abs())

    for _ in range(2):
        assert close(torch.func.jvp(net, (x,), (direction,))[1])
        with torch.no_grad():
            assert close(torch.func.jvp(net, (x,), (direction,))[1])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            assert close(torch.autograd.forward_ad.unpack_dual(net(dual)).tangent)
        assert close((torch.func.grad(lambda x: net(x).sum())(x) * direction).sum()[None, None])
        cut_small_pictures(32)  # in strips, where no derivative is wanted


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["tiny-resnet", "tiny-vit", "qualiclip-mini"])
def test_functional_transforms_and_tracing(kind: str, tiny_folder: Path) -> None:
    net, x = build(kind, tiny_folder), upstream.pictures(3, 64, 96)
    mapped = torch.func.vmap(lambda image: net(image[None])[0])(x)
    assert (mapped - net(x)).abs().max() < 1e-5
    traced = torch.jit.trace(net, x, check_trace=False)
    assert (traced(x) - net(x)).abs().max() < 1e-6


def test_inference_mode(tiny_folder: Path) -> None:
    x = upstream.pictures(2, 64, 96)
    pixels = [(image.movedim(0, -1) * 255).round().byte().numpy() for image in x]
    with torch.no_grad():
        expected = build("tiny-resnet", tiny_folder)(x)
    with torch.inference_mode():
        net = build("tiny-resnet", tiny_folder)
        assert torch.equal(net(x), expected)
        assert (net.double().float()(x) - expected).abs().max() < 1e-6
        records = list(Scorer({"x": net}, device="cpu", workers=0).score(pixels))
    assert np.allclose([record.scores["x"] for record in records], expected[:, 0], atol=2e-3, rtol=0)  # 8-bit pixels


@torch.no_grad()
def test_a_weight_that_is_not_finite_keeps_to_the_public_functions(frozen: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    for value in (torch.nan, torch.inf):
        broken = copy.deepcopy(frozen)
        broken.layer2[0].shortcut.conv.bias[0] = value
        assert not onednn.use_onednn(broken)
        assert not broken(x).isfinite().any()


@torch.no_grad()
def test_a_pixel_that_is_not_finite_makes_a_feature_that_is_not(frozen: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    x[1, 2, 17, 30] = torch.nan
    found = frozen(x)
    assert found[0].isfinite().all() and found[1].isnan().all()


@torch.no_grad()
def test_hooks_see_what_stays(plain: ResNetTower, frozen: ResNetTower, packed: ResNetTower) -> None:
    x = upstream.pictures(2, 64, 64)
    towers = (plain, frozen, packed)
    seen: dict[ResNetTower, list[torch.Tensor]] = {tower: [] for tower in towers}
    hooks = [
        block.register_forward_hook(lambda _, __, out, tower=tower: seen[tower].append(out))
        for tower in towers
        for block in tower.layer1
    ]
    for tower in towers:
        tower(x)
    for hook in hooks:
        hook.remove()
    for tower in (frozen, packed):
        assert len(seen[tower]) == 3
        for expected, found in zip(seen[plain], seen[tower], strict=True):
            assert (found - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["frozen", "packed"])
@pytest.mark.parametrize("where", ["layer1.1", "layer1.1.conv1", "layer1.2", "everywhere"])
def test_what_a_hook_is_given_is_not_written_over(where: str, kind: str, request: pytest.FixtureRequest) -> None:
    tower = request.getfixturevalue(kind)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.Identity | nn.Sequential):
            pairs.append((inputs[0], inputs[0].clone()))

    def after(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if not isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.Identity):
            pairs.append((out, out.clone()))

    if where == "everywhere":
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(before),
            nn.modules.module.register_module_forward_hook(after),
        ]
    else:
        module = tower.get_submodule(where)
        hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    tower(upstream.pictures(2, 64, 64))
    for hook in hooks:
        hook.remove()
    assert len(pairs) >= 2
    for given, copied in pairs:
        assert torch.equal(given, copied)


@torch.no_grad()
def test_copies_and_pickles_hold_each_weight_once(packed: ResNetTower) -> None:
    size = len(pickle.dumps(packed))
    x = upstream.pictures(2, 64, 64)
    expected = packed(x)
    assert packed.conv1.kernel.packed is not None
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert twin.conv1.kernel.packed is None
        assert torch.equal(twin(x), expected)
    assert len(pickle.dumps(packed)) == size


def test_gradients_and_counters_of_a_metrics_tower(plain: ResNetTower, frozen: ResNetTower) -> None:
    gradients = []
    for each in (plain, frozen):
        x = upstream.pictures(2, 64, 64).requires_grad_()
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x)
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
    counts = []
    for each in (plain, frozen):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


NAMES = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")


@pytest.mark.usefixtures("fresh_trial")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in NAMES for change in ("gone", "other arguments")),
        *((name, "other values") for name in NAMES[:2]),
    ],
)
def test_another_pytorch_is_recognised(
    name: str, change: str, frozen: ResNetTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = torch.ops.mkldnn

    class Other:
        def __getattr__(self, wanted: str) -> object:
            operator = getattr(public, wanted)
            if wanted != name:
                return operator
            if change == "gone":
                raise AttributeError(wanted)
            if change == "other arguments":
                return torch.ops.aten.relu
            wrong = lambda *args: 1.01 * (operator.binary if name.endswith("_") else operator)(*args)  # noqa: E731
            wrong.binary = wrong  # type: ignore[attr-defined]
            return wrong

    monkeypatch.setattr(torch.ops, "mkldnn", Other())
    assert not onednn.use_onednn(frozen)
    x = upstream.pictures(1, 40, 40)
    assert operators(frozen, x) == 0


@pytest.mark.usefixtures("fresh_trial")
def test_without_onednn(frozen: ResNetTower, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.use_onednn(frozen)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.use_onednn(frozen)
