"""Resizing on tensors equals Pillow's, and has a gradient."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from qualiclip_pyiqa.towers.resampling import FILTERS, resize_like_pillow, rows_first

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# The second, fifth and sixth have their rows resampled first.
SIZES = [
    ((224, 224), (224, 224)),
    ((301, 235), (224, 224)),
    ((97, 640), (224, 224)),
    ((33, 47), (16, 23)),
    ((90, 60), (40, 64)),
    ((300, 150), (100, 60)),
    ((5, 7), (50, 31)),
]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_it_equals_pillow(filter: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    if rows_first(*size, *wanted) and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("this version of Pillow always resamples columns first")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[: size[0] // 3] = np.where(pixels[: size[0] // 3] > 127, 255, 0)  # overshoots of the bicubic filter are cut
    expected = np.asarray(Image.fromarray(pixels).resize(wanted[::-1], RESAMPLING[filter]))
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    found = resize_like_pillow(rgb, *wanted, filter)
    assert found.dtype == torch.float32
    assert np.array_equal((found * 255).round()[0].permute(1, 2, 0).to(torch.uint8).numpy(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_like_pillow(rgb, *wanted, filter), found)
    assert torch.equal(resize_like_pillow(rgb.requires_grad_(), *wanted, filter), found)
    finer = resize_like_pillow(rgb.detach() * 0.999, *wanted, filter) / 0.999  # not of 8 bits: rounded nowhere
    assert ((finer - found).abs().max() > 1e-4) == (size != wanted)
    assert (finer - found).abs().max() < 1.5 / 255


def test_it_has_an_exact_gradient() -> None:
    rgb = (0.25 + 0.5 * torch.rand(1, 3, 9, 12)).double().requires_grad_()
    for filter in FILTERS:
        assert torch.autograd.gradcheck(lambda x, by=filter: resize_like_pillow(x, 4, 5, by), rgb)
