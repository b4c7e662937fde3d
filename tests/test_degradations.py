"""The degradation bank against SciPy, scikit-image, Pillow and formulas; its random choices; compositions."""

from __future__ import annotations

import collections
import io
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats
from skimage import color
from synthetic import synthetic_photograph

from qualiclip_pyiqa.degradations import sheet as contact
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS, degrade, strength
from qualiclip_pyiqa.degradations.base import GROUP_ORDER, LEVELS, Degradation
from qualiclip_pyiqa.degradations.compose import degrade_all, draw_types
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.evaluation.ladders import behaviour, behaviours, ladder, steps

Array = NDArray[np.float64]

# The published table (ARNIQA, after KADID-10k).
TABLE = {
    "gaussian_blur": (0.1, 0.5, 1, 2, 5),
    "lens_blur": (1, 2, 4, 6, 8),
    "motion_blur": (1, 2, 4, 6, 10),
    "color_diffusion": (1, 3, 6, 8, 12),
    "color_shift": (1, 3, 6, 8, 12),
    "color_saturation_1": (0.4, 0.2, 0.1, 0, -0.4),
    "color_saturation_2": (1, 2, 3, 6, 9),
    "jpeg2000": (16, 32, 45, 120, 170),
    "jpeg": (43, 36, 24, 7, 4),
    "white_noise": (0.001, 0.002, 0.003, 0.005, 0.01),
    "white_noise_color": (0.0001, 0.0005, 0.001, 0.002, 0.003),
    "impulse_noise": (0.001, 0.005, 0.01, 0.02, 0.03),
    "multiplicative_noise": (0.001, 0.005, 0.01, 0.02, 0.05),
    "brighten": (0.1, 0.2, 0.4, 0.7, 1.1),
    "darken": (0.05, 0.1, 0.2, 0.4, 0.8),
    "mean_shift": (0, 0.08, -0.08, 0.15, -0.15),
    "jitter": (0.05, 0.1, 0.2, 0.5, 1),
    "patch_displacement": (20, 40, 60, 80, 100),
    "pixelate": (0.01, 0.05, 0.1, 0.2, 0.5),
    "quantization": (20, 16, 13, 10, 7),
    "color_block": (2, 4, 6, 8, 10),
    "high_sharpen": (1, 2, 3, 6, 12),
    "linear_contrast": (0, 0.15, -0.4, 0.3, -0.6),
    "nonlinear_contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
}
GEOMETRY = {"motion_blur", "color_shift", "patch_displacement", "color_block"}
PATTERNS = {"white_noise", "white_noise_color", "impulse_noise", "multiplicative_noise", "jitter"}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.stack([synthetic_photograph(1), synthetic_photograph(2)])


def test_bank_is_the_published_table() -> None:
    assert {name: degradation.levels for name, degradation in DEGRADATIONS.items()} == TABLE
    assert {degradation.group for degradation in DEGRADATIONS.values()} == set(GROUP_ORDER)
    assert len(GROUP_ORDER) == 7


# ---------------------------------------------------------------- references: (H, W, 3) float64 -> the same


def smooth(x: Array, sigma: float) -> Array:
    """Over the first two axes."""
    radius = math.ceil(2 * sigma)
    return ndimage.gaussian_filter(x, sigma, mode="nearest", radius=radius, axes=(0, 1))


def filtered(x: Array, kernel: Array) -> Array:
    return ndimage.correlate(x, kernel[:, :, None] / kernel.sum(), mode="nearest")


def uniform(seed: int, *shape: int) -> Array:
    """The choices that the bank draws under a seed."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double().numpy()


def disk(x: Array, radius: float, seed: int) -> Array:
    """By the area of each pixel inside, counted on a fine grid."""
    size, fine = math.ceil(radius), 41
    offsets = (np.arange((2 * size + 1) * fine) + 0.5) / fine - size - 0.5
    inside = np.hypot(offsets[:, None], offsets[None, :]) < radius
    return filtered(x, inside.reshape(2 * size + 1, fine, 2 * size + 1, fine).mean(axis=(1, 3)))


def line(x: Array, length: float, seed: int) -> Array:
    """By many points, each shared among its four neighbours."""
    angle = math.pi * uniform(seed, 1)[0]
    size = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * size + 1, 2 * size + 1))
    for t in np.linspace(-length / 2, length / 2, 4001):
        px, py = t * math.cos(angle) + size, t * math.sin(angle) + size
        left, top = math.floor(px), math.floor(py)
        kernel[top : top + 2, left : left + 2] += np.outer([top + 1 - py, py - top], [left + 1 - px, px - left])
    return filtered(x, kernel)


def diffused(x: Array, amount: float, seed: int) -> Array:
    lab = color.rgb2lab(x)
    lab[..., 1:] = smooth(lab[..., 1:], 1.5 * amount + 2) * amount
    return color.lab2rgb(lab)


def shifted(x: Array, pixels: float, seed: int) -> Array:
    angle = 2 * math.pi * uniform(seed, 1)[0]
    move = [round(pixels * math.sin(angle)), round(pixels * math.cos(angle))]
    luma = np.pad(x @ [0.299, 0.587, 0.114], 1, mode="edge")
    mask = smooth(np.hypot(*np.gradient(luma))[1:-1, 1:-1], 4)
    mask /= mask.max()
    moved = ndimage.shift(x[..., 1], move, order=0, mode="nearest")
    return np.stack([x[..., 0], (1 - mask) * x[..., 1] + mask * moved, x[..., 2]], axis=-1)


def saturated_hsv(x: Array, factor: float, seed: int) -> Array:
    return color.hsv2rgb(color.rgb2hsv(x) * [1, factor, 1])


def saturated_lab(x: Array, factor: float, seed: int) -> Array:
    return color.lab2rgb(color.rgb2lab(x) * [1, factor, factor])


def sharpened(x: Array, amount: float, seed: int) -> Array:
    lab = color.rgb2lab(x)
    lab[..., 0] = np.clip(lab[..., 0] + amount * (lab[..., 0] - smooth(lab[..., 0], 1)), 0, 100)
    return color.lab2rgb(lab)


def through_pillow(x: Array, **how: object) -> Array:
    file = io.BytesIO()
    Image.fromarray(np.rint(x * 255).astype(np.uint8)).save(file, **how)
    with Image.open(file) as decoded:
        return np.asarray(decoded) / 255.0


def curve(*points: tuple[float, float]) -> Callable[[Array], Array]:
    """The one polynomial of the lowest degree through some points."""
    return np.poly1d(np.polyfit(*np.transpose(points), deg=len(points) - 1))


def s_curve(x: Array, amount: float, seed: int) -> Array:
    return curve((0, 0), (0.3, 0.25 - amount / 4), (0.5, 0.5), (0.7, 0.75 + amount / 4), (1, 1))(x)


def jittered(x: Array, amount: float, seed: int) -> Array:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        d = amount * (2 * torch.rand(*x.shape[:2], 2, generator=generator).double().numpy() - 1)
        y, x_ = np.indices(x.shape[:2])
        places = np.stack([y + d[..., 1], x_ + d[..., 0]])
        x = np.stack([ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in np.moveaxis(x, -1, 0)], -1)
    return x


def patched(x: Array, count: float, seed: int) -> Array:
    result, room = x.copy(), np.array(x.shape[:2]) - 16
    for draw in uniform(seed, int(count), 4):
        source = np.rint(draw[:2] * room).astype(int)
        top, left = np.clip(source + np.rint(16 * draw[2:] - 8).astype(int), 0, room)
        result[top : top + 16, left : left + 16] = x[source[0] : source[0] + 16, source[1] : source[1] + 16]
    return result


def blocked(x: Array, count: float, seed: int) -> Array:
    result, room = x.copy(), np.array(x.shape[:2]) - 32
    for draw in uniform(seed, int(count), 5):
        top, left = np.rint(draw[:2] * room).astype(int)
        result[top : top + 32, left : left + 32] = draw[2:]
    return result


def pixelated(x: Array, amount: float, seed: int) -> Array:
    # In whole numbers, as a pixel's centre can fall between two: pixel i of m lies in pixel (2i + 1) * n // 2m of n.
    for axis, n in enumerate(x.shape[:2]):
        m = round(n * (0.95 - amount**0.6))
        down = (2 * np.arange(m) + 1) * n // (2 * m)
        up = (2 * np.arange(n) + 1) * m // (2 * n)
        x = x.take(down[up], axis)
    return x


def quantized(x: Array, levels: float, seed: int) -> Array:
    steps = np.linspace(0, 1, int(levels))
    return steps[np.abs(x[..., None] - steps).argmin(-1)]


# Tolerances. FILTER: float32 sums against float64. LAB: float32 through cube roots and powers of 2.4, whose slopes
# reach 13 at black, with chroma times up to 12. RIM, LINE: a rim pixel's exact area against its linear estimate; 16
# points a pixel along the line against 400 or more. CODEC: another libjpeg may round differently. COORDINATES:
# positions in float32, five rounds.
FILTER, LAB, RIM, LINE, CODEC, COORDINATES = 2e-6, 2e-4, 6e-3, 2e-4, 2 / 255, 5e-5
REFERENCES: dict[str, tuple[Callable[[Array, float, int], Array], float]] = {
    "gaussian_blur": (lambda x, sigma, seed: smooth(x, sigma), FILTER),
    "lens_blur": (disk, RIM),
    "motion_blur": (line, LINE),
    "color_diffusion": (diffused, LAB),
    "color_shift": (shifted, FILTER),
    "color_saturation_1": (saturated_hsv, FILTER),
    "color_saturation_2": (saturated_lab, LAB),
    "jpeg2000": (
        lambda x, ratio, seed: through_pillow(
            x, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True
        ),
        CODEC,
    ),
    "jpeg": (lambda x, quality, seed: through_pillow(x, format="JPEG", quality=quality, subsampling="4:2:0"), CODEC),
    "brighten": (lambda x, a, seed: curve((0, 0), (0.5, 0.5 + a / 2), (1, 1))(x), FILTER),
    "darken": (lambda x, a, seed: curve((0, 0), (0.5, 0.5 - a / 2), (1, 1))(x), FILTER),
    "mean_shift": (lambda x, a, seed: x + a, FILTER),
    "jitter": (jittered, COORDINATES),
    "patch_displacement": (patched, 0.0),
    "pixelate": (pixelated, 0.0),
    "quantization": (quantized, FILTER),
    "color_block": (blocked, 0.0),
    "high_sharpen": (sharpened, LAB),
    "linear_contrast": (s_curve, FILTER),
    "nonlinear_contrast": (lambda x, a, seed: np.interp(x, [0, 1], [0.5 - a, 0.5 + a]), FILTER),
}


@pytest.mark.filterwarnings("ignore:.*negative Z values:UserWarning")  # colours that RGB has not, clipped as by us
@pytest.mark.parametrize("name", REFERENCES)
def test_type_is_its_reference(name: str) -> None:
    reference, tolerance = REFERENCES[name]
    picture = synthetic_photograph(3, 88, 101)  # no round numbers, no square
    for level, amount in enumerate(TABLE[name], 1):
        expected = reference(picture.movedim(0, -1).double().numpy(), amount, 11 + level).clip(0, 1)
        result = degrade(picture[None], name, level, seed=11 + level)[0].movedim(0, -1).numpy()
        assert np.abs(result - expected).max() <= tolerance, (level, np.abs(result - expected).max())


def residual(name: str, level: int, grey: float = 0.5) -> Array:
    """What a noise adds to even grey, (3, 200k): far enough from 0 and 1 for none of it to be clamped."""
    flat = torch.full((2, 3, 320, 320), grey)
    return (degrade(flat, name, level, seed=level) - flat).double().movedim(1, 0).flatten(1).numpy()


# BT.601, full range; rows Y, Cb, Cr.
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@pytest.mark.parametrize("level", [1, 3, 5])
@pytest.mark.parametrize(
    ("name", "components", "scale"),
    [("white_noise", np.eye(3), 1.0), ("white_noise_color", YCBCR, 1.0), ("multiplicative_noise", np.eye(3), 0.4)],
)
def test_noise_is_normal_with_its_variance(name: str, components: Array, scale: float, level: int) -> None:
    noise = components @ residual(name, level, 0.4) / scale
    deviation = math.sqrt(TABLE[name][level - 1])
    # Kolmogorov-Smirnov's distance of 200k normal samples exceeds 0.005 once in 10,000 times; a variance 3 % off
    # gives as much.
    for component in noise:
        assert stats.kstest(component / deviation, "norm").statistic < 0.005
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(3)).max() < 0.01  # 4 standard errors
    half = noise.reshape(3, 2, -1)
    assert abs(np.corrcoef(half[0])[0, 1]) < 0.015  # the two pictures have noise of their own


@pytest.mark.parametrize("level", [1, 3, 5])
def test_impulse_noise_is_salt_and_pepper(level: int) -> None:
    noise = residual("impulse_noise", level)
    count = noise.size
    for value in (-0.5, 0.5):  # half of the fraction each, within 4 standard deviations of a binomial
        expected = count * TABLE["impulse_noise"][level - 1] / 2
        assert abs((noise == value).sum() - expected) < 4 * math.sqrt(expected)
    assert set(np.unique(noise)) == {-0.5, 0.0, 0.5}


def test_every_type_has_a_reference() -> None:
    assert set(REFERENCES) | PATTERNS == set(DEGRADATIONS)


def test_jpeg2000_meets_its_ratio() -> None:
    picture = synthetic_photograph(3, 256, 256)
    for level, ratio in ((2, 32), (4, 120)):
        file = io.BytesIO()
        pixels = np.rint(picture.movedim(0, -1).numpy() * 255).astype(np.uint8)
        how = {"quality_mode": "rates", "quality_layers": [strength("jpeg2000", level)], "irreversible": True}
        Image.fromarray(pixels).save(file, "JPEG2000", **how)
        assert len(file.getvalue()) == pytest.approx(256 * 256 * 3 / ratio, rel=0.1)


# ---------------------------------------------------------------- what holds for every type


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_degradation_keeps_shape_and_range_and_input(name: str, picture: torch.Tensor) -> None:
    before = picture.clone()
    for level in range(LEVELS + 1):
        result = degrade(picture, name, level, seed=3)
        assert result.shape == picture.shape and result.dtype == picture.dtype
        assert result.min() >= 0 and result.max() <= 1 and torch.isfinite(result).all()
        assert torch.equal(result, degrade(picture, name, level, seed=3))
        result.zero_()  # a view of the input would change it
        assert torch.equal(picture, before)
    small = torch.rand(1, 3, 32, 41)
    assert degrade(small, name, LEVELS, seed=0).shape == small.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_other_precisions(name: str, dtype: torch.dtype, picture: torch.Tensor) -> None:
    x = (picture * 255).round() / 255
    result = degrade(x.to(dtype), name, 3, seed=5)
    assert result.dtype == dtype and torch.isfinite(result).all()
    # What 8 or 11 bits lose, a codec and a step can multiply: on average it stays below a few steps of theirs.
    assert (result.float() - degrade(x, name, 3, seed=5)).abs().mean() < 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_another_default_dtype_changes_nothing(name: str, picture: torch.Tensor) -> None:
    expected = degrade(picture, name, 3, seed=5)
    torch.set_default_dtype(torch.float64)
    try:
        found = degrade(picture, name, 3, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_devices_agree(name: str, picture: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for seed in (5, [5, 6]):
        result = degrade(picture.cuda(), name, 4, seed)
        assert result.is_cuda
        assert torch.allclose(result.cpu(), degrade(picture, name, 4, seed), atol=LAB)


def mean_squares(name: str) -> list[float]:
    # 192 pixels: a count of patches or squares must not saturate the picture.
    picture = torch.stack([synthetic_photograph(seed, 192, 192) for seed in (1, 2, 3)])
    return [float((degrade(picture, name, level, seed=5) - picture).square().mean()) for level in range(LEVELS + 1)]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_psnr_falls_along_every_chain(name: str) -> None:
    errors = mean_squares(name)
    for chain in DEGRADATIONS[name].chains:
        assert all(errors[a] < errors[b] for a, b in itertools.pairwise(chain)), (chain, errors)
    assert {level for chain in DEGRADATIONS[name].chains for level in chain} == set(range(LEVELS + 1))


def test_levels_are_marked_as_ordered_where_they_are(picture: torch.Tensor) -> None:
    assert [name for name, d in DEGRADATIONS.items() if not d.monotone] == [
        "color_saturation_1",
        "mean_shift",
        "linear_contrast",
    ]
    shift, jpeg = DEGRADATIONS["mean_shift"], DEGRADATIONS["jpeg"]
    assert shift.ordered(2, 4) and shift.ordered(0, 5) and shift.ordered(1, 3)
    assert not shift.ordered(0, 1) and not shift.ordered(2, 3) and not shift.ordered(2, 5) and not shift.ordered(4, 2)
    assert all(jpeg.ordered(i, j) == (i < j) for i in range(6) for j in range(6))
    # Level 1 is pristine just where no chain puts it after pristine.
    for name, degradation in DEGRADATIONS.items():
        same = torch.allclose(degrade(picture, name, 1, seed=0), picture, atol=0.5 / 255)
        assert degradation.ordered(0, 1) != same, name
    # The last level of saturation 1 is as colourful as the first, with hues turned around.
    vivid, grey, turned = (degrade(picture, "color_saturation_1", level, seed=0) for level in (1, 4, 5))
    colourfulness = [float((x.amax(1) - x.amin(1)).mean()) for x in (grey, vivid, turned)]
    assert colourfulness[0] < 1e-6 < colourfulness[1] * 0.5 < colourfulness[2]


@given(st.integers(0, 2**31), st.sampled_from(sorted(DEGRADATIONS)), st.floats(1, LEVELS))
@settings(max_examples=30, deadline=None)
def test_any_picture_stays_in_range(seed: int, name: str, level: float) -> None:
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


@pytest.mark.parametrize(("name", "level"), [("gausian_blur", 1), ("jpeg", 6), ("jpeg", -1)])
def test_unknown_type_or_level_is_one_clear_error(name: str, level: int) -> None:
    with pytest.raises(SettingsError, match="expected"):
        degrade(torch.rand(1, 3, 32, 32), name, level, seed=0)


# ---------------------------------------------------------------- random choices


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_one_seed_shares_geometry_and_not_patterns(name: str, picture: torch.Tensor) -> None:
    pair = picture[:1].expand(2, -1, -1, -1)
    first, second = degrade(pair, name, 4, seed=1)
    # Pictures of a batch may take different paths through a vector unit, hence no equality to the last bit.
    assert torch.allclose(first, second, atol=1e-6) == (name not in PATTERNS)
    other = degrade(pair, name, 4, seed=2)[0]
    assert torch.allclose(first, other, atol=1e-6) == (name not in PATTERNS | GEOMETRY)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_seed_for_each_picture(name: str, picture: torch.Tensor) -> None:
    seeds = [7, 9, 7]
    batch = picture[[0, 0, 0]]
    results = degrade(batch, name, 4, seeds)
    assert torch.allclose(results[0], results[2], atol=1e-6)
    assert torch.allclose(results[0], results[1], atol=1e-6) == (name not in PATTERNS | GEOMETRY)
    for result, seed in zip(results, seeds, strict=True):  # neighbours change nothing
        assert torch.allclose(result, degrade(batch[:1], name, 4, seed)[0], atol=1e-6)


def test_number_of_seeds_is_checked(picture: torch.Tensor) -> None:
    for seeds in ([], [1], [1, 2, 3]):
        with pytest.raises(SettingsError, match=rf"{len(seeds)} seeds for 2 images; expected one"):
            degrade(picture, "jpeg", 1, seeds)
        with pytest.raises(SettingsError, match="expected one"):
            degrade(picture, "jpeg", 0, seeds)


def test_levels_of_one_seed_share_their_choices() -> None:
    grey = torch.full((2, 3, 64, 64), 0.5)
    for seed in (4, [4, 5]):
        weak, strong = (degrade(grey, "white_noise", level, seed) - 0.5 for level in (1, 5))
        assert torch.allclose(strong, weak * math.sqrt(10), atol=1e-5)
        few, many = (degrade(grey, "impulse_noise", level, seed) for level in (1, 5))
        assert torch.equal(many[few != 0.5], few[few != 0.5])
    # A point's image lies along one line at both levels, and a higher level has the lower one's squares and patches.
    point = torch.zeros(1, 3, 33, 33)
    point[..., 16, 16] = 1
    offsets = np.arange(33) - 16
    slopes = []
    for level in (4, 5):
        image = degrade(point, "motion_blur", level, seed=6)[0, 0].numpy()
        moments = [(image * a * b).sum() for a, b in ((offsets[:, None], offsets), (offsets[:, None] ** 2, 1))]
        slopes.append(math.atan2(*moments))
    assert slopes[0] == pytest.approx(slopes[1], abs=0.1)  # radians; lengths 6 and 10 on a grid
    black = torch.zeros(1, 3, 128, 128)
    few, many = (degrade(black, "color_block", level, seed=2) for level in (1, 2))
    assert (many[few > 0] > 0).all() and (many > 0).sum() > (few > 0).sum()


# ---------------------------------------------------------------- compositions


def test_composition_is_its_types_one_after_the_other(picture: torch.Tensor) -> None:
    names = ("motion_blur", "white_noise", "jpeg")
    for seed, derived in ((3, (3, 4, 5)), ([3, 9], ([3, 9], [4, 10], [5, 11]))):
        expected = picture
        for name, own in zip(names, derived, strict=True):
            expected = degrade(expected, name, 2.5, own)
        assert torch.equal(degrade_all(picture, names, 2.5, seed), expected)
    assert torch.equal(degrade_all(picture, names, 0, 3), picture)
    untouched = degrade_all(picture, (), 2, 3)
    assert torch.equal(untouched, picture) and untouched.data_ptr() != picture.data_ptr()
    with pytest.raises(SettingsError, match="jpeg, jpeg2000 cannot be composed; expected at most one"):
        degrade_all(picture, ("jpeg", "jpeg2000"), 1, 0)
    for level in (0, 1):
        with pytest.raises(SettingsError, match="unknown degradation 'jpg'"):
            degrade_all(picture, ("jpg",), level, 0)


def test_types_are_drawn_as_often_as_asked() -> None:
    rng = random.Random(0)
    draws = [draw_types(rng, (0.5, 0.3, 0.2), {"jpeg": 3.0, "jpeg2000": 0.0}) for _ in range(6000)]
    for names in draws:
        places = [GROUP_ORDER.index(DEGRADATIONS[name].group) for name in names]
        assert places == sorted(set(places))  # one of each group, in order
    sizes = collections.Counter(map(len, draws))
    for size, share in ((1, 0.5), (2, 0.3), (3, 0.2)):
        assert sizes[size] / len(draws) == pytest.approx(share, abs=0.02)  # 3 standard errors
    single = collections.Counter(names[0] for names in draws if len(names) == 1)
    assert set(single) == set(DEGRADATIONS) - {"jpeg2000"}
    assert single["jpeg"] / single.total() == pytest.approx(3 / 25, abs=0.02)
    assert draw_types(random.Random(1), (1, 1), {}) == draw_types(random.Random(1), (1, 1), {})
    # Seven types are one of each group.
    assert len(draw_types(rng, (0, 0, 0, 0, 0, 0, 1), {})) == 7


def test_impossible_compositions_are_refused() -> None:
    rng = random.Random(0)
    only_jpeg = {name: float(name == "jpeg") for name in DEGRADATIONS}
    assert draw_types(rng, (1, 0), only_jpeg) == ("jpeg",)
    for counts, weights in (((1, 1), only_jpeg), ((), {}), ((0, 0), {}), ((1,), dict.fromkeys(DEGRADATIONS, 0.0))):
        with pytest.raises(SettingsError, match="groups with a weight above zero"):
            draw_types(rng, counts, weights)
    with pytest.raises(SettingsError, match="unknown degradation 'jpg'; expected one of gaussian_blur"):
        draw_types(rng, (1,), {"jpg": 2.0})


def test_quantization_between_levels_keeps_black_and_white() -> None:
    ramp = torch.linspace(0, 1, 256).expand(1, 3, 32, 256)
    for level in (1, 1.4, 2.5, 3.5, 4.9, 5):
        values = degrade(ramp, "quantization", level, 0).unique()
        expected = torch.linspace(0, 1, round(strength("quantization", level)))
        assert len(values) == len(expected) and torch.allclose(values, expected), level


# ---------------------------------------------------------------- the contact sheet


def test_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, sheet = tmp_path / "photo.png", tmp_path / "sheet.png"
    pixels = (synthetic_photograph(0, 200, 260) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(photo)
    assert contact.main([str(photo), "-o", str(sheet)]) == 0
    with Image.open(sheet) as drawn:
        cells = np.asarray(drawn)[24:, 190:].reshape(24, 162, 6, 162, 3)[:, :160, :, :160].swapaxes(1, 2)
    # Every row begins with the photograph's middle, and no cell is empty or the same as its neighbour but where the
    # first level is pristine.
    assert all(np.array_equal(row[0], cells[0, 0]) for row in cells)
    assert np.array_equal(cells[0, 0], pixels[20:180, 50:210])
    same = {
        (n, k) for n, row in zip(DEGRADATIONS, cells, strict=True) for k in range(5) if np.array_equal(*row[k : k + 2])
    }
    assert same == {(name, 0) for name, degradation in DEGRADATIONS.items() if not degradation.ordered(0, 1)}
    capsys.readouterr()
    for arguments, message in (
        ([tmp_path / "none.png", "-o", sheet], "none.png does not exist"),
        ([photo, "-o", tmp_path / "sheet.xyz"], "sheet.xyz has no suffix of an image format; expected such as .png"),
        ([photo, "-o", tmp_path / "none" / "sheet.png"], "sheet.png cannot be written"),
    ):
        assert contact.main([*map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_a_sheet_whose_name_the_terminal_cannot_show(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "qualiclip_pyiqa.degradations.sheet", "photo.png", "-o", "国.png"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, r"\u56fd.png", "")
    assert (tmp_path / "国.png").is_file()


def test_a_second_bank_is_a_table_of_its_own() -> None:
    def invert(x: torch.Tensor, amount: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
        return x + amount * (1 - 2 * x)

    bank = {"invert": Degradation("color distortion", (0.1, 0.2, 0.3, 0.4, 1), invert)}
    x = synthetic_photograph(0, 64, 64)[None]
    assert torch.allclose(degrade(x, "invert", 5, 0, bank), 1 - x)
    assert torch.equal(degrade_all(x, ["invert"], 2, 0, bank), degrade(x, "invert", 2, 0, bank))
    assert draw_types(random.Random(0), [1], {}, bank) == ("invert",)
    assert contact.contact_sheet(x[0], bank=bank, cell=32).size == (190 + 6 * 34, 24 + 34)
    with pytest.raises(SettingsError, match="unknown degradation 'jpeg'; expected one of invert"):
        degrade(x, "jpeg", 1, 0, bank)
    with pytest.raises(SettingsError, match="group is 'colour'; expected one of brightness change"):
        Degradation("colour", (1, 2, 3, 4, 5), invert)


def test_kornia_is_asked_for_where_it_is_needed() -> None:
    """In a process of its own: nothing is imported yet, and importing fails as it does where kornia is missing."""
    code = """
import sys
sys.modules["kornia"] = None
import torch
from qualiclip_pyiqa.degradations.bank import degrade
from qualiclip_pyiqa.errors import SettingsError
x = torch.rand(1, 3, 32, 32)
degrade(x, "jpeg", 1, 0)
try:
    degrade(x, "gaussian_blur", 1, 0)
except SettingsError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith('a degradation needs kornia: pip install "qualiclip-pyiqa[train]"')


def test_a_ladder_is_the_photograph_and_every_level_as_files_hold_them() -> None:
    rgb = synthetic_photograph(0, 64, 48)
    pictures = list(ladder(rgb, seed=3))
    assert len(pictures) == steps() == 1 + 5 * 24 and torch.equal(pictures[0], rgb)
    for number, name in enumerate(DEGRADATIONS):
        for level in range(1, LEVELS + 1):
            found = pictures[LEVELS * number + level]
            assert torch.equal(found, (degrade(rgb[None], name, level, seed=3)[0] * 255).round() / 255), (name, level)


def test_behaviour_counts_what_is_known_to_be_worse() -> None:
    # Two photographs: what is worse everywhere, for a metric of either direction.
    worse = np.tile([0, *range(1, LEVELS + 1)], (2, 1))
    for name, degradation in DEGRADATIONS.items():
        for scores, lower_better in ((-worse, False), (worse, True)):
            found = behaviour(name, scores, lower_better)
            assert found.falls and found.in_order == 1 and found.means == scores[0].tolist()
            assert behaviour(name, scores, not lower_better).in_order == 0
        # Nothing is known of a pair of levels that no chain has in common; alike is not in order.
        assert behaviour(name, np.zeros((1, LEVELS + 1))).in_order == 0
        swapped = -worse[:1].copy()
        swapped[0, [2, 3]] = swapped[0, [3, 2]]
        found = behaviour(name, swapped)
        assert not found.falls and found.in_order == 1 - degradation.ordered(2, 3) / len(degradation.pairs)

    # A mean may fall though one photograph's scores do not; level 1 may be better than the photograph itself.
    found = behaviour("jpeg", [[1, 9, 5, 4, 3, 2], [1, 2, 3, 2, 1, 0]])
    assert found.falls and found.in_order == pytest.approx((10 + 9) / (15 * 2))


def test_behaviours_are_by_type_in_the_banks_order() -> None:
    table = np.arange(2 * steps(), dtype=float).reshape(2, steps())
    found = behaviours(table.flatten(), lower_better=True)
    assert list(found) == list(DEGRADATIONS) and all(each.falls and each.in_order == 1 for each in found.values())
    assert found["gaussian_blur"].means == [steps() / 2 + k for k in (0, 1, 2, 3, 4, 5)]
    assert found["lens_blur"].means == [steps() / 2 + k for k in (0, 6, 7, 8, 9, 10)]
