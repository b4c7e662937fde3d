"""A metric without prompts needs `encode` and `rate`, fulfils the contract and is scored like any other."""

from __future__ import annotations

import re

import pyiqa
import pytest
import torch
import upstream
from contract import MetricContract, scores
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric, QualityLoss, Scorer
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.metrics.registry import METRICS
from qualiclip_pyiqa.towers.base import freeze


def small_tower(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3, stride=2, dtype=torch.float32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return freeze(nn.Sequential(*layers))


class TwoScales(BlindMetric):
    """Like CONTRIQUE: features at full and half resolution, and a linear regression on them."""

    def __init__(self, seed: int = 0, tile: int | None = None) -> None:
        super().__init__("two-scales", paper="none", score_range="-10, 10", lower_better=True, tile=tile)
        self.tower = small_tower(seed)
        weight = torch.randn(16, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)

    def encode(self, rgb: Tensor) -> Tensor:
        half = rgb[:, :, ::2, ::2]  # no pooling: torch 2.8 would compile once for even and once for odd sizes
        return torch.cat([self.tower(rgb), self.tower(half)], dim=1)

    def rate(self, features: Tensor) -> Tensor:
        precise = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return features.to(precise) @ self.weight.to(precise)


class LocalAndGlobal(BlindMetric):
    """Like a transformer with deep prompts: the whole image and its quarters, two attributes, a learned prompt."""

    def __init__(self, tile: int | None = None) -> None:
        super().__init__("local-global", paper="none", tile=tile)
        self.tower = small_tower(1)
        self.prompt = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float32))

    @property
    def attributes(self) -> tuple[str, ...]:
        return "quality", "consistency"

    def encode(self, rgb: Tensor) -> Tensor:
        height, width = rgb.shape[2] // 2, rgb.shape[3] // 2
        quarters = [rgb[..., :height, :width], rgb[..., :height, width:], rgb[..., height:, :width]]
        return torch.stack([self.tower(rgb), *map(self.tower, quarters)], dim=1).flatten(1)

    def rate(self, features: Tensor) -> Tensor:
        precise = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            each = features.to(precise).unflatten(1, (4, -1)) @ self.prompt.to(precise)
        return torch.stack([each[:, 0], each[:, 1:].mean(dim=1)], dim=1).sigmoid()


class TestTwoScales(MetricContract):
    def build(self, **options: object) -> BlindMetric:
        return TwoScales(**options).eval()


class TestLocalAndGlobal(MetricContract):
    def build(self, **options: object) -> BlindMetric:
        return LocalAndGlobal(**options).eval()


def test_scored_in_batches_beside_others_and_nothing_is_shared() -> None:
    first, second, third = TwoScales(0).eval(), TwoScales(1).eval(), LocalAndGlobal().eval()
    images = list(upstream.pictures(5, 64, 80))
    scorer = Scorer({"first": first, "second": second, "third": third}, device="cpu", workers=0)
    assert scorer.columns == ("first", "second", "third.quality", "third.consistency")
    x = torch.stack(images)
    expected = torch.cat([scores(metric, x) for metric in (first, second, third)], dim=1)
    records = list(scorer.score(images))
    for record, row in zip(records, expected.tolist(), strict=True):
        assert record.error is None
        assert list(record.scores.values()) == pytest.approx(row, abs=1e-5)


def test_equal_towers_share_features_only_where_they_are_encoded_alike() -> None:
    class OneScale(TwoScales):
        def encode(self, rgb: Tensor) -> Tensor:
            return torch.cat([self.tower(rgb)] * 2, dim=1)

    both, one = TwoScales().eval(), OneScale().eval()
    assert both.encodes_like(TwoScales(1)) and not both.encodes_like(one)
    images = list(upstream.pictures(3, 64, 80))
    x = torch.stack(images)
    for record, two, single in zip(
        Scorer({"two": both, "one": one}, device="cpu", workers=0).score(images),
        scores(both, x)[:, 0].tolist(),
        scores(one, x)[:, 0].tolist(),
        strict=True,
    ):
        assert record.scores == pytest.approx({"two": two, "one": single}, abs=1e-5)
        assert abs(two - single) > 1e-4  # ten times the tolerance above


def test_a_metric_that_forgets_rate_says_so() -> None:
    class Unfinished(BlindMetric):
        def __init__(self) -> None:
            super().__init__("unfinished", paper="none")
            self.tower = small_tower(0)

    with pytest.raises(NotImplementedError, match=r"Unfinished does not implement rate\(features\)"):
        Unfinished()(torch.rand(1, 3, 32, 32))


def test_lower_better_metrics_are_a_loss() -> None:
    metric = TwoScales().eval()
    x = upstream.pictures(2, 64, 64)
    assert float(QualityLoss(metric)(x)) == pytest.approx((float(scores(metric, x).mean()) + 10) / 20, abs=1e-6)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_an_unknown_option_is_one_line_with_the_metric_s_name(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{re.escape(name)} has no option 'foo'; expected some of .*\btile\b"):
        pyiqa.create_metric(name, foo=1, device="cpu")  # before a weight file is looked for


def test_an_option_of_another_metric_is_refused() -> None:
    for name, option in (
        ("clip-dqa", "prompts"),
        ("clip-dqa", "caption"),
        ("face-norm", "backbone"),
        ("contrique", "backbone"),
        ("reiqa", "regression"),
    ):
        with pytest.raises(SettingsError, match=f"^{name} has no option '{option}'; expected some of "):
            pyiqa.create_metric(name, device="cpu", **{option: "x"})
