"""Measure how far the mean score of tiles is from the score of the whole image, over a folder of photographs.

python benchmarks/tiles.py --images DIR... [--metric qualiclip-mini] [--tile 128 256] [--limit N]
"""

from __future__ import annotations

import common
import pyiqa
from scipy import stats

from qualiclip_pyiqa.images.paths import find_images
from qualiclip_pyiqa.scoring.scorer import Scorer


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--metric", default="qualiclip-mini")
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    if options.quick:
        options.limit, options.tile = 3, [128]
    paths = find_images(options.images).paths[: options.limit]
    metrics = {"whole": pyiqa.create_metric(options.metric, device="cpu")}
    metrics |= {str(tile): pyiqa.create_metric(options.metric, device="cpu", tile=tile) for tile in options.tile}
    records = list(Scorer(metrics, device="cpu").score(paths))
    whole = [record.scores["whole"] for record in records]
    rows = []
    for tile in options.tile:
        tiled = [record.scores[str(tile)] for record in records]
        differences = [abs(a - b) for a, b in zip(whole, tiled, strict=True)]
        rows.append(
            {
                "metric": options.metric,
                "photographs": len(paths),
                "tile": tile,
                "mean difference": sum(differences) / len(differences),
                "largest": max(differences),
                "SRCC with the whole": float(stats.spearmanr(whole, tiled)[0]),
            }
        )
    common.report(options, rows, weights=options.metric)


if __name__ == "__main__":
    main()
