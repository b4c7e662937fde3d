"""Weights and images that anyone can make again from a name, for which the networks' authors' own code gave numbers.

A value is the upper 53 bits of PCG64 seeded with the checksum of its name; numpy keeps that bit stream stable.
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
# Height and width of the images by number; 10 and 11 stand for aligned faces.
SIZES = {
    0: (224, 224),
    1: (224, 224),
    2: (256, 320),
    3: (352, 288),
    4: (301, 235),
    5: (480, 640),
    10: (112, 112),
    11: (112, 112),
}
_PROMPTS = {"ctx", "prompts_text", "prompts_vis"}
_FROM_THE_LEFT = {"proj", "text_projection", "projection"}  # matrices W of x @ W
_SLOPES = ("input_layer.2.weight", "res_layer.3.weight")  # of PReLU


def golden(system: str) -> dict[str, Any]:
    """Return the numbers of a system, `tests/golden/SYSTEM.json`."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / f"{system}.json").read_text())
    return found


def uniform(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """Draw values in 0..1, in C order."""
    stream = np.random.PCG64(zlib.crc32(name.encode()) + SEED)
    bits = stream.random_raw(math.prod(shape)) >> np.uint64(11)
    return (bits * 2.0**-53).reshape(shape)


def unit(name: str, shape: Sequence[int], factor: float = 1.0) -> Tensor:
    """Draw values of mean 0 and standard deviation `factor`: inputs that are no weights."""
    return torch.from_numpy((factor * _unit(name, shape)).astype(np.float32))


def _unit(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    return (uniform(name, shape) - 0.5) * math.sqrt(12)


def tensor(layout: str, key: str, shape: Sequence[int]) -> Tensor:
    """Make the tensor `key` of a checkpoint in `layout`."""
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if last == "logit_scale":
        return torch.full(tuple(shape), math.log(100), dtype=torch.float32)
    n = _unit(f"{layout}/{key}", shape)
    if last == "running_var":
        values = 1 + 0.3 * n
    elif last == "running_mean" or last.endswith("bias"):
        values = 0.1 * n
    elif last == "gamma":
        values = 0.5 + 0.1 * n
    elif _PROMPTS & set(key.split(".")):
        values = 0.2 * n
    elif "embedding" in key:
        values = 0.05 * n
    elif layout == "qgface" and key.endswith(_SLOPES):
        values = 0.25 + 0.05 * n
    elif last == "weight" and len(shape) == 1:
        values = 1 + 0.1 * n
    else:
        values = n / math.sqrt(shape[0] if last in _FROM_THE_LEFT else math.prod(shape[1:]))
    out = torch.from_numpy(values.astype(np.float32))
    return out.half().float() if layout == "openai-clip" else out


def state(layout: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Make a checkpoint of these shapes."""
    return {key: tensor(layout, key, shape) for key, shape in shapes.items()}


def image(number: int) -> NDArray[np.uint8]:
    """Draw an image (H, W, 3): in each channel a level, two plane waves and noise."""
    height, width = SIZES[number]
    rows = (np.arange(height)[:, None] + 0.5) / height
    columns = (np.arange(width)[None] + 0.5) / width
    waves = uniform(f"picture/{number}/waves", (3, 9))
    noise = uniform(f"picture/{number}/noise", (height, width, 3)) - 0.5
    strength = 8.0 * (1 + (5 * number) % 11)
    channels = []
    for c in range(3):
        (down, along), (down_again, along_again) = 0.5 + 5.0 * waves[c, [1, 0]], 0.5 + 5.0 * waves[c, [3, 2]]
        first, second = 20.0 + 60.0 * waves[c, 4:6]
        wave = first * np.sin(2 * np.pi * (along * columns + down * rows + waves[c, 6]))
        wave = wave + second * np.sin(2 * np.pi * (along_again * columns - down_again * rows + waves[c, 7]))
        level = 70.0 + 115.0 * waves[c, 8]
        channels.append(np.clip(np.rint(level + wave + strength * noise[..., c]), 0, 255))
    return np.stack(channels, axis=-1).astype(np.uint8)


def pixels(*numbers: int) -> Tensor:
    """Return images of one size as (N, 3, H, W), RGB in 0..1, float32."""
    return torch.stack([torch.from_numpy(image(number)).permute(2, 0, 1) for number in numbers]).float() / 255
