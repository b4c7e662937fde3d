"""Measure the rounding errors of scores and features: this package's and pyiqa's, in float32, on the same weights.

    python benchmarks/rounding.py [--draws 6] [--images 8] [--weights DIR ...]

The reference is our network in double precision, prompts included, without folded BatchNorm. Weights and images
(224x224, every second one smoothed) are random. One set of weights rounds all images in the same direction, so a single
set says little: reported are means over draws with standard errors, and in how many draws each is nearer on average.
With --weights, each folder with RN50.pt and QualiCLIP.pth is a set, instead of random ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import common
import pyiqa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qualiclip_pyiqa.towers.resnet import ResNetTower
from qualiclip_pyiqa.towers.text import tokenize

OURS, FOLDED, THEIRS = "this package", "its folded weights, else exact", "pyiqa"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--draws", type=int, default=6, help="sets of random weights, at least 2")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--weights", type=Path, nargs="+", metavar="DIR")
    options = parser.parse_args()
    if options.quick:
        options.draws, options.images = 2, 1
    given = options.weights or [None] * options.draws
    if len(given) < 2:
        parser.error(f"{len(given)} sets of weights; expected at least 2")
    rows = []
    for name in ("qualiclip",) if options.quick else ("qualiclip", "clipiqa"):
        draws = [distances(name, draw, options.images, folder) for draw, folder in enumerate(given)]
        for what in (OURS, FOLDED, THEIRS):
            row: dict[str, object] = {"metric": name, "what": what}
            for k, of in enumerate(("score", "feature")):
                found = [each[what][k] for each in draws]
                row[f"{of}: mean distance"] = mean(found)
                row[f"{of}: standard error"] = stdev(found) / len(found) ** 0.5
                other = THEIRS if what == OURS else OURS
                row[f"{of}: nearer"] = None if what == FOLDED else sum(d[what][k] < d[other][k] for d in draws)
            rows.append(row)
    names = ", ".join(folder.name for folder in options.weights or ())
    common.report(options, rows, weights=names or None)


@torch.no_grad()
def distances(name: str, draw: int, images: int, given: Path | None) -> dict[str, tuple[float, float]]:
    """Measure mean distances of scores and of features for one set of weights."""
    with common.weights(given, draw) as folder:
        theirs = common.oracle(name, folder)
        ours = pyiqa.create_metric(name, device="cpu").net
        exact = exactly(name)
    folded = copy.deepcopy(ours).double()
    folded.prompt_features = exact.prompt_features
    scores: dict[str, list[float]] = {what: [] for what in (OURS, FOLDED, THEIRS)}
    features: dict[str, list[float]] = {what: [] for what in scores}
    for seed in range(images):
        x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1000 * draw + seed))
        x = F.avg_pool2d(x, 5, 1, 2) if seed % 2 else x
        truth = exact.features(x.double())
        exact_score = exact.score(truth)
        normalised = (x - ours.tower.mean) / ours.tower.std
        feature, folded_feature = ours.features(x), folded.features(x.double())
        found = {
            OURS: (ours.score(feature), feature),
            FOLDED: (folded.score(folded_feature), folded_feature),
            THEIRS: (theirs(x), theirs.clip_model[0].encode_image(normalised, pos_embedding=False)),
        }
        for what, (score, feature) in found.items():
            scores[what].append(float((score.double() - exact_score).abs().max()))
            features[what].append(relative(feature, truth))
    return {what: (mean(scores[what]), mean(features[what])) for what in scores}


def exactly(name: str) -> nn.Module:
    with patch.object(ResNetTower, "prepare_to_freeze"):
        exact = pyiqa.create_metric(name, device="cpu").net.double()
    model = exact.origin.reload()
    texts = exact.prompts.texts
    if not all(text in model.stored_features for text in texts):  # else the prompts' features are the file's
        text = model.text_tower().eval().double()
        exact.prompt_features = F.normalize(text.encode(tokenize(texts, text.context_length)), dim=-1)
    return exact


def relative(feature: Tensor, truth: Tensor) -> float:
    return float((feature.double() - truth).norm() / truth.norm())


if __name__ == "__main__":
    main()
