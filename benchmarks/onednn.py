"""Measure what fused convolutions and strips change, in time and scores, against the same tower without them.

    python benchmarks/onednn.py [--repeat 9]

Weights are random, as times do not depend on them. Both variants take turns in one process; medians are compared. A
`Scorer` uses fused convolutions on a CPU.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from unittest.mock import patch

import common
import pyiqa
import torch
from torch import Tensor

from qualiclip_pyiqa.towers import streaming
from qualiclip_pyiqa.towers.onednn import use_onednn

FUSED = ((1, 224, 224), (8, 224, 224), (1, 768, 1024))
STREAMED = ((1, 2160, 3840),)


@torch.no_grad()
def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    repeat = 1 if options.quick else options.repeat
    rows = []
    with common.weights(options.weights):
        net = pyiqa.create_metric("qualiclip", device="cpu").net
        fused = copy.deepcopy(net)
        if not use_onednn(fused.tower):
            sys.exit("error: this build of PyTorch lacks oneDNN's operators")

        def whole(x: Tensor) -> Tensor:
            with patch.object(streaming, "LARGE_PIXELS", 2**62):
                return net(x)

        cases = [("fused convolutions", fused, net, size) for size in FUSED]
        cases += [("strips", net, whole, size) for size in STREAMED]
        for what, with_it, without, (count, height, width) in cases[:1] if options.quick else cases:
            x = common.images(count, height, width)
            difference = float((with_it(x) - without(x)).abs().max())
            calls = [lambda call=call, x=x: call(x) for call in (with_it, without)]
            with_s, without_s = common.medians(calls, repeat)
            rows.append(
                {
                    "what": what,
                    "qualiclip": f"{count}x{height}x{width}",
                    "with, seconds": with_s,
                    "without, seconds": without_s,
                    "time saved": 1 - with_s / without_s,
                    "largest difference of a score": difference,
                }
            )
    common.report(options, rows, weights=options.weights and options.weights.name)


if __name__ == "__main__":
    main()
