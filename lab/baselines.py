"""Baselines for the embedded models: sharpness, natural scene statistics, and pyiqa's classical metrics.

Each is a module that scores images (N, 3, H, W) in 0..1 -> (N,), which `Scorer` takes like a metric of pyiqa.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NoReturn
from unittest import mock

import numpy as np
import pyiqa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pyiqa.utils import download_util
from scipy import ndimage, special
from torch import Tensor, nn
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.towers.statistics import PERCENTILES, UNRANKED, log_energies
from qualiclip_pyiqa.training.stacks import laplacian_log_variance

# pyiqa's no-reference metrics that are not neural networks. Most need a file of parameters that pyiqa downloads.
CLASSICAL = ("piqe", "entropy", "niqe", "niqe_matlab", "ilniqe", "brisque", "brisque_matlab", "nrqm", "pi")

PATCH = 96  # side of a patch at the image's own size, half of that at the second scale
SHARP = 0.75  # patches are fitted to if they have this share of the sharpness of the photograph's sharpest patch
# Patches further from the mean than this, in standard deviations of any feature, are not fitted to. The paper has no
# such rule, but chose its photographs by hand; without it a few skies and drawings widen the covariance.
OUTLIER = 4
SHAPES = np.arange(0.2, 10, 0.001)  # candidate shapes of a generalised Gaussian

Floats = NDArray[np.float64]


class LaplacianEnergy(nn.Module):
    """Log of the mean energy of luma's Laplacian, in cells of 4x4 pixels that fit in whole; higher is better."""

    lower_better = False

    def forward(self, rgb: Tensor) -> Tensor:
        return log_energies(rgb)[:, 0]


class Sharpness(nn.Module):
    """Log variance of the Laplacian; higher is better."""

    lower_better = False

    def forward(self, rgb: Tensor) -> Tensor:
        return laplacian_log_variance(rgb)


class SharpestParts(nn.Module):
    """98th percentile of the log Laplacian energy of cells of 16x16 pixels; higher is better."""

    lower_better = False

    def forward(self, rgb: Tensor) -> Tensor:
        return log_energies(rgb)[:, UNRANKED + PERCENTILES.index(98)]


class NaturalScenes(nn.Module):
    """NIQE from its paper's formulas (Mittal, Soundararajan, Bovik: Making a "Completely Blind" Image Quality Analyzer,
    IEEE Signal Processing Letters 2013), fitted to given photographs; lower is better.

    An image is described by the mean and covariance of its patches' features (see `features`). Its score is their
    distance from those of all sharp patches of the photographs, sqrt(d^T ((S1 + S2) / 2)^-1 d) for means that differ
    by d.

    Args:
        mean, covariance: (36,) and (36, 36) of the photographs' patches.
    """

    lower_better = True

    def __init__(self, mean: Floats, covariance: Floats) -> None:
        super().__init__()
        self.mean, self.covariance = mean, covariance

    @classmethod
    def fit(cls, paths: Iterable[str | Path]) -> NaturalScenes:
        """Fit to the sharp patches of every photograph, see `SHARP`."""
        chosen = []
        for path in tqdm(list(paths), desc="natural scene statistics", unit="image", file=sys.stderr):
            found, sharpness = features(load_image(path))
            chosen.append(found[sharpness >= SHARP * sharpness.max()])
        sharp = np.concatenate(chosen) if chosen else np.empty((0, 36))
        if len(sharp) < 2:
            raise SettingsError(f"{len(sharp)} patches to fit natural scene statistics to; pass more photographs")
        apart = np.abs(sharp - sharp.mean(0)) / np.maximum(sharp.std(0), _TINY)
        usual = sharp[apart.max(1) < OUTLIER]
        return cls(usual.mean(0), np.cov(usual, rowvar=False))

    def forward(self, rgb: Tensor) -> Tensor:
        return torch.tensor([self.distance(image) for image in rgb], dtype=torch.float64)

    def distance(self, rgb: Tensor) -> float:
        found, _ = features(rgb)
        covariance = np.cov(found, rowvar=False) if len(found) > 1 else np.zeros_like(self.covariance)
        apart = self.mean - found.mean(0)
        return float(np.sqrt(apart @ np.linalg.pinv((self.covariance + covariance) / 2) @ apart))


def features(rgb: Tensor) -> tuple[Floats, Floats]:
    """Compute 18 statistics of every whole patch at each of two scales, and the patch's sharpness.

    An image smaller than a patch is one patch.

    Shape:
        rgb: (3, H, W) in 0..1 -> (B, 36), (B,) for B patches.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    luma = 255 * (rgb.double() * weights).sum(0)
    side = min(PATCH, *luma.shape) // 2 * 2
    luma = luma[: luma.shape[0] // side * side, : luma.shape[1] // side * side]
    half = F.interpolate(luma[None, None], scale_factor=0.5, mode="bicubic", antialias=True)[0, 0]
    normalised, deviation = mscn(luma.numpy())
    second, _ = mscn(half.numpy())
    found = [statistics(patches(normalised, side)), statistics(patches(second, side // 2))]
    return np.concatenate(found, axis=1), patches(deviation, side).mean((1, 2))


def mscn(luma: Floats) -> tuple[Floats, Floats]:
    """Compute mean-subtracted, contrast-normalised luma (0..255), and the local standard deviation.

    The window is a Gaussian of 7x7 pixels with sigma 7/6; the divisor is the deviation plus 1.
    """

    def local(x: Floats) -> Floats:
        return ndimage.gaussian_filter(x, 7 / 6, mode="nearest", radius=3)

    mean = local(luma)
    deviation = np.sqrt(np.maximum(local(luma**2) - mean**2, 0))
    return (luma - mean) / (deviation + 1), deviation


def patches(x: Floats, side: int) -> Floats:
    """Cut (H, W), multiples of `side`, into patches (B, side, side)."""
    rows, columns = (length // side for length in x.shape)
    return x.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)


def statistics(x: Floats) -> Floats:
    """Fit the distributions of MSCN coefficients and of neighbours' products: patches (B, S, S) -> (B, 18)."""
    found = [*ggd(x.reshape(len(x), -1))]
    for product in (
        x[:, :, :-1] * x[:, :, 1:],
        x[:, :-1] * x[:, 1:],
        x[:, :-1, :-1] * x[:, 1:, 1:],
        x[:, :-1, 1:] * x[:, 1:, :-1],
    ):
        shape, left, right = aggd(product.reshape(len(x), -1))
        mean = (right - left) * special.gamma(2 / shape) / special.gamma(1 / shape)
        found += [shape, mean, left, right]
    return np.stack(found, axis=1)


def _ratio(shape: Floats) -> Floats:
    """Compute E[|x|]^2 / E[x^2] of generalised Gaussians, which rises with their shape."""
    return special.gamma(2 / shape) ** 2 / (special.gamma(1 / shape) * special.gamma(3 / shape))


_RATIOS = _ratio(SHAPES)
_TINY = 1e-12  # gives a constant patch a distribution: the most peaked one, of zero width


def ggd(x: Floats) -> tuple[Floats, Floats]:
    """Fit generalised Gaussians, density ~ exp(-(|x| / scale)^shape), by moments (Sharifi, Leon-Garcia 1995).

    Shape:
        x: (B, n) -> shapes (B,), scales (B,).
    """
    power = (x**2).mean(1)
    shape = np.interp(np.abs(x).mean(1) ** 2 / (power + _TINY), _RATIOS, SHAPES)
    return shape, np.sqrt(power * special.gamma(1 / shape) / special.gamma(3 / shape))


def aggd(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit asymmetric generalised Gaussians, with a scale for each side of zero (Lasmar, Stitou, Berthoumieu 2009).

    Shape:
        x: (B, n) -> shapes (B,), left scales (B,), right scales (B,).
    """
    below, squares = x < 0, x**2
    left = np.sqrt((squares * below).sum(1) / np.maximum(below.sum(1), 1))
    right = np.sqrt((squares * ~below).sum(1) / np.maximum((~below).sum(1), 1))
    skew = left / (right + _TINY)
    ratio = np.abs(x).mean(1) ** 2 / (squares.mean(1) + _TINY)
    shape = np.interp(ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2, _RATIOS, SHAPES)
    width = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    return shape, left * width, right * width


def classical() -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Create pyiqa's classical metrics that need no download; also return why the others cannot be created."""

    def refuse(url: str, *_: object, **__: object) -> NoReturn:
        raise WeightsError(f"needs {PurePosixPath(url).name}, which pyiqa downloads")

    made: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    # pyiqa prints before a download. Files already in its cache are used.
    with mock.patch.object(download_util, "download_url_to_file", refuse), contextlib.redirect_stdout(io.StringIO()):
        for name in CLASSICAL:
            try:
                made[name] = pyiqa.create_metric(name, device="cpu")
            except WeightsError as error:
                missing[name] = str(error)
    return made, missing
