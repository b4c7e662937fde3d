"""What is restored: photographs of a folder, random crops of them, and how each task degrades them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import Denoiser, SuperResolver
from torch import Generator, Tensor, nn

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.images.paths import list_images
from qualiclip_pyiqa.training.photographs import read_held_out

SIGMA = 25  # standard deviation of the noise, of 255


@dataclass(frozen=True)
class Task:
    """A restorer, and what it has to undo.

    Attributes:
        network: creates the restorer.
        degrade: maps sharp images (N, 3, H, W) and a generator to the restorer's input.
        enlarge: brings that input to the size of the output, to be looked at and measured.
    """

    network: Callable[[], nn.Module]
    degrade: Callable[[Tensor, Generator], Tensor]
    enlarge: Callable[[Tensor], Tensor]


def add_noise(sharp: Tensor, generator: Generator) -> Tensor:
    return (sharp + SIGMA / 255 * torch.randn(sharp.shape, generator=generator)).clamp(0, 1)


def halve(sharp: Tensor, generator: Generator) -> Tensor:
    return F.interpolate(sharp, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def double(small: Tensor) -> Tensor:
    return F.interpolate(small, scale_factor=2, mode="bicubic").clamp(0, 1)


TASKS = {
    "denoise": Task(Denoiser, add_noise, lambda noisy: noisy),
    "sr2": Task(SuperResolver, halve, double),
}


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the photographs to train on, and those held out.

    Held out are those that the folder's `manifest.csv` names (columns `file` and `held_out`); without such a table, the
    last quarter by name.

    Raises:
        SettingsError: one of the two is empty.
    """
    paths = sorted(list_images(folder))
    held_out = {folder / name for name in read_held_out(folder)} or set(paths[len(paths) - len(paths) // 4 :])
    training = [path for path in paths if path not in held_out]
    testing = [path for path in paths if path in held_out]
    if not training or not testing:
        raise SettingsError(
            f"{folder} has {len(training)} photographs to train on and {len(testing)} held out; expected some of both"
        )
    return training, testing


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """Select at most this many paths, evenly spread."""
    count = min(most, len(paths))
    return [paths[k * len(paths) // count] for k in range(count)]


def read_middle(path: Path, side: int) -> Tensor:
    """Read the middle of a photograph -> (1, 3, S, S), S even and at most `side`."""
    rgb = load_image(path)
    side = min(side, *rgb.shape[1:]) // 2 * 2
    top, left = ((length - side) // 2 for length in rgb.shape[1:])
    return rgb[None, :, top : top + side, left : left + side]


class Crops:
    """Random crops of photographs, which are kept in memory as bytes.

    Args:
        paths: the photographs.
        side: of a crop, pixels.

    Raises:
        SettingsError: a photograph is smaller than a crop.
    """

    def __init__(self, paths: Sequence[Path], side: int) -> None:
        self.side = side
        self.photographs = []
        for path in paths:
            rgb = load_image(path)
            if min(rgb.shape[1:]) < side:
                raise SettingsError(f"{path} is smaller than a crop of {side} pixels; leave it out or pass --crop")
            self.photographs.append((rgb * 255).round().to(torch.uint8))

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Draw crops (N, 3, S, S) in 0..1, half of them mirrored."""
        return torch.stack([self._draw(generator) for _ in range(count)]).float() / 255

    def _draw(self, generator: Generator) -> Tensor:
        def below(end: int) -> int:
            return int(torch.randint(end, (), generator=generator))

        rgb = self.photographs[below(len(self.photographs))]
        top, left = (below(length - self.side + 1) for length in rgb.shape[1:])
        crop = rgb[:, top : top + self.side, left : left + self.side]
        return crop.flip(2) if below(2) else crop
