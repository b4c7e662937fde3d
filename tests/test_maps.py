"""Quality maps: how each kind relates to the score, on every tower that has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import upstream
from test_archs import build
from torch import Tensor, nn

from qualiclip_pyiqa import BlindMetric, OpenQualiCLIP
from qualiclip_pyiqa.explain import local
from qualiclip_pyiqa.explain.contributions import contributions, logit_directions
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.towers.mobile import MobileTower
from qualiclip_pyiqa.towers.statistics import ENERGIES, log_energies, moments

SIZES = [(32, 32), (37, 101), (63, 33), (64, 96), (200, 130)]


@pytest.fixture(scope="module")
def look() -> OpenQualiCLIP:
    return OpenQualiCLIP("qualiclip-mini+", prompts="look").eval()


def tower_of(metric: BlindMetric) -> MobileTower:
    assert isinstance(metric.tower, MobileTower)
    return metric.tower


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_a_window_as_large_as_the_image_has_its_statistics_and_score(
    size: tuple[int, int], look: OpenQualiCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = upstream.pictures(2, *size)
    assert torch.allclose(tower_of(look).cells(x).whole(), tower_of(look).statistics(x), atol=1e-5)
    monkeypatch.setattr(local, "WINDOW", 100)
    for maps, scores in zip(Mapper(look).maps(x), look(x), strict=True):
        for found, score in zip(maps, scores.tolist(), strict=True):
            assert found.score == pytest.approx(score, abs=2e-6)
            assert found.values == pytest.approx(score, abs=2e-6)


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
