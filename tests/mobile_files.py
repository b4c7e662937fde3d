"""MobileTowers with random weights, and files of them."""

from __future__ import annotations

from pathlib import Path

import torch
import upstream
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qualiclip_pyiqa.towers.mobile import MobileTower
from qualiclip_pyiqa.training.embedded.__main__ import PAIRS, write


def random_tower(seed: int = 0, pairs: int = len(PAIRS)) -> MobileTower:
    """A tower whose activations neither vanish nor grow, with heads that standardise and spread their logits."""
    draw = torch.Generator().manual_seed(seed)
    tower = MobileTower(pairs).eval().requires_grad_(False)
    for value in tower.trunk.state_dict().values():
        fan_in = value[0].numel() if value.dim() > 1 else 1
        scale = (2 / fan_in) ** 0.5 if value.dim() > 1 else 0.1
        value.copy_((scale * torch.randn(value.shape, generator=draw)).half())  # as files store them
    found = tower.statistics(upstream.pictures(16, 64, 64))
    tower.head_mean.copy_(found.mean(0)), tower.head_std.copy_(found.std(0) + 1e-4)
    tower.head_weight.copy_(torch.randn(tower.head_weight.shape, generator=draw) / 20)
    tower.head_bias.copy_(torch.randn(tower.head_bias.shape, generator=draw))
    return tower


def add_window_heads(tower: MobileTower, pairs: int = len(PAIRS) - 1, statistics: int = 50) -> MobileTower:
    """Give the tower's last pairs random window heads."""
    draw = torch.Generator().manual_seed(5)
    both = torch.rand(2, pairs, statistics, generator=draw), torch.randn(1, pairs, statistics, generator=draw)
    tower.window_heads, tower.window_bias = torch.cat(both), torch.randn(pairs, generator=draw)
    return tower


def write_trunk(path: Path, seed: int = 0) -> Path:
    """The file that `--trunk` names."""
    save_file(random_tower(seed).trunk.state_dict(), path)
    return path


def write_tower(path: Path, seed: int = 0) -> Path:
    write(path, random_tower(seed), "CC0-1.0", {"seed": seed})
    return path


def rewrite(path: Path, new: Path, tensors: dict[str, torch.Tensor | None], **metadata: str | None) -> Path:
    """Copy a file with other tensors or metadata; None leaves one out."""
    with safe_open(path, "pt") as file:
        texts = {**file.metadata(), **metadata}
    state = {key: value for key, value in (load_file(path) | tensors).items() if value is not None}
    save_file(state, new, {key: text for key, text in texts.items() if text is not None})
    return new
