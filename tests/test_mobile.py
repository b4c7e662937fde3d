"""The tower of the embedded models: against a plain network, in strips, in every precision; and its files."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
import torch.nn.functional as F
import upstream
from mobile_files import add_window_heads, random_tower, rewrite, write_tower
from torch import Tensor

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.errors import PromptError, SettingsError, WeightsError
from qualiclip_pyiqa.metrics.prompt_iqa import OpenQualiCLIP
from qualiclip_pyiqa.metrics.prompts import LOOK
from qualiclip_pyiqa.metrics.registry import METRICS
from qualiclip_pyiqa.pretrained.layouts import _MAX_STATISTICS
from qualiclip_pyiqa.pretrained.model import load_model
from qualiclip_pyiqa.towers.base import freeze
from qualiclip_pyiqa.towers.mobile import FARTHEST, SCALE, MobileTower
from qualiclip_pyiqa.towers.statistics import ENERGIES, log_energies

# Expansion, channels, repeats and stride: table 2 of arXiv:1801.04381.
PAPER = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


@pytest.fixture(scope="module")
def tower() -> MobileTower:
    return random_tower()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("mobile") / "x.safetensors")


def plain_network(state: dict[str, Tensor], rgb: Tensor) -> list[Tensor]:
    """MobileNetV2 as TensorFlow computes it, written out: the output of each block."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding: list[int] = []
        for size, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):  # width first, as F.pad wants it
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), weight, state[f"{name}.bias"], stride, groups=groups)

    x = conv(rgb * 2 - 1, "stem", 2).clamp(0, 6)
    outputs = []
    for expansion, width, repeats, first_stride in PAPER:
        for repeat in range(repeats):
            name, stride = f"block{len(outputs)}", first_stride if repeat == 0 else 1
            y = conv(x, f"{name}.expand").clamp(0, 6) if expansion > 1 else x
            y = conv(conv(y, f"{name}.depthwise", stride, y.shape[1]).clamp(0, 6), f"{name}.project")
            x = x + y if repeat else y
            assert x.shape[1] == width
            outputs.append(x)
    return outputs


@torch.no_grad()
def test_the_trunk_is_mobilenet_v2_and_its_moments_are_the_statistics(tower: MobileTower) -> None:
    double = copy.deepcopy(tower).double()
    x = upstream.pictures(2, 64, 96).double()
    expected = plain_network(double.trunk.state_dict(), x)
    found = list(double.trunk(x))
    assert len(found) == len(expected) == 17
    for ours, plain in zip(found, expected, strict=True):
        assert ours.shape == plain.shape and (ours - plain).abs().max() < 1e-10
    moments = [log_energies(x)]
    for plain in expected:
        moments += [plain.mean((2, 3)), (plain.var((2, 3), correction=0) + 1e-5).sqrt()]
    statistics = double.statistics(x)
    assert statistics.shape == (2, ENERGIES + 2 * sum(plain.shape[1] for plain in expected))
    assert (statistics - torch.cat(moments, dim=1)).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "rows"), [((64, 96), 32), ((97, 131), 32), ((301, 33), 7), ((33, 300), 1), ((162, 46), 33), ((32, 32), 1)]
)
def test_statistics_in_strips_are_those_of_the_whole_image(
    tower: MobileTower, size: tuple[int, int], rows: int, cut_small_pictures: Callable[..., None]
) -> None:
    double = copy.deepcopy(tower).double()
    x = upstream.pictures(2, *size).double()
    whole, seen = double.statistics(x), []
    cut_small_pictures(rows)
    pool = MobileTower._pool_in_strips
    double._pool_in_strips = lambda *args: seen.append(args[1]) or pool(double, *args)  # type: ignore[method-assign]
    assert (double.statistics(x) - whole).abs().max() < 1e-10
    assert len(seen) == 2


@torch.no_grad()
def test_a_batch_equals_its_images_and_a_feature_has_a_unit_length_for_each_pair(tower: MobileTower) -> None:
    for height, width in ((32, 32), (33, 47), (96, 64), (127, 161)):
        x = upstream.pictures(5, height, width)
        together, alone = tower(x), torch.cat([tower(each) for each in x.split(1)])
        assert together.shape == (5, tower.feature_dim) and together.dtype == torch.float32
        assert (together - alone).abs().max() < 2e-6
        assert torch.allclose(together.view(5, -1, 2).norm(dim=2), torch.ones(5, tower.pairs), atol=1e-6)


@torch.no_grad()
def test_a_score_is_the_sigmoid_of_its_logit(file: Path) -> None:
    metric = OpenQualiCLIP("qualiclip-mini", weights=file, prompts="look").eval()
    x = upstream.pictures(4, 64, 80)
    logits = metric.tower.logits(metric.tower.statistics(x))
    assert logits.std(0).min() > 0.01 and logits.abs().max() < FARTHEST * SCALE
    assert (metric(x) - logits.sigmoid()).abs().max() < 1e-6
    metric.tower.head_bias += torch.tensor([1e9, -1e9, 0, 0, 0, 0, 0])
    most = torch.tensor(FARTHEST * SCALE).sigmoid()
    assert torch.allclose(metric(x)[:, :2], torch.stack([most, 1 - most]).expand(4, 2), atol=1e-6)


def test_gradients_are_those_of_the_score(tower: MobileTower) -> None:
    """Against differences of the score along the gradient; it is finite where a logit is clamped too."""
    double = copy.deepcopy(tower).double()
    x = upstream.pictures(1, 48, 64).double().requires_grad_()

    def quality(image: Tensor) -> Tensor:
        feature = double(image)
        return (SCALE * (feature[:, 0] - feature[:, 1])).sigmoid().sum()

    (gradient,) = torch.autograd.grad(quality(x), x)
    along = gradient / gradient.norm()
    step = 1e-6
    with torch.no_grad():
        difference = (quality(x + step * along) - quality(x - step * along)) / (2 * step)
    assert gradient.norm() > 1e-4 and float(difference) == pytest.approx(float(gradient.norm()), rel=1e-3)
    with torch.no_grad():
        double.head_bias += 1e6
    (gradient,) = torch.autograd.grad(quality(x), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_heads_are_never_in_half_precision(tower: MobileTower, dtype: torch.dtype, frozen: bool) -> None:
    x = upstream.pictures(2, 48, 64)
    expected = tower(x)
    tower = add_window_heads(copy.deepcopy(tower))
    cast = copy.deepcopy(tower)
    cast = (freeze(cast) if frozen else cast).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    heads = ("head_mean", "head_std", "head_weight", "head_bias", "window_heads", "window_bias")
    assert cast.trunk.stem.weight.dtype == dtype
    assert {getattr(cast, name).dtype for name in heads} == {precise}
    assert isinstance(cast.head_weight, torch.nn.Parameter) is not frozen
    found = cast(x.to(dtype))
    assert found.dtype == precise and cast.statistics(x.to(dtype)).dtype == precise
    # 11 or 8 bits of every activation.
    assert (found - expected).abs().max() < {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    back = cast.float()
    for name in heads:
        assert torch.equal(getattr(back, name), getattr(tower, name))
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype=dtype):
            found = tower(x)
        assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.08


@torch.no_grad()
@pytest.mark.parametrize("window_heads", [False, True])
def test_copies_and_frozen_towers_are_the_same(tower: MobileTower, window_heads: bool) -> None:
    x = upstream.pictures(2, 48, 64)
    expected = tower(x)
    names = set(tower.state_dict())
    if window_heads:
        tower = add_window_heads(copy.deepcopy(tower))
        assert set(tower.state_dict()) == names | {"window_heads", "window_bias"} and torch.equal(tower(x), expected)
        names = set(tower.state_dict())
    for same in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(same(x), expected) and set(same.state_dict()) == names
    rebuilt = MobileTower(tower.pairs, (6, 50) if window_heads else None)
    rebuilt.load_state_dict(tower.state_dict(), strict=True)
    assert torch.equal(rebuilt.eval()(x), expected)
    frozen = freeze(copy.deepcopy(tower))
    assert (frozen(x) - expected).abs().max() < 2e-6
    assert not list(frozen.parameters()) and not frozen.state_dict()
    assert {name for name, _ in frozen.named_buffers()} == names


def test_a_window_head_may_read_every_statistic_and_no_more(tower: MobileTower) -> None:
    assert tower.head_mean.shape[1] == _MAX_STATISTICS


@torch.no_grad()
def test_extreme_images_have_scores(file: Path) -> None:
    images = {
        "black": torch.zeros(3, 64, 64),
        "white": torch.ones(3, 64, 64),
        "red": torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 64, 64),
        "noise": torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "chequers": (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).expand(3, 64, 64).float(),
    }
    for name in ("qualiclip-mini", file):
        options = {} if name != file else {"weights": file}
        metric = OpenQualiCLIP("qualiclip-mini", prompts="look", **options).eval()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = metric.to(dtype)(torch.stack(list(images.values())))
            assert torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
    edge = torch.zeros(1, 3, 32, 4000)  # as thin as may be
    assert torch.isfinite(metric(edge)).all()


# Files


@pytest.mark.parametrize(
    ("tower", "said"),
    [
        ('{"pairs": 0}', "'tower.pairs' is 0; expected an integer in 1.."),
        ('{"pairs": 1000000000}', "'tower.pairs' is 1000000000; expected an integer"),
        ('{"pairs": "x"}', "'tower.pairs' is 'x'; expected an integer"),
        ('{"pairs": true}', "'tower.pairs' is True; expected an integer"),
        ('{"pairs": 7.0}', "'tower.pairs' is 7.0; expected an integer"),
        ("{}", "'tower' lacks pairs; expected pairs"),
        ('{"pairs": 7, "widths": [4]}', "unknown keyword 'widths'"),
        ('{"pairs": 7, "window_heads": 6}', "'tower.window_heads' is 6; expected two integers"),
        ('{"pairs": 7, "window_heads": [6]}', "'tower.window_heads' is [6]; expected two integers"),
        ('{"pairs": 7, "window_heads": [0, 9]}', "'tower.window_heads' is [0, 9]; expected two integers"),
        ('{"pairs": 7, "window_heads": [6, 3043]}', "expected two integers, in 1..64 and 1..3042"),
        ('{"pairs": 7, "window_heads": [8, 9]}', "expected at most 7 heads, the pairs"),
        ('{"pairs": 7, "window_heads": [6, 9]}', "lacks 2 tensors of this backbone (first: 'window_heads')"),
        ("7", "'tower' is 7; expected a JSON object"),
    ],
)
def test_wrong_metadata_is_one_line(file: Path, tmp_path: Path, tower: str, said: str) -> None:
    refused(rewrite(file, tmp_path / "w.safetensors", {}, tower=tower), "w.safetensors", said)


def test_tensors_that_make_no_tower_are_one_line(file: Path, tmp_path: Path) -> None:
    stem, block = "visual.trunk.stem.weight", "visual.trunk.block16.project.bias"
    for tensors, metadata, parts in (
        ({block: None}, {}, ("lacks 1 tensors", "trunk.block16.project.bias")),
        ({stem: torch.zeros(32, 3, 5, 5)}, {}, ("'trunk.stem.weight' has shape (32, 3, 5, 5)", "(32, 3, 3, 3)")),
        ({"visual.head_weight": torch.zeros(6, 10)}, {}, ("'head_weight' has shape (6, 10)",)),
        (
            {"visual.window_heads": torch.zeros(3, 6, 8), "visual.window_bias": torch.zeros(6)},
            {"tower": '{"pairs": 7, "window_heads": [6, 9]}'},
            ("'window_heads' has shape (3, 6, 8)", "(3, 6, 9)"),
        ),
        ({}, {"tower": '{"pairs": 6}'}, ("has shape (7, ", "(6, ")),
        ({"prompts_features": torch.eye(12)}, {}, ("holds 12 prompt features; expected 14",)),
        ({"prompts_features": torch.ones(14, 12)}, {}, ("features of length 12; expected 14",)),
    ):
        refused(rewrite(file, tmp_path / "t.safetensors", tensors, **metadata), "t.safetensors", *parts)
        (tmp_path / "t.safetensors").unlink()


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(WeightsError) as caught:
        OpenQualiCLIP("qualiclip-mini", weights=path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message, message


def test_a_file_has_no_positional_table_and_no_open_clip_definition(file: Path) -> None:
    model = load_model(file, "RN50")
    assert (model.backbone, model.activation, model.options_to_store()) == ("mobile", "none", {"pairs": 7})
    with pytest.raises(SettingsError, match="mobile tower has no positional table"):
        model.image_tower(pos_embedding=True)
    with pytest.raises(SettingsError, match="'mobile'"):
        model.tower_definition()


@torch.no_grad()
def test_prompts_of_a_file(file: Path) -> None:
    """Its own pairs, under any name of a metric; no others."""
    x = upstream.pictures(2, 64, 64)
    metric = OpenQualiCLIP("qualiclip-mini", weights=file, prompts="look").eval()
    assert metric.attributes == tuple(LOOK) and len(LOOK) == 7
    columns = metric(x)
    assert columns.shape == (2, 7)
    for number, attribute in enumerate(LOOK):
        single = OpenQualiCLIP("qualiclip-mini", weights=file, prompts=attribute).eval()
        assert torch.allclose(single(x)[:, 0], columns[:, number], atol=1e-6)
    for other in ("happy", "feel", [("A cat.", "A dog.")]):
        with pytest.raises(PromptError, match="no text tower and no feature for") as caught:
            OpenQualiCLIP("qualiclip-mini", weights=file, prompts=other)
        assert "\n" not in str(caught.value)
    quality = OpenQualiCLIP("qualiclip", weights=file).eval()
    assert quality.attributes == ("quality",) and torch.allclose(quality(x), columns[:, :1], atol=1e-6)
    (record,) = Scorer(str(file), device="cpu", workers=0).score([np.full((40, 60, 3), 99, np.uint8)])
    flat = torch.full((1, 3, 40, 60), 99 / 255)
    assert record.scores[str(file)] == pytest.approx(float(quality(flat)), abs=2e-6)


# The embedded files


@torch.no_grad()
def test_each_attribute_is_a_metric_and_a_column(tower: MobileTower) -> None:
    x = upstream.pictures(2, 64, 64)
    names = [name for name in METRICS if re.match(r"qualiclip-mini-", name)]
    assert names == [f"qualiclip-mini-{attribute}" for attribute in LOOK if attribute != "quality"]
    columns = pyiqa.create_metric("qualiclip-mini", device="cpu", prompts="look")(x)
    found = torch.cat([pyiqa.create_metric(name, device="cpu")(x) for name in ("qualiclip-mini", *names)], dim=1)
    assert columns.shape == (2, 7) and (found - columns).abs().max() < 1e-6
    assert len({tuple(column) for column in columns.T.tolist()}) == 7
    both = [OpenQualiCLIP(name).describe() for name in ("qualiclip-mini", "qualiclip-mini+")]
    assert json.dumps(both) and [said["metric"] for said in both] == ["qualiclip-mini", "qualiclip-mini+"]
