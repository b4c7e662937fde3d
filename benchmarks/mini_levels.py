"""How a model's score falls with the level of every degradation type, on photographs it was not trained on.

    python benchmarks/mini_levels.py --pristine DIR [--weights FILE] [--out DIR] [--limit N] [--half]

DIR holds `manifest.csv` with columns `file` and `held_out`; the rows with held_out = 1 are measured, whole pictures at
their own size. A type counts when its mean score falls strictly from level 1 to 5. Writes mini_levels.json and
mini_levels.png to --out and the table to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from mini_common import Mini, read_rgb
from tqdm import tqdm

from qualiclip_pyiqa.training.degradations import DEGRADATIONS, LEVELS, degrade

KEY_TYPES = ("jpeg", "gaussian_blur", "motion_blur", "white_noise")


def measure(model: Mini, paths: list[Path]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores of the pristine pictures (V,) and per type of their levels 1..5 (V, 5)."""
    pristine, scores = [], {name: [] for name in DEGRADATIONS}
    for number, path in enumerate(tqdm(paths, file=sys.stderr)):
        rgb = read_rgb(path)
        pristine.append(model(rgb)[0])
        for name in DEGRADATIONS:
            ladder = torch.cat([degrade(rgb, name, level, seed=number) for level in range(1, LEVELS + 1)])
            scores[name].append(model((ladder * 255).round() / 255))
    return torch.stack(pristine), {name: torch.stack(rows) for name, rows in scores.items()}


def summarise(pristine: torch.Tensor, scores: dict[str, torch.Tensor]) -> dict:
    types = {}
    for name, ladder in scores.items():
        full = torch.cat([pristine[:, None], ladder], dim=1)
        falls = full[:, :-1] > full[:, 1:]
        means = ladder.mean(0)
        types[name] = {
            "means": [round(float(v), 4) for v in means],
            "falls_1_to_5": bool((means.diff() < 0).all()),
            "below_pristine": bool(means[0] < pristine.mean()),
            "pictures_strict_1_to_5": round(float(falls[:, 1:].all(1).float().mean()), 3),
            "pairs_in_order": round(
                float((ladder[:, :, None] > ladder[:, None, :]).float().mean(0).triu(1).sum() / 10), 3
            ),
        }
    counted = [name for name, t in types.items() if t["falls_1_to_5"]]
    return {
        "pictures": len(pristine),
        "pristine_mean": round(float(pristine.mean()), 4),
        "pristine_std": round(float(pristine.std()), 4),
        "types_falling": len(counted),
        "key_types": {name: types[name]["falls_1_to_5"] for name in KEY_TYPES},
        "types": types,
    }


def plot(summary: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 6, figsize=(15, 9), sharex=True, sharey=True)
    for axis, (name, entry) in zip(axes.flat, summary["types"].items(), strict=True):
        color = "tab:blue" if entry["falls_1_to_5"] else "tab:red"
        axis.plot(range(LEVELS + 1), [summary["pristine_mean"], *entry["means"]], marker="o", color=color)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("level (0 is pristine)")
    figure.supylabel(f"mean score of {summary['pictures']} held-out photographs")
    figure.tight_layout(rect=(0.02, 0, 1, 1))
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=Path("weights/qualiclip-mini.safetensors"))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--limit", type=int, help="only the first N photographs, for a quick look")
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast")
    options = parser.parse_args()
    with (options.pristine / "manifest.csv").open(newline="", encoding="utf-8") as file:
        paths = [options.pristine / row["file"] for row in csv.DictReader(file) if row["held_out"] == "1"]
    if options.limit:
        paths = paths[:: max(1, len(paths) // options.limit)][: options.limit]
    summary = summarise(*measure(Mini(options.weights, options.half), paths))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mini_levels.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, options.out / "mini_levels.png")
    print(f"{summary['pictures']} photographs, pristine {summary['pristine_mean']:.3f}")
    print(f"{'type':22s} {'level 1':>8s} {'2':>7s} {'3':>7s} {'4':>7s} {'5':>7s}  falls  pairs in order")
    for name, entry in summary["types"].items():
        means = " ".join(f"{v:7.3f}" for v in entry["means"])
        print(f"{name:22s}  {means}  {'yes' if entry['falls_1_to_5'] else 'NO ':5s}  {entry['pairs_in_order']:.3f}")
    print(f"strictly falling: {summary['types_falling']} of {len(DEGRADATIONS)}; key types {summary['key_types']}")


if __name__ == "__main__":
    main()
