"""Measure where the embedded models are wrong, on photographs that are held out.

    python benchmarks/limits.py --pristine DIR [--limit N] [--json FILE.json]

Photographs are those held out by the folder's `manifest.csv` (columns `file` and `held_out`), as 8-bit images.

- Means over photographs: noise followed by JPEG; a background that is blurred while the subject is not, beside blur of
  the whole; darkening; the photograph scaled down.
- Framing: the same photograph without its first rows and columns of pixels, which nobody would call another quality:
  mean and largest absolute change.
- Images without content: one colour, and noise.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import common
import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.images.convert import MIN_SIDE
from qualiclip_pyiqa.scoring.scorer import Scorer

METRICS = ("qualiclip-mini+", "qualiclip-mini")
COLUMNS = (*METRICS, "noisiness")
NOISE = 20  # standard deviation, of 255
JPEG = (60, 40, 20, 10)
DARK = (0.5, 0.3, 0.15)
SHIFTS = (1, 3, 16)
SMALLER = (2, 4, 8)
Row: TypeAlias = dict[str, Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24, help="photographs, at most (default: 24)")
    options = parser.parse_args()
    if options.quick:
        options.limit = 1
    try:
        _, held_out = common.photographs(options.pristine)
        metrics = {name: common.load(name) for name in METRICS}
        metrics["noisiness"] = common.load("qualiclip-mini", "noisiness")
        scorer = Scorer(metrics, device="cpu", workers=0)
        rows = measure(scorer, [load_image(path)[None] for path in common.spread(held_out, options.limit)])
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join(METRICS))


def measure(scorer: Scorer, photographs: list[Tensor]) -> list[Row]:
    found = [score(scorer, versions(photograph)) for photograph in tqdm(photographs, unit="photograph")]
    rows: list[Row] = []
    for name in found[0]:
        means = {column: statistics.mean(each[name][column] for each in found) for column in COLUMNS}
        rows.append({"measured": f"mean of {len(found)} photographs", "image": name} | means)
    for pixels in SHIFTS:
        changes = [
            {column: abs(one[f"without {pixels} px"][column] - one["pristine"][column]) for column in COLUMNS}
            for one in (score(scorer, framings(photograph)) for photograph in photographs)
        ]
        for what, summarise in (("mean", statistics.mean), ("largest", max)):
            values = {column: summarise([change[column] for change in changes]) for column in COLUMNS}
            rows.append({"measured": f"{what} absolute change", "image": f"without {pixels} px"} | values)
    for name, scores in score(scorer, empty_images()).items():
        rows.append({"measured": "score", "image": name} | dict(scores))
    return rows


def score(scorer: Scorer, images: Mapping[str, Tensor]) -> dict[str, Mapping[str, float]]:
    pixels = [(image[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy() for image in images.values()]
    return {name: record.scores for name, record in zip(images, scorer.score(pixels), strict=True)}


def versions(rgb: Tensor) -> dict[str, Tensor]:
    """Return a photograph (1, 3, H, W) in the versions whose scores are averaged."""
    generator = torch.Generator().manual_seed(0)
    noisy = (rgb + NOISE / 255 * torch.randn(rgb.shape, generator=generator)).clamp(0, 1)
    made = {"pristine": rgb, f"noise {NOISE}": noisy}
    made |= {f"noise {NOISE}, JPEG {quality}": jpeg(noisy, quality) for quality in JPEG}
    made |= {f"JPEG {quality}": jpeg(rgb, quality) for quality in JPEG}
    y, x = (torch.linspace(-1, 1, side) for side in rgb.shape[2:])
    subject = ((0.5 - torch.hypot(y[:, None], x[None, :])) * 10).sigmoid()
    mild, strong = (gaussian_blur2d(rgb, (4 * sigma + 1,) * 2, (sigma, sigma)) for sigma in (2, 8))
    made |= {"background blurred, sigma 8": torch.lerp(strong, rgb, subject), "blurred, sigma 2": mild}
    made |= {f"darkened to {share}": rgb * share for share in DARK}
    smaller = [factor for factor in SMALLER if min(rgb.shape[2:]) >= factor * MIN_SIDE]
    return made | {f"at 1/{factor} of its size": F.avg_pool2d(rgb, factor) for factor in smaller}


def framings(rgb: Tensor) -> dict[str, Tensor]:
    return {"pristine": rgb} | {f"without {pixels} px": rgb[:, :, pixels:, pixels:] for pixels in SHIFTS}


def empty_images() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    noise = {f"uniform noise, {side} px": torch.rand(1, 3, side, side, generator=rng) for side in (256, 32)}
    black = torch.zeros(1, 3, 256, 256)
    return {"black": black, "grey": black + 0.5, "white": black + 1} | noise


def jpeg(rgb: Tensor, quality: int) -> Tensor:
    """Compress by Pillow, with its subsampling of colours."""
    pixels = (rgb[0] * 255).round().byte().movedim(0, -1).numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        return torch.from_numpy(np.array(opened)).movedim(-1, 0)[None] / 255


if __name__ == "__main__":
    main()
