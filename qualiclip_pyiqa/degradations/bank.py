"""The degradation bank of QualiCLIP's training: 24 types in 7 groups, each at five levels.

Types and levels are those of ARNIQA (Agnolucci et al., arXiv:2310.14918), by QualiCLIP's group, after KADID-10k (Lin et
al., QoMEX 2019). Where the sources give a description rather than a formula, the formula here is ours and stands in the
function's docstring.

Every function takes pictures (N, 3, H, W), float, RGB in 0..1, a strength and the generators of its random choices, and
returns new pictures on the same device; `degrade` clamps to 0..1.

What is random is decided on purpose. With one generator, geometry (angle, direction, positions) is drawn once and
shared by the N pictures, while patterns (noise, displacement) are drawn for each. With N generators every picture draws
all of its choices from its own. Seed the generators alike at every level of a stack, and its levels share the choices.
The generators live on the CPU, so that all devices agree.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import lab_to_rgb, rgb_to_lab, rgb_to_y, rgb_to_ycbcr, ycbcr_to_rgb
from kornia.filters import filter2d, gaussian_blur2d, spatial_gradient
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.v2.functional import jpeg as encode_and_decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ..errors import SettingsError

LEVELS = 5
Generators = Sequence[Generator]  # one for all pictures, or one for each

# ---------------------------------------------------------------- helpers


def _filter(x: Tensor, kernels: Tensor) -> Tensor:
    """Correlate every channel with one odd-sized kernel (1, kH, kW) or each picture's own (N, kH, kW)."""
    # A kernel for each picture, even where all are the same: on a CPU it makes the convolution several times faster.
    return filter2d(x, kernels.to(x).expand(len(x), -1, -1), "replicate")


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian of that sigma in pixels, (N, C, H, W) -> the same shape; a kernel of 2 * ceil(2 * sigma) + 1 pixels."""
    size = 2 * math.ceil(2 * sigma) + 1
    # A sigma for each picture as in `_filter`; on the CPU, since kornia looks at its sign and would wait for a GPU.
    return gaussian_blur2d(x, (size, size), torch.full((len(x), 2), sigma, dtype=torch.float64), "replicate")


def _geometry(generators: Generators, *shape: int) -> Tensor:
    """Uniform numbers in 0..1 that pictures of one generator share: (number of generators, *shape), on the CPU."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def _pattern(draw: Callable[..., Tensor], x: Tensor, generators: Generators, *shape: int) -> Tensor:
    """Random numbers of each picture's own: (N, *shape), where x is."""
    share = len(x) // len(generators)
    return torch.cat([draw((share, *shape), generator=generator) for generator in generators]).to(x)


def _noise(x: Tensor, generators: Generators) -> Tensor:
    return _pattern(torch.randn, x, generators, *x.shape[1:])


# ---------------------------------------------------------------- blur


def gaussian_blur(x: Tensor, sigma: float, generators: Generators) -> Tensor:
    """Like all filters here it repeats the picture's border."""
    return blur(x, sigma)


def lens_blur(x: Tensor, radius: float, generators: Generators) -> Tensor:
    """A disk; a pixel on its rim counts by the part of it that lies inside."""
    size = math.ceil(radius)
    t = torch.arange(-size, size + 1, dtype=torch.float32)
    disk = (radius + 0.5 - torch.hypot(t[:, None], t[None, :])).clamp(0, 1)
    return _filter(x, disk[None] / disk.sum())


def motion_blur(x: Tensor, length: float, generators: Generators) -> Tensor:
    """A line segment of that length through the pixel's centre, at one random angle, splatted bilinearly."""
    # kornia's motion_blur knows odd whole lengths only.
    angle = math.pi * _geometry(generators, 1)
    points = 16 * math.ceil(length)
    t = ((torch.arange(points) + 0.5) / points - 0.5) * length
    size = math.ceil(length / 2)
    grid = torch.arange(-size, size + 1, dtype=torch.float32)
    across, down = ((1 - ((t * way)[..., None] - grid).abs()).clamp(min=0) for way in (angle.cos(), angle.sin()))
    kernels = down.mT @ across
    return _filter(x, kernels / kernels.sum(dim=(1, 2), keepdim=True))


# ---------------------------------------------------------------- colour distortion


def color_diffusion(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Lab a, b blurred with sigma 1.5 * amount + 2 and multiplied by the amount."""
    lab = rgb_to_lab(x)
    return lab_to_rgb(torch.cat([lab[:, :1], blur(lab[:, 1:], 1.5 * amount + 2) * amount], dim=1))


def color_shift(x: Tensor, pixels: float, generators: Generators) -> Tensor:
    """Green moved by whole pixels in one random direction, blended in by edge strength.

    The mask is the gradient magnitude of luma, blurred with sigma 4 and divided by its largest value.
    """
    angle = 2 * math.pi * _geometry(generators, 1)
    dx, dy = ((pixels * way).round().long() for way in (angle.cos(), angle.sin()))
    h, w = x.shape[-2:]
    rows = (torch.arange(h) - dy).clamp(0, h - 1)[:, :, None].to(x.device)
    cols = (torch.arange(w) - dx).clamp(0, w - 1)[:, None, :].to(x.device)
    green = x[:, 1]
    moved = green.gather(1, rows.expand_as(green)).gather(2, cols.expand_as(green))
    across, down = spatial_gradient(rgb_to_y(x), mode="diff").unbind(2)
    mask = blur(torch.hypot(across, down), 4.0)[:, 0]
    mask = mask / mask.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    return torch.stack([x[:, 0], green + mask * (moved - green), x[:, 2]], dim=1)


def color_saturation_hsv(x: Tensor, factor: float, generators: Generators) -> Tensor:
    """HSV saturation times the factor; hue and value stay, so a channel's distance to the largest one is scaled.

    A negative factor overshoots to the complementary hue before clamping.
    """
    # The same by way of kornia's HSV takes 40 times as long.
    value = x.amax(dim=1, keepdim=True)
    return value - (value - x) * factor


def color_saturation_lab(x: Tensor, factor: float, generators: Generators) -> Tensor:
    """Lab a, b times the factor."""
    lab = rgb_to_lab(x)
    return lab_to_rgb(torch.cat([lab[:, :1], lab[:, 1:] * factor], dim=1))


# ---------------------------------------------------------------- compression


def _through_file(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each picture as an image of 8 bits through an encoder and its decoder."""
    pixels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return torch.stack([pil_to_tensor(change(to_pil_image(picture))) for picture in pixels]).to(x) / 255


def jpeg2000(x: Tensor, ratio: float, generators: Generators = ()) -> Tensor:
    """Compression ratio against 24 bits a pixel, irreversible wavelet."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)
        return Image.open(file, formats=["JPEG2000"])

    return _through_file(x, change)


def jpeg(x: Tensor, quality: float, generators: Generators = ()) -> Tensor:
    """libjpeg's quality scale, chroma at half size."""
    # Of Pillow images: torchvision's JPEG of tensors is deprecated since 0.29, and CUDA's keeps chroma at full size.
    return _through_file(x, lambda image: encode_and_decode_jpeg(image, int(quality)))


# ---------------------------------------------------------------- noise


def white_noise(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Gaussian, in RGB."""
    return x + math.sqrt(variance) * _noise(x, generators)


def white_noise_color(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Gaussian, in YCbCr of full range (ITU-R BT.601)."""
    return ycbcr_to_rgb(rgb_to_ycbcr(x) + math.sqrt(variance) * _noise(x, generators))


def impulse_noise(x: Tensor, fraction: float, generators: Generators) -> Tensor:
    """That fraction of all samples becomes 0 or 1; those of a lower fraction are among those of a higher one."""
    draw, salt = (_pattern(torch.rand, x, generators, *x.shape[1:]) for _ in range(2))
    return torch.where(draw < fraction, (salt < 0.5).to(x), x)


def multiplicative_noise(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Gaussian, times the sample."""
    return x + math.sqrt(variance) * x * _noise(x, generators)


# ---------------------------------------------------------------- brightness


def brighten(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """The parabola through (0, 0), (0.5, 0.5 + amount / 2) and (1, 1)."""
    return x + 2 * amount * x * (1 - x)


def darken(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """The parabola through (0, 0), (0.5, 0.5 - amount / 2) and (1, 1)."""
    return x - 2 * amount * x * (1 - x)


def mean_shift(x: Tensor, amount: float, generators: Generators) -> Tensor:
    return x + amount


# ---------------------------------------------------------------- spatial distortion


def jitter(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Five rounds of bilinear resampling at positions displaced by up to that many pixels in x and y."""
    # Grid coordinates run from -1 at the left and upper edges to 1 at the right and lower ones, hence the halves; in
    # them a pixel is 2 / size. kornia's remap is the same grid_sample and takes a third longer.
    h, w = x.shape[-2:]
    size = x.new_tensor([w, h])
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    lowest = 2 * (torch.stack([cols, rows], dim=-1).to(x) + 0.5 - amount) / size - 1
    for _ in range(5):
        grid = torch.addcmul(lowest, _pattern(torch.rand, x, generators, h, w, 2), 4 * amount / size)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return x


def patch_displacement(x: Tensor, count: float, generators: Generators) -> Tensor:
    """Non-eccentricity patch: that many 16x16 patches are copied up to 8 pixels away."""
    h, w = x.shape[-2:]
    side = min(16, h, w)
    places = np.arange(h * w).reshape(h, w)
    sources = np.stack([places] * len(generators))  # where each pixel comes from
    for source, draws in zip(sources, _geometry(generators, int(count), 4).tolist(), strict=True):
        for fy, fx, ddy, ddx in draws:
            top, left = round(fy * (h - side)), round(fx * (w - side))
            to_top = min(max(top + round(16 * ddy - 8), 0), h - side)
            to_left = min(max(left + round(16 * ddx - 8), 0), w - side)
            source[to_top : to_top + side, to_left : to_left + side] = places[top : top + side, left : left + side]
    index = torch.from_numpy(sources).to(x.device).reshape(-1, 1, h * w).expand(len(x), 3, -1)
    return x.flatten(2).gather(2, index).reshape(x.shape)


def pixelate(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Nearest neighbour down to 0.95 - amount^0.6 of the size, and up again."""
    factor = 0.95 - amount**0.6
    h, w = x.shape[-2:]
    small = F.interpolate(x, size=(max(1, round(h * factor)), max(1, round(w * factor))), mode="nearest-exact")
    return F.interpolate(small, size=(h, w), mode="nearest-exact")


def quantization(x: Tensor, grey_levels: float, generators: Generators) -> Tensor:
    """That many equally spaced values, to the nearest whole number, 0 and 1 among them, for each channel."""
    steps = round(grey_levels) - 1
    return (x * steps).round() / steps


def color_block(x: Tensor, count: float, generators: Generators) -> Tensor:
    """That many 32x32 squares of random colour; a lower count's squares are the first of a higher count's."""
    h, w = x.shape[-2:]
    side = min(32, h, w)
    paint = torch.full((len(generators), 3, h, w), torch.nan)
    for layer, draws in zip(paint, _geometry(generators, int(count), 5), strict=True):
        for (fy, fx), color in zip(draws[:, :2].tolist(), draws[:, 2:, None, None], strict=True):
            top, left = round(fy * (h - side)), round(fx * (w - side))
            layer[:, top : top + side, left : left + side] = color
    paint = paint.to(x)
    return torch.where(paint.isnan(), x, paint)


# ---------------------------------------------------------------- sharpness and contrast


def high_sharpen(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Unsharp mask on Lab L with that amount; the mask is a Gaussian of sigma 1."""
    lab = rgb_to_lab(x)
    light = lab[:, :1]
    light = (light + amount * (light - blur(light, 1.0))).clamp(0, 100)
    return lab_to_rgb(torch.cat([light, lab[:, 1:]], dim=1))


def linear_contrast(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """The odd cubic about (0.5, 0.5) through (0.3, 0.25 - amount / 4), (0.7, 0.75 + amount / 4), (0, 0) and (1, 1)."""
    cubic = -(0.05 + amount / 4) / 0.042
    t = x - 0.5
    return 0.5 + (1 - cubic / 4) * t + cubic * t**3


def nonlinear_contrast(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """0..1 onto 0.5 - amount..0.5 + amount."""
    return 0.5 + amount * (2 * x - 1)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Degradation:
    """One type of the bank.

    Attributes:
        group: one of the seven groups.
        levels: strength at levels 1 (mildest) to 5, in the unit the function documents.
        apply: (pictures, strength, generators) -> pictures, not yet clamped.
        chains: which levels are ordered, 0 being pristine: within a chain each level is worse than those before it. Of
            two levels that no chain has in common nothing is known.
    """

    group: str
    levels: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, float, Generators], Tensor]
    chains: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4, 5),)

    def ordered(self, i: int, j: int) -> bool:
        """Whether level j is known to be worse than level i, each from 0 to 5."""
        return i < j and any(i in chain and j in chain for chain in self.chains)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Levels (i, j) of which j is known to be worse, 0 being pristine."""
        return [(i, j) for i, j in combinations(range(LEVELS + 1), 2) if self.ordered(i, j)]

    @property
    def monotone(self) -> bool:
        """Whether each of the five levels is worse than those below it."""
        return all(self.ordered(level, level + 1) for level in range(1, LEVELS))


# Level 1 is the identity: sigma 0.1 (to the last bit) and factor 1.
_FIRST_IS_PRISTINE = ((0, 2, 3, 4, 5), (1, 2, 3, 4, 5))

DEGRADATIONS: dict[str, Degradation] = {
    "gaussian_blur": Degradation("blur", (0.1, 0.5, 1, 2, 5), gaussian_blur, _FIRST_IS_PRISTINE),
    "lens_blur": Degradation("blur", (1, 2, 4, 6, 8), lens_blur),
    "motion_blur": Degradation("blur", (1, 2, 4, 6, 10), motion_blur),
    "color_diffusion": Degradation("color distortion", (1, 3, 6, 8, 12), color_diffusion),
    "color_shift": Degradation("color distortion", (1, 3, 6, 8, 12), color_shift),
    # The last level overshoots to the complementary hue: strange, but colourful.
    "color_saturation_1": Degradation(
        "color distortion", (0.4, 0.2, 0.1, 0, -0.4), color_saturation_hsv, ((0, 1, 2, 3, 4), (0, 5))
    ),
    "color_saturation_2": Degradation("color distortion", (1, 2, 3, 6, 9), color_saturation_lab, _FIRST_IS_PRISTINE),
    "jpeg2000": Degradation("compression", (16, 32, 45, 120, 170), jpeg2000),
    "jpeg": Degradation("compression", (43, 36, 24, 7, 4), jpeg),
    "white_noise": Degradation("noise", (0.001, 0.002, 0.003, 0.005, 0.01), white_noise),
    "white_noise_color": Degradation("noise", (0.0001, 0.0005, 0.001, 0.002, 0.003), white_noise_color),
    "impulse_noise": Degradation("noise", (0.001, 0.005, 0.01, 0.02, 0.03), impulse_noise),
    "multiplicative_noise": Degradation("noise", (0.001, 0.005, 0.01, 0.02, 0.05), multiplicative_noise),
    "brighten": Degradation("brightness change", (0.1, 0.2, 0.4, 0.7, 1.1), brighten),
    "darken": Degradation("brightness change", (0.05, 0.1, 0.2, 0.4, 0.8), darken),
    # The next two change sides from level to level; mean shift begins with the identity.
    "mean_shift": Degradation(
        "brightness change", (0, 0.08, -0.08, 0.15, -0.15), mean_shift, ((0, 2, 4), (0, 3, 5), (1, 2, 4), (1, 3, 5))
    ),
    "jitter": Degradation("spatial distortion", (0.05, 0.1, 0.2, 0.5, 1), jitter),
    "patch_displacement": Degradation("spatial distortion", (20, 40, 60, 80, 100), patch_displacement),
    "pixelate": Degradation("spatial distortion", (0.01, 0.05, 0.1, 0.2, 0.5), pixelate),
    "quantization": Degradation("spatial distortion", (20, 16, 13, 10, 7), quantization),
    "color_block": Degradation("spatial distortion", (2, 4, 6, 8, 10), color_block),
    "high_sharpen": Degradation("sharpness and contrast", (1, 2, 3, 6, 12), high_sharpen),
    "linear_contrast": Degradation(
        "sharpness and contrast", (0, 0.15, -0.4, 0.3, -0.6), linear_contrast, ((0, 1, 2, 4), (0, 3, 5))
    ),
    "nonlinear_contrast": Degradation("sharpness and contrast", (0.4, 0.3, 0.2, 0.1, 0.05), nonlinear_contrast),
}


def strength(name: str, level: float) -> float:
    """A type's strength at a level from 1 to 5, between whole levels on the line between theirs.

    Where the strengths alternate in sign (mean shift, linear contrast) that line leads through the undistorted picture.

    Raises:
        SettingsError: no such type or level.
    """
    if name not in DEGRADATIONS:
        raise SettingsError(f"no degradation is called {name!r}; expected one of {', '.join(DEGRADATIONS)}")
    if not 1 <= level <= LEVELS:
        raise SettingsError(f"degradation level is {level!r}; expected a number from 1 to {LEVELS}, or 0 for pristine")
    levels = DEGRADATIONS[name].levels
    below = min(int(level), LEVELS - 1)
    share = level - below
    return (1 - share) * levels[below - 1] + share * levels[below] if share else levels[below - 1]


def degrade(x: Tensor, name: str, level: float, seed: int | Sequence[int]) -> Tensor:
    """Degrade pictures by one type at one level.

    Args:
        x: (N, 3, H, W), float, RGB in 0..1; never changed.
        name: a key of `DEGRADATIONS`.
        level: from 1 (mildest) to 5, fractions too, or 0 for the pictures as they are.
        seed: decides every random choice; the same seed at several levels shares them. One integer: the N pictures
            share angle, direction and positions, and each has its own noise and displacement. N integers: pictures of
            equal seeds share every choice, the others none.

    Returns:
        (N, 3, H, W), the dtype and device of x, in 0..1.

    Raises:
        SettingsError: no such type or level, or a number of seeds other than N.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not isinstance(seed, int) and len(seeds) != len(x):
        raise SettingsError(f"{len(seeds)} seeds for {len(x)} pictures; expected one integer, or one for each picture")
    if level == 0 and name in DEGRADATIONS:
        return x.clone()
    how = strength(name, level)
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    return DEGRADATIONS[name].apply(x, how, generators).clamp(0, 1)


# ---------------------------------------------------------------- compositions

# Order of a composition: what happens before the lens comes first, what the file does to the picture last.
GROUP_ORDER = (
    "brightness change",
    "color distortion",
    "sharpness and contrast",
    "blur",
    "noise",
    "spatial distortion",
    "compression",
)


def draw_types(rng: random.Random, counts: Sequence[float], weights: Mapping[str, float]) -> tuple[str, ...]:
    """Draw the types of a composition, at most one of each group.

    Args:
        rng: decides.
        counts: relative frequencies of one, two, three... types.
        weights: how often a type is drawn relative to the others; 1 where it is not named.

    Returns:
        Keys of `DEGRADATIONS` in the order of `GROUP_ORDER`.

    Raises:
        SettingsError: no such type, or more types asked for than there are groups with a weight above zero.
    """
    if unknown := sorted(set(weights) - set(DEGRADATIONS)):
        raise SettingsError(f"no degradation is called {unknown[0]!r}; expected one of {', '.join(DEGRADATIONS)}")
    left = {name: weights.get(name, 1.0) for name in DEGRADATIONS if weights.get(name, 1.0) > 0}
    groups = {DEGRADATIONS[name].group for name in left}
    if not any(counts) or any(counts[len(groups) :]):
        raise SettingsError(
            f"the frequencies of one, two... types are {list(counts)}; expected one above zero, and none for more than "
            f"the {len(groups)} groups with a weight above zero"
        )
    drawn: list[str] = []
    for _ in range(rng.choices(range(1, len(counts) + 1), counts)[0]):
        drawn += rng.choices(list(left), list(left.values()))
        group = DEGRADATIONS[drawn[-1]].group
        left = {name: weight for name, weight in left.items() if DEGRADATIONS[name].group != group}
    return tuple(sorted(drawn, key=lambda name: GROUP_ORDER.index(DEGRADATIONS[name].group)))


def degrade_all(x: Tensor, names: Sequence[str], level: float, seed: int | Sequence[int]) -> Tensor:
    """Degrade pictures by several types at the same level, one after the other.

    Args:
        names: keys of `DEGRADATIONS`, at most one of each group; the type at position p has `seed` + p.
        x, level, seed: as in `degrade`.

    Returns:
        (N, 3, H, W), the dtype and device of x, in 0..1.

    Raises:
        SettingsError: as `degrade`, or two types of one group.
    """
    groups = [DEGRADATIONS[name].group for name in names if name in DEGRADATIONS]
    if len(set(groups)) < len(groups):
        raise SettingsError(f"{', '.join(names)} are not composed; expected at most one type of a group")
    result = x.clone()
    for position, name in enumerate(names):
        result = degrade(
            result, name, level, seed + position if isinstance(seed, int) else [one + position for one in seed]
        )
    return result


# ---------------------------------------------------------------- the contact sheet


def contact_sheet(rgb: Tensor, seed: int = 0, cell: int = 160) -> Image.Image:
    """All types at all levels: a row per type, the photograph itself first; (3, H, W) in 0..1 -> a PIL image.

    The middle of the photograph is shown at its own size, so that what a degradation does to single pixels can be
    seen; the degradations themselves see a square of twice that size.
    """
    from PIL import ImageDraw

    side = min(2 * cell, *rgb.shape[-2:])
    top, left = ((length - side) // 2 for length in rgb.shape[-2:])
    square = rgb[None, :, top : top + side, left : left + side]
    label, gap = 190, 2
    sheet = Image.new("RGB", (label + (LEVELS + 1) * (cell + gap), 24 + len(DEGRADATIONS) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for level in range(LEVELS + 1):
        pen.text((label + level * (cell + gap) + 4, 6), f"level {level}" if level else "pristine", fill="black")
    for row, (name, degradation) in enumerate(DEGRADATIONS.items()):
        y = 24 + row * (cell + gap)
        lines = [name.replace("_", " "), f"({degradation.group})", *([] if degradation.monotone else ["not monotone"])]
        pen.text((6, y + 6), "\n".join(lines), fill="black")
        for level in range(LEVELS + 1):
            pixels = (degrade(square, name, level, seed)[0] * 255).round().byte().movedim(0, -1).cpu().numpy()
            shown = Image.fromarray(pixels).crop(((side - cell) // 2, (side - cell) // 2, *[(side + cell) // 2] * 2))
            sheet.paste(shown.resize((cell, cell)), (label + level * (cell + gap), y))
    return sheet


def main() -> int:
    import argparse
    import sys
    from pathlib import Path

    from ..errors import ImageError
    from ..images.tensors import load_image

    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.degradations.bank",
        description="Draw the contact sheet of the degradation bank: every type at every level.",
    )
    parser.add_argument("photo", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        contact_sheet(load_image(arguments.photo), arguments.seed).save(arguments.output)
    except (ImageError, OSError, ValueError) as error:  # Pillow raises ValueError for a suffix that it does not know
        print(f"degradations: {error}", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
