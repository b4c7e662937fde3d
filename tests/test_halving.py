"""Halving on tensors: Pillow's, bit for bit, and differentiable."""

from __future__ import annotations

import hashlib

import by_rule
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qualiclip_pyiqa.towers.halving import halved

GOLDEN = by_rule.golden("contrique")["pictures"]


@pytest.mark.parametrize("number", range(6))
def test_half_images_are_those_of_the_authors_code(number: int) -> None:
    expected = GOLDEN[str(number)]
    half = (halved(by_rule.pixels(number))[0] * 255).movedim(0, -1)
    assert list(half.shape[:2]) == expected["half_size_hw"]
    assert half.equal(half.round())
    levels = np.ascontiguousarray(half.byte().numpy())
    assert hashlib.sha256(levels.tobytes()).hexdigest() == expected["half_picture_sha256"]


def by_pillow(pixels: np.ndarray) -> Tensor:
    """Halve an image (H, W, 3), rows before columns: Pillow's own order but for tall images in Pillow 13."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    if height <= 2 * width:
        half = image.resize((width // 2, height // 2))
    else:
        half = image.resize((width // 2, height)).resize((width // 2, height // 2))
    return torch.from_numpy(np.array(half)).movedim(-1, 0)[None]


def test_8_bit_images_are_halved_exactly_as_by_pillow() -> None:
    random = np.random.default_rng(0)
    for height, width in [*((side, 33 + side % 7) for side in range(32, 70)), (301, 235), (100, 37), (36, 1999)]:
        levels = random.integers(0, 256, (height, width, 3), np.uint8)
        for pixels in (levels, (levels // 128) * np.uint8(255)):  # black and white overshoots everywhere
            rgb = torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255
            expected = by_pillow(pixels)
            assert torch.equal(halved(rgb), expected.float() / 255), (height, width)
            assert torch.equal((halved(rgb.double()) * 255).round().byte(), expected)
            assert (halved(rgb).sum() - halved(rgb.contiguous(memory_format=torch.channels_last)).sum()) == 0


def test_other_images_are_halved_without_rounding() -> None:
    """Each image of a batch by its own rule; the rule of 8 bits is a level away, and has the gradient of the other."""
    image = by_rule.pixels(2)
    other = (image + 0.3 / 255).clamp(0, 1)
    both = halved(torch.cat([image, other]))
    assert torch.equal(both[:1], halved(image)) and torch.equal(both[1:], halved(other))
    assert not (both[1:] * 255).round().allclose(both[1:] * 255, atol=0.1)
    # 0.3 levels of the image, half a level of rounding rows, as much of columns.
    assert (both[1:] - both[:1]).abs().max() * 255 < 0.3 + 0.5 * 1.2 + 0.5
    gradients = []
    for x in (image, image + 1e-4):
        x = x.clone().requires_grad_()
        (halved(x) * by_rule.unit("weights", (1, 3, 128, 160))).sum().backward()
        gradients.append(x.grad)
    inside = (image > 0.1) & (image < 0.9)
    assert gradients[0] is not None and gradients[1] is not None
    assert (gradients[0] - gradients[1])[inside].abs().quantile(0.99) < 1e-5
