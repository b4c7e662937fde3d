"""The degradation bank, the alignment losses, the small tower and its training."""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.mini import BLOCKS, MiniTower, log_energies
from qualiclip_pyiqa.prompts import QUALITY_SETS
from qualiclip_pyiqa.training import degradations
from qualiclip_pyiqa.training import train as trainer
from qualiclip_pyiqa.training.config import CONFIGS, load_config, make_config
from qualiclip_pyiqa.training.degradations import DEGRADATIONS, LEVELS, degrade, lab_to_rgb, rgb_to_lab, strength
from qualiclip_pyiqa.training.losses import across_loss, centre_loss, consistency_loss, ranking_loss
from qualiclip_pyiqa.training.stacks import Recipe, Stacks, list_photographs

TOY = load_config("toy")


def synthetic_photograph(seed: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """Coloured shapes with sharp edges over a 1/f texture: (3, H, W) in 0..1."""
    rng = np.random.default_rng(seed)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    radius = np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    texture = np.fft.ifft2(np.fft.fft2(rng.standard_normal((3, height, width))) / radius).real
    picture = 0.5 + 0.12 * texture / texture.std()
    yy, xx = np.mgrid[:height, :width]
    for _ in range(12):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 20)
        inside = np.hypot(yy - cy, xx - cx) < r if rng.random() < 0.5 else (abs(yy - cy) < r) & (abs(xx - cx) < r / 2)
        picture[:, inside] = 0.5 * picture[:, inside] + 0.5 * rng.uniform(0.1, 0.9, (3, 1))
    return torch.from_numpy(picture.clip(0.02, 0.98)).float()


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


# ---------------------------------------------------------------- degradations


def test_bank_has_24_types_in_7_groups() -> None:
    assert len(DEGRADATIONS) == 24
    assert len({d.group for d in DEGRADATIONS.values()}) == 7
    assert [name for name, d in DEGRADATIONS.items() if not d.monotone] == ["mean_shift", "linear_contrast"]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradation_keeps_shape_and_range_and_input(name: str, picture: torch.Tensor) -> None:
    before = picture.clone()
    for level in range(1, LEVELS + 1):
        result = degrade(picture, name, level, seed=3)
        assert result.shape == picture.shape and result.dtype == picture.dtype
        assert result.min() >= 0 and result.max() <= 1 and torch.isfinite(result).all()
        assert torch.equal(result, degrade(picture, name, level, seed=3))
        result.zero_()  # a view of the input would change it
        assert torch.equal(picture, before)
    small = torch.rand(1, 3, 32, 41)
    assert degrade(small, name, LEVELS, seed=0).shape == small.shape


@pytest.mark.parametrize("name", [name for name, d in DEGRADATIONS.items() if d.monotone])
def test_psnr_falls_with_the_level(name: str) -> None:
    # 192 pixels: a count of patches or squares must not saturate the picture.
    picture = torch.stack([synthetic_photograph(seed, 192, 192) for seed in (1, 2, 3)])
    errors = [
        float((degrade(picture, name, level, seed=5) - picture).square().mean()) for level in range(1, LEVELS + 1)
    ]
    assert all(a < b for a, b in itertools.pairwise(errors)), errors


def test_random_choices_are_shared_as_documented(picture: torch.Tensor) -> None:
    pair = picture[:1].expand(2, -1, -1, -1)
    same = degrade(pair, "motion_blur", 5, seed=1)
    assert torch.equal(same[0], same[1])  # one angle for all
    noisy = degrade(pair, "white_noise", 5, seed=1)
    assert not torch.equal(noisy[0], noisy[1])  # noise for each
    assert not torch.equal(degrade(pair, "motion_blur", 5, seed=2), same)
    # The same pattern at two levels, as far as the range lets it.
    grey = torch.full((1, 3, 64, 64), 0.5)
    weak, strong = degrade(grey, "white_noise", 1, seed=4) - 0.5, degrade(grey, "white_noise", 5, seed=4) - 0.5
    assert torch.allclose(strong, weak * math.sqrt(10), atol=1e-5)
    salted = degrade(grey, "impulse_noise", 1, seed=4) != 0.5
    assert (degrade(grey, "impulse_noise", 5, seed=4) != 0.5)[salted].all()


def test_strengths_are_those_of_the_table() -> None:
    grey = torch.full((1, 3, 256, 256), 0.5)
    assert degrade(grey, "white_noise", 5, seed=0).var().item() == pytest.approx(0.01, rel=0.02)  # 200k samples
    assert degrade(grey, "multiplicative_noise", 5, seed=0).var().item() == pytest.approx(0.05 / 4, rel=0.02)
    assert (degrade(grey, "impulse_noise", 5, seed=0) != 0.5).float().mean().item() == pytest.approx(0.03, rel=0.05)
    for name, level, expected in [
        ("brighten", 2, 0.6),
        ("darken", 4, 0.3),
        ("mean_shift", 5, 0.35),
        ("nonlinear_contrast", 5, 0.5),
    ]:
        assert torch.allclose(degrade(grey, name, level, seed=0), torch.tensor(expected), atol=1e-6)
    for level, amount in enumerate((0, 0.15, -0.4, 0.3, -0.6), 1):
        for x, y in [(0.3, 0.25 - amount / 4), (0.5, 0.5), (0.7, 0.75 + amount / 4)]:
            assert degrade(torch.full((1, 3, 32, 32), x), "linear_contrast", level, 0).mean().item() == pytest.approx(
                y, abs=1e-5
            )
    assert degrade(torch.rand(1, 3, 64, 64), "quantization", 5, seed=0).unique().numel() == 7
    assert torch.equal(degrade(grey, "mean_shift", 1, seed=0), grey)


def test_blur_kernels_keep_the_mean_and_have_their_width() -> None:
    point = torch.zeros(1, 3, 65, 65)
    point[..., 32, 32] = 1
    rows = torch.arange(65.0) - 32
    for name in ("gaussian_blur", "lens_blur", "motion_blur"):
        assert degrade(point, name, 5, seed=0).sum().item() == pytest.approx(3, abs=1e-3)
    spread = degrade(point, "gaussian_blur", 4, seed=0)[0, 0].sum(1)
    # sigma 2 in a kernel of 9: cut off at +-4.5 a Gaussian's standard deviation is 1.85
    assert float((spread * rows.square()).sum()) ** 0.5 == pytest.approx(1.85, abs=0.02)
    line = degrade(point, "motion_blur", 5, seed=0)[0, 0]
    variance = (line * (rows[:, None].square() + rows.square())).sum().item()
    assert variance == pytest.approx(10**2 / 12, abs=0.5)  # a uniform segment of length 10, splatted


@given(st.integers(0, 2**31), st.sampled_from(sorted(DEGRADATIONS)), st.integers(1, LEVELS))
@settings(max_examples=25, deadline=None)
def test_any_picture_stays_in_range(seed: int, name: str, level: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, 33, 47, generator=generator).round(decimals=seed % 3)
    result = degrade(x, name, level, seed)
    assert result.shape == x.shape and result.min() >= 0 and result.max() <= 1


def test_levels_may_be_fractions(picture: torch.Tensor) -> None:
    assert strength("gaussian_blur", 2) == 0.5 and strength("gaussian_blur", 5) == 5
    assert strength("gaussian_blur", 4.5) == pytest.approx(3.5)
    assert strength("jpeg", 1.5) == pytest.approx(39.5)
    for level in (1, 2, 3, 4, 5):
        assert strength("color_shift", level) == DEGRADATIONS["color_shift"].levels[level - 1]
    error = [
        float((degrade(picture, "lens_blur", level, 0) - picture).square().mean()) for level in (2, 2.5, 3, 3.7, 4)
    ]
    assert all(a < b for a, b in itertools.pairwise(error))
    assert torch.equal(degrade(picture, "white_noise", 0, 0), picture)
    for level in (-1, 0.5, 5.1):
        with pytest.raises(SettingsError, match="expected a number from 1 to 5"):
            degrade(picture, "jpeg", level, 0)


def test_contact_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    photo, sheet = tmp_path / "photo.png", tmp_path / "sheet.png"
    pixels = (synthetic_photograph(0, 200, 260) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(photo)
    monkeypatch.setattr("sys.argv", ["degradations", str(photo), "-o", str(sheet)])
    assert degradations.main() == 0
    with Image.open(sheet) as drawn:
        cells = np.asarray(drawn)[24:, 190:].reshape(24, 162, 6, 162, 3)[:, :160, :, :160].swapaxes(1, 2)
    # Every row begins with the photograph's middle, and no cell is empty or the same as its neighbour but where the
    # table says so (mean shift and saturation 2 begin with the identity, a blur of sigma 0.1 rounds to it).
    assert all(np.array_equal(row[0], cells[0, 0]) for row in cells)
    assert np.array_equal(cells[0, 0], pixels[20:180, 50:210])
    same = {
        (n, k) for n, row in zip(DEGRADATIONS, cells, strict=True) for k in range(5) if np.array_equal(*row[k : k + 2])
    }
    assert same <= {("mean_shift", 0), ("color_saturation_2", 0), ("gaussian_blur", 0), ("linear_contrast", 0)}
    monkeypatch.setattr("sys.argv", ["degradations", str(tmp_path / "none.png"), "-o", str(sheet)])
    assert degradations.main() == 1
    assert "does not exist" in capsys.readouterr().err


def test_lab_is_a_round_trip_and_knows_white() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(lab_to_rgb(rgb_to_lab(x)), x, atol=1e-3)
    white = rgb_to_lab(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(white, torch.tensor([100.0, 0.0, 0.0]), atol=0.05)


@pytest.mark.parametrize(("name", "level"), [("gausian_blur", 1), ("jpeg", 6), ("jpeg", -1)])
def test_unknown_type_or_level_is_one_clear_error(name: str, level: int) -> None:
    with pytest.raises(SettingsError, match="expected"):
        degrade(torch.rand(1, 3, 32, 32), name, level, seed=0)


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
    level, stack = torch.tensor([0.0, 4.0, 2.0]), torch.tensor([0, 1, 1])
    # only (0, 1): level gap 4, margin 0.1 -> 0.4 - (0.1 - 0.2)
    assert across_loss(quality, level, stack, 0.1, 3).item() == pytest.approx(0.5, abs=1e-6)
    assert across_loss(quality, level, torch.zeros(3), 0.1, 3).item() == 0


def test_a_pair_need_not_fall_with_what_it_is_not_about_but_must_not_rise() -> None:
    about = torch.tensor([[True, False]])
    constant, rising = torch.zeros(1, 2, 2, 2), torch.tensor([0.0, 0.4]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert ranking_loss(constant, 0.2, about=about).item() == pytest.approx((0.2 + 0) / 2, abs=1e-6)
    assert ranking_loss(rising, 0.2, about=about).item() == pytest.approx((0.6 + 0.4) / 2, abs=1e-6)
    blur, both = Recipe(("lens_blur",), 0).about, Recipe(("lens_blur", "white_noise"), 0).about
    assert all(blur) and both.count(False) == 1
    level, stack = torch.tensor([0.0, 5.0]), torch.tensor([0, 1])
    assert across_loss(torch.zeros(2, 1), level, stack, 0.1, 3, torch.tensor([[True], [False]])).item() == 0


def test_centre_is_zero_only_for_balanced_pairs() -> None:
    assert centre_loss(torch.tensor([[1.0, -0.5], [-1.0, 0.5]])).item() == 0
    assert centre_loss(torch.tensor([[0.4], [0.2]])).item() == pytest.approx(0.09)


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


def test_compiles_whole_for_any_size(tower: MiniTower) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tower, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for size in [(64, 64), (49, 80), (33, 101)]:
            x = torch.rand(2, 3, *size)
            assert torch.allclose(compiled(x), tower(x), atol=1e-5)


def test_log_energies_know_blur_noise_and_darkness(picture: torch.Tensor) -> None:
    clean = log_energies(picture)
    assert (log_energies(degrade(picture, "gaussian_blur", 4, 0))[:, 0] < clean[:, 0]).all()
    assert (log_energies(degrade(picture, "white_noise", 5, 0))[:, 1] > clean[:, 1]).all()
    assert (log_energies(degrade(picture, "darken", 4, 0))[:, 12] < clean[:, 12]).all()


# ---------------------------------------------------------------- stacks and training


def test_step_is_decided_by_seed_and_number() -> None:
    photographs = [(synthetic_photograph(n, 112, 112) * 255).byte() for n in range(5)]
    stacks = Stacks(photographs, TOY, seed=1, steps=3)
    first, again, other = stacks[1], stacks[1], Stacks(photographs, TOY, seed=2, steps=3)[1]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["pictures"], other["pictures"])
    b, n_levels = TOY.stacks, TOY.levels + 1
    assert first["pictures"].shape == (b, n_levels, 2, 3, 48, 48)
    assert (first["level"].diff(dim=1) > 0).all() and (first["level"][:, 0] == 0).all()
    assert not first["ordered"].tril().any()
    assert Recipe(("mean_shift", "jpeg"), 0).monotone is False


def short_toy() -> str:
    """toy.toml with one step so small that nothing moves."""
    text = (CONFIGS / "toy.toml").read_text()
    return text.replace("steps = 60", "steps = 1").replace("learning_rate = 5e-3", "learning_rate = 1e-9")


def test_toy_training_learns_to_rank_and_is_deterministic(folder: Path, tmp_path: Path) -> None:
    log = []
    for run in ("a", "b"):
        path = trainer.train(TOY, folder, tmp_path / run, seed=3)
        log.append([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()])
    # safetensors writes its metadata in any order, so tensors are compared and not bytes
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("a", "b"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["visual.stem.0.weight"], torch.zeros_like(first["visual.stem.0.weight"]))
    assert not list(tmp_path.rglob("*.part"))

    (tmp_path / "short.toml").write_text(short_toy())
    arguments = ["--config", str(tmp_path / "short.toml"), "--pristine", str(folder), "--out", str(tmp_path / "c")]
    assert trainer.main([*arguments, "--seed", "7", "--licence", "CC0", "--start", str(path)]) == 0
    again = tmp_path / "c" / "model.safetensors"
    with safe_open(again, "pt") as file:
        written = file.metadata()
    assert written["licence"] == "CC0" and json.loads(written["training"])["seed"] == 7
    assert json.loads(written["training"])["start"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.allclose(load_file(again)["visual.heads.0.fc1.weight"], first["visual.heads.0.fc1.weight"], atol=1e-6)
    with pytest.raises(SettingsError, match="--start"):
        trainer.train(dataclasses.replace(TOY, dim=4), folder, tmp_path / "d", start=path)

    fresh = trainer.train(dataclasses.replace(TOY, steps=1, learning_rate=1e-9), folder, tmp_path / "untrained", seed=3)
    untrained = json.loads((fresh.parent / "log.jsonl").read_text().splitlines()[-1])
    # Photographs that were not trained on; every type counts alike. An untrained network ranks about half the pairs.
    assert log[0][-1]["accuracy"] > untrained["accuracy"] + 0.1
    assert log[0][-1]["types"]["white_noise"] > 0.8

    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        anchors, scale = file.get_tensor("prompts_features"), file.get_tensor("logit_scale")
    assert (
        metadata["format"] == "qualiclip-pyiqa/1" and metadata["backbone"] == "mini" and metadata["temperature"] == "1"
    )
    tower = MiniTower(**json.loads(metadata["tower"]))
    assert keys == {f"visual.{key}" for key in tower.state_dict()} | {"prompts_features", "logit_scale"}
    assert [tuple(pair) for pair in json.loads(metadata["prompts"])] == list(QUALITY_SETS["qualiclip"])
    assert anchors.shape == (14, tower.feature_dim) and torch.allclose(anchors.norm(dim=1), torch.ones(14), atol=1e-6)
    assert scale.shape == () and scale.dtype == torch.float32
    assert json.loads(metadata["training"])["seed"] == 3


def test_held_out_and_excluded_photographs_are_not_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "held_out"], ["a.png", "1"], ["b.png", "0"]])
    (tmp_path / "skip.txt").write_text("c.png\n")
    assert [p.name for p in list_photographs(tmp_path)] == ["b.png", "c.png"]
    assert [p.name for p in list_photographs(tmp_path, tmp_path / "skip.txt")] == ["b.png"]


def test_nan_stops_with_step_and_cause(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "centre_loss", lambda difference: difference.mean() * math.nan)
    with pytest.raises(trainer.DivergedError, match=r"centre .* step 1"):
        trainer.train(TOY, folder, tmp_path, seed=0)
    assert not (tmp_path / "model.safetensors").exists()


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
        ({"repeat": {"a": 0.5}}, "repeat"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"type_weights": {"smudge": 1}}, "smudge"),
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
    with pytest.raises(SettingsError, match="mini, mini-finish, toy"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(SettingsError, match="not TOML"):
        load_config(tmp_path / "broken.toml")
    with pytest.raises(SettingsError, match="no folder"):
        trainer.train(TOY, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SettingsError, match="photographs of at least"):
        trainer.train(dataclasses.replace(TOY, validation=50), folder, tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"x\.png"):
        trainer.train(TOY, tmp_path / "bad", tmp_path / "out")


def test_command_line_reports_errors_by_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = trainer.main(["--config", "toy", "--pristine", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")])
    assert status == 1 and not capsys.readouterr().out
    assert load_config("mini").steps > load_config("mini-finish").steps > 100  # the shipped settings are valid
