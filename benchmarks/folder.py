"""A folder of photographs end to end: `qualiclip score` against `pyiqa METRIC -t FOLDER`, start-up aside.

    python benchmarks/folder.py --images DIR [--limit 200] [--metric qualiclip] [--device cpu] [--weights DIR]

Both read, decode and score the same files with the same weights (without --weights: random content, which time does not
depend on) in this process. pyiqa's part is what its command does: `metric(path).item()` for one file after the other,
with pyiqa's own network; the models are loaded before the clock starts. The photographs, every `--limit`-th of the
folder in the order of their names, go to each in turn in four portions, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import pyiqa
import torch
import versus

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.discover import find_pictures
from qualiclip_pyiqa.scoring import Scorer

PORTIONS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--metric", default="qualiclip", choices=("qualiclip", "clipiqa"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = find_pictures([str(options.images)]).paths
    paths = paths[:: max(1, len(paths) // options.limit)][: options.limit]
    with versus.weights(options.weights) as folder:
        scorer = Scorer(options.metric, device=options.device, compile=options.compile)
        theirs = pyiqa.create_metric(options.metric, device=options.device)
        theirs.net = versus.oracle(options.metric, folder).to(options.device)
        list(scorer.score(paths[:2]))
        [theirs(path) for path in paths[:2]]
        ours_s = theirs_s = largest = 0.0
        for portion in range(PORTIONS):
            part = paths[portion * len(paths) // PORTIONS : (portion + 1) * len(paths) // PORTIONS]
            started = time.perf_counter()
            own = [record.scores[options.metric] for record in scorer.score(part)]
            between = time.perf_counter()
            upstreams = [theirs(path).item() for path in part]
            ours_s, theirs_s = ours_s + between - started, theirs_s + time.perf_counter() - between
            largest = max(largest, float((torch.tensor(own) - torch.tensor(upstreams)).abs().max()))
    sizes = Counter(tuple(load_image(path).shape[1:]) for path in paths)
    (common, count), *_ = sizes.most_common(1)
    print(
        f"{options.metric}, {len(paths)} photographs of {len(sizes)} sizes ({count} of {common[1]}x{common[0]}): "
        f"this package {ours_s:.1f} s, pyiqa {theirs_s:.1f} s, ratio {theirs_s / ours_s:.2f}; "
        f"largest difference of a score {largest:.1e}"
    )
    row = {"metric": options.metric, "photographs": len(paths), "sizes": len(sizes), "compile": options.compile}
    row |= {"seconds": ours_s, "pyiqa_seconds": theirs_s, "ratio": theirs_s / ours_s, "difference": largest}
    versus.report(options.json, options.device, options.weights, [row])


if __name__ == "__main__":
    main()
