"""The simple measures that the embedded models are compared with behave as such."""

from __future__ import annotations

from pathlib import Path

import baselines
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor


def natural(seed: int, side: int = 192) -> Tensor:
    """(1, 3, H, W): a power spectrum of 1/f^2, as photographs have, around grey."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    spectrum = np.fft.fft2(rng.normal(size=(side, side))) / np.maximum(frequency, 1 / side)
    luma = np.real(np.fft.ifft2(spectrum))
    luma = 0.5 + 0.15 * (luma - luma.mean()) / luma.std()
    return torch.from_numpy(luma).float().clamp(0, 1).expand(1, 3, side, side)


def write(path: Path, rgb: Tensor) -> None:
    Image.fromarray((rgb[0] * 255).round().byte().movedim(0, -1).numpy()).save(path)


@pytest.mark.parametrize(("shape", "scale"), [(0.7, 2.0), (1.0, 0.5), (2.0, 1.0), (3.5, 1.5)])
def test_generalised_gaussians_are_recovered(shape: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = stats.gennorm.rvs(shape, scale=scale, size=(2, 100_000), random_state=rng)
    found, width = baselines.ggd(x)
    # Moments of 100,000 samples: their standard error is a few tenths of a percent.
    assert found == pytest.approx([shape] * 2, rel=0.03) and width == pytest.approx([scale] * 2, rel=0.03)

    # Twice as wide on the right, where then two thirds of the probability are.
    x = np.abs(x[:1])
    left = rng.uniform(size=x.shape) < 1 / 3
    found, below, above = baselines.aggd(np.where(left, -x, 2 * x))
    assert found == pytest.approx([shape], rel=0.03)
    assert below == pytest.approx([scale], rel=0.03) and above == pytest.approx([2 * scale], rel=0.03)


def test_a_patch_without_variation_has_statistics() -> None:
    found, sharpness = baselines.features(torch.full((3, 96, 96), 0.3))
    assert found.shape == (1, 36) and np.isfinite(found).all() and sharpness[0] < 1e-3


def test_natural_scene_statistics_know_blur_and_noise(tmp_path: Path) -> None:
    for seed in range(6):
        write(tmp_path / f"{seed}.png", natural(seed))
    model = baselines.NaturalScenes.fit(sorted(tmp_path.glob("*.png")))
    fresh = natural(100)
    blurred = [fresh]
    for _ in range(2):
        blurred.append(torch.nn.functional.avg_pool2d(blurred[-1], 5, stride=1, padding=2, count_include_pad=False))
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(fresh + sigma * noise).clamp(0, 1) for sigma in (0, 0.03, 0.1)]
    for ladder in (blurred, noisy):
        distances = model(torch.cat(ladder)).tolist()
        assert distances == sorted(distances) and distances[2] > 1.5 * distances[0]
    assert torch.isfinite(model(fresh[..., :40, :50])).all()  # smaller than a patch
    for measure in (baselines.LaplacianEnergy(), baselines.Sharpness(), baselines.SharpestParts()):
        sharpness = measure(torch.cat(blurred)).tolist()
        assert sharpness == sorted(sharpness, reverse=True)
