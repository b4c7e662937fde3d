"""Which statistic of sharpness stands in a pair's place: how the embedded model's relative sharpness was chosen.

    python benchmarks/mini_statistics.py --pristine DIR --ratings scores.csv --images DIR [--weights FILE] [--limit 12]

A statistic is the 98th percentile of the Laplacian's log energy in cells of 16 pixels, less what the median (and in one
row the spread of luma) explains of it by least squares over 500 photographs of --pristine, in standard deviations z.
Reported for each: the SRCC of z alone and of the model's score with sigmoid(z + 1) as one of its pairs, with opinion
scores on every second rated picture by name (the "choice half" of benchmarks/mini.py), and what degradations of --limit
more photographs of --pristine do to that score: types that fall, and the share of ordered pairs of levels in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyiqa
import torch
import torch.nn.functional as F
import versus
from mini import EMBEDDED, halves, photographs, spread
from scipy.special import expit
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.evaluation.ladders import STEPS, behaviours, ladder
from qualiclip_pyiqa.evaluation.ratings import read_ratings
from qualiclip_pyiqa.towers.mini import BLOCKS, PERCENTILES, SCALES, UNRANKED, log_energies
from qualiclip_pyiqa.training.run import FITTED
from qualiclip_pyiqa.training.stacks import read_energies

PLACE = BLOCKS.index(("sharpness",))
LUMA_SPREAD = 3 * SCALES + 1  # of `log_energies`
TAKEN = "first two octaves"


def ranked(energies: np.ndarray, percent: int, octaves: int) -> np.ndarray:
    by_octave = energies[:, UNRANKED:].reshape(len(energies), SCALES, len(PERCENTILES))
    return by_octave[:, :octaves, PERCENTILES.index(percent)].mean(1)


# Columns of (N, ENERGIES): first what is scored, then what explains it.
STATISTICS: dict[str, Callable[[np.ndarray], list[np.ndarray]]] = {
    "first octave": lambda e: [ranked(e, 98, 1), ranked(e, 50, 1)],
    TAKEN: lambda e: [ranked(e, 98, 2), ranked(e, 50, 2)],
    "first octave, the spread of luma explains too": lambda e: [ranked(e, 98, 1), ranked(e, 50, 1), e[:, LUMA_SPREAD]],
}
CURVES = [(scale, offset) for scale in (0.5, 1, 2, 3) for offset in (0, 1, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", help="a model with a pair for each block (default: the embedded one)")
    parser.add_argument("--limit", type=int, default=12)
    options = parser.parse_args()
    ratings = read_ratings(options.ratings, options.images)
    half = halves(ratings)["choice_half"]
    opinions = np.array([ratings.opinions[k] for k in half]) * (-1 if ratings.lower_better else 1)
    training, _ = photographs(options.pristine)
    chosen = spread(training, FITTED + options.limit)
    # The degraded ones, too, are spread over the folder.
    degraded = spread(chosen, options.limit)
    fitted = [path for path in chosen if path not in degraded]
    net = pyiqa.create_metric(EMBEDDED, device="cpu", **({"weights": options.weights} if options.weights else {})).net

    with torch.no_grad():
        undistorted = read_energies([Path(path) for path in fitted]).double().numpy()
        rated = [seen(net, load_image(ratings.paths[k])) for k in tqdm(half, unit="picture")]
        pictures = (rgb for number, path in enumerate(degraded) for rgb in ladder(load_image(path), number))
        ladders = [seen(net, rgb) for rgb in tqdm(pictures, total=STEPS * len(degraded), unit="picture")]
    energies, pairs = (np.concatenate(each) for each in zip(*rated, strict=True))
    worse_energies, worse_pairs = (np.concatenate(each) for each in zip(*ladders, strict=True))

    def srcc(scores: np.ndarray) -> float:
        return float(spearmanr(scores, opinions).statistic)

    print(f"{versus.machine()}, {len(fitted)} photographs fitted to, {len(degraded)} degraded, {len(half)} rated\n")
    median, top = ranked(energies, 50, 1), ranked(energies, 98, 1)
    print("without learning, first octave | SRCC\n---|---")
    print(f"98th percentile | {srcc(top):.3f}")
    for part in np.arange(1, 11) / 10:
        print(f"less {part:.1f} of the median | {srcc(top - part * median):.3f}")
    slope = np.polyfit(ranked(undistorted, 50, 1), ranked(undistorted, 98, 1), 1)[0]
    print(f"less {slope:.3f} of it, the slope over undistorted photographs | {srcc(top - slope * median):.3f}")

    print("\nin the place of | statistic | alone | SRCC | types that fall | levels in order\n---|---|---|---|---|---")
    print(f"none | | | {srcc(pairs.mean(1)):.3f} | {behaviour(worse_pairs.mean(1))}")
    for name, columns in STATISTICS.items():
        z, worse_z = (standardised(columns, undistorted, each) for each in (energies, worse_energies))
        for place in range(len(BLOCKS)):
            score = replaced(pairs, place, z + 1)
            print(
                f"pair {place + 1}{' (Sharp edges.)' if place == PLACE else ''} | {name} | {srcc(z):.3f} | "
                f"{srcc(score):.3f} | {behaviour(replaced(worse_pairs, place, worse_z + 1))}"
            )
    print(f"\nscale and offset ({TAKEN}) | SRCC | types that fall | levels in order\n---|---|---|---")
    z, worse_z = (standardised(STATISTICS[TAKEN], undistorted, each) for each in (energies, worse_energies))
    for scale, offset in CURVES:
        score = replaced(pairs, PLACE, scale * z + offset)
        worse = behaviour(replaced(worse_pairs, PLACE, scale * worse_z + offset))
        print(f"{scale} z + {offset} | {srcc(score):.3f} | {worse}")


def seen(net: torch.nn.Module, picture: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log energies (1, ENERGIES), and what each pair scores (1, P)."""
    rgb = picture[None]
    image, text = (F.normalize(each, dim=-1) for each in (net.features(rgb), net.prompt_features))
    logits = (image @ text.T * (net.logit_scale / net.temperature)).unflatten(1, (-1, 2))
    return log_energies(rgb).double().numpy(), logits.softmax(-1)[..., 0].double().numpy()


def standardised(
    columns: Callable[[np.ndarray], list[np.ndarray]], undistorted: np.ndarray, energies: np.ndarray
) -> np.ndarray:
    """What is left of the first column once the others are regressed out, in the undistorted ones' deviations."""
    top, *explaining = columns(undistorted)
    weights = np.linalg.lstsq(np.stack([np.ones_like(top), *explaining], axis=1), top, rcond=None)[0]

    def left(top: np.ndarray, *explaining: np.ndarray) -> np.ndarray:
        return top - np.stack([np.ones_like(top), *explaining], axis=1) @ weights

    return left(*columns(energies)) / left(top, *explaining).std()


def replaced(pairs: np.ndarray, place: int, logit: np.ndarray) -> np.ndarray:
    changed = pairs.copy()
    changed[:, place] = expit(logit)
    return changed.mean(1)


def behaviour(scores: np.ndarray) -> str:
    found = behaviours(scores).values()
    return f"{sum(each.falls for each in found)} of {len(found)} | {np.mean([each.in_order for each in found]):.3f}"


if __name__ == "__main__":
    main()
