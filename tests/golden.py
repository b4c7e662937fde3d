"""Weights and images made by a rule, on which the authors' own code has been run (tests/golden/*.json).

`uniform` takes the raw bits of PCG64, so that any version of NumPy gives the same values.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SEED = 1
SIZES = [(224, 224), (224, 224), (256, 320), (352, 288), (301, 235), (480, 640)]  # of image 0, 1, ...
_BITS = np.uint64(11)


def golden(name: str) -> dict[str, Any]:
    """The numbers of one system."""
    found: dict[str, Any] = json.loads((Path(__file__).with_name("golden") / f"{name}.json").read_text())
    return found


def uniform(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """In 0..1: the upper 53 bits of each number of PCG64, seeded by the name's CRC-32."""
    raw = np.random.PCG64(zlib.crc32(name.encode()) + SEED).random_raw(math.prod(shape))
    return ((raw >> _BITS) * 2.0**-53).reshape(shape)


def weight(layout: str, key: str, shape: Sequence[int]) -> Tensor:
    """The tensor of a key in a layout, float32."""
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if last == "logit_scale":
        return torch.full(tuple(shape), math.log(100.0))
    unit = (uniform(f"{layout}/{key}", shape) - 0.5) * math.sqrt(12.0)
    if last == "running_var":
        values = 1 + 0.3 * unit
    elif last == "running_mean" or last.endswith("bias"):
        values = 0.1 * unit
    elif last == "gamma":
        values = 0.5 + 0.1 * unit
    elif {"ctx", "prompts_text", "prompts_vis"} & set(key.split(".")):
        values = 0.2 * unit
    elif "embedding" in key:
        values = 0.05 * unit
    elif last == "weight" and len(shape) == 1:
        values = 1 + 0.1 * unit
    else:
        from_left = last in ("proj", "text_projection", "projection")
        values = unit * (shape[0] if from_left else math.prod(shape[1:])) ** -0.5
    found = torch.from_numpy(values.astype(np.float32))
    return found.half().float() if layout == "openai-clip" else found


def state(layout: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A whole state dict."""
    return {key: weight(layout, key, shape) for key, shape in shapes.items()}


def pixels(index: int) -> NDArray[np.uint8]:
    """Image (H, W, 3): in each channel a level, two plane waves and noise."""
    height, width = SIZES[index]
    y, x = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width
    draws = uniform(f"picture/{index}/waves", (3, 9))
    noise = uniform(f"picture/{index}/noise", (height, width, 3)) - 0.5
    strength = 8.0 * (1 + (5 * index) % 11)
    out = np.empty((height, width, 3), np.uint8)
    for channel, p in enumerate(draws):
        fx, fy, gx, gy = 0.5 + 5 * p[:4]
        first, second = 20 + 60 * p[4:6]
        waves = first * np.sin(2 * np.pi * (fx * x + fy * y + p[6])) + second * np.sin(
            2 * np.pi * (gx * x - gy * y + p[7])
        )
        levels = np.rint(70 + 115 * p[8] + waves + strength * noise[..., channel])
        out[..., channel] = np.clip(levels, 0, 255)
    return out


def image(index: int) -> Tensor:
    """Image (1, 3, H, W) in 0..1."""
    return torch.from_numpy(pixels(index)).permute(2, 0, 1)[None] / 255
