"""The loss in a training loop: nothing of it in the parent, and every way to train it leaves it right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pyiqa
import pytest
import torch
import upstream
from small_metric import SmallMetric
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qualiclip_pyiqa import OpenCLIPIQA, QualityLoss
from qualiclip_pyiqa.towers.recompute import Recomputed


class Restorer(nn.Module):
    """A residual convolution with the loss as a part, as some frameworks want it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.quality = loss

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.body(x)

    def loss(self, x: Tensor) -> Tensor:
        found: Tensor = self.quality(self(x))
        return found


@pytest.fixture(scope="module")
def metric() -> nn.Module:
    return pyiqa.create_metric("qualiclip-mini", device="cpu")


@pytest.fixture(scope="module")
def small() -> SmallMetric:
    return SmallMetric().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return upstream.pictures(4, 64, 64)


def gradients(restorer: Restorer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(restorer.body.parameters())))


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all(
        (a - b).abs().max() <= tolerance * max(b.abs().max(), 1e-9) for a, b in zip(found, expected, strict=True)
    )


def test_parent_neither_holds_nor_disturbs_it(metric: nn.Module) -> None:
    parent = Restorer(QualityLoss(metric)).train()
    assert set(parent.state_dict()) == {"body.weight", "body.bias"}
    assert len(list(parent.parameters())) == 2 and not list(parent.buffers())
    hidden = parent.quality.metric.network
    parent.requires_grad_(True)
    assert not any(module.training for module in hidden.modules())
    assert not any(tensor.requires_grad for tensor in [*hidden.parameters(), *hidden.buffers()])
    before = [tensor.clone() for tensor in hidden.buffers()]
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5)
    parent.loss(upstream.pictures(2, 64, 64)).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, hidden.buffers(), strict=True))
    parent.load_state_dict(parent.state_dict())


def test_a_learned_context_is_frozen_too(tiny_folder: Path) -> None:
    weights = tiny_folder / "tiny-resnet.pt"
    learned = OpenCLIPIQA("clipiqa+", backbone="tiny-resnet", weights=weights, pretrained=False).train()
    assert any(parameter.requires_grad for parameter in learned.parameters())
    loss = QualityLoss(learned)
    assert not any(parameter.requires_grad for parameter in loss.metric.network.parameters())
    assert any(parameter.requires_grad for parameter in learned.parameters()) and learned.training
    assert not list(loss.parameters()) and not loss.state_dict()


def test_copies_and_casts(metric: nn.Module) -> None:
    parent = Restorer(QualityLoss(metric, relative_to="target", crops=(1, 64), checkpointing=True)).double()
    x, y = upstream.pictures(4, 64, 64).double().split(2)
    expected = parent.quality(x, y)
    assert expected.dtype == torch.float64
    assert metric(upstream.pictures(1, 64, 64)).dtype == torch.float32  # the user's own metric is another object
    for quality in (copy.deepcopy(parent).quality, pickle.loads(pickle.dumps(parent.quality))):
        assert torch.equal(quality(x, y), expected)


def test_every_way_to_move_a_module_reaches_it(metric: nn.Module) -> None:
    """`_apply`, which all of them go through in PyTorch, is a private method: this fails if it is one no more."""
    x = upstream.pictures(1, 64, 64)
    expected = QualityLoss(metric)(x)
    for move, dtype in ((nn.Module.double, torch.float64), (nn.Module.bfloat16, torch.bfloat16)):
        parent = nn.Sequential(QualityLoss(metric))
        move(parent)
        moved = dict(parent[0].metric.network.named_buffers())
        # The tower's heads are never in half precision.
        heads = ("head_", "window_")
        assert {value.dtype for name, value in moved.items() if not any(each in name for each in heads)} == {dtype}
        assert abs(parent(x) - expected) < 0.15
    parent = nn.Sequential(nn.Linear(2, 2), QualityLoss(metric)).to("meta")
    assert all(value.is_meta for value in parent[1].metric.network.buffers())
    parent.to_empty(device="cpu")
    assert not any(value.is_meta for value in parent[1].metric.network.buffers())


def test_it_teaches_a_restorer(metric: nn.Module, x: Tensor) -> None:
    parent = Restorer(QualityLoss(metric))
    optimizer = torch.optim.Adam(parent.parameters(), lr=1e-2)
    start = float(parent.loss(x).detach())
    for _ in range(10):
        optimizer.zero_grad()
        parent.loss(x).backward()
        optimizer.step()
    assert float(parent.loss(x).detach()) < start - 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(metric: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    parent = Restorer(QualityLoss(metric, crops=(2, 48), scales=(1.0, 0.7)))
    torch.manual_seed(1)
    expected = parent.loss(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        found = parent.loss(x)
    assert found.dtype == torch.float32
    assert abs(found - expected) < (0.15 if dtype == torch.bfloat16 else 0.03)  # as the scores' own
    right, wrong = gradients(parent, expected), gradients(parent, found)
    for a, b in zip(right, wrong, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.8


def test_gradients_of_a_scaled_loss_are_scaled(metric: nn.Module, x: Tensor) -> None:
    parent = Restorer(QualityLoss(metric))
    expected = gradients(parent, parent.loss(x))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
    scaler.scale(parent.loss(x)).backward()
    scaler.unscale_(optimizer)
    assert close([parameter.grad for parameter in parent.body.parameters()], expected)
    before = parent.body.weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(parent.body.weight, before)
    # A step whose gradients are not finite is left out.
    optimizer.zero_grad()
    scaler.update()
    scaler.scale(parent.loss(x * torch.nan)).backward()
    before = parent.body.weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(parent.body.weight, before)


def test_accumulated_gradients_are_those_of_one_big_batch(metric: nn.Module, x: Tensor) -> None:
    parent = Restorer(QualityLoss(metric))
    expected = gradients(parent, parent.loss(x))
    for size in (1, 2):  # one image after the other, or several
        for part in x.split(size):
            (parent.loss(part) * size / len(x)).backward()
        assert close([parameter.grad for parameter in parent.body.parameters()], expected)
        parent.zero_grad()


@pytest.mark.parametrize("where", ["parent", "loss", "both"])
def test_activation_checkpointing(metric: nn.Module, x: Tensor, where: str) -> None:
    options = {"crops": (2, 48), "scales": (1.0, 0.7)}
    parent = Restorer(QualityLoss(metric, **options))
    torch.manual_seed(1)
    expected = gradients(parent, parent.loss(x))
    if where != "parent":
        parent.quality = QualityLoss(metric, **options, checkpointing=True)
    torch.manual_seed(1)
    # A second pass of the parent has to draw the same crops again.
    loss = parent.loss(x) if where == "loss" else checkpoint(parent.loss, x, use_reentrant=False)
    assert close(gradients(parent, loss), expected)


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-vit", "tiny-convnext"])
def test_activation_checkpointing_of_other_towers(name: str, families_folder: Path, x: Tensor) -> None:
    metric = OpenCLIPIQA("clipiqa", backbone=name, weights=families_folder / f"{name}.pt").eval()
    x = x[:1].clone().requires_grad_()
    plain, frugal = QualityLoss(metric), QualityLoss(metric, checkpointing=True)
    results = []
    for loss in (plain, frugal):
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            value = loss(x)
        results.append((value, torch.autograd.grad(value, x)[0], saved))
    (value, gradient, many), (same, alike, few) = results
    assert torch.allclose(value, same) and close([alike], [gradient])
    assert few < 0.6 * many
    with torch.no_grad():
        assert torch.allclose(frugal(x), value)


@pytest.mark.filterwarnings("ignore")
def test_compiles_whole(small: SmallMetric, x: Tensor) -> None:
    """Of the embedded models' tower the metrics' contract says that it compiles whole."""
    torch._dynamo.reset()
    parent = Restorer(QualityLoss(small, relative_to="target", crops=(2, 48), scales=(1.0, 0.8)))
    network = parent.quality.metric.network
    network.tower = Recomputed(network.tower)

    def step(image: Tensor) -> Tensor:
        return parent.quality(parent(image), image.flip(0))

    torch.manual_seed(1)
    expected = step(x)
    torch.manual_seed(1)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert expected > 0 and abs(found - expected) < 1e-6
    assert close(gradients(parent, found), gradients(parent, expected), 1e-4)
