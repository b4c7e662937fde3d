"""Quality as a loss: sign, gradient, and nothing of it in the parent."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pyiqa
import pytest
import torch
import torch.distributed as dist
import upstream
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qualiclip_pyiqa import QualityLoss
from qualiclip_pyiqa.errors import SettingsError


@pytest.fixture(scope="module")
def metric() -> nn.Module:
    return pyiqa.create_metric("qualiclip-mini", device="cpu")


def test_lower_is_better_and_differentiable(metric: nn.Module) -> None:
    loss = QualityLoss(metric)
    x = upstream.pictures(3, 64, 64)
    assert torch.allclose(loss(x), 1 - metric(x).mean())
    x.requires_grad_()
    loss(x).backward()
    with torch.no_grad():
        step = 1e-3 / x.grad.abs().max()
        assert loss(x - step * x.grad) < loss(x)


def test_parent_neither_holds_nor_disturbs_it(metric: nn.Module) -> None:
    class Restorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 3, 3, padding=1)
            self.quality = QualityLoss(metric)

    parent = Restorer().train()
    assert set(parent.state_dict()) == {"body.weight", "body.bias"}
    assert len(list(parent.parameters())) == 2 and not list(parent.quality.buffers())
    hidden = parent.quality._unregistered[0]
    assert not any(module.training for module in hidden.modules())
    parent.double()
    x = upstream.pictures(2, 64, 64).double()
    assert parent.quality(x).dtype == torch.float64
    assert metric(upstream.pictures(1, 64, 64)).dtype == torch.float32  # the user's own metric is another object
    parent.load_state_dict(parent.state_dict())
    for clone in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent.quality))):
        quality = clone.quality if isinstance(clone, nn.Module) and hasattr(clone, "quality") else clone
        assert torch.equal(quality(x), parent.quality(x))


def test_every_way_to_move_a_module_reaches_it(metric: nn.Module) -> None:
    """`_apply`, which all of them go through in PyTorch, is a private method: this fails if it is one no more."""
    x = upstream.pictures(1, 64, 64)
    expected = QualityLoss(metric)(x)
    for move, dtype in ((nn.Module.double, torch.float64), (nn.Module.bfloat16, torch.bfloat16)):
        parent = nn.Sequential(QualityLoss(metric))
        move(parent)
        moved = dict(parent[0]._unregistered[0].named_buffers())
        # The tower's heads are never in half precision.
        assert {value.dtype for name, value in moved.items() if "head_" not in name} == {dtype}
        assert abs(parent(x) - expected) < 0.15
    parent = nn.Sequential(nn.Linear(2, 2), QualityLoss(metric)).to("meta")
    assert all(value.is_meta for value in parent[1]._unregistered[0].buffers())
    parent.to_empty(device="cpu")
    assert not any(value.is_meta for value in parent[1]._unregistered[0].buffers())


def test_fsdp_shards_the_parent_alone(metric: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), QualityLoss(metric))
    x = upstream.pictures(2, 64, 64)
    expected = parent(x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(parent, mesh=init_device_mesh("cpu", (1,)))
        loss = parent(x)
        assert abs(loss - expected) < 1e-6
        loss.backward()
        assert set(parent.state_dict()) == {"0.weight", "0.bias"}
        assert all(isinstance(each, DTensor) and each.grad is not None for each in parent.parameters())
        assert not any(isinstance(value, DTensor) for value in parent[1]._unregistered[0].buffers())
    finally:
        dist.destroy_process_group()


def test_it_teaches_a_restorer(metric: nn.Module) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 3, 3, padding=1)
    nn.init.dirac_(body.weight)
    loss = QualityLoss(metric)
    x = upstream.pictures(4, 64, 64)
    optimizer = torch.optim.Adam(body.parameters(), lr=1e-3)
    start = float(loss(body(x)).detach())
    for _ in range(10):
        optimizer.zero_grad()
        loss(body(x)).backward()
        optimizer.step()
    assert float(loss(body(x)).detach()) < start


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(SettingsError, match="needs a reference"):
        QualityLoss(pyiqa.create_metric("psnr", device="cpu"))

    class Unbounded(nn.Module):
        score_range: str | None = None

    for score_range in (None, "0", "0, inf", "0, nan", "low, high", "1, 0"):
        Unbounded.score_range = score_range
        with pytest.raises(SettingsError, match=f"score_range is {score_range!r}; expected .* finite"):
            QualityLoss(Unbounded())
    with pytest.raises(SettingsError, match=r"metric is 3; expected a name or a metric, such as 'qualiclip-mini'"):
        QualityLoss(3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"unknown metric 'qualiclip-mni'.*did you mean 'qualiclip-mini'"):
        QualityLoss("qualiclip-mni")


def test_lower_better_metrics_keep_their_sign() -> None:
    class Distance(nn.Module):
        score_range, lower_better = "0, 10", True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 10 * x.mean(dim=(1, 2, 3))[:, None]

    assert float(QualityLoss(Distance())(torch.full((2, 3, 32, 32), 0.25))) == 0.25
