"""The frozen half of a `MobileTower`: what training needs of each image, computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...towers.mobile import LAYOUT, MobileTower
from ...towers.statistics import ENERGIES, log_energies, moments

FROZEN = 6  # blocks that are not fine-tuned: all up to an eighth of the image's resolution
EARLY = ENERGIES + 2 * sum(width for width, _ in LAYOUT[:FROZEN])  # statistics that training does not change


@dataclass(frozen=True)
class Passed:
    """Images that have passed the frozen blocks.

    Attributes:
        activations: output of the last frozen block of each image, (C, h, w), float16.
        early: (N, EARLY), log energies and the statistics of the frozen blocks.
    """

    activations: Sequence[Tensor]
    early: Tensor

    def __len__(self) -> int:
        return len(self.activations)


@torch.no_grad()
def pass_frozen(tower: MobileTower, images: Iterable[Tensor]) -> Passed:
    """Compute the frozen blocks of images (3, H, W) of any size, one after the other, in bfloat16."""
    activations, early = [], []
    for image in images:
        found = [log_energies(image[None])]
        with torch.autocast("cpu", torch.bfloat16):
            for number, x in zip(range(FROZEN), tower.trunk(image[None]), strict=False):
                found += moments(x.float())
                if number == FROZEN - 1:
                    activations.append(x[0].half().contiguous())
        early.append(torch.cat(found, dim=1))
    return Passed(activations, torch.cat(early))


def late_statistics(tower: MobileTower, activations: Tensor) -> Tensor:
    """Compute the statistics of the blocks after the frozen ones: (N, C, h, w) -> (N, S - EARLY), in bfloat16."""
    found = []
    x = activations.float().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        for block in tower.trunk.blocks[FROZEN:]:
            x = block(x)
            found += moments(x.float())
    return torch.cat(found, dim=1)


@torch.no_grad()
def statistics(tower: MobileTower, passed: Passed, batch: int = 16) -> Tensor:
    """Compute all statistics of images that have passed the frozen blocks: (N, S)."""
    late = torch.empty(len(passed), tower.head_mean.shape[1] - EARLY)
    for indices in same_size(passed, range(len(passed)), batch):
        late[indices] = late_statistics(tower, torch.stack([passed.activations[k] for k in indices]))
    return torch.cat([passed.early, late], dim=1)


def same_size(passed: Passed, order: Iterable[int], batch: int, whole: bool = False) -> Iterator[list[int]]:
    """Yield batches of indices of images of equal size, in the given order; `whole`: no incomplete ones."""
    waiting: dict[torch.Size, list[int]] = {}
    for k in order:
        same = waiting.setdefault(passed.activations[k].shape, [])
        same.append(k)
        if len(same) == batch:
            yield waiting.pop(passed.activations[k].shape)
    if not whole:
        yield from waiting.values()
