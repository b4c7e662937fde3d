"""What every metric must do: a subclass says how its metric is built, and inherits the tests."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
import upstream
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric
from qualiclip_pyiqa.errors import ImageError, SettingsError

# Largest difference of a score from that in float32, as a share of the score's range. Half precision keeps 11 (float16)
# or 8 (bfloat16) bits of a feature; scores are computed in float32 whatever the tower's dtype is.
TOLERANCES = {torch.float64: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.15}
# Kernels may order a batch's sums differently: one float32 rounding of a logit near 20 is 2e-6 of a score at most.
ROUNDING = 1e-6

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


class MetricContract:
    """Inherit, and define `build`."""

    #: Batches and sizes that one compiled graph takes.
    COMPILED = ((2, 64, 96), (3, 101, 79))

    def build(self, **options: object) -> BlindMetric:
        """The metric in eval mode; `tile` is among the options that every metric takes."""
        raise NotImplementedError

    @pytest.fixture
    def metric(self) -> BlindMetric:
        return self.build()

    def spread(self, metric: BlindMetric) -> float:
        low, high = (float(bound) for bound in metric.score_range.split(","))
        return high - low

    @torch.no_grad()
    def test_batch_equals_single_and_nothing_changes(self, metric: BlindMetric) -> None:
        before = {name: value.clone() for name, value in metric.named_buffers()}
        low, high = (float(bound) for bound in metric.score_range.split(","))
        for height, width in ((32, 32), (33, 47), (100, 64), (256, 160)):
            x = upstream.pictures(5, height, width)
            kept = x.clone()
            together = metric(x)
            alone = torch.cat([metric(x[i : i + 1]) for i in range(5)])
            assert (together - alone).abs().max() <= ROUNDING * self.spread(metric)
            assert torch.equal(x, kept)
            assert together.dtype == torch.float32 and together.shape == (5, len(metric.attributes))
            assert ((together >= low) & (together <= high)).all()
            assert (together.std(dim=0) > 1e-4 * self.spread(metric)).all()
        for name, value in metric.named_buffers():
            assert torch.equal(value, before[name]), name

    @torch.no_grad()
    def test_forward_is_score_of_features(self, metric: BlindMetric) -> None:
        x = upstream.pictures(3, 64, 80)
        features = metric.features(x)
        assert features.dim() == 2 and len(features) == 3
        assert torch.equal(metric.score(features), metric(x))
        assert metric.encodes_like(copy.deepcopy(metric))

    @torch.no_grad()
    def test_copies_score_alike(self, metric: BlindMetric) -> None:
        x = upstream.pictures(2, 64, 80)
        expected = metric(x)
        assert torch.equal(copy.deepcopy(metric)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(metric))(x), expected)

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @torch.no_grad()
    def test_dtypes(self, metric: BlindMetric, dtype: torch.dtype) -> None:
        x = upstream.pictures(3, 64, 96)
        expected = metric(x)
        cast = copy.deepcopy(metric).to(dtype)
        for found in (cast(x.to(dtype)), cast(x)):
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (found - expected).abs().max() < TOLERANCES[dtype] * self.spread(metric)
        if dtype != torch.float64:
            with torch.autocast("cpu", dtype=dtype):
                found = metric(x)
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < TOLERANCES[dtype] * self.spread(metric)

    @torch.no_grad()
    def test_default_dtype_changes_nothing(self, metric: BlindMetric, double_by_default: None) -> None:
        x = upstream.pictures(2, 64, 80).float()
        expected = metric(x)
        found = self.build()(x)
        assert found.dtype == expected.dtype == torch.float32
        assert torch.equal(found, expected)
        torch.set_default_dtype(torch.float32)
        assert torch.equal(metric(x), expected)

    @pytest.fixture
    def double_by_default(self, metric: BlindMetric) -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    def test_is_built_and_used_in_inference_mode(self, metric: BlindMetric) -> None:
        x = upstream.pictures(2, 64, 80)
        with torch.inference_mode():
            inside = self.build()
            expected = metric(x)
            assert torch.equal(inside(x), expected)
            assert torch.equal(inside.double().float()(x), expected)
        with torch.no_grad():
            assert torch.equal(inside(x), expected)

    @pytest.mark.filterwarnings("ignore")
    @torch.no_grad()
    def test_compiles_whole_and_for_any_size(self, metric: BlindMetric) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(metric, fullgraph=True, dynamic=True, backend="eager")
        for number, size in enumerate(self.COMPILED):
            x = upstream.pictures(*size)
            # Older torch (seen with 2.8) has graphs for even and odd sizes.
            with torch._dynamo.config.patch(error_on_recompile=number == 1 and TORCH >= (2, 14)):
                assert (compiled(x) - metric(x)).abs().max() < 1e-5 * self.spread(metric)

    def test_gradients_reach_the_image(self, metric: BlindMetric) -> None:
        x = upstream.pictures(2, 64, 64).requires_grad_()
        metric(x).mean().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0

    def test_gradients_equal_finite_differences(self, metric: BlindMetric) -> None:
        double = copy.deepcopy(metric).double()
        x = upstream.pictures(2, 32, 40).double().requires_grad_()
        assert torch.autograd.gradcheck(double, x, eps=1e-6, atol=1e-6, fast_mode=True)

    @torch.no_grad()
    def test_grey_is_rgb_three_times_and_input_is_checked(self, metric: BlindMetric) -> None:
        grey = upstream.pictures(1, 48, 48)[:, :1]
        assert torch.equal(metric(grey), metric(grey.expand(-1, 3, -1, -1)))
        with pytest.raises(ImageError, match="31x64 pixels; the smallest that can be scored is 32x32"):
            metric(torch.rand(1, 3, 64, 31))
        with pytest.raises(ImageError, match=r"has shape \(0, 3, 64, 64\); expected at least one image"):
            metric(torch.rand(0, 3, 64, 64))
        for wrong in (torch.rand(3, 64, 64), torch.rand(1, 4, 64, 64), "photo.jpg", torch.ones(1, 3, 64, 64).byte()):
            with pytest.raises(ImageError, match="expected") as caught:
                metric(wrong)
            assert "\n" not in str(caught.value)

    def test_a_parent_does_not_carry_the_tower(self, metric: BlindMetric) -> None:
        """What is frozen is in no optimiser and no checkpoint, and the parent's own loads strictly."""
        parent = nn.Sequential(nn.Conv2d(3, 3, 1), metric)
        assert not any(key.startswith("1.tower.") for key in parent.state_dict())
        assert not any(name.startswith("1.tower.") for name, _ in parent.named_parameters())
        assert sum(value.numel() for value in metric.state_dict().values()) < 2**20
        parent.load_state_dict(parent.state_dict())
        parent.train()
        assert not any(module.training for module in metric.tower.modules())

    @torch.no_grad()
    def test_tiles_are_another_rule_that_says_so(self, metric: BlindMetric) -> None:
        tiled = self.build(tile=64)
        x = upstream.pictures(2, 100, 170)
        windows = [x[:, :, t : t + 64, left : left + 64] for t in (0, 36) for left in (0, 53, 106)]
        expected = torch.stack([metric(window) for window in windows]).mean(0)
        assert tiled.features(x).shape[:2] == (2, 6)
        assert (tiled(x) - expected).abs().max() < ROUNDING * self.spread(metric)
        assert torch.equal(tiled(x[:, :, :64, :50]), metric(x[:, :, :64, :50]))  # nothing to cut
        assert not tiled.encodes_like(metric)
        assert "the whole image" in metric.describe()["resize"]
        assert "64x64" in tiled.describe()["resize"]
        for tile in (16, True, 64.0):
            with pytest.raises(SettingsError, match=f"tile is {tile}; expected None or an integer of at least 32"):
                self.build(tile=tile)

    def test_describe_is_plain(self, metric: BlindMetric) -> None:
        said = metric.describe()
        assert json.loads(json.dumps(said)) == said
        assert said["metric"] == metric.model_type and said["architecture"] == type(metric).__name__
        assert said["lower_better"] is metric.lower_better
        assert said["direction"] == ("lower is better" if metric.lower_better else "higher is better")
        for key in ("score_range", "paper", "version", "minimum_side", "reading"):
            assert said[key], key


def scores(metric: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = metric(x)
        return result
