"""Pictures that are made rather than taken."""

from __future__ import annotations

import numpy as np
import torch


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
