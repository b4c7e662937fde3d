"""Quality as a loss: sign, gradient, and nothing of it in the parent."""

from __future__ import annotations

import copy
import pickle

import pyiqa
import pytest
import torch
import upstream
from torch import nn

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
    hidden = parent.quality._hidden[0]
    assert not any(module.training for module in hidden.modules())
    parent.double()
    x = upstream.pictures(2, 64, 64).double()
    assert parent.quality(x).dtype == torch.float64
    assert metric(upstream.pictures(1, 64, 64)).dtype == torch.float32  # the user's own metric is another object
    parent.load_state_dict(parent.state_dict())
    for clone in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent.quality))):
        quality = clone.quality if isinstance(clone, nn.Module) and hasattr(clone, "quality") else clone
        assert torch.equal(quality(x), parent.quality(x))


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
        score_range = None

    with pytest.raises(SettingsError, match="best score"):
        QualityLoss(Unbounded())


def test_lower_better_metrics_keep_their_sign() -> None:
    class Distance(nn.Module):
        score_range, lower_better = "0, 10", True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(1, 2, 3))[:, None]

    assert float(QualityLoss(Distance())(torch.full((2, 3, 4, 4), 0.25))) == 0.25
