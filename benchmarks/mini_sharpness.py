"""A finished model with the pair "Sharp edges." as `--config mini` has it now: relative sharpness, not learned.

    python benchmarks/mini_sharpness.py --weights FILE --pristine DIR --out FILE

No other tensor is changed. It is fitted as `qualiclip train` does it: to the first 500 photographs, in the order that
the model's seed draws, of those that were trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from qualiclip_pyiqa.pretrained import weights
from qualiclip_pyiqa.towers.mini import RelativeSharpness, detail_and_top
from qualiclip_pyiqa.training import alignment as towers
from qualiclip_pyiqa.training.config import load_config
from qualiclip_pyiqa.training.run import FITTED
from qualiclip_pyiqa.training.stacks import list_photographs, read_energies, shorter_side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    state, metadata = weights.read(options.weights, layout="qualiclip-pyiqa")
    training = json.loads(metadata["training"])
    config = load_config("mini")
    aligned = towers.build(config, training["seed"])
    (number,) = (k for k, head in enumerate(aligned.tower.heads) if isinstance(head, RelativeSharpness))
    ours = aligned.tower.state_dict()
    kept = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
    kept = {key: value for key, value in kept.items() if not key.startswith(f"heads.{number}.")}
    if kept.keys() != {key for key in ours if not key.startswith(f"heads.{number}.")}:
        sys.exit(f"error: {options.weights} holds another tower than `--config mini`")

    paths = [path for path in list_photographs(options.pristine) if shorter_side(path) >= config.smallest_photograph]
    random.Random(f"split {training['seed']}").shuffle(paths)
    energies = read_energies(paths[config.validation :][:FITTED])
    aligned.tower.heads[number].fit(detail_and_top(energies))
    pair = slice(2 * number, 2 * number + 2)
    anchors = state["prompts_features"].clone()
    anchors[pair] = aligned.anchors[pair]
    aligned.anchors = anchors
    summary = training | {"sharpness_added_to": weights.file_sha256(options.weights)}
    towers.save(options.out, aligned, {**aligned.tower.state_dict(), **kept}, summary, metadata["licence"])


if __name__ == "__main__":
    main()
