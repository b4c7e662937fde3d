"""SRCC of a model with opinion scores, beside the log variance of the Laplacian on the same pictures.

    python benchmarks/mini_srcc.py --ratings scores.csv --images DIR [--weights FILE] [--out FILE.json] [--half]

scores.csv has the columns `image` and `mos` (higher is better). Intervals are 95 % percentile bootstraps over pictures.
Nothing here is trained or chosen on the ratings.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from mini_common import Mini, read_rgb
from scipy.stats import pearsonr, spearmanr
from tqdm import tqdm

from qualiclip_pyiqa.training.stacks import laplacian_log_variance


def srcc(scores: np.ndarray, mos: np.ndarray, rounds: int = 2000) -> dict[str, object]:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(rounds):
        chosen = rng.integers(0, len(mos), len(mos))
        samples.append(spearmanr(scores[chosen], mos[chosen]).statistic)
    low, high = np.percentile(samples, [2.5, 97.5])
    return {
        "srcc": round(float(spearmanr(scores, mos).statistic), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
        "plcc": round(float(pearsonr(scores, mos).statistic), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=Path("weights/qualiclip-mini.safetensors"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast")
    options = parser.parse_args()
    with options.ratings.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model = Mini(options.weights, options.half)
    pairs, sharpness = [], []
    for row in tqdm(rows, file=sys.stderr):
        rgb = read_rgb(options.images / row["image"])
        pairs.append(model.pairs(rgb)[0])
        sharpness.append(laplacian_log_variance(rgb)[0])
    mos = np.array([float(row["mos"]) for row in rows])
    opinions = torch.stack(pairs).numpy()
    result = {
        "pictures": len(rows),
        "qualiclip-mini": srcc(opinions.mean(1), mos),
        "log variance of the Laplacian": srcc(torch.stack(sharpness).numpy(), mos),
        "single pairs": [round(float(spearmanr(column, mos).statistic), 4) for column in opinions.T],
        "score_mean": round(float(opinions.mean()), 4),
        "score_std": round(float(opinions.mean(1).std()), 4),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
