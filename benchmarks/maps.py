"""Measure which quality map finds a degraded region, on photographs that are held out.

    python benchmarks/maps.py --pristine DIR [--metric NAME] [--limit N] [--checked N] [--crop PIXELS] [--level L]
        [--training] [--json FILE.json]

Photographs are those held out by the folder's `manifest.csv` (columns `file` and `held_out`), cut to their middle. In
each, a region at a random place is degraded: blurred, noisy, compressed, darkened or pixelated, a quarter, a sixteenth
or a sixty-fourth of the area, of the photograph's own aspect. Values are compared every 8 pixels.

- Pointing: share of photographs in which the map's lowest value lies in the region. By chance, the region's share.
- AUROC: probability that a place in the region has a lower value than one outside, mean over photographs.
- Occlusion: Spearman's correlation with the occlusion map of the same attribute; of the first photographs only, with
  regions of a sixteenth, as an occlusion map takes some 230 passes. So are the rows of Grad-CAM and occlusion.

Beside the maps: random values (smoothed as a map is), and plain sharpness, the log of the Laplacian's energy in the
windows of the local map. Embedded models only: contributions need a CLIP tower, whose weights are not part of the
package, and with random weights such a map shows nothing. Settings of the maps were chosen on photographs that are not
held out (`--training`).
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.degradations.bank import degrade
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.explain.local import spread
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.towers.statistics import laplacian, luma_and_opponents
from qualiclip_pyiqa.towers.windows import SIDE, WINDOW

# Type of the bank, and the attribute that should find it.
TYPES = {
    "blur": ("gaussian_blur", "sharpness"),
    "noise": ("white_noise", "noisiness"),
    "JPEG": ("jpeg", "compression"),
    "dark": ("darken", "brightness"),
    "pixelation": ("pixelate", "sharpness"),
}
SIZES = (4, 16, 64)  # the image's area over the region's
CHECKED_SIZE = 16
EVERY = 8  # pixels between compared values
Floats = NDArray[np.floating[Any]]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--metric", default="qualiclip-mini", help="an embedded model (default: qualiclip-mini)")
    parser.add_argument("--limit", type=int, default=40, help="photographs, at most (default: 40)")
    parser.add_argument("--checked", type=int, default=3, help="photographs with occlusion and Grad-CAM (default: 3)")
    parser.add_argument("--crop", type=int, default=512, metavar="PIXELS", help="side of the middle (default: 512)")
    parser.add_argument("--level", type=float, default=4, help="level of the degradations, 1 to 5 (default: 4)")
    parser.add_argument("--training", action="store_true", help="use photographs that are not held out, to choose")
    options = parser.parse_args()
    if options.quick:
        options.limit, options.checked, options.crop = 2, 1, 96
    try:
        training, held_out = common.photographs(options.pristine)
        paths = common.spread(training if options.training else held_out, options.limit)
        rows = list(measure(options.metric, paths, options.checked, options.level, options.crop))
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=options.metric)


def measure(metric: str, paths: Sequence[str], checked: int, level: float, crop: int) -> Iterator[dict[str, Any]]:
    """Map all degraded photographs and summarise by map, attribute, type and size."""
    net = common.load(metric, prompts="look")
    kinds = {kind: Mapper(net, kind) for kind in ("local", "gradcam", "occlusion")}
    found: dict[tuple[str, str, str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for number, path in enumerate(tqdm(paths, unit="photograph", file=sys.stderr, disable=None)):
        rgb = middle(load_image(path), crop)
        for (what, (name, own)), size in ((each, size) for each in TYPES.items() for size in SIZES):
            x, inside = with_region(rgb, name, level, size, seed=1000 * number + size)
            maps: dict[tuple[str, str], Floats] = {
                ("random", "-"): random_map(x, number),
                ("sharpness of pixels", "-"): sharpness_map(x),
            }
            check = None
            for kind, mapper in kinds.items():
                if kind != "local" and (number >= checked or size != CHECKED_SIZE):
                    continue
                each = Mapper(net, kind, [own]) if kind != "local" else mapper
                for one in each.maps(x[None])[0]:
                    maps[kind, one.attribute] = one.enlarged()[EVERY // 2 :: EVERY, EVERY // 2 :: EVERY]
                check = maps.get(("occlusion", own))
            for (kind, attribute), values in maps.items():
                agrees = np.nan
                if check is not None and kind != "occlusion" and attribute in ("-", own):
                    agrees = spearmanr(values.flat, check.flat)[0]
                lowest = float(inside.flat[int(values.argmin())])
                found[kind, attribute, what, size].append((lowest, auroc(values, inside), float(agrees)))
    for (kind, attribute, what, size), each in found.items():
        pointing, area, agreement = np.array(each).T
        known = agreement[np.isfinite(agreement)]
        yield {
            "map": kind,
            "attribute": attribute,
            "degraded by": what,
            "own attribute": attribute == TYPES[what][1] or attribute == "-",
            "region": f"1/{size}",
            "photographs": len(each),
            "pointing": float(pointing.mean()),
            "AUROC": float(area.mean()),
            "occlusion": float(known.mean()) if len(known) else None,
        }


def middle(rgb: Tensor, crop: int) -> Tensor:
    """Cut an image (3, H, W) to its middle."""
    height, width = (min(crop, length) for length in rgb.shape[1:])
    top, left = (rgb.shape[1] - height) // 2, (rgb.shape[2] - width) // 2
    return rgb[:, top : top + height, left : left + width]


def with_region(rgb: Tensor, name: str, level: float, size: int, seed: int) -> tuple[Tensor, Floats]:
    """Degrade a random region; returns the image in 8 bits, and which of the compared values lie in the region."""
    height, width = (max(8, round(length / size**0.5)) for length in rgb.shape[1:])
    draw = random.Random(seed)
    top, left = draw.randrange(rgb.shape[1] - height + 1), draw.randrange(rgb.shape[2] - width + 1)
    x, inside = rgb.clone(), torch.zeros(rgb.shape[1:])
    part = slice(top, top + height), slice(left, left + width)
    x[:, part[0], part[1]] = degrade(rgb[None, :, part[0], part[1]], name, level, seed)[0]
    inside[part] = 1
    return (x * 255).round() / 255, inside[EVERY // 2 :: EVERY, EVERY // 2 :: EVERY].numpy()


def auroc(values: Floats, inside: Floats) -> float:
    """Return the probability that a value inside is lower than one outside; ties count half."""
    ranks = rankdata(values.ravel())
    members = inside.ravel() > 0
    first, second = members.sum(), (~members).sum()
    return float(1 - (ranks[members].sum() - first * (first + 1) / 2) / (first * second))


def random_map(x: Tensor, seed: int) -> Floats:
    """Draw values for the windows of a local map."""
    grid = [max(1, -(-length // SIDE) - WINDOW + 1) for length in x.shape[1:]]
    values = torch.rand(1, 1, *grid, generator=torch.Generator().manual_seed(seed))
    return _compared(spread(values, (WINDOW, WINDOW)), x)


def sharpness_map(x: Tensor) -> Floats:
    """Compute the log of the Laplacian's mean energy in the windows of a local map."""
    luma = luma_and_opponents(x[None])[0]
    energy = laplacian(F.pad(luma, (1, 1, 1, 1), mode="replicate")).square()
    cells = F.avg_pool2d(energy, SIDE, ceil_mode=True)
    windows = F.avg_pool2d(cells, [min(WINDOW, length) for length in cells.shape[2:]], 1)
    return _compared(spread((windows + 1e-8).log(), (WINDOW, WINDOW)), x)


def _compared(values: Tensor, x: Tensor) -> Floats:
    large = F.interpolate(values, scale_factor=SIDE, mode="bilinear", align_corners=False)
    compared: Floats = large[0, 0, : x.shape[1], : x.shape[2]][EVERY // 2 :: EVERY, EVERY // 2 :: EVERY].numpy()
    return compared


if __name__ == "__main__":
    main()
