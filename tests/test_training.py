"""The alignment losses, the small tower, and the training of it and of CLIP's."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
import upstream
from accelerate.tracking import GeneralTracker
from forks import Fork
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from synthetic import synthetic_photograph

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS, degrade
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.metrics.prompts import QUALITY_SETS
from qualiclip_pyiqa.pretrained.write import write_safetensors
from qualiclip_pyiqa.towers.mini import BLOCKS, MiniTower, RelativeSharpness
from qualiclip_pyiqa.towers.statistics import (
    CELL,
    PERCENTILES,
    ROUNDING_ENERGY,
    UNRANKED,
    detail_and_top,
    log_energies,
)
from qualiclip_pyiqa.training import checkpoint as checkpoint_module
from qualiclip_pyiqa.training import loop
from qualiclip_pyiqa.training import losses as losses_module
from qualiclip_pyiqa.training import run as trainer
from qualiclip_pyiqa.training import stacks as stacks_module
from qualiclip_pyiqa.training.alignment import Aligned, build, similarities
from qualiclip_pyiqa.training.checkpoint import Progress, State, read_checkpoint, write_checkpoint
from qualiclip_pyiqa.training.config import CONFIGS, Config, load_config, make_config
from qualiclip_pyiqa.training.losses import across_loss, alignment_losses, centre_loss, consistency_loss, ranking_loss
from qualiclip_pyiqa.training.photographs import list_photographs
from qualiclip_pyiqa.training.stacks import Stack, Stacks, batch_of

TOY = load_config("toy")
NOISE = {name: float(each.group == "noise") for name, each in DEGRADATIONS.items()}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.stack([synthetic_photograph(1), synthetic_photograph(2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    for number in range(14):
        pixels = (synthetic_photograph(number, 112, 96) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path / f"{number:02d}.png")
    return path


# ---------------------------------------------------------------- losses


def test_consistency_by_hand() -> None:
    # two levels, two crops, one prompt: differences 0.3 and 0.05, margin 0.1 -> (0.2 + 0) / 2
    similarity = torch.tensor([[[[0.5], [0.2]], [[0.1], [0.15]]]])
    assert consistency_loss(similarity, 0.1).item() == pytest.approx(0.1, abs=1e-6)
    assert consistency_loss(similarity, 0.3).item() == pytest.approx(0.0, abs=1e-6)


def test_ranking_by_hand() -> None:
    # levels i < j, crops k, l: differences 0.5-0.4, 0.5-0.2, 0.3-0.4, 0.3-0.2 = 0.1, 0.3, -0.1, 0.1; margin 0.2
    similarity = torch.tensor([[[[0.5], [0.3]], [[0.4], [0.2]]]])
    assert ranking_loss(similarity, 0.2).item() == pytest.approx((0.1 + 0 + 0.3 + 0.1) / 4, abs=1e-6)
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert ranking_loss(similarity, 0.2, nothing).item() == 0


def test_ranking_rewards_falling_similarity() -> None:
    falling = torch.linspace(1, -1, 6).view(1, 6, 1, 1).expand(2, 6, 2, 7)
    assert ranking_loss(falling, 0.1).item() == 0
    assert ranking_loss(falling.flip(1), 0.1) > ranking_loss(torch.zeros(2, 6, 2, 7), 0.1) > 0


def test_across_compares_only_other_photographs_and_clear_gaps() -> None:
    quality = torch.tensor([[0.1], [0.2], [0.5]])
    level, stack = torch.tensor([[0.0], [4.0], [2.0]]), torch.tensor([0, 1, 1])
    # only (0, 1): level gap 4, margin 0.1 -> 0.4 - (0.1 - 0.2)
    assert across_loss(quality, level, stack, 0.1, 3).item() == pytest.approx(0.5, abs=1e-6)
    assert across_loss(quality, level, torch.zeros(3), 0.1, 3).item() == 0


def test_a_pair_need_not_fall_with_what_it_is_not_about_but_must_not_rise() -> None:
    about = torch.tensor([[1.0, 0.0]])
    constant, rising = torch.zeros(1, 2, 2, 2), torch.tensor([0.0, 0.4]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert ranking_loss(constant, 0.2, severity=about).item() == pytest.approx((0.2 + 0) / 2, abs=1e-6)
    assert ranking_loss(rising, 0.2, severity=about).item() == pytest.approx((0.6 + 0.4) / 2, abs=1e-6)
    crops = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    blur, both = (
        Stack(crops, types, (0, 5), (0, 0), 32, None).severity(TOY)
        for types in (("lens_blur",), ("lens_blur", "white_noise"))
    )
    assert all(blur) and both.count(0) == 1
    mild = dataclasses.replace(TOY, severity={"noise": 0.5, "blur": 0.25})
    assert Stack(crops, ("lens_blur", "white_noise"), (0, 5), (0, 0), 32, None).severity(mild) == [
        0.5 * value for value in both
    ]
    severity, stack = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([0, 1])
    assert across_loss(torch.zeros(2, 2), severity, stack, 0.1, 3).item() == pytest.approx(0.5)


def test_centre_is_zero_only_for_balanced_pairs() -> None:
    assert centre_loss(torch.tensor([[1.0, -0.5], [-1.0, 0.5]])).item() == 0
    assert centre_loss(torch.tensor([[0.4], [0.2]])).item() == pytest.approx(0.09)


def test_the_loss_of_a_step_is_the_weighted_sum_of_what_it_says() -> None:
    """Two stacks of two levels of two crops, one prompt pair, by plain loops."""
    margins = {"margin_consistency": 0.05, "margin_rank": 0.4, "margin_across": 0.2, "gap_across": 3.0}
    weights = {"consistency": 2.0, "positive": 3.0, "negative": 5.0, "across": 7.0, "centre": 11.0}
    config = dataclasses.replace(TOY, **margins, **{f"weight_{name}": w for name, w in weights.items()})
    angles = torch.tensor([[[0.1, 0.3], [0.8, 1.2]], [[0.5, 0.2], [0.6, 1.5]]])  # stack, level, crop
    features = torch.stack([angles.cos(), angles.sin()], -1)
    positive, negative = features.double().numpy()[..., 0], features.double().numpy()[..., 1]
    level = [[0, 4], [1, 3]]
    batch = {
        "pictures": torch.zeros(2, 2, 2, 3, 1, 1, dtype=torch.uint8),
        "level": torch.tensor(level).float(),
        "ordered": torch.tensor([[False, True], [False, False]]).expand(2, 2, 2),
        "monotone": torch.tensor([True, True]),
        "severity": torch.ones(2, 1),
    }
    aligned = Aligned(torch.nn.Identity(), torch.eye(2), 1.0, 0.0, {})
    found = alignment_losses(lambda pictures: features.flatten(0, 2), aligned, batch, config)

    def mean(terms: list[float]) -> float:
        return sum(terms) / len(terms)

    crops, stacks = (0, 1), (0, 1)
    expected = {
        "consistency": mean(
            [max(0, abs(c[b, i, 0] - c[b, i, 1]) - 0.05) for c in (positive, negative) for b in stacks for i in (0, 1)]
        ),
        # The milder level is nearer to the positive prompt ...
        "positive": mean(
            [max(0, 0.4 - (positive[b, 0, k] - positive[b, 1, m])) for b in stacks for k in crops for m in crops]
        ),
        # ... and farther from the negative one.
        "negative": mean(
            [max(0, 0.4 - (negative[b, 1, m] - negative[b, 0, k])) for b in stacks for k in crops for m in crops]
        ),
    }
    quality = positive - negative
    pairs = [((0, 0), (1, 1)), ((1, 0), (0, 1))]  # of two photographs, at least three levels apart: 0 and 3, 1 and 4
    expected["across"] = mean(
        [
            max(
                0,
                0.2 * (level[worse[0]][worse[1]] - level[better[0]][better[1]])
                - (quality[better][k] - quality[worse][m]),
            )
            for better, worse in pairs
            for k in crops
            for m in crops
        ]
    )
    expected["centre"] = quality.mean() ** 2
    assert {name: float(part) for name, part in found.items()} == pytest.approx(
        expected | {"loss": sum(weights[name] * part for name, part in expected.items())}, abs=1e-6
    )
    assert all(part > 0.01 for part in expected.values()), expected  # nothing is tested by a term that is zero


# ---------------------------------------------------------------- tower


@pytest.fixture(scope="module")
def tower() -> MiniTower:
    torch.manual_seed(0)
    tower = MiniTower(TOY.widths, TOY.depths, TOY.hidden, TOY.dim)
    with torch.no_grad():  # statistics of real pictures, so that features differ between pictures
        for seed in range(60):
            tower(torch.stack([synthetic_photograph(seed, 64, 64), torch.rand(3, 64, 64)]))
    return tower.eval()


def test_feature_is_blocks_of_unit_length(tower: MiniTower) -> None:
    features = tower(torch.rand(3, 3, 45, 67))
    assert features.shape == (3, tower.feature_dim) and features.dtype == torch.float32
    lengths = features.unflatten(1, (len(BLOCKS), -1)).norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    assert len(BLOCKS) == len(QUALITY_SETS["qualiclip"])


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40), (131, 97)])
def test_batch_equals_single(tower: MiniTower, size: tuple[int, int]) -> None:
    x = torch.rand(4, 3, *size)
    with torch.no_grad():
        batch, single = tower(x), torch.cat([tower(one[None]) for one in x])
    assert torch.isfinite(batch).all()
    assert torch.allclose(batch, single, atol=1e-5)  # unit-length blocks of float32 sums in another order
    assert (batch[0] - batch[1]).abs().max() > 1e-3


def test_flat_black_and_white_pictures_are_finite(tower: MiniTower) -> None:
    x = torch.stack([torch.zeros(3, 40, 40), torch.ones(3, 40, 40), torch.full((3, 40, 40), 0.5)]).requires_grad_()
    tower(x).sum().backward()
    assert torch.isfinite(tower(x)).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_forward_changes_no_state_and_survives_copies(tower: MiniTower) -> None:
    before = copy.deepcopy(tower.state_dict())
    x = torch.rand(2, 3, 64, 64)
    y = tower(x)
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other(x), y)
    rebuilt = MiniTower(**json.loads(json.dumps({"widths": TOY.widths, "depths": TOY.depths, "hidden": 16, "dim": 8})))
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt.eval()(x), y)


# Cosine of the whole feature with float32's: float16 keeps 11 bits, bfloat16 8, and the picture itself is rounded.
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.999), (torch.bfloat16, 0.9)])
def test_half_precision(tower: MiniTower, dtype: torch.dtype, least: float) -> None:
    x = torch.stack([synthetic_photograph(5), synthetic_photograph(6)])
    with torch.no_grad():
        expected = tower(x)
        small = copy.deepcopy(tower).to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            mixed = tower(x)
    for features in (small, mixed):
        assert torch.isfinite(features).all()
        assert torch.cosine_similarity(features.float(), expected).min() > least


def test_log_energies_know_blur_noise_and_darkness(picture: torch.Tensor) -> None:
    clean = log_energies(picture)
    assert (log_energies(degrade(picture, "gaussian_blur", 4, 0))[:, 0] < clean[:, 0]).all()
    assert (log_energies(degrade(picture, "white_noise", 5, 0))[:, 1] > clean[:, 1]).all()
    assert (log_energies(degrade(picture, "darken", 4, 0))[:, 12] < clean[:, 12]).all()


def test_percentiles_of_energies_are_numpys_and_know_a_quiet_background(picture: torch.Tensor) -> None:
    luma = (picture.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).numpy()
    p = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="edge")
    laplacian = 4 * luma - p[:, :-2, 1:-1] - p[:, 2:, 1:-1] - p[:, 1:-1, :-2] - p[:, 1:-1, 2:]
    n, h, w = laplacian.shape
    assert h % CELL == w % CELL == 0
    cells = (laplacian**2).reshape(n, h // CELL, CELL, w // CELL, CELL).mean((2, 4)).reshape(n, -1)
    expected = np.percentile(np.log(cells + ROUNDING_ENERGY), PERCENTILES, axis=1).T
    found = log_energies(picture.double())[:, UNRANKED : UNRANKED + len(PERCENTILES)]
    assert np.allclose(found, expected, atol=1e-9)

    quiet = torch.full((2, 3, 2 * h, 2 * w), 0.5)
    quiet[..., :h, :w] = picture  # the same subject, three quarters of the picture without anything
    energies, alone = log_energies(quiet), log_energies(picture)
    sharpest, median = UNRANKED + PERCENTILES.index(98), UNRANKED + PERCENTILES.index(50)
    assert (energies[:, sharpest] - alone[:, sharpest]).abs().max() < 0.5  # a blur by one level takes 1 and more
    assert (energies[:, median] < alone[:, median] - 0.5).all()


def test_detail_and_top_are_means_of_two_octaves(picture: torch.Tensor) -> None:
    energies = log_energies(picture)
    ranked = [[UNRANKED + k * len(PERCENTILES) + PERCENTILES.index(q) for k in (0, 1)] for q in (50, 98)]
    expected = torch.stack([energies[:, columns].mean(1) for columns in ranked], dim=1)
    assert torch.allclose(detail_and_top(energies), expected)


def test_relative_sharpness_is_standard_deviations_above_the_line_of_undistorted_photographs() -> None:
    rng = np.random.default_rng(0)
    median = rng.normal(-5, 2, 400)
    top = 0.3 * median - 1 + rng.normal(0, 0.7, 400)
    head = RelativeSharpness(16)
    head.fit(torch.from_numpy(np.stack([median, top], axis=1)))
    slope, offset = np.polyfit(median, top, 1)
    spread = (top - slope * median - offset).std()
    assert head.line.numpy() == pytest.approx([offset, slope, spread], rel=1e-4)

    seen = torch.tensor([[-5.0, -2.5], [-5.0, -1.0], [-3.0, -1.0], [-5.0, -40.0], [-5.0, 40.0]])
    block = head(seen)
    assert block.shape == (5, 16) and torch.allclose(block.norm(dim=1), torch.ones(5), atol=1e-6)
    z = (seen[:, 1].double() - slope * seen[:, 0].double() - offset) / spread
    expected = ((z + 1) / 8).clamp(-1.4, 1.4)
    assert torch.allclose((block[:, 0] - block[:, 1]).double(), expected, atol=1e-4)
    assert len(set(expected.tolist())) == 5


def test_relative_sharpness_of_alike_photographs_is_finite() -> None:
    head = RelativeSharpness(4)
    head.fit(torch.tensor([[-5.0, -2.0], [-5.0, -2.0]]))
    seen = torch.tensor([[-5.0, -2.0], [-9.0, 0.0]], requires_grad=True)
    head(seen).square()[:, 0].sum().backward()
    assert torch.isfinite(head(seen)).all() and torch.isfinite(seen.grad).all()


# ---------------------------------------------------------------- stacks


def test_out_of_focus_are_the_surroundings_and_all_levels_alike() -> None:
    region = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        blurred = stacks_module._bokeh(random.Random(seed), region, 96)
        assert blurred.shape == region.shape and blurred.min() >= 0 and blurred.max() <= 1
        changed = (blurred - region).abs().mean((0, 1))
        corners = torch.stack([changed[:12, :12], changed[:12, -12:], changed[-12:, :12], changed[-12:, -12:]])
        assert corners.mean() > 5 * changed[65:95, 65:95].amin()  # both crops of 96 see the middle 32 pixels
        assert corners.mean() > 0.15  # of uniform noise a blur leaves its mean: 0.25 on average


def paths_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def test_item_is_decided_by_seed_and_number(folder: Path) -> None:
    stacks = Stacks(paths_of(folder), TOY, seed=1)
    first, again, other = (batch_of(items, TOY) for items in (stacks[1], stacks[1], stacks[2]))
    elsewhere = batch_of(Stacks(paths_of(folder), TOY, seed=2)[1], TOY)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["pictures"], other["pictures"])
    assert not torch.equal(first["pictures"], elsewhere["pictures"])
    b, n_levels = TOY.stacks, TOY.levels + 1
    assert first["pictures"].shape == (b, n_levels, 2, 3, 48, 48)
    assert (first["level"].diff(dim=1) > 0).all() and (first["level"][:, 0] == 0).all()
    assert not first["ordered"].tril().any()


def test_level_0_is_the_crop_itself_and_the_paper_has_none(folder: Path) -> None:
    for stack in Stacks(paths_of(folder), TOY, seed=0)[0]:
        assert torch.equal(stack.pictures()[0], stack.crops)
    paper = dataclasses.replace(load_config("paper"), crops=(48,), stacks=1)
    (stack,) = Stacks(paths_of(folder), paper, seed=0)[0]
    assert stack.levels == (1, 2, 3, 4, 5) and stack.pictures().shape == (5, 2, 3, 48, 48)


def noise_stacks(folder: Path, **change: bool) -> list[Stack]:
    only = dict.fromkeys(DEGRADATIONS, 0.0) | {"motion_blur": 1.0}
    config = dataclasses.replace(TOY, type_weights=only, **change)
    return Stacks(paths_of(folder), config, seed=0)[0]


def test_random_choices_are_shared_as_configured(folder: Path) -> None:
    angles = [stack.seeds for stack in noise_stacks(folder)]
    assert all(len(set(seeds)) == 1 and isinstance(seeds[0], int) for seeds in angles)
    assert len({seeds[0] for seeds in angles}) == TOY.stacks  # each photograph has its own
    for stack in noise_stacks(folder, share_levels=False):
        assert len(set(stack.seeds)) == len(stack.levels)
    for stack in noise_stacks(folder, share_crops=False):
        (pair,) = set(stack.seeds)
        assert pair[0] != pair[1]
        twice = dataclasses.replace(stack, crops=stack.crops[:1].expand(2, -1, -1, -1))
        assert not torch.equal(*twice.pictures()[-1])  # the same crop, blurred at two angles
        same = dataclasses.replace(twice, seeds=(1,) * len(stack.levels))
        assert torch.equal(*same.pictures()[-1])


def test_only_what_is_known_is_ranked(folder: Path) -> None:
    crops = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    shift = Stack(crops, ("mean_shift",), (0, 1, 2, 3), (0,) * 4, 32, None)
    assert not shift.monotone
    # Level 1 is the identity, 2 and 3 have opposite signs.
    assert shift.ordered() == [[False, False, True, True], [False, False, True, True], [False] * 4, [False] * 4]
    both = dataclasses.replace(shift, types=("mean_shift", "jpeg"))
    assert both.ordered() == shift.ordered()
    assert Stack(crops, ("jpeg",), (0, 1, 2, 3), (0,) * 4, 32, None).ordered()[1] == [False, False, True, True]


# ---------------------------------------------------------------- training


def short(**change: object) -> Config:
    """Of few types, as most of so short a run is the making of what it is validated on."""
    few = dict.fromkeys(DEGRADATIONS, 0.0) | dict.fromkeys(("motion_blur", "white_noise", "darken"), 1.0)
    steps = {"steps": 4, "validate_every": 4, "checkpoint_every": 2}
    return dataclasses.replace(TOY, **{"type_weights": few, **steps, **change})  # type: ignore[arg-type]


def train(config: Config, folder: Path, out: Path, **options: Any) -> Path:
    """Train without a tracker, whose drawings take as long as a short run."""
    return trainer.train(config, folder, out, trackers=[], **options)


def write_config(config: Config, path: Path) -> Path:
    """A TOML file of it; JSON's numbers, strings, lists and booleans are TOML's."""
    values = dataclasses.asdict(config)
    tables = {key: values.pop(key) for key in ("type_weights", "repeat", "severity")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    assert load_config(path) == config
    return path


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_bytes(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def toy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run."""
    return trainer.train(TOY, folder, tmp_path_factory.mktemp("toy"), seed=3)


def test_toy_training_learns_to_rank(toy: Path, folder: Path, tmp_path: Path) -> None:
    fresh = train(dataclasses.replace(TOY, steps=1, learning_rate=1e-9), folder, tmp_path / "fresh", seed=3)
    untrained, log = lines_of(fresh.parent)[-1], lines_of(toy.parent)
    # Photographs that were not trained on; every type counts alike. An untrained network ranks about half the pairs.
    # With another seed, which is what another processor's rounding amounts to, it gained 0.14 to 0.53.
    assert log[-1]["accuracy"] > untrained["accuracy"] + 0.05
    # Every part of the loss, ranking accuracy by type and the share of time spent waiting stand in the log.
    assert {"consistency", "positive", "negative", "across", "centre", "loss", "waiting", "types"} <= log[1].keys()
    assert 0 <= log[1]["waiting"] <= 1 and log[1]["loss"] > log[2]["loss"]
    assert [line.get("step") for line in log] == [None, 30, 60, 60]
    assert sorted(path.name for path in toy.parent.iterdir()) == ["log.jsonl", "model.safetensors", "tensorboard"]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "qualiclip"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_part(toy: Path) -> None:
    found = scalars(toy.parent)
    assert {"loss/loss", "loss/positive", "accuracy/all", "accuracy/jpeg", "waiting", "learning_rate"} <= found.keys()
    assert [step for step, _ in found["loss/loss"]] == [30, 60]
    assert found["loss/loss"][1][1] == pytest.approx(lines_of(toy.parent)[2]["loss"])


def test_tensorboard_has_scores_and_a_map(toy: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = scalars(toy.parent)
    names = {positive.rstrip(".").lower() for positive, _ in QUALITY_SETS["qualiclip"]}
    assert {f"score/{name}" for name in ("quality", *names)} == {tag for tag in found if tag.startswith("score/")}
    assert all(0 < value < 1 for name in names for _, value in found[f"score/{name}"])
    mean = sum(found[f"score/{name}"][-1][1] for name in names) / len(names)
    assert found["score/quality"][-1] == (60, pytest.approx(mean, abs=1e-4))
    events = EventAccumulator(str(toy.parent / "tensorboard" / "qualiclip"))
    events.Reload()
    shown = events.Images("map/quality")
    assert [image.step for image in shown] == [30, 60] and min(shown[0].width, shown[0].height) > 100


class Recorder(GeneralTracker):
    """A tracker of the caller's own."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict]] = []
        self.images: list[tuple[int, dict]] = []

    @property
    def tracker(self) -> list:
        return self.logged

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.logged.append((step, values))

    def log_images(self, values: dict, step: int | None = None, **more: object) -> None:
        assert not more
        self.images.append((step, values))


def test_any_tracker_is_told_and_none_changes_the_model(folder: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    runs = [
        trainer.train(short(), folder, tmp_path / name, trackers=trackers)
        for name, trackers in (("tracked", [recorder, "tensorboard"]), ("untracked", []))
    ]
    assert same_bytes(*runs)
    told = {name for _, values in recorder.logged for name in values}
    assert {"loss/loss", "accuracy/all", "score/quality", "score/good photo"} <= told
    (step, images), *_ = recorder.images
    assert step == short().validate_every and images["map/quality"].ndim == 4
    assert images["map/quality"].dtype == np.uint8 and images["map/quality"].shape[-1] == 3
    assert (tmp_path / "tracked" / "tensorboard").is_dir() and not (tmp_path / "untracked" / "tensorboard").exists()


def test_weights_and_biases_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer.train(short(), folder, tmp_path / "run", trackers=["wandb"])
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert next(kept.glob("run-*.wandb")).stat().st_size > 1000
    assert list(kept.glob("files/media/images/map/quality*.png"))


def test_an_unknown_or_missing_tracker_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="tracker is 'wand'; expected one of tensorboard, wandb"):
        trainer.train(short(), folder, tmp_path / "a", trackers=["wand"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="pip install wandb"):
        trainer.train(short(), folder, tmp_path / "a", trackers=["wandb"])
    assert not (tmp_path / "a").exists()


def test_relative_sharpness_is_fitted_to_the_photographs_that_are_trained_on(toy: Path, folder: Path) -> None:
    paths = paths_of(folder)
    random.Random("split 3").shuffle(paths)
    seen = torch.cat([log_energies(load_image(path)[None]) for path in paths[TOY.validation :]]).double()
    detail, top = detail_and_top(seen).unbind(1)
    slope, offset = np.polyfit(detail, top, 1)
    spread = (top - slope * detail - offset).numpy().std()
    line = load_file(toy)[f"visual.heads.{BLOCKS.index(('sharpness',))}.line"]
    assert line.numpy() == pytest.approx([offset, slope, spread], abs=1e-3)


def test_model_file_says_what_it_is_and_is_a_metric(toy: Path) -> None:
    with safe_open(toy, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        anchors, scale = file.get_tensor("prompts_features"), file.get_tensor("logit_scale")
    assert metadata["format"] == "qualiclip-pyiqa/1" and metadata["backbone"] == "mini"
    tower = MiniTower(**json.loads(metadata["tower"]))
    assert keys == {f"visual.{key}" for key in tower.state_dict()} | {"prompts_features", "logit_scale"}
    assert [tuple(pair) for pair in json.loads(metadata["prompts"])] == list(QUALITY_SETS["qualiclip"])
    assert anchors.shape == (14, tower.feature_dim) and torch.allclose(anchors.norm(dim=1), torch.ones(14), atol=1e-6)
    assert scale.shape == () and json.loads(metadata["training"])["seed"] == 3
    # The file's own temperature counts under either name; the embedded one's default is a single pair.
    x = torch.stack([synthetic_photograph(30), degrade(synthetic_photograph(30)[None], "white_noise", 5, 0)[0]])
    names = ("qualiclip", "qualiclip-mini")
    scores = [pyiqa.create_metric(name, weights=str(toy), prompts="qualiclip")(x) for name in names]
    assert torch.equal(*scores) and scores[0][0] != scores[0][1]


def test_commands_take_the_model_file_as_a_metric(
    toy: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "scores.csv"
    assert cli.main(["score", str(folder / "00.png"), "-m", str(toy), "-o", str(table)]) == 0
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = float(pyiqa.create_metric("qualiclip", weights=str(toy))(str(folder / "00.png")))
    assert float(row[str(toy)]) == pytest.approx(expected, abs=2e-6)  # what a Scorer promises
    arguments = ["--degradations", str(folder), "--limit", "1", "--json", str(tmp_path / "levels.json")]
    assert cli.main(["evaluate", "-m", str(toy), *arguments]) == 0
    assert str(toy) in (tmp_path / "levels.json").read_text()
    assert cli.main(["score", str(folder), "-m", str(tmp_path / "none.safetensors"), "-o", str(table)]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_same_seed_same_file_whoever_reads_and_degrades(folder: Path, tmp_path: Path) -> None:
    runs = [train(short(), folder, tmp_path / "a"), train(short(), folder, tmp_path / "b")]
    assert same_bytes(*runs)  # hence one hash
    runs.append(train(short(workers=2), folder, tmp_path / "c"))
    runs.append(train(short(degrade_on="device"), folder, tmp_path / "d"))
    assert all(same_tensors(runs[0], run) for run in runs[1:])
    assert not same_tensors(runs[0], train(short(), folder, tmp_path / "e", seed=1))


@pytest.fixture(scope="module")
def usual(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(short(), folder, tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"clip": 0.01},
        {"levels": 2},
        {"stacks": 3},
        {"crops": (48, 64)},
        {"margin_consistency": 0.0},
        {"margin_rank": 0.3},
        {"margin_across": 0.3},
        {"gap_across": 2.0},
        {"weight_consistency": 1.0},
        {"weight_positive": 2.0},
        {"weight_negative": 2.0},
        {"weight_across": 2.0},
        {"weight_centre": 1.0},
        {"learning_rate": 1e-3},
        {"accumulate": 2},
        {"steps": 3},
        {"recalibrate": 3},
        {"recalibrate_crop": 64},
        {"type_weights": NOISE},
        {"severity": {"noise": 0.5}},
        {"dropout": 0.5},
        {"pairs": "mean", "weight_across": 0.0, "weight_centre": 0.0},
        {"types": (0.0, 1.0, 1.0)},
        {"share_levels": False},
        {"share_crops": False},
        {"average": 0.0},
        {"pristine": False},
        {"delivery": 1.0},
        {"bokeh": 1.0},
        {"camera": 1.0},
        {"native": 0.0, "smallest_scale": 0.6},
        {"candidates": 3},
        {"overlap": 0.9},
        {"cosine": False},
        {"betas": (0.5, 0.9)},
        {"weight_decay": 0.5},
        {"warmup": 0},
        {"repeat": {"00.png": 9.0}},
    ],
)
def test_every_setting_changes_the_model(change: dict, usual: Path, folder: Path, tmp_path: Path) -> None:
    model = train(short(**change), folder, tmp_path / "changed")
    values = load_file(model)
    assert not same_tensors(usual, model)
    assert all(torch.isfinite(value).all() for value in values.values())


def test_ctrl_c_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: Config, pristine: Path, out: Path, **_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", stopped)
    run = tmp_path / "run"
    line = ["train", "--config", "toy", "--pristine", str(tmp_path), "--out", str(run)]
    assert cli.main(line) == 130
    assert capsys.readouterr().err == (
        "qualiclip: stopped before the first checkpoint; the same command with --resume starts again\n"
    )
    run.mkdir()
    (run / "checkpoint-000000002-01234567.safetensors").touch()
    assert cli.main(line) == 130
    assert capsys.readouterr().err == (
        "qualiclip: stopped; the same command with --resume continues from "
        f"{run}/checkpoint-000000002-01234567.safetensors\n"
    )


def test_run_begins_from_an_earlier_model(
    toy: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    still = short(learning_rate=1e-9, recalibrate=0)  # so small that nothing moves
    arguments = ["--pristine", str(folder), "--start", str(toy), "--seed", "7", "--licence", "CC0"]
    config = write_config(still, tmp_path / "still.toml")
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "run"), *arguments]) == 0
    again = tmp_path / "run" / "model.safetensors"
    with safe_open(again, "pt") as file:
        written = file.metadata()
    assert f"{still.steps} steps; on {still.validation} validation photographs ranking accuracy" in caplog.text
    before = again.read_bytes()
    repeated = ["train", "--config", str(config), "--out", str(tmp_path / "run"), *arguments, "--resume"]
    assert cli.main(repeated) == 0 and again.read_bytes() == before
    assert f"the run in {tmp_path / 'run'} is finished; nothing is trained" in caplog.text
    assert written["licence"] == "CC0" and json.loads(written["training"])["seed"] == 7
    first, second = load_file(toy), load_file(again)
    assert torch.equal(first["prompts_features"], second["prompts_features"])  # another seed's would differ
    assert torch.allclose(first["visual.heads.0.fc1.weight"], second["visual.heads.0.fc1.weight"], atol=1e-6)
    with pytest.raises(SettingsError, match="--start"):
        train(dataclasses.replace(TOY, dim=4), folder, tmp_path / "d", start=toy)


def test_srcc_on_rated_pictures_is_logged(folder: Path, tmp_path: Path) -> None:
    rated = tmp_path / "rated"
    rated.mkdir()
    rows = [["image", "mos"]]
    for level in range(6):
        pixels = (degrade(synthetic_photograph(50)[None], "white_noise", level, 0)[0] * 255).round().byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(rated / f"{level}.png")
        rows.append([f"{level}.png", str(5 - level)])
    with (rated / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    ratings = read_ratings(rated / "scores.csv", rated)
    trained = train(short(), folder, tmp_path / "run", ratings=ratings)
    metric = pyiqa.create_metric("qualiclip", weights=str(trained))
    scores = [float(metric(load_image(path)[None])) for path in ratings.paths]
    # How high it is after so short a run is for the processor's rounding to say.
    assert lines_of(trained.parent)[-1]["srcc"] == pytest.approx(spearmanr(scores, ratings.opinions)[0], abs=1e-4)
    reverse = dataclasses.replace(ratings, lower_better=True)
    signs = [
        lines_of(train(short(), folder, tmp_path / name, ratings=each).parent)[1]["srcc"]
        for name, each in (("higher", ratings), ("lower", reverse))
    ]
    assert signs[0] == -signs[1] != 0
    # The last image once more, with another opinion score: it counts once, with the mean of both.
    twice = dataclasses.replace(ratings, paths=[*ratings.paths, ratings.paths[-1]], opinions=[*ratings.opinions, 7.0])
    averaged = lines_of(train(short(), folder, tmp_path / "twice", ratings=twice).parent)[-1]["srcc"]
    assert averaged == pytest.approx(spearmanr(scores, [*ratings.opinions[:-1], 3.5])[0], abs=1e-4)
    (rated / "3.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"3\.png"):  # before the first step
        train(short(), folder, tmp_path / "damaged", ratings=ratings)
    Image.new("RGB", (40, 31)).save(rated / "3.png")
    with pytest.raises(ImageError, match=r"3\.png has a side of 31 pixels; expected at least 32 to be scored"):
        train(short(), folder, tmp_path / "damaged", ratings=ratings)
    assert not (tmp_path / "damaged").exists()


def test_another_default_dtype_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(SettingsError, match=r"default dtype is torch\.float64; expected torch\.float32 to train"):
            train(short(), folder, tmp_path / "run")
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_result_does_not_depend_on_the_screen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(full, "isatty", lambda: True)  # else there are no progress bars
        monkeypatch.setattr(sys, "stderr", full)
        assert trainer.train(short(), folder, tmp_path / "run").is_file()


def test_without_a_correlation_the_log_is_still_json(folder: Path, tmp_path: Path) -> None:
    paths = paths_of(folder)
    for name, ratings in (
        ("constant", Ratings(paths[:3], [2.0] * 3, False)),
        ("one", Ratings(paths[:1], [2.0], False)),
    ):
        run = trainer.train(short(), folder, tmp_path / name, ratings=ratings).parent
        assert "NaN" not in (run / "log.jsonl").read_text()
        assert [line["srcc"] for line in lines_of(run)[1:]] == [None, None]
        assert "srcc" not in scalars(run)


def test_clip_tower_is_trained_and_its_text_side_is_not(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    # With one place left in the last layer, as for smaller crops, attention would have nothing to choose from.
    config = of_backbone("tiny-resnet", tiny_folder)
    before = torch.load(tiny_folder / "tiny-resnet.pt", weights_only=True)
    path = train(config, folder, tmp_path / "run")
    after = load_file(path)
    assert set(after) == set(before) | {"prompts_features"}
    for key, value in before.items():
        trained = key.startswith("visual.") and "running_" not in key and "num_batches" not in key
        # The positional table is not used: QualiCLIP's is off.
        moved = trained and "positional_embedding" not in key
        assert torch.equal(after[key].to(value), value) != (moved and "k_proj.bias" not in key), key
    x = torch.stack([synthetic_photograph(n) for n in range(3)])
    metric = pyiqa.create_metric("qualiclip", weights=str(path))
    assert metric.net.temperature == 2
    tuned = after | {f"clip_model.{key}": value for key, value in after.items() if key != "prompts_features"}
    reference = open_clip_scores({k: v for k, v in tuned.items() if "clip_model" not in k}, x)
    # float32 on both sides, one with BatchNorm folded into the convolutions
    assert torch.allclose(metric(x), reference, atol=1e-5)
    own = pyiqa.create_metric("qualiclip", weights=str(path), prompts=[["Nice photo.", "Ugly photo."]])
    assert not torch.allclose(own(x), metric(x))  # the text tower is in the file
    # BatchNorm counts in whole numbers, also where its statistics are averaged.
    learned = load_file(train(dataclasses.replace(config, statistics=True), folder, tmp_path / "learned"))
    counters = [key for key in before if key.endswith("num_batches_tracked")]
    assert counters and all(learned[key].dtype == before[key].dtype for key in counters)
    # ... and the run may be gone on with from the file.
    again = train(config, folder, tmp_path / "again", start=path)
    assert again.is_file()


def of_backbone(name: str, folder: Path, **more: object) -> Config:
    """The short configuration with a CLIP tower of `folder` in the mini tower's place."""
    values = {k: v for k, v in dataclasses.asdict(short()).items() if k not in ("widths", "depths", "hidden", "dim")}
    values |= {"backbone": name, "weights": str(folder / f"{name}.pt"), "statistics": False, "recalibrate": 0}
    return make_config(values | {"crops": [96], "learning_rate": 1e-4} | more)


# ... which take no part: the positional table, and the key's bias of an attention pool.
UNUSED = {"mini": 0, "tiny-resnet": 2, "tiny-convnext": 0, "tiny-mlp": 0, "tiny-fastvit": 0}


@pytest.mark.parametrize("backbone", ["mini", "tiny-resnet", "tiny-vit", *upstream.families(Path())])
def test_all_that_is_trained_has_a_gradient(backbone: str, folder: Path, families_folder: Path) -> None:
    """Otherwise several processes would wait for one another."""
    config = make_config(dataclasses.asdict(short()) | {"crops": [96]})
    if backbone != "mini":
        config = of_backbone(backbone, families_folder)
    aligned = build(config, seed=0)
    batch = batch_of(Stacks(paths_of(folder), config, seed=0)[0], config)
    alignment_losses(aligned.tower, aligned, batch, config)["loss"].backward()
    without = [name for name, p in aligned.tower.named_parameters() if p.requires_grad and p.grad is None]
    still = [name for name, p in aligned.tower.named_parameters() if not p.requires_grad]
    assert not without and len(still) == UNUSED.get(backbone, 1)


@pytest.mark.parametrize("backbone", ["tiny-convnext", "tiny-siglip", "tiny-coca", "tiny-bert"])
def test_any_tower_of_open_clip_is_trained_and_is_a_metric(
    backbone: str, folder: Path, tmp_path: Path, families_folder: Path
) -> None:
    config = of_backbone(backbone, families_folder)
    path = train(config, folder, tmp_path / "run")
    before, after = torch.load(families_folder / f"{backbone}.pt"), load_file(path)
    assert set(after) == set(before) | {"prompts_features"}
    for key, value in before.items():
        moved = key.startswith("visual.") and not key.endswith(("pos_embed", "positional_embedding"))
        assert torch.equal(after[key], value) != moved, key
    x = torch.stack([synthetic_photograph(n) for n in range(3)])
    metric = pyiqa.create_metric("qualiclip", weights=str(path))
    aligned = build(config, seed=0, start=path)
    with torch.no_grad():
        c = similarities(aligned.tower.eval()(x), aligned.anchors, aligned.unit)
        expected = (c * math.exp(aligned.logit_scale) / 2).softmax(-1)[..., 0].mean(1, keepdim=True)
    assert torch.allclose(metric(x), expected, atol=1e-5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata["tower"])
    assert said == {"mean": list(MEAN), "std": list(STD), "quick_gelu": False}
    # What the file says holds, whatever the name's own are by then.
    save_file(after, tmp_path / "other.safetensors", metadata | {"tower": json.dumps(said | {"mean": [0.5, 0.5, 0.5]})})
    other = pyiqa.create_metric("qualiclip", weights=str(tmp_path / "other.safetensors"))
    assert other.net.describe()["pixel_mean"] == [0.5] * 3 and not torch.allclose(other(x), metric(x))
    own = pyiqa.create_metric("qualiclip", weights=str(path), prompts=[["Good photo.", "Bad edges."]])
    assert not torch.allclose(own(x), metric(x))  # the text side is in the file


@pytest.mark.parametrize("backbone", ["mini", "tiny-resnet", "tiny-vit", "tiny-convnext"])
def test_activations_may_be_computed_again(backbone: str, folder: Path, tmp_path: Path, families_folder: Path) -> None:
    """The same model in less memory."""
    values = dataclasses.asdict(short()) | {"crops": [96]}
    if backbone != "mini":
        values = dataclasses.asdict(of_backbone(backbone, families_folder, statistics=backbone == "tiny-resnet"))
    models, kept = [], []
    for recompute in (False, True):
        config = make_config(values | {"recompute": recompute})
        models.append(train(config, folder, tmp_path / str(recompute)))
        aligned = build(config, seed=0)
        batch = batch_of(Stacks(paths_of(folder), config, seed=0)[0], config)
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            alignment_losses(aligned.tower.train(), aligned, batch, config)
        kept.append(sum(storages.values()))
    assert same_tensors(*models)
    assert kept[1] < 0.7 * kept[0]


def test_text_side_with_one_tensor_under_two_names_is_written(
    folder: Path, tmp_path: Path, families_folder: Path
) -> None:
    """As Hugging Face's T5 and M2M100 have it, of mt5-base-ViT-B-32 and nllb-clip."""
    state = torch.load(families_folder / "tiny-bert.pt")
    name = next(key for key in state if "word_embeddings" in key)
    torch.save(state | {"text.shared": state[name]}, tmp_path / "tied.pt")
    config = of_backbone("tiny-bert", families_folder, weights=str(tmp_path / "tied.pt"), steps=1)
    after = load_file(train(config, folder, tmp_path / "run"))
    assert torch.equal(after["text.shared"], after[name])


def test_recomputing_would_let_statistics_learn_twice(families_folder: Path) -> None:
    with pytest.raises(SettingsError, match="expected statistics = false"):
        build(of_backbone("tiny-fastvit", families_folder, statistics=True, recompute=True), seed=0)


def open_clip_scores(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Scores by open_clip's own layers: 32 features of a tower without a positional table, temperature 2."""
    import open_clip
    import torch.nn.functional as F

    features = state.pop("prompts_features")
    model = open_clip.CLIP(**upstream.TINY_RESNET).eval()
    model.load_state_dict(state)
    visual, mean, std = model.visual, *(torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pool = visual.attnpool
    with torch.no_grad():
        y = visual.stem((x - mean) / std)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            y = stage(y)
        tokens = y.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        pooled, _ = F.multi_head_attention_forward(
            tokens, tokens, tokens, tokens.shape[-1], pool.num_heads, None,
            torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
            pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
            k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight, need_weights=False,
        )  # fmt: skip
        logits = F.normalize(pooled[0], dim=-1) @ features.T * state["logit_scale"].exp() / 2
        return logits.unflatten(1, (-1, 2)).softmax(-1)[..., 0].mean(1, keepdim=True)


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP


# ---------------------------------------------------------------- kill and resume


def command(config: Path, folder: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--config", str(config), "--pristine", str(folder), "--out", str(out), "--device", "cpu", *more]


def fail_at(patch: pytest.MonkeyPatch, step: int, kept: int = 0) -> None:
    """Let the loss of a step be NaN, in a run that starts after step `kept`."""
    calls = iter([1.0] * (step - 1 - kept) + [math.nan])
    patch.setattr(losses_module, "centre_loss", lambda difference: centre_loss(difference) * next(calls))


def steps_kept(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*.safetensors")), default=0)


def test_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    config = short(steps=24, validate_every=8, checkpoint_every=4)
    expected = trainer.train(config, folder, tmp_path / "whole", seed=5)
    file, run = write_config(config, tmp_path / "config.toml"), tmp_path / "killed"
    arguments = command(file, folder, run, "--seed", "5", "--resume")
    # As long as the next validation, the next checkpoint and the end of the run may be what is hit.
    for least, later in ((4, 0.0), (12, 0.11)):
        process = Fork(arguments)
        while steps_kept(run) < least and process.is_running():
            time.sleep(0.005)
        time.sleep(later)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (run / "model.safetensors").exists()
    assert Fork(arguments).wait() == 0
    assert same_bytes(expected, run / "model.safetensors")
    time_free = [
        [{k: v for k, v in line.items() if k not in ("seconds", "waiting")} for line in lines_of(path)]
        for path in (expected.parent, run)
    ]
    assert time_free[0] == time_free[1]
    assert scalars(run)["loss/loss"] == scalars(expected.parent)["loss/loss"]  # each step once
    # Done is done: nothing is trained again, and another seed's run is another run.
    before = (run / "model.safetensors").stat().st_mtime_ns
    assert trainer.train(config, folder, run, seed=5, resume=True) == run / "model.safetensors"
    assert (run / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SettingsError, match="another run"):
        trainer.train(config, folder, run, seed=6, resume=True)


class Payload:
    """What a pickle makes a directory of when it is opened carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def stopped_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after its checkpoint of step 2; its tests take copies."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(loop.DivergedError):
            train(short(), folder, run)
    return run


@pytest.mark.parametrize("way", ["pickle", "zip"])
def test_nothing_in_a_checkpoint_is_executed(way: str, stopped_run: Path, folder: Path, tmp_path: Path) -> None:
    """Whatever file of the checkpoint is replaced, and however it is pickled."""
    (checkpoint,) = stopped_run.glob("checkpoint-*")
    files = [path for path in (checkpoint, *checkpoint.rglob("*")) if path.is_file()]
    assert files
    for number, path in enumerate(files):
        run, ran = tmp_path / str(number), tmp_path / f"executed {path.name}"
        shutil.copytree(stopped_run, run)
        hostile = run / path.relative_to(stopped_run)
        if way == "pickle":
            hostile.write_bytes(pickle.dumps(Payload(ran)))
        else:
            torch.save(Payload(ran), hostile)
        with pytest.raises(WeightsError, match=r"is damaged or not a checkpoint \(.*\); delete it") as caught:
            train(short(), folder, run, resume=True)
        assert "\n" not in str(caught.value) and not ran.exists(), path


def rewrite(path: Path, **change: object) -> None:
    """Write a checkpoint with some tensors or metadata replaced; None leaves one out."""
    with safe_open(path, "pt") as file:
        values = {**{name: file.get_tensor(name) for name in file.keys()}, **file.metadata()}  # noqa: SIM118
    progress = json.loads(values["progress"])
    changed = {key: change.pop(key) for key in list(change) if key in progress}
    values |= {"progress": json.dumps(progress | changed)} | change
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    write_safetensors(path, tensors, {key: value for key, value in values.items() if isinstance(value, str)})


def small_state(seed: int = 0) -> State:
    """Of a run whose tower is three layers, the last of which is not trained; with fp16's scaler, on a CPU."""
    torch.manual_seed(seed)
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 2))
    tower[2].requires_grad_(False)
    tower = tower.to(memory_format=torch.channels_last)
    parameters = [p for p in tower.parameters() if p.requires_grad]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15 + seed, growth_interval=7)
    return State(tower, copy.deepcopy(tower), optimiser, scaler, Progress("a" * 64))


def stepped_state() -> State:
    state = small_state(1)
    for _ in range(3):
        state.optimiser.zero_grad()
        state.scaler.scale(state.tower[:2](torch.rand(2, 3, 8, 8)).square().sum()).backward()
        state.scaler.step(state.optimiser)
        state.scaler.update()
    state.progress = Progress("a" * 64, 3, 1 / 3, 77, 2, {"loss": 0.1, "spent": 1e-9})
    return state


def test_checkpoint_keeps_every_value(tmp_path: Path) -> None:
    fresh, state = small_state(0), stepped_state()
    read_checkpoint(write_checkpoint(tmp_path, fresh), small_state(2), 3)  # before the first step
    path = write_checkpoint(tmp_path, state)
    assert list(tmp_path.iterdir()) == [path]
    read_checkpoint(path, fresh, 3)
    assert fresh.progress == state.progress and fresh.scaler.state_dict() == state.scaler.state_dict()
    tensors = [each.model_tensors() | each.optimiser_tensors() for each in (fresh, state)]
    assert len(tensors[0]) == 2 * 9 + 4 * 3 and tensors[0].keys() == tensors[1].keys()
    for key, value in tensors[1].items():
        assert torch.equal(tensors[0][key], value) and tensors[0][key].stride() == value.stride(), key
    with pytest.raises(WeightsError, match="gradient scaler has other entries"):
        read_checkpoint(path, dataclasses.replace(fresh, scaler=None), 3)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "is damaged or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "its format is None, not 'qualiclip-pyiqa-checkpoint/1'"),
        (lambda path: rewrite(path, **{"ema.0.bias": torch.ones(3)}), r"'ema.0.bias' has shape \[3\] .* not \[4\] "),
        (lambda path: rewrite(path, **{"tower.0.bias": None}), "'tower.0.bias' is missing"),
        (lambda path: rewrite(path, **{"tower.hook": torch.ones(1)}), "'tower.hook' is not of this run"),
        (lambda path: rewrite(path, **{"optimiser.0.bias.step": None}), "'optimiser.0.bias.step' is missing"),
        (
            lambda path: rewrite(path, **{"optimiser.0.bias.exp_avg": torch.zeros(4).half()}),
            r"'optimiser.0.bias.exp_avg' has .* torch.float16, not .* torch.float32",
        ),
        (lambda path: rewrite(path, progress=None), "KeyError: 'progress'"),
        (lambda path: rewrite(path, progress="{"), "JSONDecodeError"),
        (lambda path: rewrite(path, progress="[" * 100_000), "RecursionError"),
        (lambda path: rewrite(path, progress="[1]"), "progress has other entries"),
        (lambda path: rewrite(path, step=-1), "not counted in whole numbers"),
        (lambda path: rewrite(path, log_bytes=0.5), "not counted in whole numbers"),
        (lambda path: rewrite(path, step=4), "progress is 4 of 3 steps"),
        (lambda path: rewrite(path, seconds=math.nan), "a value that is not a number"),
        (lambda path: rewrite(path, sums={"step": 1.0}), "unknown sums"),
        (lambda path: rewrite(path, scaler='{"scale": 2.0}'), "gradient scaler has other entries"),
        (
            lambda path: path.rename(path.with_suffix("")) and path.symlink_to(path.with_suffix("")),
            "not a regular file",
        ),
        (lambda path: path.unlink() or path.mkdir(), "not a regular file"),
        (lambda path: path.unlink() or os.mkfifo(path), "not a regular file"),
    ],
)
def test_checkpoint_that_does_not_fit_is_one_line_and_changes_nothing(
    spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    path, state = write_checkpoint(tmp_path, stepped_state()), small_state()
    spoil(path)
    before = copy.deepcopy(state)
    with pytest.raises(WeightsError, match=rf"checkpoint-000000003-aaaaaaaa\.safetensors .*{said}") as caught:
        read_checkpoint(path, state, 3)
    assert "\n" not in str(caught.value)
    assert state.progress == before.progress and not state.optimiser_tensors()
    assert all(torch.equal(value, before.model_tensors()[key]) for key, value in state.model_tensors().items())


def test_checkpoint_that_cannot_be_written_leaves_the_last_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", checkpoint_module.write_safetensors

    def full(path: Path, tensors: dict, metadata: dict) -> None:
        if steps_kept(run) == 2:
            Path(f"{path}.0123456789ab.part").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_safetensors", full)
        with pytest.raises(OSError, match=r"cannot be written \(No space .*\); make room, then pass --resume"):
            train(short(), folder, run)
    assert steps_kept(run) == 2
    resumed = train(short(), folder, run, resume=True)
    assert same_bytes(resumed, train(short(), folder, tmp_path / "whole"))
    assert not list(run.glob("checkpoint*"))


def test_log_of_a_run_that_stops_twice_has_each_line_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(short(), steps=6, validate_every=100)
    for step in (3, 5):  # each after a checkpoint, whose log has no line about it
        with monkeypatch.context() as patch:
            fail_at(patch, step, steps_kept(run))
            with pytest.raises(loop.DivergedError, match=f"at step {step};"):
                train(config, folder, run, resume=True)
        assert [line.get("stopped") for line in lines_of(run)] == [None, "centre"]
    train(config, folder, run, resume=True)
    assert [(line.get("step"), line.get("stopped")) for line in lines_of(run)] == [(None, None), (6, None), (6, None)]


# Where a process is killed: in the first step, while a checkpoint or the model is written, and before the last
# checkpoint is deleted.
FATES = """
import os, signal
from pathlib import Path
from qualiclip_pyiqa.training import loop, losses

place, delete = Path.replace, Path.unlink
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def when_it_is_written(name):
    Path.replace = lambda path, to: die() if path.name.startswith(name) else place(path, to)
def before_the_last_checkpoint_is_deleted():
    Path.unlink = lambda path: die() if path.name.startswith("checkpoint-000000004") else delete(path)
"""


def test_run_killed_at_every_stage_is_the_same_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    config, run, said = write_config(short(), tmp_path / "config.toml"), tmp_path / "run", tmp_path / "said"
    line = command(config, folder, run, "--resume")
    left = []
    for fate in (
        "losses.centre_loss = die",
        "when_it_is_written('checkpoint-000000004')",
        "loop.recalibrate = die",
        "when_it_is_written('model.safetensors')",
        "before_the_last_checkpoint_is_deleted()",
    ):
        assert Fork(line, before=FATES + fate, stderr=said).wait() == -signal.SIGKILL, said.read_text()[-1000:]
        names = " ".join(sorted(path.name for path in run.iterdir()))
        left.append(re.sub(r"(?<=00000[24])-\w+|(?<=tensors.)[0-9a-f]{12}| tensorboard", "", names))
    two, four = "checkpoint-000000002.safetensors", "checkpoint-000000004.safetensors"
    assert left == [
        "log.jsonl",
        f"{two} {four}..part log.jsonl",
        f"{four} log.jsonl",
        f"{four} log.jsonl model.safetensors..part",
        f"{four} log.jsonl model.safetensors",
    ]
    finished = trainer.train(short(), folder, run, resume=True)
    assert {path.name for path in run.iterdir()} == {"log.jsonl", "model.safetensors", "tensorboard"}
    assert same_bytes(finished, train(short(), folder, tmp_path / "whole"))


def test_resume_refuses_another_run_and_a_fresh_one_an_old_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = tmp_path / "run", iter([0.0, 0.0, math.nan])
    with monkeypatch.context() as patch:
        patch.setattr(losses_module, "centre_loss", lambda difference: difference.mean() * next(calls))
        with pytest.raises(loop.DivergedError, match="step 3"):
            train(short(), folder, run)
    assert steps_kept(run) == 2
    with pytest.raises(SettingsError, match="pass --resume"):
        train(short(), folder, run)
    for change in ({"margin_rank": 0.2}, {"widths": (8, 8, 8, 8)}, {"accumulate": 2}):
        with pytest.raises(SettingsError, match="belongs to another run"):
            train(short(**change), folder, run, resume=True)
    (run / "log.jsonl").rename(run / "lost.jsonl")
    with pytest.raises(SettingsError, match="holds checkpoint-000000002-"):
        train(short(), folder, run)
    assert train(short(), folder, run, resume=True).is_file()
    assert b"\0" not in (run / "log.jsonl").read_bytes()  # it began anew


# In each of two processes: a run; one with dropout; and the same with a stop after its checkpoint of step 2.
TOGETHER = """
import math, os, sys
from dataclasses import replace
from itertools import count
from pathlib import Path
import torch
from torch import distributed
from qualiclip_pyiqa.training import losses
from qualiclip_pyiqa.training.config import load_config
from qualiclip_pyiqa.training.loop import DivergedError
from qualiclip_pyiqa.training.run import train

torch.set_num_threads(1)
config, folder, out, numbers = load_config(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), count()
def run(config, name, **options):
    meeting, rank = f"file://{out}/meeting{next(numbers)}", int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        return train(config, folder, out / name, device="cpu", **options)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()

run(config, "two")
run(replace(config, dropout=0.5), "whole")
centre, calls = losses.centre_loss, iter([1, 1, math.nan])
losses.centre_loss = lambda difference: centre(difference) * next(calls)
try:
    run(replace(config, dropout=0.5), "stopped")
except DivergedError:
    losses.centre_loss = centre
run(replace(config, dropout=0.5), "stopped", resume=True)
"""


def test_two_processes_train_what_one_would_accumulate_and_resume(folder: Path, tmp_path: Path) -> None:
    two = write_config(short(recalibrate=0), tmp_path / "two.toml")
    # What `torchrun` sets.
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    said = tmp_path / "said"
    processes = [
        Fork(
            [str(two), str(folder), str(tmp_path)],
            before=TOGETHER,
            command=False,
            environment=common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=said,
        )
        for rank in "01"
    ]
    assert [process.wait() for process in processes] == [0, 0], said.read_text()[-2000:]
    two_processes, whole, stopped = (tmp_path / name / "model.safetensors" for name in ("two", "whole", "stopped"))
    assert lines_of(tmp_path / "two")[0]["processes"] == 2
    assert same_bytes(whole, stopped) and not same_tensors(whole, two_processes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two; hinges, AdamW and normalisation make much of another order of sums
    try:
        one = train(short(recalibrate=0, accumulate=2), folder, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    half = train(short(recalibrate=0), folder, tmp_path / "half")
    # AdamW makes a whole step of a gradient that is nothing but rounding: hence nearly all values, within a hundredth
    # of what the rate of 5e-3 moves them by in four steps.
    assert share_alike(one, two_processes) > 0.98 > 0.5 > share_alike(one, half)


def share_alike(first: Path, second: Path) -> float:
    a, b = load_file(first), load_file(second)
    learned = [key for key in a if key.endswith(("weight", "bias"))]
    near = torch.cat([((a[key] - b[key]).abs() < 2e-4).flatten() for key in learned])
    return near.float().mean().item()


# ---------------------------------------------------------------- what may go wrong


def test_held_out_and_excluded_photographs_are_not_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "held_out"], ["a.png", "1"], ["b.png", "0"]])
    (tmp_path / "skip.txt").write_text("c.png\n\n")
    (tmp_path / "._b.png").write_bytes(b"what macOS leaves beside b.png on other file systems")
    (tmp_path / "B.GIF").write_bytes((tmp_path / "b.png").read_bytes())  # every suffix that is scored is trained on
    assert [p.name for p in list_photographs(tmp_path)] == ["B.GIF", "b.png", "c.png"]
    assert [p.name for p in list_photographs(tmp_path, tmp_path / "skip.txt")] == ["B.GIF", "b.png"]


def test_lists_that_name_other_files_do_not_pass_unseen(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "sub" / "a.png")
    (tmp_path / "skip.txt").write_text("a.png\n")  # of another folder
    with pytest.raises(SettingsError, match=r"skip\.txt: a\.png is not an image in .*; expected paths relative to"):
        list_photographs(tmp_path, tmp_path / "skip.txt")
    # Held-out pictures need not be downloaded, so they are only counted.
    (tmp_path / "manifest.csv").write_text("file,held_out\nsub/b.png,1\nsub/c.png,0\n")
    assert [p.name for p in list_photographs(tmp_path)] == ["a.png"]
    assert "1 held-out images of manifest.csv are not in" in caplog.text and "sub/b.png" in caplog.text
    with pytest.raises(SettingsError, match="repeat names 'portrait', which is not in"):
        train(short(repeat={"portrait": 3.0}), folder, tmp_path / "run")


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour that is small as a file whatever its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # of which Pillow warns, and which it refuses
def test_photograph_of_too_many_pixels_is_one_line_at_once(side: int, folder: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    (pristine / "big.png").write_bytes(png_of(side, side))
    with pytest.raises(ImageError, match=r"big\.png is too large.*pixels.*; leave it out \(--exclude\)$"):
        train(short(), pristine, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_stops_with_step_and_cause(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(losses_module, "centre_loss", lambda difference: difference.mean() * math.nan)
        with pytest.raises(loop.DivergedError, match=r"centre .* step 1;"):
            train(TOY, folder, tmp_path / "loss")
    assert lines_of(tmp_path / "loss")[-1] == {"seconds": 0.0, "step": 1, "stopped": "centre"}
    # A finite loss whose gradient is not: the square root of zero.
    monkeypatch.setattr(losses_module, "centre_loss", lambda difference: (difference.mean() * 0).abs().sqrt())
    with pytest.raises(loop.DivergedError, match=r"gradient of the loss is (nan|inf) at step 1;"):
        train(TOY, folder, tmp_path / "gradient")
    assert lines_of(tmp_path / "gradient")[-1]["stopped"] == "gradient"
    assert not list(tmp_path.rglob("model.safetensors"))


def test_overflows_of_fp16_are_left_out_but_not_for_ever() -> None:
    progress = Progress("", step=7)
    for _ in range(2):
        for norm in [math.inf, math.nan] * (loop.OVERFLOWS // 2) + [1.0]:
            assert not loop.is_lost(norm, progress, "fp16")
    for _ in range(loop.OVERFLOWS):
        assert not loop.is_lost(math.nan, progress, "fp16")
    assert loop.is_lost(math.nan, progress, "fp16")
    assert progress.overflows == loop.OVERFLOWS + 1
    for precision in ("fp32", "bf16"):
        assert loop.is_lost(math.inf, Progress(""), precision)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"levels": 6}, "levels"),
        ({"crops": [16]}, "crops"),
        ({"half": 1}, "half"),
        ({"native": 1.5}, "native"),
        ({"stacks": 1}, "stacks"),
        ({"types": []}, "types"),
        ({"types": [0, 0]}, "types"),
        ({"pairs": "all"}, "each or mean"),
        ({"precision": "int8"}, "fp32, bf16 or fp16"),
        ({"degrade_on": "gpu"}, "workers or device"),
        ({"betas": [0.9]}, "betas"),
        ({"pristine": False, "levels": 1}, "levels"),
        ({"backbone": "RN50"}, "mini where widths"),
        ({"backbone": "RN50", "widths": [], "depths": [], "hidden": 0, "dim": 0}, "weights"),
        ({"statistics": False}, "statistics"),
        ({"steps": math.inf}, "steps"),
        ({"margin_rank": math.nan}, "margin_rank"),
        ({"weights": "RN50"}, "weights"),
        ({"weight_consistency": 0, "weight_positive": 0, "weight_negative": 0}, "weight_positive"),
        ({"repeat": {"a": 0.5}}, "repeat"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"type_weights": {"smudge": 1}}, "smudge"),
        ({"type_weights": {"haze": 1}}, "types of the banks kadid as keys, not 'haze'"),
        ({"banks": []}, "one or more of kadid, camera, each once"),
        ({"banks": ["camera", "camera"]}, "one or more of kadid, camera, each once"),
        ({"banks": ["kamera"]}, "one or more of kadid, camera, each once"),
        ({"severity": {"smudge": 1}}, "groups as keys"),
        ({"severity": {"noise": -1}}, "at least 0"),
        ({"dropout": 1}, "0 to less than 1"),
        ({"type_weights": dict.fromkeys(DEGRADATIONS, 0)}, "0 groups with a weight above zero"),
        ({"types": [0, 0, 1], "type_weights": NOISE | {"jpeg": 1}}, "more than the 2 groups with a weight above zero"),
    ],
)
def test_hostile_configuration_is_one_clear_error(change: dict, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint) as caught:
        make_config(dataclasses.asdict(TOY) | change)
    assert "\n" not in str(caught.value)


def test_missing_key_file_and_photographs_are_errors(tmp_path: Path, folder: Path) -> None:
    values = dataclasses.asdict(TOY)
    del values["steps"]
    with pytest.raises(SettingsError, match="missing steps"):
        make_config(values)
    with pytest.raises(SettingsError, match="expected cpu"):
        train(TOY, folder, tmp_path / "out", device="tpu")
    with pytest.raises(SettingsError, match="mini, paper, small-gpu, toy"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(SettingsError, match="not TOML"):
        load_config(tmp_path / "broken.toml")
    with pytest.raises(SettingsError, match="not a folder"):
        train(TOY, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SettingsError, match="fp16, which needs a GPU"):
        train(short(precision="fp16"), folder, tmp_path / "out", device="cpu")
    with pytest.raises(SettingsError, match="photographs of at least"):
        train(dataclasses.replace(TOY, validation=50), folder, tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"x\.png"):
        train(TOY, tmp_path / "bad", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be created"):
        train(TOY, folder, tmp_path / "file")


@pytest.mark.parametrize("workers", [0, 1])
def test_photograph_that_ends_early_is_one_line(workers: int, folder: Path, tmp_path: Path) -> None:
    for path in paths_of(folder):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-4000])  # the header is whole
    whole = sorted(path.name for path in paths_of(folder))[:3]
    for name in whole:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    Image.new("RGB", (40, 20)).save(tmp_path / "icon.png")  # too small to be scored, so not in question
    config = dataclasses.replace(short(workers=workers), validation=1)
    seed = next(s for s in range(100) if first_of_split(tmp_path, s) in whole)
    with pytest.raises(ImageError, match=r"^\S+\.png .*; leave it out \(--exclude\)$"):
        train(config, tmp_path, tmp_path / "run", seed=seed)


def first_of_split(folder: Path, seed: int) -> str:
    """The photograph that a run validates on."""
    paths = [path for path in list_photographs(folder) if path.name != "icon.png"]
    random.Random(f"split {seed}").shuffle(paths)
    return paths[0].name


def test_a_second_run_chooses_its_device_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer.create_accelerator(TOY, tmp_path, "cpu").device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")  # in a GPU's place
    other = trainer.create_accelerator(dataclasses.replace(TOY, precision="bf16"), tmp_path, None)
    assert (other.device.type, other.mixed_precision) == ("meta", "bf16")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    # Where Accelerate's state cannot be forgotten, the run is refused.
    monkeypatch.delattr(trainer.AcceleratorState, "_reset_state")
    with pytest.raises(SettingsError, match="precision fp32 or the device cannot be used"):
        trainer.create_accelerator(TOY, tmp_path, "cpu")
    monkeypatch.undo()
    assert trainer.create_accelerator(TOY, tmp_path, "cpu").device.type == "cpu"


def test_command_line_reports_errors_by_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", "toy", "--pristine", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out and "nowhere is not a folder" in said.err and "Traceback" not in said.err
    for useless in (["--images", str(tmp_path)], ["--lower-better"]):
        assert cli.main([*arguments, *useless]) == 2
        assert f"{useless[0]} has no effect without --ratings" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert (config.backbone == "mini") != bool(config.weights)
