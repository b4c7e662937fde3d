"""How far the mean score of tiles is from the score of the whole picture, by a folder of photographs.

python benchmarks/tiles.py --images DIR... [--metric qualiclip-mini] [--tile 128 256] [--limit N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyiqa
import versus
from scipy import stats

from qualiclip_pyiqa.images.paths import find_pictures
from qualiclip_pyiqa.scoring.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--metric", default="qualiclip-mini")
    parser.add_argument("--tile", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = find_pictures(options.images).paths[: options.limit]
    metrics = {"whole": pyiqa.create_metric(options.metric, device="cpu")}
    metrics |= {str(tile): pyiqa.create_metric(options.metric, device="cpu", tile=tile) for tile in options.tile}
    records = list(Scorer(metrics, device="cpu").score(paths))
    whole = [record.scores["whole"] for record in records]
    rows = []
    print(f"{options.metric}, {len(paths)} photographs\n\n| tile | mean difference | largest | SRCC with the whole |")
    print("|---|---|---|---|")
    for tile in options.tile:
        tiled = [record.scores[str(tile)] for record in records]
        apart = [abs(a - b) for a, b in zip(whole, tiled, strict=True)]
        row = {"tile": tile, "mean": sum(apart) / len(apart), "largest": max(apart)}
        row["srcc"] = float(stats.spearmanr(whole, tiled)[0])
        rows.append(row)
        print(f"| {tile} | {row['mean']:.3f} | {row['largest']:.3f} | {row['srcc']:.3f} |")
    versus.report(options.json, "cpu", None, rows)


if __name__ == "__main__":
    main()
