"""Quality maps: how each kind relates to the score, on every tower that has it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream
from test_archs import build
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric, ImageError, OpenQualiCLIP, QualityMap, SettingsError, load_image, quality_map
from qualiclip_pyiqa.explain import local
from qualiclip_pyiqa.explain.contributions import contributions, logit_directions
from qualiclip_pyiqa.explain.drawing import draw_maps
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.explain.quality_map import KINDS, scale_of
from qualiclip_pyiqa.towers.mobile import MobileTower
from qualiclip_pyiqa.towers.statistics import ENERGIES, log_energies, moments

SIZES = [(32, 32), (37, 101), (63, 33), (64, 96), (200, 130)]


@pytest.fixture(scope="module")
def look() -> OpenQualiCLIP:
    return OpenQualiCLIP("qualiclip-mini+", prompts="look").eval()


def tower_of(metric: BlindMetric) -> MobileTower:
    assert isinstance(metric.tower, MobileTower)
    return metric.tower


def without_window_heads(metric: OpenQualiCLIP) -> OpenQualiCLIP:
    """As from a file that has none."""
    plain = copy.deepcopy(metric)
    tower = tower_of(plain)
    tower.window_heads = tower.window_bias = None
    return plain


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_a_window_as_large_as_the_image_has_its_statistics_and_score(
    size: tuple[int, int], look: OpenQualiCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = upstream.pictures(2, *size)
    assert torch.allclose(tower_of(look).cells(x).whole(), tower_of(look).statistics(x), atol=1e-5)
    monkeypatch.setattr(local, "WINDOW", 100)
    plain = without_window_heads(look)
    for maps, scores in zip(Mapper(plain).maps(x), look(x), strict=True):
        for found, score in zip(maps, scores.tolist(), strict=True):
            assert found.score == pytest.approx(score, abs=2e-6)
            assert found.values == pytest.approx(score, abs=2e-6)


@torch.no_grad()
def test_attributes_have_heads_for_windows_and_quality_has_not(look: OpenQualiCLIP) -> None:
    x = upstream.pictures(2, 96, 128)
    plain = without_window_heads(look)
    tower = tower_of(look)
    assert tower.window_bias is not None and len(tower.window_bias) == len(look.attributes) - 1
    assert torch.equal(look(x), plain(x))
    for one, other in zip(Mapper(look).maps(x)[1], Mapper(plain).maps(x)[1], strict=True):
        assert one.score == other.score
        assert ("head of their own" in one.relation) is (one.attribute != "quality")
        assert "head of their own" not in other.relation
        assert np.array_equal(one.values, other.values) is (one.attribute == "quality")
    heads, statistics = tower.window_heads, tower.cells(x).whole()
    assert heads is not None
    mean, std, weight = heads.double()
    standardised = (statistics.double()[:, None, : mean.shape[1]] - mean) / std
    logits = (3 * torch.tanh(standardised / 3) * weight).sum(-1) + tower.window_bias
    assert torch.allclose(tower.window_logits(statistics)[:, 1:].double(), logits, atol=1e-4)
    assert torch.equal(tower.window_logits(statistics)[:, :1], tower.logits(statistics)[:, :1])


@torch.no_grad()
def test_the_first_blocks_alone_have_the_same_cells(
    look: OpenQualiCLIP, cut_small_pictures: Callable[..., None]
) -> None:
    x, tower = upstream.pictures(1, 96, 101), tower_of(look)
    every = next(tower.cells(x).rows((2, 2)))
    few = next(tower.cells(x, 3).rows((2, 2)))
    assert 0 < few.shape[2] < every.shape[2] and torch.equal(few, every[..., : few.shape[2]])
    cut_small_pictures()
    assert torch.allclose(next(tower.cells(x, 3).rows((2, 2))), few, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 160), (161, 101)])
def test_a_window_has_the_statistics_of_its_places(size: tuple[int, int], look: OpenQualiCLIP) -> None:
    tower, x = tower_of(look), upstream.pictures(2, *size)
    rows = list(tower.cells(x).rows((2, 3)))
    grid = [-(-length // 32) for length in size]
    assert (len(rows), rows[0].shape[1]) == (grid[0] - 1, grid[1] - 2)
    for top in range(len(rows)):
        for left in range(rows[0].shape[1]):
            found = []
            for block, stride in zip(tower.trunk(x), tower.trunk.strides, strict=True):
                side = 32 // stride
                found += moments(block[:, :, top * side : (top + 2) * side, left * side : (left + 3) * side])
            assert torch.allclose(rows[top][:, left, ENERGIES:], torch.cat(found, dim=1), atol=2e-5)


@torch.no_grad()
def test_a_window_has_the_log_energies_of_its_pixels(look: OpenQualiCLIP) -> None:
    """Windows of an image that is reflected at their edges, where the Laplacian sees the same replicated pixels."""
    tile = upstream.pictures(1, 64, 64)
    both = torch.cat([tile, tile.flip(3)], dim=3)
    x = torch.cat([both, both.flip(2)], dim=2)
    rows = list(tower_of(look).cells(x).rows((2, 2)))
    alone = log_energies(tile)
    assert torch.allclose(rows[0][:, 0, :ENERGIES], alone, atol=1e-4)
    assert torch.allclose(rows[2][:, 2, :ENERGIES], alone, atol=1e-4)
    assert not torch.allclose(rows[1][:, 1, :ENERGIES], alone, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (161, 101)])
def test_cells_in_strips_equal_those_of_the_whole_image(
    size: tuple[int, int],
    look: OpenQualiCLIP,
    cut_small_pictures: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = upstream.pictures(2, *size)
    whole = list(tower_of(look).cells(x).rows((2, 2)))
    cut_small_pictures()
    seen: list[int] = []
    cut = MobileTower._cells_in_strips

    def watched(self: MobileTower, image: Tensor, rows: int, sides: list[int]) -> list:
        seen.append(rows)
        return cut(self, image, rows, sides)

    monkeypatch.setattr(MobileTower, "_cells_in_strips", watched)
    for row, same in zip(tower_of(look).cells(x).rows((2, 2)), whole, strict=True):
        assert torch.allclose(row, same, atol=1e-5)
    assert seen == [32, 32]


@pytest.mark.parametrize("kind", ["tiny-resnet", "tiny-resnet-pos", "tiny-vit", "tiny-vit-pos", "tiny-clipa"])
def test_contributions_and_the_rest_add_up_to_the_logit_difference(kind: str, families_folder: Path) -> None:
    metric = build(kind, families_folder)
    x = upstream.pictures(2, 100, 132)
    found = contributions(metric, x, [0])
    assert isinstance(metric, nn.Module)
    with torch.no_grad():
        features = nn.functional.normalize(metric.features(x).double(), dim=-1)
        text = metric.prompt_features.double()
        pairs = (features @ text.T * metric.logit_scale / metric.temperature).unflatten(1, (-1, 2))
        logits = (pairs[..., 0] - pairs[..., 1]).mean(dim=1)
        shares = metric.tower.shares(x, logit_directions(metric))
    total = found.values.double().sum(dim=(1, 2, 3)) + shares.rest[:, 0].double()
    assert torch.allclose(total, logits, atol=1e-5)
    assert torch.allclose(found.scores[:, 0], metric(x)[:, 0], atol=2e-6)
    if "resnet" in kind:
        assert found.values.shape[2:] == (3, 4)
    assert f"{logits[1]:+.3f}"[:-1] in found.relation(1, 0)


@torch.no_grad()
def test_a_batch_has_the_maps_of_its_images_alone_also_in_grey_and_other_dtypes(look: OpenQualiCLIP) -> None:
    x = upstream.pictures(2, 70, 101)
    mapper = Mapper(look, attributes=["sharpness", "quality"])
    both = mapper.maps(x)
    assert [[each.attribute for each in maps] for maps in both] == [["sharpness", "quality"]] * 2
    for number, maps in enumerate(both):
        for one, alone in zip(maps, mapper.maps(x[number : number + 1])[0], strict=True):
            assert one.values.shape == (3, 4) and one.values.dtype == np.float32
            assert np.allclose(one.values, alone.values, atol=2e-6)
            assert (one.size, one.step) == ((70, 101), (32, 32))
    grey = x.mean(dim=1, keepdim=True)
    one, three = mapper.maps(grey)[0][0], mapper.maps(grey.expand(-1, 3, -1, -1))[0][0]
    assert np.array_equal(one.values, three.values)
    assert np.allclose(mapper.maps(x.double())[0][0].values, both[0][0].values, atol=1e-5)
    half = Mapper(OpenQualiCLIP("qualiclip-mini+", prompts="sharpness").half()).maps(x)[0][0]
    assert np.isfinite(half.values).all() and np.allclose(half.values, both[0][0].values, atol=0.05)


def test_a_blurred_or_noisy_half_is_found(look: OpenQualiCLIP) -> None:
    x = load_image("examples/photos/lighthouse.jpg")[:, 440:696, :512]
    blurred, noisy = x.clone(), x.clone()
    blurred[:, :, 256:] = load_image("examples/photos/lighthouse-blurred.jpg")[:, 440:696, 256:512]
    noisy[:, :, 256:] = load_image("examples/photos/lighthouse-noisy.jpg")[:, 440:696, 256:512]
    for picture, attribute in ((blurred, "sharpness"), (noisy, "noisiness")):
        values = Mapper(look, attributes=[attribute]).maps(picture[None])[0][0].values
        lower = values[:, 9:, None, None] < values[:, :7][None, None]
        assert lower.mean() > 0.95


@pytest.mark.parametrize(
    "kind", ["tiny-resnet", "tiny-resnet-pos", "tiny-vit", "tiny-clipa", "tiny-convnext", "tiny-fastvit"]
)
@torch.no_grad()
def test_the_feature_of_the_only_place_is_the_image_s(kind: str, families_folder: Path) -> None:
    metric = build(kind, families_folder)
    found = metric.tower.place_features(upstream.pictures(2, 64, 100))
    assert found.places.shape[1] == found.grid[0] * found.grid[1]
    assert torch.equal(found.image, metric.tower(upstream.pictures(2, 64, 100)))
    if kind in ("tiny-resnet", "tiny-convnext", "tiny-fastvit"):  # others have a class token or a table besides
        one = metric.tower.place_features(upstream.pictures(2, 32, 32))
        assert one.grid == (1, 1) and torch.allclose(one.places[:, 0], one.image, atol=1e-4)
    maps = Mapper(metric).maps(upstream.pictures(2, 64, 100))
    assert maps[1][0].kind == "local" and maps[1][0].values.shape == found.grid
    assert f"{maps[1][0].values.mean():.4f}" in maps[1][0].relation


class Left(BlindMetric):
    """Scores the mean of the left half alone."""

    def __init__(self, lower_better: bool = False) -> None:
        super().__init__("left", paper="none", lower_better=lower_better)
        self.tower = nn.Identity()

    def encode(self, rgb: Tensor) -> Tensor:
        halves = rgb[..., : rgb.shape[3] // 2].var(dim=(2, 3))
        return halves.mean(dim=1, keepdim=True)

    def rate(self, features: Tensor) -> Tensor:
        return features


def test_occlusion_finds_what_a_toy_scores() -> None:
    pytest.importorskip("captum")
    x = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    for lower_better in (False, True):
        found = Mapper(Left(lower_better), "occlusion").maps(x)
        values = (-1 if lower_better else 1) * found[0][0].values
        assert values[:, :3].min() > 1e-4 and np.abs(values[:, 6:]).max() < 1e-6
        assert found[0][0].meaning.startswith("minus") == lower_better
        assert found[0][0].high == -found[0][0].low


def test_passes_are_counted() -> None:
    pytest.importorskip("captum")
    ticks: list[int] = []
    for kind, metric, size in (("occlusion", Left(), (64, 128)), ("occlusion", Left(), (32, 40))):
        mapper = Mapper(metric, kind)
        ticks.clear()
        mapper.maps(torch.rand(1, 3, *size), lambda: ticks.append(1))
        assert len(ticks) == mapper.passes(*size) > 1
    assert Mapper("qualiclip-mini", device="cpu").passes(64, 64) == 1


@pytest.mark.parametrize("kind", ["qualiclip-mini", "tiny-resnet", "tiny-vit"])
def test_grad_cam_leaves_a_frozen_tower_as_it_is(kind: str, families_folder: Path) -> None:
    pytest.importorskip("captum")
    metric = build(kind, families_folder)
    before = {name: value.clone() for name, value in metric.named_buffers()}
    x = upstream.pictures(1, 96, 128)
    found = Mapper(metric, "gradcam").maps(x)[0][0]
    assert np.isfinite(found.values).all() and np.abs(found.values).max() > 0
    assert all(torch.equal(value, before[name]) for name, value in metric.named_buffers())
    assert not any(module._forward_hooks for module in metric.modules())


def test_grad_cam_is_the_gradient_times_the_feature_map(families_folder: Path) -> None:
    pytest.importorskip("captum")
    metric = build("tiny-resnet", families_folder)
    x = upstream.pictures(1, 96, 128)
    with torch.no_grad():
        features = metric.tower.forward_features(x)
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(metric.rate(metric.tower.forward_head(features)).sum(), features)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)[0].detach().numpy()
    found = Mapper(metric, "gradcam").maps(x)[0][0].values
    assert np.allclose(found, expected, atol=1e-6) and expected.min() < 0 < expected.max()


def test_scales() -> None:
    assert scale_of([0.5, 0.52], "local") == pytest.approx((0.46, 0.56))
    assert scale_of([0.2, 0.8], "local") == (0.2, 0.8)
    assert scale_of([-1, 3], "occlusion") == (-3, 3)


def test_enlarged_values_lie_at_the_centres_of_places() -> None:
    values = np.array([[0, 1], [2, 3]], np.float32)
    found = QualityMap(values, (50, 64), (32, 32), "m", "a", "local", 0.5, 0, 3, "", "")
    large = found.enlarged()
    assert large.shape == (50, 64)
    assert large[15:17, 15:17].mean() == pytest.approx(0, abs=0.1) and large[0, 0] == 0
    assert large[49, 63] == pytest.approx(3, abs=0.1)
    assert large[:, 31:33].mean(axis=1)[0] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "heat"}, "kind is 'heat'; expected one of local"),
        ({"attributes": ["sharpnes"]}, "did you mean 'sharpness'"),
        ({"attributes": []}, "attributes is empty"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
    ],
)
def test_wrong_settings_are_one_line(arguments: dict, message: str, look: OpenQualiCLIP) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Mapper(look, **arguments)
    assert "\n" not in str(caught.value)


def test_kinds_that_a_metric_lacks_are_one_line(families_folder: Path, look: OpenQualiCLIP) -> None:
    pytest.importorskip("captum")
    x = upstream.pictures(1, 64, 64)
    cases = [
        (look, "contributions", "MobileTower"),
        (build("tiny-convnext", families_folder), "contributions", "TimmTower"),
        (build("tiny-convnext", families_folder), "gradcam", "TimmTower"),
        (build("tiny-eva", families_folder), "local", "feature of its own"),
        (build("tiny-coca", families_folder), "contributions", "no CLIP ResNet"),
        (Left(), "local", "left on Identity"),
        (OpenQualiCLIP("qualiclip-mini", tile=64).eval(), "local", "tile=64"),
    ]
    for metric, kind, message in cases:
        with pytest.raises(SettingsError, match=message) as caught:
            Mapper(metric, kind).maps(x)
        assert "\n" not in str(caught.value)
        named = str(caught.value).partition("kinds that work: ")[2].split(", ")
        assert kind not in named and named[-1] == "occlusion"
        for other in KINDS:  # all that are named work, and no others
            if other in named:
                Mapper(metric, other, metric.attributes[:1]).maps(x)
            else:
                with pytest.raises(SettingsError, match="is not defined for"):
                    Mapper(metric, other, metric.attributes[:1]).maps(x)
    with pytest.raises(SettingsError, match="2 metrics were given"):
        Mapper(["qualiclip-mini", "qualiclip-mini+"])
    with pytest.raises(SettingsError, match="pass attribute=NAME"):
        quality_map(x[0], look)


@pytest.mark.parametrize("x", [torch.rand(3, 64, 64), torch.rand(1, 3, 31, 64), torch.zeros(1, 3, 64, 64).int(), None])
def test_wrong_images_are_refused(x: Tensor, look: OpenQualiCLIP) -> None:
    with pytest.raises(ImageError):
        Mapper(look).maps(x)


def test_another_package_s_metric_is_mapped_by_occlusion() -> None:
    pytest.importorskip("captum")
    found = quality_map(upstream.pictures(1, 64, 64)[0], "piqe", device="cpu")
    assert (found.kind, found.attribute, found.values.shape) == ("occlusion", "quality", (4, 4))
    with pytest.raises(SettingsError, match="another package"):
        Mapper("piqe", "local", device="cpu")


def test_missing_captum_is_one_line(look: OpenQualiCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for kind in ("occlusion", "gradcam"):
        with pytest.raises(SettingsError, match=r"needs captum: pip install \"qualiclip-pyiqa\[explain\]\""):
            Mapper(look, kind).maps(upstream.pictures(1, 64, 64))


def test_one_image_of_a_batch_is_mapped_and_drawn(look: OpenQualiCLIP) -> None:
    x = upstream.pictures(2, 64, 96)
    found = quality_map(x[:1], look, attribute="sharpness")
    assert np.array_equal(found.values, quality_map(x[0], look, attribute="sharpness").values)
    with pytest.raises(ImageError, match="tensor has 2 images; expected one"):
        quality_map(x, look, attribute="sharpness")
    pytest.importorskip("matplotlib")
    assert found.figure(x[:1]).axes


def test_a_map_s_repr_is_one_short_line(look: OpenQualiCLIP) -> None:
    said = repr(quality_map(upstream.pictures(1, 640, 640)[0], look, attribute="sharpness"))
    assert "sharpness" in said and "20x20 places" in said and "array" not in said
    assert "\n" not in said and len(said) < 200


def test_figures_show_images_maps_and_scales(look: OpenQualiCLIP) -> None:
    pytest.importorskip("matplotlib")
    x = upstream.pictures(1, 64, 96)
    maps = Mapper(look, attributes=["sharpness"]).maps(x)[0]
    figure = maps[0].figure(x[0])
    texts = [text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))]
    assert f"sharpness: {maps[0].score:.3f} (whole image)" in texts
    assert any("blurrier" in text and "sharper" in text for text in texts)
    quality, brightness = Mapper(look, attributes=["quality", "brightness"]).maps(x)[0]
    # The score of the image and values of another scale are not shown as if they were one.
    assert (maps[0].own_scale, quality.own_scale) == (True, False)
    assert any("windows' own score, not the image's scale" in text for text in texts)
    caption = " ".join(figure.get_supxlabel().split())
    assert caption == f"sharpness: {maps[0].relation}" and "not on the scale of the image's score" in caption
    both = draw_maps(x[0], [maps[0], quality])
    labels = [axis.get_xlabel().split("\n")[0] for axis in both.axes if axis.get_xlabel().strip()]
    assert any("own score" in text for text in labels) and any("score of the surroundings" in text for text in labels)
    assert both.get_supxlabel().count("\n") == 1
    assert (quality.comparatives, brightness.comparatives) == (("better", "worse"), ("brighter", "darker"))
    with pytest.raises(SettingsError, match="96x64 pixels, but this one has 64x64"):
        maps[0].figure(x[0, :, :, :64])
