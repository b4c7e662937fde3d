"""What fused convolutions and strips change: time and values, each against the same tower without it.

    python benchmarks/onednn.py [--repeat 9]

Weights are random: times do not depend on them. The two take turns in one process, and the medians are compared.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import common
import pyiqa
import torch
from torch import Tensor

from qualiclip_pyiqa.towers import onednn, streaming

PLAIN = patch.object(onednn, "_known", lambda: False)  # PyTorch's public convolutions
WHOLE = patch.object(streaming, "LARGE_PIXELS", 2**62)
CASES = (
    ("fused convolutions", PLAIN, 1, 224, 224),
    ("fused convolutions", PLAIN, 8, 224, 224),
    ("fused convolutions", PLAIN, 1, 768, 1024),
    ("strips", WHOLE, 1, 2160, 3840),
)


@torch.no_grad()
def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    rows = []
    with common.weights(options.weights):
        net = pyiqa.create_metric("qualiclip", device="cpu").net
        for what, without, count, height, width in CASES[:1] if options.quick else CASES:
            x = common.images(count, height, width)

            def plain(without=without, x=x) -> Tensor:
                with without:
                    return net(x)

            difference = float((net(x) - plain()).abs().max())
            with_s, without_s = common.medians([lambda x=x: net(x), plain], 1 if options.quick else options.repeat)
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
