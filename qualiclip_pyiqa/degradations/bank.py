"""The degradation bank of QualiCLIP's training: 24 types in 7 groups, each at five levels.

Types and levels are those of ARNIQA (Agnolucci et al., arXiv:2310.14918), by QualiCLIP's group, after KADID-10k (Lin et
al., QoMEX 2019). Where these sources describe a type without a formula, the formula is ours and is in the function's
docstring.

A degradation is one function and one row of the table `DEGRADATIONS`. The function takes

    x: images (N, 3, H, W), float, RGB in 0..1, which it must not change,
    a strength, in the unit given in its docstring,
    the generators of its random choices,

and returns new images of the same shape on the same device; `degrade` clamps them to 0..1.

Random choices: with one generator, geometry (angle, direction, positions) is drawn once and shared by the N images
(`shared_choices`), while patterns (noise, displacement) are drawn for each image (`own_choices`). With N generators
every image draws all of its choices from its own. Generators that are seeded alike at every level of a stack make its
levels share their choices. Generators are on the CPU, so that results agree on all devices.

To add a bank, write a module beside this one with the functions and a table, as `camera` is, and name it in `banks`.
`degrade`, `degrade_all`, `draw_types`, `contact_sheet` and `score_degraded` take a table as `bank=`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import jpeg as encode_and_decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ..errors import SettingsError
from .base import LEVELS, Bank, Degradation, Generators, blur, correlate, known, kornia, own_choices, shared_choices

# ---------------------------------------------------------------- blur


def gaussian_blur(x: Tensor, sigma: float, generators: Generators) -> Tensor:
    """Blur by a Gaussian of `sigma` pixels; like all filters here it repeats the image's border."""
    return blur(x, sigma)


def lens_blur(x: Tensor, radius: float, generators: Generators) -> Tensor:
    """Blur by a disk of `radius` pixels; a pixel on its rim counts by the part of it that lies inside."""
    size = math.ceil(radius)
    t = torch.arange(-size, size + 1, dtype=torch.float32)
    disk = (radius + 0.5 - torch.hypot(t[:, None], t[None, :])).clamp(0, 1)
    return correlate(x, disk[None] / disk.sum())


def motion_blur(x: Tensor, length: float, generators: Generators) -> Tensor:
    """Blur along a segment of `length` pixels, centred on the pixel, at a random angle, splatted bilinearly."""
    # kornia's motion_blur takes odd whole lengths only.
    angle = math.pi * shared_choices(generators, 1)
    points = 16 * math.ceil(length)
    t = ((torch.arange(points, dtype=torch.float32) + 0.5) / points - 0.5) * length
    size = math.ceil(length / 2)
    grid = torch.arange(-size, size + 1, dtype=torch.float32)
    across, down = ((1 - ((t * way)[..., None] - grid).abs()).clamp(min=0) for way in (angle.cos(), angle.sin()))
    kernels = down.mT @ across
    return correlate(x, kernels / kernels.sum(dim=(1, 2), keepdim=True))


# ---------------------------------------------------------------- colour distortion


def _from_lab(light: Tensor, chroma: Tensor) -> Tensor:
    """L (N, 1, H, W) and a, b (N, 2, H, W) as RGB (N, 3, H, W)."""
    rgb: Tensor = kornia("color").lab_to_rgb(torch.cat([light, chroma], dim=1))
    return rgb


def color_diffusion(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Blur Lab a, b with sigma 1.5 * amount + 2 pixels and multiply them by `amount`."""
    lab = kornia("color").rgb_to_lab(x)
    return _from_lab(lab[:, :1], blur(lab[:, 1:], 1.5 * amount + 2) * amount)


def color_shift(x: Tensor, pixels: float, generators: Generators) -> Tensor:
    """Move green by `pixels`, rounded to whole ones, in a random direction, and blend it in along edges.

    The mask is the gradient magnitude of luma, blurred with sigma 4 and divided by its maximum.
    """
    angle = 2 * math.pi * shared_choices(generators, 1)
    dx, dy = ((pixels * way).round().long() for way in (angle.cos(), angle.sin()))
    h, w = x.shape[-2:]
    rows = (torch.arange(h) - dy).clamp(0, h - 1)[:, :, None].to(x.device)
    cols = (torch.arange(w) - dx).clamp(0, w - 1)[:, None, :].to(x.device)
    green = x[:, 1]
    moved = green.gather(1, rows.expand_as(green)).gather(2, cols.expand_as(green))
    luma = kornia("color").rgb_to_y(x)
    across, down = kornia("filters").spatial_gradient(luma, mode="diff").unbind(2)
    mask = blur(torch.hypot(across, down), 4.0)[:, 0]
    mask = mask / mask.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    return torch.stack([x[:, 0], green + mask * (moved - green), x[:, 2]], dim=1)


def color_saturation_hsv(x: Tensor, factor: float, generators: Generators) -> Tensor:
    """Multiply HSV saturation by `factor`, keeping hue and value: it scales each channel's distance to the largest.

    A negative factor overshoots to the complementary hue before clamping.
    """
    # Converting to HSV and back by kornia takes 40 times as long.
    value = x.amax(dim=1, keepdim=True)
    return value - (value - x) * factor


def color_saturation_lab(x: Tensor, factor: float, generators: Generators) -> Tensor:
    """Multiply Lab a, b by `factor`."""
    lab = kornia("color").rgb_to_lab(x)
    return _from_lab(lab[:, :1], lab[:, 1:] * factor)


# ---------------------------------------------------------------- compression


def _through_file(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Encode and decode each image at 8 bits per channel."""
    pixels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return torch.stack([pil_to_tensor(change(to_pil_image(each))) for each in pixels]).to(x) / 255


def jpeg2000(x: Tensor, ratio: float, generators: Generators = ()) -> Tensor:
    """Compress by `ratio` against 24 bits per pixel, with the irreversible wavelet."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)
        return Image.open(file, formats=["JPEG2000"])

    return _through_file(x, change)


def jpeg(x: Tensor, quality: float, generators: Generators = ()) -> Tensor:
    """Compress at `quality` of libjpeg's scale, chroma at half size."""
    # On Pillow images: torchvision's JPEG of tensors is deprecated since 0.29, and CUDA's keeps chroma at full size.
    return _through_file(x, lambda image: encode_and_decode_jpeg(image, int(quality)))


# ---------------------------------------------------------------- noise


def _normal(x: Tensor, generators: Generators) -> Tensor:
    return own_choices(torch.randn, x, generators, *x.shape[1:])


def white_noise(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Add Gaussian noise of `variance` to RGB."""
    return x + math.sqrt(variance) * _normal(x, generators)


def white_noise_color(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Add Gaussian noise of `variance` to YCbCr of full range (ITU-R BT.601)."""
    color = kornia("color")
    noisy: Tensor = color.ycbcr_to_rgb(color.rgb_to_ycbcr(x) + math.sqrt(variance) * _normal(x, generators))
    return noisy


def impulse_noise(x: Tensor, fraction: float, generators: Generators) -> Tensor:
    """Set a `fraction` of all samples to 0 or 1; those of a lower fraction are among those of a higher one."""
    draw, salt = (own_choices(torch.rand, x, generators, *x.shape[1:]) for _ in range(2))
    return torch.where(draw < fraction, (salt < 0.5).to(x), x)


def multiplicative_noise(x: Tensor, variance: float, generators: Generators) -> Tensor:
    """Add Gaussian noise of `variance`, multiplied by the sample."""
    return x + math.sqrt(variance) * x * _normal(x, generators)


# ---------------------------------------------------------------- brightness


def brighten(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Apply the parabola through (0, 0), (0.5, 0.5 + amount / 2) and (1, 1)."""
    return x + 2 * amount * x * (1 - x)


def darken(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Apply the parabola through (0, 0), (0.5, 0.5 - amount / 2) and (1, 1)."""
    return x - 2 * amount * x * (1 - x)


def mean_shift(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Add `amount` to every sample."""
    return x + amount


# ---------------------------------------------------------------- spatial distortion


def jitter(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Resample bilinearly five times, at positions displaced by up to `amount` pixels in x and y."""
    # Grid coordinates run from -1 at the left and upper edges to 1 at the right and lower ones, hence the halves; a
    # pixel is 2 / size wide. kornia's remap is the same grid_sample and takes a third longer.
    h, w = x.shape[-2:]
    size = x.new_tensor([w, h])
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    lowest = 2 * (torch.stack([cols, rows], dim=-1).to(x) + 0.5 - amount) / size - 1
    for _ in range(5):
        grid = torch.addcmul(lowest, own_choices(torch.rand, x, generators, h, w, 2), 4 * amount / size)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return x


def patch_displacement(x: Tensor, count: float, generators: Generators) -> Tensor:
    """Copy `count` 16x16 patches to places up to 8 pixels away (non-eccentricity patch)."""
    h, w = x.shape[-2:]
    side = min(16, h, w)
    places = np.arange(h * w).reshape(h, w)
    sources = np.stack([places] * len(generators))  # where each pixel comes from
    for source, draws in zip(sources, shared_choices(generators, int(count), 4).tolist(), strict=True):
        for fy, fx, ddy, ddx in draws:
            top, left = round(fy * (h - side)), round(fx * (w - side))
            to_top = min(max(top + round(16 * ddy - 8), 0), h - side)
            to_left = min(max(left + round(16 * ddx - 8), 0), w - side)
            source[to_top : to_top + side, to_left : to_left + side] = places[top : top + side, left : left + side]
    index = torch.from_numpy(sources).to(x.device).reshape(-1, 1, h * w).expand(len(x), 3, -1)
    return x.flatten(2).gather(2, index).reshape(x.shape)


def pixelate(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Scale by nearest neighbour to 0.95 - amount^0.6 of the size and back."""
    factor = 0.95 - amount**0.6
    h, w = x.shape[-2:]
    small = F.interpolate(x, size=(max(1, round(h * factor)), max(1, round(w * factor))), mode="nearest-exact")
    return F.interpolate(small, size=(h, w), mode="nearest-exact")


def quantization(x: Tensor, grey_levels: float, generators: Generators) -> Tensor:
    """Round each channel to `grey_levels` equally spaced values, 0 and 1 among them."""
    steps = round(grey_levels) - 1
    return (x * steps).round() / steps


def color_block(x: Tensor, count: float, generators: Generators) -> Tensor:
    """Paint `count` 32x32 squares of random colour; a lower count's squares are the first of a higher count's."""
    h, w = x.shape[-2:]
    side = min(32, h, w)
    paint = torch.full((len(generators), 3, h, w), torch.nan, dtype=torch.float32)
    for layer, draws in zip(paint, shared_choices(generators, int(count), 5), strict=True):
        for (fy, fx), color in zip(draws[:, :2].tolist(), draws[:, 2:, None, None], strict=True):
            top, left = round(fy * (h - side)), round(fx * (w - side))
            layer[:, top : top + side, left : left + side] = color
    paint = paint.to(x)
    return torch.where(paint.isnan(), x, paint)


# ---------------------------------------------------------------- sharpness and contrast


def high_sharpen(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Apply an unsharp mask of `amount` to Lab L, with a Gaussian of sigma 1."""
    lab = kornia("color").rgb_to_lab(x)
    light = lab[:, :1]
    light = (light + amount * (light - blur(light, 1.0))).clamp(0, 100)
    return _from_lab(light, lab[:, 1:])


def linear_contrast(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Apply the cubic, odd about (0.5, 0.5), through (0, 0), (0.3, 0.25 - amount / 4) and their mirror points."""
    cubic = -(0.05 + amount / 4) / 0.042
    t = x - 0.5
    return 0.5 + (1 - cubic / 4) * t + cubic * t**3


def nonlinear_contrast(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Map 0..1 linearly onto 0.5 - amount..0.5 + amount."""
    return 0.5 + amount * (2 * x - 1)


# ---------------------------------------------------------------- the table

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


def strength(name: str, level: float, bank: Bank = DEGRADATIONS) -> float:
    """Return a type's strength at a level from 1 to 5; fractional levels are interpolated linearly.

    Where strengths alternate in sign (mean shift, linear contrast), a fractional level may be the undistorted image.

    Raises:
        SettingsError: an unknown type, or a level outside 1..5.
    """
    levels = known(bank, name).levels
    if not 1 <= level <= LEVELS:
        raise SettingsError(f"degradation level is {level!r}; expected a number from 1 to {LEVELS}, or 0 for pristine")
    below = min(int(level), LEVELS - 1)
    share = level - below
    return (1 - share) * levels[below - 1] + share * levels[below] if share else levels[below - 1]


def degrade(x: Tensor, name: str, level: float, seed: int | Sequence[int], bank: Bank = DEGRADATIONS) -> Tensor:
    """Degrade images by one type at one level.

    Args:
        x: (N, 3, H, W), float, RGB in 0..1; never changed.
        name: a key of the bank.
        level: from 1 (mildest) to 5, fractions too, or 0 for the images as they are.
        seed: decides every random choice; the same seed at several levels shares them. One integer: the N images share
            angle, direction and positions, and each has its own noise and displacement. N integers: images of equal
            seeds share every choice, the others none.
        bank: the types to choose from.

    Returns:
        (N, 3, H, W), the dtype and device of x, in 0..1.

    Raises:
        SettingsError: an unknown type or level, a number of seeds other than N, or kornia is not installed.

    Example:
        >>> grey = torch.full((1, 3, 32, 32), 0.5)
        >>> degrade(grey, "mean_shift", level=2, seed=0)[0, :, 0, 0]
        tensor([0.5800, 0.5800, 0.5800])
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not isinstance(seed, int) and len(seeds) != len(x):
        raise SettingsError(f"{len(seeds)} seeds for {len(x)} images; expected one integer, or one for each image")
    if level == 0 and name in bank:
        return x.clone()
    how = strength(name, level, bank)
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    return bank[name].apply(x, how, generators).clamp(0, 1)
