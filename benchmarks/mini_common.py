"""What the benchmarks of `qualiclip-mini` share: loading the file, scoring a picture, reading one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from qualiclip_pyiqa.mini import MiniTower


class Mini:
    """The embedded model straight from its file: (N, 3, H, W) in 0..1 -> (N,) scores, or (N, P) per pair."""

    def __init__(self, path: Path, half: bool = False) -> None:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.tower = MiniTower(**json.loads(metadata["tower"])).to(memory_format=torch.channels_last)
        self.tower.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
        self.tower.eval()
        self.anchors = state["prompts_features"]
        self.scale = math.exp(float(state["logit_scale"]))
        self.half = half

    @torch.no_grad()
    def pairs(self, rgb: Tensor) -> Tensor:
        with torch.autocast(rgb.device.type, torch.bfloat16, enabled=self.half):
            features = F.normalize(self.tower(rgb).float(), dim=-1)
        return (self.scale * features @ self.anchors.T).unflatten(1, (-1, 2)).softmax(-1)[..., 0]

    def __call__(self, rgb: Tensor) -> Tensor:
        return self.pairs(rgb).mean(1)


def read_rgb(path: Path) -> Tensor:
    """One picture file -> (1, 3, H, W) float32 in 0..1."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
