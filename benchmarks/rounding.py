"""How far scores and features are from exact ones: this package's and pyiqa's, in float32, on the same weights.

    python benchmarks/rounding.py [--pictures 24] [--weights DIR]

Exact is a network of ours in double precision whose BatchNorm is not folded into the convolutions. Pictures are
224x224, random, every second one smoothed; without --weights the files' content is random, too.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import pyiqa
import torch
import torch.nn.functional as F
import versus

from qualiclip_pyiqa import clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    print("| metric | what | score: mean distance | largest | feature: mean relative distance |\n|---|---|---|---|---|")
    with versus.weights(options.weights) as folder, torch.no_grad():
        for name in ("qualiclip", "clipiqa"):
            theirs = versus.oracle(name, folder)
            ours = pyiqa.create_metric(name, device="cpu").net
            with patch.object(clip, "_fold_batchnorm", lambda tower: None):
                exact = pyiqa.create_metric(name, device="cpu").net.double()
            networks = {
                "this package": ours,
                "its folded weights, else exact": copy.deepcopy(ours).double(),
                "its softmax, else exact": None,
                "pyiqa": theirs,
            }
            scores: dict[str, list[float]] = {what: [] for what in networks}
            features: dict[str, list[float]] = {what: [] for what in networks}
            for seed in range(options.pictures):
                x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
                x = F.avg_pool2d(x, 5, 1, 2) if seed % 2 else x
                truth = exact.features(x.double())
                score = exact.score(truth)
                for what, network in networks.items():
                    if network is None:
                        found = ours.score(truth.float())
                    elif network is theirs:
                        found = theirs(x)
                        normalised = (x - ours.tower.mean) / ours.tower.std
                        features[what].append(
                            relative(theirs.clip_model[0].encode_image(normalised, pos_embedding=False), truth)
                        )
                    else:
                        feature = network.features(x.to(network.prompt_features.dtype))
                        found = network.score(feature)
                        features[what].append(relative(feature, truth))
                    scores[what].append(float((found.double() - score).abs().max()))
            for what in networks:
                far = f"{mean(features[what]):.1e}" if features[what] else "-"
                print(f"| {name} | {what} | {mean(scores[what]):.1e} | {max(scores[what]):.1e} | {far} |", flush=True)
    print(f"\n{versus.machine()}, torch {torch.__version__}, pyiqa {pyiqa.__version__}")


def relative(feature: torch.Tensor, truth: torch.Tensor) -> float:
    return float((feature.double() - truth).norm() / truth.norm())


if __name__ == "__main__":
    main()
