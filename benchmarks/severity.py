"""Compare all types and levels of both degradation banks by full-reference metrics that need no weights.

python benchmarks/severity.py --pristine DIR... [--photographs N] [--crop PIXELS] [--write severities.toml]

Within a photograph, each metric ranks its degraded images; an image's severity is the share of them that are better,
averaged over metrics and photographs. Ranks need no scale that metrics have in common, and no outlier moves them far.
--write replaces the table that `qualiclip_pyiqa.degradations.severity` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import common
import numpy as np
import pyiqa
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from qualiclip_pyiqa.degradations.banks import ALL_TYPES, BANKS
from qualiclip_pyiqa.degradations.base import LEVELS
from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.evaluation.ladders import ladder
from qualiclip_pyiqa.files import replacing
from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.images.tensors import load_image

# SSIM, MS-SSIM, VIF and MAD of pyiqa take 10 to 200 times as long as these.
METRICS = ("fsim", "vsi", "gmsd", "nlpd", "psnr")


@torch.no_grad()
def quality(rgb: torch.Tensor, seed: int, metrics: Sequence[torch.nn.Module]) -> NDArray[np.float64]:
    """Measure every degraded image of a photograph -> (metrics, types, LEVELS), higher is better."""
    scores: list[list[float]] = []
    for number, image in enumerate(ladder(rgb, seed, ALL_TYPES)):
        if number:
            scores.append([float(f(image[None], rgb[None])) * (-1 if f.lower_better else 1) for f in metrics])
    return np.array(scores).T.reshape(len(metrics), len(ALL_TYPES), LEVELS)


def shares_better(qualities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map (metrics, types, LEVELS) to the share of the images that are better, for each metric and image.

    Images that a metric cannot tell apart to six digits share the smaller value, so that identity has 0.
    """
    flat = qualities.reshape(len(qualities), -1).round(6)
    ranks = stats.rankdata(-flat, method="min", axis=1) - 1
    return (ranks / (flat.shape[1] - 1)).reshape(qualities.shape)


def write_table(path: Path, severity: NDArray[np.float64], measured: str) -> None:
    """Write (types, LEVELS) as the package's table; `measured` says on what."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    # Folders by name alone: where they lie is the machine's matter.
    options = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
    lines = [f"# Written by `python benchmarks/severity.py {options}`, {date}:", f"# {measured}."]
    for (name, degradation), row in zip(ALL_TYPES.items(), severity, strict=True):
        numbers = ", ".join(f"{value:.3f}" for value in row)
        lines += ["", f"[{name}]", f"levels = {list(degradation.levels)}", f"severity = [{numbers}]"]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", nargs="+", required=True, metavar="DIR", help="folders of pristine photographs")
    parser.add_argument("--photographs", type=int, default=24, metavar="N", help="spread evenly over all (default: 24)")
    parser.add_argument("--crop", type=int, default=384, metavar="PIXELS", help="side of the middle that is used")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the package's table")
    options = parser.parse_args()
    if options.quick:
        options.photographs, options.crop = 1, 96
    paths = find_images(options.pristine).paths
    if not paths or options.photographs < 1 or options.crop < 96:
        parser.error(
            f"{len(paths)} images, --photographs {options.photographs}, --crop {options.crop}; expected some images, "
            "at least 1 and at least 96"
        )
    count = min(options.photographs, len(paths))
    paths = [paths[number * len(paths) // count] for number in range(count)]
    names = ("gmsd", "psnr") if options.quick else METRICS
    metrics = [pyiqa.create_metric(name, device="cpu") for name in names]
    found = []
    for number, path in enumerate(tqdm(paths, disable=None)):
        rgb = load_image(path)
        side = min(options.crop, *rgb.shape[1:])
        top, left = ((length - side) // 2 for length in rgb.shape[1:])
        found.append(quality(rgb[:, top : top + side, left : left + side], number, metrics))
    qualities = np.stack(found)  # (photographs, metrics, types, LEVELS)
    shares = np.stack([shares_better(each) for each in qualities])
    severity = shares.mean((0, 1))
    bank_of = {name: bank for bank, types in BANKS.items() for name in types}
    signs = np.array([-1 if f.lower_better else 1 for f in metrics])
    rows = [
        {"bank": bank_of[name], "type": name, "level": level + 1, "severity": float(severity[t, level])}
        | dict(zip(names, (qualities[:, :, t, level].mean(0) * signs).tolist(), strict=True))
        for t, name in enumerate(ALL_TYPES)
        for level in range(LEVELS)
    ]
    common.report(options, rows, weights="none")
    if options.write:
        measured = f"{', '.join(names)} of pyiqa {pyiqa.__version__}, {count} crops of {options.crop} pixels"
        write_table(options.write, severity, measured)


if __name__ == "__main__":
    try:
        main()
    except (ImageError, SettingsError) as error:
        sys.exit(f"error: {error}")
