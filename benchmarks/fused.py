"""What fused convolutions and strips change: time and values, each against the same tower without it.

    python benchmarks/fused.py [--repeat 9]

Weights are random: times do not depend on them. The two take turns in one process, and the medians are compared.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from unittest.mock import patch

import pyiqa
import torch
import versus
from speed import medians
from torch import Tensor, nn

from qualiclip_pyiqa.towers import onednn as fused
from qualiclip_pyiqa.towers import streaming as strips

PLAIN = patch.object(fused, "_known", lambda: False)  # PyTorch's public convolutions
WHOLE = patch.object(strips, "LARGE_PIXELS", 2**62)
CASES = (
    ("fused", PLAIN, 1, 224, 224),
    ("fused", PLAIN, 8, 224, 224),
    ("fused", PLAIN, 1, 768, 1024),
    ("strips", WHOLE, 1, 2160, 3840),
)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    with versus.weights(None):
        net = pyiqa.create_metric("qualiclip", device="cpu").net
        print("| what | qualiclip | with | without | time saved | largest difference of a score |")
        print("|---|---|---|---|---|---|")
        for what, without, count, height, width in CASES:
            size = f"{count}x{height}x{width}"
            compare(what, size, net, versus.pictures(count, height, width), without, options.repeat)
    print(f"\n{versus.machine()}, torch {torch.__version__}")


def compare(what: str, size: str, net: nn.Module, x: Tensor, without: AbstractContextManager, repeat: int) -> None:
    def other() -> Tensor:
        with without:
            return net(x)

    difference = float((net(x) - other()).abs().max())
    own_time, other_time = medians([lambda: net(x), other], repeat)
    saved = 1 - own_time / other_time
    print(f"| {what} | {size} | {own_time:.3f} s | {other_time:.3f} s | {saved:.0%} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
