"""Tensors and arrays as other packages have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qualiclip_pyiqa import as_batch, from_bgr, from_nhwc, load_image
from qualiclip_pyiqa.errors import ImageError

cv2 = pytest.importorskip("cv2")  # comes with pyiqa

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "hats.jpg"


def test_tensors_with_channels_last() -> None:
    """ComfyUI's IMAGE: (B, H, W, C) in 0..1."""
    x = torch.rand(2, 40, 48, 3)
    assert torch.equal(from_nhwc(x), x.permute(0, 3, 1, 2))
    assert torch.equal(from_nhwc(x[0]), from_nhwc(x[:1]))
    assert torch.equal(from_nhwc((x * 255).byte()), as_batch((x * 255).byte().permute(0, 3, 1, 2)))
    alpha = torch.rand(1, 40, 48, 4)
    assert torch.allclose(from_nhwc(alpha), (alpha[..., :3] * alpha[..., 3:] + 1 - alpha[..., 3:]).movedim(-1, 1))
    x.requires_grad_()
    from_nhwc(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_tensors_with_channels_elsewhere_are_named() -> None:
    with pytest.raises(ImageError, match=r"this looks like \(N, C, H, W\), which as_batch takes"):
        from_nhwc(torch.rand(2, 3, 40, 48))
    with pytest.raises(ImageError, match=r"expected \(N, H, W, C\), C being 1, 3 or 4$"):
        from_nhwc(torch.rand(40, 48))
    with pytest.raises(ImageError, match="images is a ndarray; expected a tensor"):
        from_nhwc(np.zeros((1, 40, 48, 3)))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="divide by 255"):
        from_nhwc(torch.rand(1, 40, 48, 3) * 255)


def test_arrays_of_opencv(tmp_path: Path) -> None:
    rgb = (load_image(PHOTO)[:, :64, :80] * 255).round().byte().permute(1, 2, 0).numpy()
    cv2.imwrite(str(tmp_path / "photo.png"), rgb[:, :, ::-1])
    bgr = cv2.imread(str(tmp_path / "photo.png"))
    assert torch.equal(from_bgr(bgr), as_batch(tmp_path / "photo.png"))
    assert torch.equal(from_bgr(bgr.astype(np.float32) / 255), from_bgr(bgr))
    assert torch.equal(from_bgr(bgr[:, :, 0]), as_batch(rgb[:, :, 2]))
    alpha = np.dstack([bgr, np.full(bgr.shape[:2], 0, np.uint8)])
    assert torch.equal(from_bgr(alpha), torch.ones(1, 3, 64, 80))  # transparent: the white behind it
    with pytest.raises(ImageError, match="image is a NoneType; expected an array"):
        from_bgr(cv2.imread(str(tmp_path / "none.png")))
