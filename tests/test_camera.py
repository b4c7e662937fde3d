"""The bank of camera faults: what holds for every type, formulas where they can be seen, the severity of levels."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import structural_similarity
from synthetic import synthetic_photograph

from qualiclip_pyiqa.degradations import severity as severity_table
from qualiclip_pyiqa.degradations import sheet as contact
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS, degrade, jpeg
from qualiclip_pyiqa.degradations.banks import ALL_TYPES, BANKS, bank_of
from qualiclip_pyiqa.degradations.base import LEVELS
from qualiclip_pyiqa.degradations.camera import CAMERA, FULL_WELL, READ_NOISE
from qualiclip_pyiqa.degradations.compose import degrade_all, draw_types
from qualiclip_pyiqa.degradations.severity import severity
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.training.config import load_config, make_config
from qualiclip_pyiqa.training.stacks import Stack, Stacks, batch_of

PHOTOS = sorted((Path(__file__).parents[1] / "examples" / "photos").glob("*.jpg"))
# What random choices a type has: shared by the images of one seed, or each image's own.
GEOMETRY = {"flare", "haze", "white_balance", "camera_shake", "defocus", "repeated_jpeg"}
PATTERNS = {"low_light", "sensor_noise", "smearing_denoiser"}
# Fourier transforms round differently in batches of another size.
CLOSE = 1e-4


def camera(x: torch.Tensor, name: str, level: float, seed: int | list[int]) -> torch.Tensor:
    return degrade(x, name, level, seed, CAMERA)


def linear(x: torch.Tensor) -> torch.Tensor:
    """By the formula of IEC 61966-2-1."""
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


@pytest.fixture(scope="module")
def pair() -> torch.Tensor:
    return torch.stack([synthetic_photograph(1, 96, 96), synthetic_photograph(2, 96, 96)])


# ---------------------------------------------------------------- what holds for every type


@pytest.mark.parametrize("name", CAMERA)
def test_degradation_keeps_shape_and_range_and_input(name: str, pair: torch.Tensor) -> None:
    before = pair.clone()
    for level in range(LEVELS + 1):
        result = camera(pair, name, level, 3)
        assert result.shape == pair.shape and result.dtype == pair.dtype
        assert result.min() >= 0 and result.max() <= 1 and torch.isfinite(result).all()
        assert torch.equal(result, camera(pair, name, level, 3))
        assert torch.equal(result, pair) == (level == 0)
        result.zero_()  # a view of the input would change it
        assert torch.equal(pair, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CAMERA)
def test_other_precisions(name: str, dtype: torch.dtype, pair: torch.Tensor) -> None:
    result = camera(pair.to(dtype), name, 3, 5)
    assert result.dtype == dtype and torch.isfinite(result).all()
    expected = camera(pair.to(dtype).float(), name, 3, 5)
    assert (result.float() - expected).abs().mean() < torch.finfo(dtype).eps + 1e-4


@pytest.mark.parametrize("name", CAMERA)
def test_another_default_dtype_changes_nothing(name: str, pair: torch.Tensor) -> None:
    expected = camera(pair, name, 3, 5)
    torch.set_default_dtype(torch.float64)
    try:
        found = camera(pair, name, 3, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(CAMERA)),
    st.floats(1, LEVELS),
    st.integers(32, 70),
    st.integers(32, 70),
)
@settings(max_examples=40, deadline=None)
def test_any_image_stays_in_range(seed: int, name: str, level: float, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, height, width, generator=generator).round(decimals=seed % 3)
    result = camera(x, name, level, seed)
    assert result.shape == x.shape and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CAMERA)
def test_flat_images_are_finite(name: str, value: float) -> None:
    assert torch.isfinite(camera(torch.full((1, 3, 40, 33), value), name, LEVELS, 0)).all()


@pytest.mark.parametrize("name", CAMERA)
def test_one_seed_shares_geometry_and_not_patterns(name: str, pair: torch.Tensor) -> None:
    same = pair[:1].expand(2, -1, -1, -1)
    first, second = camera(same, name, 4, 1)
    assert torch.allclose(first, second, atol=CLOSE) == (name not in PATTERNS)
    others = [camera(same, name, 4, seed)[0] for seed in (2, 3)]
    assert all(torch.allclose(first, other, atol=CLOSE) for other in others) == (name not in PATTERNS | GEOMETRY)


@pytest.mark.parametrize("name", CAMERA)
def test_a_seed_for_each_image_makes_neighbours_irrelevant(name: str, pair: torch.Tensor) -> None:
    seeds = [7, 9, 7]
    batch = pair[[0, 1, 0]]
    whole = camera(batch, name, 4, seeds)
    assert torch.allclose(whole[0], whole[2], atol=CLOSE)
    parts = [camera(batch[:1], name, 4, seeds[:1]), camera(batch[1:], name, 4, seeds[1:])]
    assert torch.allclose(whole, torch.cat(parts), atol=CLOSE)
    assert torch.allclose(whole[1], camera(batch[1:2], name, 4, 9)[0], atol=CLOSE)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """The middles of the six photographs of the examples, at half size."""
    middles = []
    for path in PHOTOS:
        rgb = load_image(path)
        top, left = ((length - 384) // 2 for length in rgb.shape[1:])
        square = rgb[None, :, top : top + 384, left : left + 384]
        middles.append(torch.nn.functional.interpolate(square, size=(192, 192), mode="area")[0])
    return torch.stack(middles)


@pytest.mark.parametrize("name", CAMERA)
def test_quality_falls_along_every_chain(name: str, photographs: torch.Tensor) -> None:
    """By the mean over six photographs of PSNR and of SSIM of each channel, two quite different measures."""
    psnr, ssim = [float("inf")], [1.0]
    reference = photographs.movedim(1, -1).numpy()
    for level in range(1, LEVELS + 1):
        result = camera(photographs, name, level, list(range(len(photographs))))
        psnr.append(float(-10 * (result - photographs).square().mean((1, 2, 3)).log10().mean()))
        pairs = zip(result.movedim(1, -1).numpy(), reference, strict=True)
        found = [structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]
        ssim.append(float(np.mean(found)))
    for chain in CAMERA[name].chains:
        for values in (psnr, ssim):
            assert all(values[a] > values[b] for a, b in itertools.pairwise(chain)), (chain, values)
    assert psnr[1] > 22  # the first level is mild
    assert CAMERA[name].monotone


@pytest.mark.parametrize("name", ["low_light", "sensor_noise"])
def test_levels_of_one_seed_share_their_noise(name: str) -> None:
    grey = torch.full((1, 3, 64, 64), 0.6)
    noise = [linear(camera(grey, name, level, 4)) for level in (1, 2)]
    weak, strong = ((each - each.mean()).flatten() for each in noise)
    assert torch.corrcoef(torch.stack([weak, strong]))[0, 1] > 0.98


def test_levels_of_one_seed_share_geometry(pair: torch.Tensor) -> None:
    # White balance: gains are powers of one direction, so that the ratios of channels are too.
    grey = torch.full((1, 3, 8, 8), 0.3)
    logs = [linear(camera(grey, "white_balance", level, 3))[0, :, 0, 0].log() for level in (2, 4)]
    ratios = [each[0] - each[2] for each in logs]
    levels = CAMERA["white_balance"].levels
    assert float(ratios[1] / ratios[0]) == pytest.approx(levels[3] / levels[1], rel=1e-3)
    # Camera shake: a point's image at one level is the other's, scaled: their axes of inertia point the same way.
    point = torch.zeros(1, 3, 65, 65)
    point[..., 32, 32] = 1
    offsets = torch.arange(65) - 32.0
    axes = []
    for level in (4, 5):
        image = linear(camera(point, "camera_shake", level, 6))[0, 0]
        xx, xy, yy = (
            float((image * a * b).sum())
            for a, b in (
                (offsets, offsets),
                (offsets[:, None], offsets),
                (offsets[:, None], offsets[:, None]),
            )
        )
        axes.append(0.5 * np.arctan2(2 * xy, xx - yy))
    assert axes[0] == pytest.approx(axes[1], abs=0.1)
    # Haze and flare: the light that is added has one pattern at all levels. On black, haze is A * (1 - t).
    black = torch.zeros(1, 3, 48, 48)
    for name in ("haze", "flare"):
        mild, strong = (linear(camera(black, name, level, 2)).flatten() for level in (1, 3))
        assert torch.corrcoef(torch.stack([mild, strong]))[0, 1] > 0.98, name


# ---------------------------------------------------------------- formulas


def test_exposure_is_in_stops_of_linear_light() -> None:
    grey = torch.linspace(0.05, 0.5, 64).expand(1, 3, 64, 64)
    for level, stops in enumerate(CAMERA["overexposure"].levels, start=1):
        expected = (linear(grey) * 2**stops).clamp(max=1)
        assert torch.allclose(linear(camera(grey, "overexposure", level, 0)), expected, atol=1e-5)
    bright = torch.full((1, 3, 128, 128), 0.7)
    for level, stops in enumerate(CAMERA["low_light"].levels, start=1):  # half of the stops are missing
        found = linear(camera(bright, "low_light", level, 0)).mean()
        assert float(found) == pytest.approx(float(linear(bright).mean()) * 2 ** (-stops / 2), rel=0.02)


def test_noise_is_that_of_counted_electrons() -> None:
    """Green at its own samples of the mosaic is not interpolated: there the variance is the model's."""
    for value, level in ((0.3, 2), (0.6, 2), (0.6, 3)):
        x = torch.full((1, 3, 256, 256), value)
        light = float(linear(x)[0, 0, 0, 0])
        white = FULL_WELL / CAMERA["sensor_noise"].levels[level - 1]
        noise = linear(camera(x, "sensor_noise", level, 1))[0] - light
        expected = (light * white + READ_NOISE**2) / white**2
        for channel, row, col in ((1, 0, 1), (1, 1, 0), (0, 0, 0), (2, 1, 1)):
            assert float(noise[channel, row::2, col::2].var()) == pytest.approx(expected, rel=0.06)
        # Elsewhere red is the mean of two or four samples.
        assert float(noise[0, 0::2, 1:-1:2].var()) == pytest.approx(expected / 2, rel=0.06)
        assert float(noise[0, 1:-1:2, 1:-1:2].var()) == pytest.approx(expected / 4, rel=0.06)
        assert float(noise[1, 2:-1:2, 2:-1:2].var()) == pytest.approx(expected / 4, rel=0.06)


def test_denoiser_smears_texture_and_keeps_edges() -> None:
    x = torch.full((1, 3, 96, 96), 0.3)
    x[..., 48:] = 0.7
    texture = 0.03 * torch.sign(torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)))
    result = camera(x + texture, "smearing_denoiser", 3, 0)
    assert result[..., 8:40].std() < 0.5 * texture.std()  # what is left of the noise included
    step = result[..., 52:56].mean() - result[..., 40:44].mean()
    assert float(step) == pytest.approx(0.4, abs=0.08)


def test_white_balance_keeps_the_luminance_of_grey() -> None:
    grey = torch.full((8, 3, 4, 4), 0.4)
    result = linear(camera(grey, "white_balance", 4, list(range(8))))
    weights = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]
    assert torch.allclose((result * weights).sum(1), linear(grey)[:, 0], atol=1e-5)
    warm = result[:, 0, 0, 0] > result[:, 2, 0, 0]
    assert 0 < int(warm.sum()) < 8  # casts of both directions


def test_haze_is_koschmieders_model() -> None:
    """One direct light, airlight and transmission for all intensities: three greys lie on one line at every pixel."""
    values = torch.tensor([0.1, 0.5, 0.9])
    hazy = linear(camera(values[:, None, None, None].expand(3, 3, 40, 40), "haze", 4, 5)).double()
    scene = linear(values).double()
    through = (hazy[2] - hazy[0]) / (scene[2] - scene[0])
    assert torch.allclose(hazy[1], hazy[0] + through * (scene[1] - scene[0]), atol=1e-5)
    depth = CAMERA["haze"].levels[3]
    assert float(through.max()) == pytest.approx(np.exp(-0.3 * depth), abs=1e-3)
    assert float(through.min()) == pytest.approx(np.exp(-depth), abs=1e-3)


def test_camera_shake_is_a_path_of_its_length() -> None:
    point = torch.zeros(1, 3, 65, 65)
    point[..., 32, 32] = 1
    for seed in range(4):
        for level, length in enumerate(CAMERA["camera_shake"].levels, start=1):
            image = linear(camera(point, "camera_shake", level, seed))[0, 0]
            assert float(image.sum()) == pytest.approx(1, abs=0.02)  # rounding below zero is clipped
            rows, cols = torch.nonzero(image > 1e-4, as_tuple=True)
            assert max(rows.max() - rows.min(), cols.max() - cols.min()) <= length + 2
            means = [float((image * offsets).sum()) for offsets in (torch.arange(65)[:, None], torch.arange(65))]
            assert means == pytest.approx([32, 32], abs=0.3)  # the photograph does not move


def test_defocus_is_sharp_where_depth_is_zero_and_a_disk_where_it_is_one() -> None:
    dots = torch.zeros(1, 3, 192, 192)
    dots[..., 8::16, 8::16] = 1
    result = linear(camera(dots, "defocus", 4, 1))[0, 0]
    peaks = result[8::16, 8::16]
    radius = CAMERA["defocus"].levels[3]
    assert peaks.max() > 0.5
    assert peaks.min() < 2 / (np.pi * radius**2)
    assert float(result.mean()) == pytest.approx(float(dots.mean()), rel=0.1)  # light is kept


def test_over_sharpening_keeps_chroma_and_has_halos() -> None:
    x = torch.full((1, 3, 32, 64), 0.4)
    x[..., 32:] = 0.5
    x[:, 0] += 0.1
    result = camera(x, "over_sharpening", 2, 0)
    assert torch.allclose(result[:, 0] - result[:, 1], torch.full((1, 32, 64), 0.1), atol=1e-6)
    profile = result[0, 1, 16]
    assert profile.min() < 0.385 and profile.max() > 0.515  # 0.4 and 0.5 by themselves
    assert torch.allclose(profile[[5, 60]], torch.tensor([0.4, 0.5]), atol=1e-3)


def test_upscaling_loses_what_the_small_image_cannot_hold() -> None:
    for period, kept in ((2.5, False), (32, True)):
        wave = 0.5 + 0.4 * torch.sin(2 * torch.pi * torch.arange(192) / period).expand(1, 3, 192, 192)
        ratio = float(camera(wave, "upscaling", 4, 0)[..., 20:-20].std() / wave.std())
        assert (ratio > 0.9) == kept and (ratio < 0.1) != kept


def test_repeated_jpeg_differs_from_one_save(photographs: torch.Tensor) -> None:
    quality = CAMERA["repeated_jpeg"].levels[2]
    once = jpeg(photographs, quality)
    again = camera(photographs, "repeated_jpeg", 3, 0)
    loss = [(each - photographs).square().mean() for each in (once, again)]
    assert loss[1] > 1.2 * loss[0]  # without shifts, later saves would hardly change anything
    # Nothing has moved: no shift by a pixel fits better.
    around = [
        (again[..., 8:-8, 8:-8] - photographs.roll((dy, dx), (-2, -1))[..., 8:-8, 8:-8]).square().mean()
        for dy, dx in itertools.product((-1, 0, 1), repeat=2)
    ]
    assert int(torch.stack(around).argmin()) == 4


# ---------------------------------------------------------------- banks


def test_types_have_one_bank() -> None:
    counts = collections.Counter(name for bank in BANKS.values() for name in bank)
    assert max(counts.values()) == 1 and set(counts) == set(ALL_TYPES)
    assert BANKS["kadid"] is DEGRADATIONS and BANKS["camera"] is CAMERA
    assert list(bank_of(["camera", "kadid"])) == [*CAMERA, *DEGRADATIONS]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["kamera"], "unknown degradation bank 'kamera'; expected one of kadid, camera"),
        ([], r"degradation banks are \[\]; expected one or more of kadid, camera, each once"),
        (["camera", "camera"], "each once"),
    ],
)
def test_unknown_bank_is_one_clear_error(names: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        bank_of(names)


def test_unknown_type_of_the_bank_is_one_clear_error(pair: torch.Tensor) -> None:
    with pytest.raises(SettingsError, match="unknown degradation 'jpeg'; expected one of low_light"):
        camera(pair, "jpeg", 1, 0)
    with pytest.raises(SettingsError, match="expected a number from 1 to 5"):
        camera(pair, "haze", 6, 0)
    with pytest.raises(SettingsError, match="3 seeds for 2 images; expected one"):
        camera(pair, "haze", 1, [1, 2, 3])


def test_types_of_both_banks_compose(pair: torch.Tensor) -> None:
    names = ("low_light", "gaussian_blur", "repeated_jpeg")
    step = camera(pair, names[0], 3, 4)
    step = degrade(step, names[1], 3, 5)
    assert torch.equal(degrade_all(pair, names, 3, 4, ALL_TYPES), camera(step, names[2], 3, 6))
    drawn = {name for number in range(400) for name in draw_types(random.Random(number), [0, 0, 1], {}, ALL_TYPES)}
    assert drawn & set(CAMERA) and drawn & set(DEGRADATIONS)


def test_training_draws_from_the_banks_of_its_configuration(tmp_path: Path) -> None:
    toy = load_config("toy")
    assert toy.banks == ("kadid",)
    values = dataclasses.asdict(toy) | {"type_weights": {}, "stacks": 4, "crops": [32], "types": [1]}
    paths = []
    for number in range(4):
        pixels = (synthetic_photograph(number, 96, 96) * 255).round().byte().movedim(0, -1).numpy()
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    for banks in (["kadid"], ["camera"], ["kadid", "camera"]):
        config = make_config(values | {"banks": banks})
        stacks = Stacks(paths, config, 0)
        types = {name for number in range(30) for stack in stacks[number] for name in stack.types}
        for bank in BANKS:
            assert bool(types & set(BANKS[bank])) == (bank in banks)
    batch = batch_of(stacks[0], config)
    assert batch["pictures"].shape[0] == 4 and batch["monotone"].shape == (4,)


def test_a_stack_of_a_camera_fault_is_degraded_by_it() -> None:
    crops = (torch.stack([synthetic_photograph(1, 64, 64)] * 2) * 255).round().to(torch.uint8)
    stack = Stack(crops, ("overexposure",), (0, 3), (5, 5), 64, None)
    expected = (camera(crops.float() / 255, "overexposure", 3, 5) * 255).round().to(torch.uint8)
    pictures = stack.pictures()
    assert torch.equal(pictures[0], crops) and torch.equal(pictures[1], expected)
    assert stack.monotone and stack.ordered() == [[False, True], [False, False]]


def test_contact_sheet_of_the_bank(tmp_path: Path) -> None:
    photo, sheet = tmp_path / "photo.png", tmp_path / "sheet.png"
    pixels = (synthetic_photograph(0, 200, 200) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(photo)
    assert contact.main([str(photo), "--bank", "camera", "-o", str(sheet)]) == 0
    with Image.open(sheet) as drawn:
        assert drawn.size == (190 + 6 * 162, 24 + 12 * 162)


# ---------------------------------------------------------------- severity


def test_severities_are_of_the_levels_as_they_are() -> None:
    text = Path(severity_table.__file__).with_name("severities.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    assert list(table) == list(ALL_TYPES)
    for name, row in table.items():
        assert tuple(row["levels"]) == ALL_TYPES[name].levels, f"{name}: run benchmarks/severity.py again"
        assert len(row["severity"]) == LEVELS and all(0 <= each <= 1 for each in row["severity"])
        # Pristine is 0, and so is a level that is the identity.
        values = [0.0, *row["severity"]]
        for chain in ALL_TYPES[name].chains:
            assert all(values[a] < values[b] for a, b in itertools.pairwise(chain)), (name, values)
    assert text.startswith("# Written by `python benchmarks/severity.py ")


def test_severity_of_levels_and_between_them() -> None:
    for name in ("jpeg", "haze"):
        row = [severity(name, level) for level in range(LEVELS + 1)]
        assert row[0] == 0
        assert severity(name, 2.5) == pytest.approx((row[2] + row[3]) / 2)
        assert severity(name, 0.5) == pytest.approx(row[1] / 2)
    with pytest.raises(SettingsError, match="unknown degradation 'jpg'"):
        severity("jpg", 1)
    for level in (-1, 5.1, float("nan")):
        with pytest.raises(SettingsError, match="expected a number from 0 to 5"):
            severity("jpeg", level)
