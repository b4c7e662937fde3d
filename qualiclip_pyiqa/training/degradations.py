"""The degradation bank of QualiCLIP's training: 24 types in 7 groups, each at five levels.

Types and levels are those of ARNIQA (Agnolucci et al., arXiv:2310.14918), by QualiCLIP's group, after KADID-10k (Lin et
al., QoMEX 2019). Where the sources give a description rather than a formula, the formula here is ours and stands in the
function's docstring.

Every function takes pictures (N, 3, H, W), float, RGB in 0..1, a strength and a generator for its random choices, and
returns new pictures; `degrade` clamps to 0..1. What is random is decided on purpose: angle, direction and positions are
drawn once and shared by the N pictures, noise and displacement are drawn for each. Give every level of a stack a
generator seeded alike, and the choices are shared across levels too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from ..errors import SettingsError

LEVELS = 5

# ---------------------------------------------------------------- helpers: filters


def _gaussian(sigma: float, radius: int) -> Tensor:
    t = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (t / sigma).square())
    return kernel / kernel.sum()


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with one odd-sized kernel (kH, kW); replicate padding keeps the size."""
    ky, kx = kernel.shape
    n, c, h, w = x.shape
    padded = F.pad(x, (kx // 2, kx // 2, ky // 2, ky // 2), mode="replicate")
    flat = padded.reshape(n * c, 1, h + ky - 1, w + kx - 1)
    return F.conv2d(flat, kernel.to(x)[None, None]).reshape(n, c, h, w)


def _blur(x: Tensor, sigma: float, radius: int | None = None) -> Tensor:
    kernel = _gaussian(sigma, math.ceil(2 * sigma) if radius is None else radius)
    return _filter(_filter(x, kernel[None, :]), kernel[:, None])


# ---------------------------------------------------------------- helpers: colour

# sRGB (IEC 61966-2-1) to CIE XYZ, rows scaled by the D65 white point; CIE 1976 L*a*b*.
_WHITE = torch.tensor([0.950456, 1.0, 1.088754])
_RGB_TO_XYZ = (
    torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
    )
    / _WHITE[:, None]
)
_XYZ_TO_RGB = torch.linalg.inv(_RGB_TO_XYZ)
# ITU-R BT.601, full range, chroma centred on 0.
_RGB_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_YCC_TO_RGB = torch.linalg.inv(_RGB_TO_YCC)


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,njhw->nihw", matrix.to(x), x)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (N, 3, H, W) in 0..1 -> CIE L*a*b* (N, 3, H, W), L in 0..100."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = _mix(linear, _RGB_TO_XYZ)
    fx, fy, fz = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `rgb_to_lab`, clamped to 0..1."""
    light, a, b = lab.unbind(1)
    fy = (light + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _mix(xyz, _XYZ_TO_RGB).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055, 12.92 * linear)


def _uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator)


def _normal_like(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x)


# ---------------------------------------------------------------- blur


def gaussian_blur(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    return _blur(x, sigma)


def lens_blur(x: Tensor, radius: float, generator: Generator) -> Tensor:
    """A disk; a pixel on its rim counts by the part of it that lies inside."""
    size = math.ceil(radius)
    t = torch.arange(-size, size + 1, dtype=torch.float32)
    disk = (radius + 0.5 - torch.hypot(t[:, None], t[None, :])).clamp(0, 1)
    return _filter(x, disk / disk.sum())


def motion_blur(x: Tensor, length: float, generator: Generator) -> Tensor:
    """A line segment of that length through the pixel's centre, at one random angle, splatted bilinearly."""
    angle = math.pi * float(_uniform(generator, 1))
    t = torch.linspace(-0.5, 0.5, 16 * math.ceil(length) + 1) * length
    px, py = t * math.cos(angle), t * math.sin(angle)
    size = math.ceil(length / 2)
    grid = torch.arange(-size, size + 1, dtype=torch.float32)
    tent_x = (1 - (px[:, None] - grid).abs()).clamp(min=0)
    tent_y = (1 - (py[:, None] - grid).abs()).clamp(min=0)
    kernel = tent_y.T @ tent_x
    return _filter(x, kernel / kernel.sum())


# ---------------------------------------------------------------- colour distortion


def color_diffusion(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Lab a, b blurred with sigma 1.5 * amount + 2 and multiplied by the amount."""
    lab = rgb_to_lab(x)
    return lab_to_rgb(torch.cat([lab[:, :1], _blur(lab[:, 1:], 1.5 * amount + 2) * amount], dim=1))


def color_shift(x: Tensor, pixels: float, generator: Generator) -> Tensor:
    """Green moved in one random direction, blended in by edge strength.

    The mask is the gradient magnitude of luma, blurred with sigma 4 and divided by its largest value.
    """
    angle = 2 * math.pi * float(_uniform(generator, 1))
    dx, dy = round(pixels * math.cos(angle)), round(pixels * math.sin(angle))
    h, w = x.shape[-2:]
    rows = (torch.arange(h, device=x.device) - dy).clamp(0, h - 1)
    cols = (torch.arange(w, device=x.device) - dx).clamp(0, w - 1)
    luma = _mix(x, _RGB_TO_YCC[:1])
    p = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    gradient = torch.hypot(p[..., 1:-1, 2:] - p[..., 1:-1, :-2], p[..., 2:, 1:-1] - p[..., :-2, 1:-1])
    mask = _blur(gradient, 4.0)
    mask = mask / mask.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    green = x[:, 1:2]
    green = green + mask * (green[:, :, rows][..., cols] - green)
    return torch.cat([x[:, :1], green, x[:, 2:]], dim=1)


def color_saturation_hsv(x: Tensor, factor: float, generator: Generator) -> Tensor:
    """HSV saturation times the factor; hue and value stay, so a channel's distance to the largest one is scaled.

    A negative factor overshoots to the complementary hue before clamping.
    """
    value = x.amax(dim=1, keepdim=True)
    return value - (value - x) * factor


def color_saturation_lab(x: Tensor, factor: float, generator: Generator) -> Tensor:
    lab = rgb_to_lab(x)
    return lab_to_rgb(torch.cat([lab[:, :1], lab[:, 1:] * factor], dim=1))


# ---------------------------------------------------------------- compression


def _through_file(x: Tensor, **how: Any) -> Tensor:
    """Each picture as 8 bits through Pillow's encoder and decoder."""
    pictures = []
    for picture in (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu():
        stream = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(stream, **how)
        with Image.open(stream) as decoded:
            pictures.append(torch.from_numpy(np.array(decoded.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(pictures).to(x) / 255


def jpeg(x: Tensor, quality: float, generator: Generator) -> Tensor:
    """libjpeg's quality scale, chroma at half size (Pillow's default)."""
    return _through_file(x, format="JPEG", quality=int(quality))


def jpeg2000(x: Tensor, ratio: float, generator: Generator) -> Tensor:
    """Compression ratio against 24 bits a pixel, irreversible wavelet."""
    return _through_file(x, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)


# ---------------------------------------------------------------- noise


def white_noise(x: Tensor, variance: float, generator: Generator) -> Tensor:
    return x + math.sqrt(variance) * _normal_like(x, generator)


def white_noise_color(x: Tensor, variance: float, generator: Generator) -> Tensor:
    ycc = _mix(x, _RGB_TO_YCC)
    return _mix(ycc + math.sqrt(variance) * _normal_like(x, generator), _YCC_TO_RGB)


def impulse_noise(x: Tensor, fraction: float, generator: Generator) -> Tensor:
    """That fraction of all samples becomes 0 or 1; those of a lower fraction are among those of a higher one."""
    draw = torch.rand(x.shape, generator=generator).to(x)
    salt = (torch.rand(x.shape, generator=generator) < 0.5).to(x)
    return torch.where(draw < fraction, salt, x)


def multiplicative_noise(x: Tensor, variance: float, generator: Generator) -> Tensor:
    return x + math.sqrt(variance) * x * _normal_like(x, generator)


# ---------------------------------------------------------------- brightness


def brighten(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """The parabola through (0, 0), (0.5, 0.5 + amount / 2) and (1, 1)."""
    return x + 2 * amount * x * (1 - x)


def darken(x: Tensor, amount: float, generator: Generator) -> Tensor:
    return x - 2 * amount * x * (1 - x)


def mean_shift(x: Tensor, amount: float, generator: Generator) -> Tensor:
    return x + amount


# ---------------------------------------------------------------- spatial distortion


def jitter(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Five rounds of bilinear resampling at positions displaced by up to that many pixels in x and y."""
    n, _, h, w = x.shape
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    base = torch.stack([cols, rows], dim=-1).float()
    size = torch.tensor([w, h], dtype=torch.float32)
    for _ in range(5):
        place = base + amount * (2 * _uniform(generator, n, h, w, 2) - 1)
        grid = (2 * place + 1) / size - 1
        x = F.grid_sample(x, grid.to(x), mode="bilinear", padding_mode="border", align_corners=False)
    return x


def patch_displacement(x: Tensor, count: float, generator: Generator) -> Tensor:
    """Non-eccentricity patch: that many 16x16 patches are copied up to 8 pixels away."""
    out = x.clone()
    h, w = x.shape[-2:]
    side = min(16, h, w)
    for fy, fx, ddy, ddx in _uniform(generator, int(count), 4).tolist():
        top, left = round(fy * (h - side)), round(fx * (w - side))
        to_top = min(max(top + round(16 * ddy - 8), 0), h - side)
        to_left = min(max(left + round(16 * ddx - 8), 0), w - side)
        out[..., to_top : to_top + side, to_left : to_left + side] = x[..., top : top + side, left : left + side]
    return out


def pixelate(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Nearest neighbour down to 0.95 - amount^0.6 of the size, and up again."""
    factor = 0.95 - amount**0.6
    h, w = x.shape[-2:]
    small = F.interpolate(x, size=(max(1, round(h * factor)), max(1, round(w * factor))), mode="nearest-exact")
    return F.interpolate(small, size=(h, w), mode="nearest-exact")


def quantization(x: Tensor, grey_levels: float, generator: Generator) -> Tensor:
    return (x * (grey_levels - 1)).round() / (grey_levels - 1)


def color_block(x: Tensor, count: float, generator: Generator) -> Tensor:
    """That many 32x32 squares of random colour; a lower count's squares are the first of a higher count's."""
    out = x.clone()
    h, w = x.shape[-2:]
    side = min(32, h, w)
    for fy, fx, *color in _uniform(generator, int(count), 5).tolist():
        top, left = round(fy * (h - side)), round(fx * (w - side))
        out[..., top : top + side, left : left + side] = torch.tensor(color).to(x)[:, None, None]
    return out


# ---------------------------------------------------------------- sharpness and contrast


def high_sharpen(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """Unsharp mask on Lab L with that amount; the mask is a Gaussian of sigma 1."""
    lab = rgb_to_lab(x)
    light = lab[:, :1]
    light = (light + amount * (light - _blur(light, 1.0))).clamp(0, 100)
    return lab_to_rgb(torch.cat([light, lab[:, 1:]], dim=1))


def linear_contrast(x: Tensor, amount: float, generator: Generator) -> Tensor:
    """The odd cubic about (0.5, 0.5) through (0.3, 0.25 - amount / 4), (0.7, 0.75 + amount / 4), (0, 0) and (1, 1)."""
    cubic = -(0.05 + amount / 4) / 0.042
    t = x - 0.5
    return 0.5 + (1 - cubic / 4) * t + cubic * t**3


def nonlinear_contrast(x: Tensor, amount: float, generator: Generator) -> Tensor:
    return 0.5 + amount * (2 * x - 1)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Degradation:
    """One type of the bank.

    Attributes:
        group: one of the seven groups.
        levels: strength at levels 1 (mildest) to 5, in the unit the function documents.
        apply: (pictures, strength, generator) -> pictures, not yet clamped.
        monotone: whether every level is a stronger change than the one before; where it is not, level i < j says
            nothing about which of the two is worse, only that both are worse than pristine.
    """

    group: str
    levels: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, float, Generator], Tensor]
    monotone: bool = True


DEGRADATIONS: dict[str, Degradation] = {
    "gaussian_blur": Degradation("blur", (0.1, 0.5, 1, 2, 5), gaussian_blur),
    "lens_blur": Degradation("blur", (1, 2, 4, 6, 8), lens_blur),
    "motion_blur": Degradation("blur", (1, 2, 4, 6, 10), motion_blur),
    "color_diffusion": Degradation("color distortion", (1, 3, 6, 8, 12), color_diffusion),
    "color_shift": Degradation("color distortion", (1, 3, 6, 8, 12), color_shift),
    "color_saturation_1": Degradation("color distortion", (0.4, 0.2, 0.1, 0, -0.4), color_saturation_hsv),
    "color_saturation_2": Degradation("color distortion", (1, 2, 3, 6, 9), color_saturation_lab),
    "jpeg2000": Degradation("compression", (16, 32, 45, 120, 170), jpeg2000),
    "jpeg": Degradation("compression", (43, 36, 24, 7, 4), jpeg),
    "white_noise": Degradation("noise", (0.001, 0.002, 0.003, 0.005, 0.01), white_noise),
    "white_noise_color": Degradation("noise", (0.0001, 0.0005, 0.001, 0.002, 0.003), white_noise_color),
    "impulse_noise": Degradation("noise", (0.001, 0.005, 0.01, 0.02, 0.03), impulse_noise),
    "multiplicative_noise": Degradation("noise", (0.001, 0.005, 0.01, 0.02, 0.05), multiplicative_noise),
    "brighten": Degradation("brightness change", (0.1, 0.2, 0.4, 0.7, 1.1), brighten),
    "darken": Degradation("brightness change", (0.05, 0.1, 0.2, 0.4, 0.8), darken),
    "mean_shift": Degradation("brightness change", (0, 0.08, -0.08, 0.15, -0.15), mean_shift, monotone=False),
    "jitter": Degradation("spatial distortion", (0.05, 0.1, 0.2, 0.5, 1), jitter),
    "patch_displacement": Degradation("spatial distortion", (20, 40, 60, 80, 100), patch_displacement),
    "pixelate": Degradation("spatial distortion", (0.01, 0.05, 0.1, 0.2, 0.5), pixelate),
    "quantization": Degradation("spatial distortion", (20, 16, 13, 10, 7), quantization),
    "color_block": Degradation("spatial distortion", (2, 4, 6, 8, 10), color_block),
    "high_sharpen": Degradation("sharpness and contrast", (1, 2, 3, 6, 12), high_sharpen),
    "linear_contrast": Degradation(
        "sharpness and contrast", (0, 0.15, -0.4, 0.3, -0.6), linear_contrast, monotone=False
    ),
    "nonlinear_contrast": Degradation("sharpness and contrast", (0.4, 0.3, 0.2, 0.1, 0.05), nonlinear_contrast),
}


def strength(name: str, level: float) -> float:
    """A type's strength at a level from 1 to 5, between whole levels on the line between theirs.

    Where the strengths alternate in sign (`monotone` is false) that line leads through the undistorted picture.

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


def degrade(x: Tensor, name: str, level: float, seed: int) -> Tensor:
    """Degrade pictures by one type at one level.

    Args:
        x: (N, 3, H, W), float, RGB in 0..1; never changed.
        name: a key of `DEGRADATIONS`.
        level: from 1 (mildest) to 5, fractions too, or 0 for the pictures as they are.
        seed: decides every random choice; the same seed at several levels shares them.

    Returns:
        (N, 3, H, W), the dtype of x, in 0..1.

    Raises:
        SettingsError: no such type or level.
    """
    if level == 0 and name in DEGRADATIONS:
        return x.clone()
    how = strength(name, level)
    generator = torch.Generator().manual_seed(seed)
    return DEGRADATIONS[name].apply(x, how, generator).clamp(0, 1)


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
    from ..images import load_image

    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.training.degradations",
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
