"""Average embedded models of several seeds into one: the shipped ones are such averages, so no seed is chosen.

    python -m qualiclip_pyiqa.training.embedded.average SEED0/qualiclip-mini.safetensors SEED1/... --out FILE

Models that start from one trunk and are fine-tuned alike stay close enough for the average of their weights to be a
model like each of them, of less variance (Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import SettingsError, WeightsError
from ...pretrained.read import read
from ...pretrained.write import write_safetensors


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.training.embedded.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="model file to write")
    options = parser.parse_args(arguments)
    try:
        average(options.models, options.out)
    except (OSError, SettingsError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def average(models: Sequence[Path], out: Path) -> None:
    """Write the average of models of one kind, which differ in their seed alone.

    Raises:
        SettingsError: models of different kinds. WeightsError: one that cannot be read.
    """
    found = [read(model, layout="qualiclip-pyiqa") for model in models]
    described = [{key: each.metadata.get(key) for key in ("backbone", "tower", "prompts")} for each in found]
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.tensors.items()} for each in found]
    for model, other, shape in zip(models, described, shapes, strict=True):
        if other != described[0] or shape != shapes[0]:
            raise SettingsError(f"{model} is a model of another kind than {models[0]}; expected runs of several seeds")
    tensors = {
        name: torch.stack([each.tensors[name].double() for each in found]).mean(0).to(tensor.dtype)
        for name, tensor in found[0].tensors.items()
    }
    training = [json.loads(each.metadata.get("training", "{}")) for each in found]
    write_safetensors(out, tensors, {**found[0].metadata, "training": json.dumps({"average of": training})})


if __name__ == "__main__":
    sys.exit(main())
