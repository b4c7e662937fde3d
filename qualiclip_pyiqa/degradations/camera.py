"""The bank `camera`: 12 faults as cameras and their software make them, each at five levels.

Functions and rows are as in `bank`: images (N, 3, H, W) in 0..1, a strength and the generators of the random choices.
Light adds up in a scene, a lens and a sensor, so most of these work on linear light: sRGB decoded by the transfer
function of IEC 61966-2-1, in 0..1. Where a docstring names no source, the formula is ours. All levels were chosen by
eye, on photographs of 512x512 pixels: from just noticeable to very annoying.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import jpeg
from .base import Degradation, Generators, blur, kornia, own_choices, shared_choices

Apply: TypeAlias = Callable[[Tensor, float, Generators], Tensor]

# A small sensor at its base sensitivity.
FULL_WELL = 4000  # electrons of a white pixel
READ_NOISE = 3  # electrons, standard deviation
SAVES = 4  # of a repeated JPEG


def _in_float32(apply: Apply) -> Apply:
    """Compute half precision in float32: linear light, Fourier transforms and local variances need its digits."""

    @wraps(apply)
    def wrapped(x: Tensor, strength: float, generators: Generators) -> Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        return apply(x.float() if half else x, strength, generators).to(x.dtype)

    return wrapped


def _linear(x: Tensor) -> Tensor:
    """sRGB to linear light (IEC 61966-2-1)."""
    light: Tensor = kornia("color").rgb_to_linear_rgb(x)
    return light


def _srgb(light: Tensor) -> Tensor:
    """Linear light, clipped to 0..1, to sRGB (IEC 61966-2-1)."""
    x: Tensor = kornia("color").linear_rgb_to_rgb(light.clamp(0, 1))
    return x


def _smooth_map(x: Tensor, generators: Generators) -> Tensor:
    """Draw a smooth map: 4x4 uniform numbers, scaled up bicubically, from 0 to 1: (N or 1, 1, H, W)."""
    coarse = shared_choices(generators, 1, 4, 4)
    fine = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=True)
    low, high = fine.amin(dim=(-2, -1), keepdim=True), fine.amax(dim=(-2, -1), keepdim=True)
    return ((fine - low) / (high - low)).to(x)


def _spectrum(x: Tensor, radius: int) -> tuple[Tensor, tuple[int, int]]:
    """Transform images whose border is repeated for `radius` pixels; also returns the transform's size."""
    padded = F.pad(x, [radius] * 4, mode="replicate")
    h, w = (32 * math.ceil(length / 32) for length in padded.shape[-2:])  # lengths with small factors are quick
    return torch.fft.rfft2(padded, s=(h, w)), (h, w)


def _filtered(spectrum: Tensor, size: tuple[int, int], kernels: Tensor, shape: torch.Size) -> Tensor:
    """Convolve `_spectrum` with kernels (N or 1, K, K) that sum to 1, K = 2 * radius + 1; `shape` is the images'."""
    side = kernels.shape[-1] - 1
    # Large kernels, for which a direct convolution takes ten times as long.
    found = torch.fft.irfft2(spectrum * torch.fft.rfft2(kernels, s=size)[:, None], s=size)
    return found[..., side : side + shape[-2], side : side + shape[-1]]


# ---------------------------------------------------------------- light


def _sensor(light: Tensor, gain: float, generators: Generators) -> Tensor:
    """Add the noise of a sensor to linear light, with white at FULL_WELL / gain electrons.

    A sample of s electrons has variance s + READ_NOISE^2: the Gaussian approximation of the Poisson-Gaussian model (Foi
    et al., IEEE Trans. Image Processing 17(10), 2008). Samples lie on a Bayer mosaic (RGGB) and the noise, not the
    image, is interpolated bilinearly, which correlates it between neighbours as demosaicing does.
    """
    h, w = light.shape[-2:]
    white = FULL_WELL / gain
    draws = own_choices(torch.randn, light, generators, 1, h, w)
    rows, cols = torch.arange(h, device=light.device)[:, None] % 2, torch.arange(w, device=light.device) % 2
    mosaic = torch.stack([(rows + cols == k).expand(h, w) for k in (0, 1, 2)]).to(light)
    samples = mosaic * draws * (light.clamp(min=0) * white + READ_NOISE**2).sqrt() / white
    samples = F.pad(samples, [1, 1, 1, 1], mode="reflect")  # mirrored at the border, which keeps the mosaic's parity
    beside = (samples[..., :-2] + samples[..., 2:]) / 2
    red, _, blue = (samples[..., 1:-1] + beside).unbind(1)
    red, blue = (plane[:, 1:-1] + (plane[:, :-2] + plane[:, 2:]) / 2 for plane in (red, blue))
    plane = samples[:, 1, :, 1:-1]
    green = plane[:, 1:-1] + beside[:, 1, 1:-1] / 2 + (plane[:, :-2] + plane[:, 2:]) / 4
    return light + torch.stack([red, green, blue], dim=1)


@_in_float32
def low_light(x: Tensor, stops: float, generators: Generators) -> Tensor:
    """Take away `stops` of light and give half of them back by gain, with the noise of `_sensor` at a gain of 2.

    Linear light is multiplied by 2^-stops, gets shot and read noise, is multiplied by 2^(stops / 2) and clipped.
    """
    dark = _sensor(_linear(x) * 2**-stops, 2.0, generators)
    return _srgb(dark * 2 ** (stops / 2))


@_in_float32
def overexposure(x: Tensor, stops: float, generators: Generators) -> Tensor:
    """Multiply linear light by 2^stops; what exceeds white clips."""
    return _srgb(_linear(x) * 2**stops)


@_in_float32
def flare(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Add a bright light's stray light to linear light: `amount` * (0.25 + spot) * colour.

    The even part is veiling glare (the term of ISO 9358; the formula is ours). The spot is a Gaussian at a random place
    of the image, with a sigma of 0.25 to 0.5 of its shorter side, and a warm colour: 1, 0.8 to 1, 0.6 to 1.
    """
    h, w = x.shape[-2:]
    down, across, spread, green, blue = shared_choices(generators, 5).to(x)[:, :, None, None, None].unbind(1)
    rows, cols = torch.arange(h).to(x)[:, None], torch.arange(w).to(x)
    sigma = (0.25 + 0.25 * spread) * min(h, w)
    spot = (-((rows - down * h) ** 2 + (cols - across * w) ** 2) / (2 * sigma**2)).exp()
    color = torch.cat([torch.ones_like(green), 0.8 + 0.2 * green, 0.6 + 0.4 * blue], dim=1)
    return _srgb(_linear(x) + amount * (0.25 + spot) * color)


@_in_float32
def haze(x: Tensor, depth: float, generators: Generators) -> Tensor:
    """Blend linear light with airlight A by Koschmieder's model: J * t + A * (1 - t), with t = exp(-depth * d).

    `depth` is the optical depth of the farthest point, and the distance d a smooth map from 0.3 to 1. A is 0.6 to 0.9
    in red and green, and up to 0.08 more in blue. Koschmieder 1924; as in Narasimhan & Nayar, IJCV 48(3), 2002.
    """
    brightness, tint = shared_choices(generators, 2).to(x)[:, :, None, None, None].unbind(1)
    grey = 0.6 + 0.3 * brightness
    airlight = torch.cat([grey, grey, grey + 0.08 * tint], dim=1)
    through = (-depth * (0.3 + 0.7 * _smooth_map(x, generators))).exp()
    return _srgb(torch.lerp(airlight, _linear(x), through))


# ---------------------------------------------------------------- colour


@_in_float32
def white_balance(x: Tensor, stops: float, generators: Generators) -> Tensor:
    """Multiply linear red, green and blue by 2^(stops * c), 2^(stops * m / 2) and 2^(-stops * c), keeping grey's luma.

    (c, m) is a random direction within 60 degrees of (1, 0), amber, or (-1, 0), blue; m is towards green or magenta.
    Gains are divided by the luminance (ITU-R BT.709) that they give to grey.
    """
    side, tint = shared_choices(generators, 2).to(x).unbind(1)
    angle = math.pi / 1.5 * (tint - 0.5)
    warm = torch.where(side < 0.5, -1.0, 1.0).to(x) * angle.cos()
    gains = 2 ** (stops * torch.stack([warm, angle.sin() / 2, -warm], dim=1))
    gains = gains / (gains * gains.new_tensor([0.2126, 0.7152, 0.0722])).sum(1, keepdim=True)
    return _srgb(_linear(x) * gains[:, :, None, None])


# ---------------------------------------------------------------- blur


@_in_float32
def camera_shake(x: Tensor, length: float, generators: Generators) -> Tensor:
    """Blur linear light along a smooth random path of `length` pixels, from end to end along the curve.

    The path's velocity, in x and in y, is a + b cos(pi t) + c cos(2 pi t) + 0.7 d cos(3 pi t) for t from 0 to 1, with
    a, b, c and d uniform in -1..1. The path is centred on its mean and splatted bilinearly at equal steps of time.
    """
    points = 256
    t = (torch.arange(points, dtype=torch.float32) + 0.5) / points
    strengths = (1, 1, 1, 0.7)
    waves = torch.stack([strength * (turns * math.pi * t).cos() for turns, strength in enumerate(strengths)])
    velocity = (2 * shared_choices(generators, 2, 4) - 1) @ waves
    path = velocity.cumsum(-1)
    path = path / torch.hypot(*velocity.unbind(1)).sum(-1)[:, None, None]
    path = (path - path.mean(-1, keepdim=True)) * length
    radius = math.ceil(float(path.abs().max()))
    grid = torch.arange(-radius, radius + 1, dtype=torch.float32)
    across, down = ((1 - (way[..., None] - grid).abs()).clamp(min=0) for way in path.unbind(1))
    kernels = (down.mT @ across / points).to(x)
    return _srgb(_filtered(*_spectrum(_linear(x), radius), kernels, x.shape))


@_in_float32
def defocus(x: Tensor, radius: float, generators: Generators) -> Tensor:
    """Blur linear light by disks that grow with depth, from 0 to `radius` pixels.

    Depth is a smooth map from 0 to 1, in focus at 0. The image is blurred at four radii, `radius` * (1, 2, 3, 4) / 4,
    with rims as in `lens_blur`, and each pixel is interpolated between the two next to its own.
    """
    light = _linear(x)
    depth = 4 * _smooth_map(x, generators)
    size = math.ceil(radius)
    t = torch.arange(-size, size + 1).to(x)
    distance = torch.hypot(t[:, None], t[None, :])
    spectrum, shape = _spectrum(light, size)
    blurred = light * (1 - depth).clamp(min=0)
    for layer in (1, 2, 3, 4):
        disk = (radius * layer / 4 + 0.5 - distance).clamp(0, 1)
        near = _filtered(spectrum, shape, disk[None] / disk.sum(), x.shape)
        blurred = blurred + near * (1 - (depth - layer).abs()).clamp(min=0)
    return _srgb(blurred)


# ---------------------------------------------------------------- noise


@_in_float32
def sensor_noise(x: Tensor, gain: float, generators: Generators) -> Tensor:
    """Add the noise of `_sensor` to linear light, exposed for a `gain` (sensitivity relative to the sensor's base)."""
    return _srgb(_sensor(_linear(x), gain, generators))


@_in_float32
def smearing_denoiser(x: Tensor, gain: float, generators: Generators) -> Tensor:
    """Add `sensor_noise` of `gain` and remove it, with fine texture, by two passes of a guided filter.

    Guided filter: He et al., IEEE TPAMI 35(6), 2013; guided by luma (ITU-R BT.601), window 9x9, epsilon 0.0001 * gain;
    computed at half size, as in "Fast Guided Filter" (He & Sun, arXiv:1505.00996).
    """
    x = sensor_noise(x, gain, generators)
    for _ in range(2):
        luma = kornia("color").rgb_to_y(x)
        x = kornia("filters").guided_blur(luma, x, 9, 0.0001 * gain, subsample=2)
    return x


# ---------------------------------------------------------------- software


@_in_float32
def over_sharpening(x: Tensor, amount: float, generators: Generators) -> Tensor:
    """Add `amount` times luma minus its blur to each channel: an unsharp mask of sigma 1.75 pixels, luma BT.601."""
    luma = kornia("color").rgb_to_y(x)
    return x + amount * (luma - blur(luma, 1.75))


@_in_float32
def upscaling(x: Tensor, factor: float, generators: Generators) -> Tensor:
    """Scale down by `factor` bicubically with antialiasing, and up again bicubically without sharpening."""
    h, w = x.shape[-2:]
    size = (max(1, round(h / factor)), max(1, round(w / factor)))
    small = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, size=(h, w), mode="bicubic", antialias=True)


@_in_float32
def repeated_jpeg(x: Tensor, quality: float, generators: Generators) -> Tensor:
    """Save SAVES times as JPEG at `quality` of libjpeg's scale, chroma at half size (4:2:0).

    Before each save the grid of 8x8 blocks moves by 0 to 7 pixels down and right, as after a crop.
    """
    h, w = x.shape[-2:]
    shifts = (8 * shared_choices(generators, SAVES, 2)).long().repeat_interleave(len(x) // len(generators), 0)
    for save in shifts.unbind(1):
        padded = F.pad(x, [7, 0, 7, 0], mode="replicate")
        saved = [
            jpeg(image[None, :, 7 - down :, 7 - across :], quality)[..., -h:, -w:]
            for image, (down, across) in zip(padded, save.tolist(), strict=True)
        ]
        x = torch.cat(saved)
    return x


# ---------------------------------------------------------------- the table

CAMERA: dict[str, Degradation] = {
    "low_light": Degradation("brightness change", (0.7, 1.5, 2.5, 3.5, 5), low_light),
    "overexposure": Degradation("brightness change", (0.25, 0.6, 1.1, 1.7, 2.5), overexposure),
    "flare": Degradation("brightness change", (0.02, 0.05, 0.12, 0.25, 0.5), flare),
    "white_balance": Degradation("color distortion", (0.1, 0.25, 0.45, 0.75, 1.2), white_balance),
    "haze": Degradation("sharpness and contrast", (0.06, 0.15, 0.3, 0.55, 1), haze),
    "over_sharpening": Degradation("sharpness and contrast", (0.3, 0.8, 1.6, 3, 5.5), over_sharpening),
    "camera_shake": Degradation("blur", (2.5, 5, 9, 15, 25), camera_shake),
    "defocus": Degradation("blur", (1.2, 2.2, 4, 6.5, 10), defocus),
    "sensor_noise": Degradation("noise", (2, 6, 16, 40, 100), sensor_noise),
    "smearing_denoiser": Degradation("noise", (2, 6, 16, 40, 100), smearing_denoiser),
    "upscaling": Degradation("spatial distortion", (1.5, 2, 2.8, 4, 6), upscaling),
    "repeated_jpeg": Degradation("compression", (75, 50, 32, 20, 11), repeated_jpeg),
}
