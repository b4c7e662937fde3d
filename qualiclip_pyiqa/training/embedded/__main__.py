"""Train the embedded models.

    python -m qualiclip_pyiqa.training.embedded --trunk FILE --pristine DIR --judge FILE --out DIR [--seed N]
        [--ratings CSV --images DIR [--splits N]]

Writes qualiclip-mini.safetensors and, with opinion scores, qualiclip-mini+.safetensors. The same command writes the
same bytes, on one kind of machine and version of torch. `--trunk` is the pretrained MobileNetV2, `--judge` a model of
`qualiclip train --config mini`. With `--splits`, no model is written: the rated images are divided that often into 80 %
to train on and 20 % to test on, and the SRCC of each test part is printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import statistics as statistics_of
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from ...errors import ImageError, SettingsError, WeightsError
from ...evaluation.ratings import Ratings, read_ratings
from ...images.convert import MIN_SIDE
from ...images.tensors import load_image
from ...metrics.prompt_iqa import OpenQualiCLIP
from ...metrics.prompts import LOOK
from ...pretrained.layouts import OWN_FORMAT
from ...pretrained.write import write_safetensors
from ...towers.base import load_into
from ...towers.mobile import SCALE, MobileTower
from ..photographs import list_photographs, shorter_side
from .attributes import ATTRIBUTES, fit_attributes, measure_ladders
from .crops import SIDE, Crops, make_crops
from .frozen import pass_frozen, statistics
from .heads import fit_head, set_head
from .opinions import Rated, fit_opinions, logits_of

PAIRS = ["quality", *ATTRIBUTES]
LEAST_LADDERS = 2  # whose statistics have a standard deviation
STRENGTH = 300.0  # of the ridge regression on crops
FRAME = 8  # pixels that a rated image loses of its height and width: the side of a JPEG block
SLOPE = 1.5  # logits per standard deviation of the crops' targets: a pristine crop scores about 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.training.embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trunk", type=Path, required=True, help="the pretrained MobileNetV2")
    parser.add_argument("--pristine", type=Path, required=True, help="photographs; those held out are not used")
    parser.add_argument("--judge", type=Path, required=True, help="model of `qualiclip train --config mini`")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photographs", type=int, default=800, help="to draw crops of, at most (default: 800)")
    parser.add_argument("--ladders", type=int, default=120, help="to degrade by every type, at most (default: 120)")
    parser.add_argument("--ratings", type=Path, help="opinion scores")
    parser.add_argument("--images", type=Path, help="the rated images")
    parser.add_argument("--splits", type=int, default=0, help="only test: how many splits of the rated images")
    parser.add_argument("--licence", default="not stated")
    options = parser.parse_args(arguments)
    if (options.ratings is None) != (options.images is None) or (options.splits and options.ratings is None):
        parser.error("--ratings and --images belong together, and --splits needs them")
    try:
        train(options)
    except (ImageError, SettingsError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    check(options)
    torch.manual_seed(options.seed)
    tower = read_tower(options.trunk)
    judge = read_judge(options.judge)
    ratings = None if options.ratings is None else read_opinions(options.ratings, options.images)
    paths = [path for path in list_photographs(options.pristine) if shorter_side(path) >= SIDE]
    if len(paths) < LEAST_LADDERS:
        raise SettingsError(
            f"{options.pristine} has {len(paths)} photographs of at least {SIDE} pixels a side; "
            f"expected at least {LEAST_LADDERS}"
        )
    random.Random(f"photographs {options.seed}").shuffle(paths)
    crops = make_crops(tower, sorted(paths[: options.photographs]), judge, options.seed)
    rated = None if ratings is None else read_rated(tower, ratings, options.seed)
    if rated is not None and options.splits:
        test(tower, rated, crops, options.splits, options.seed)
        return
    ladders = measure_ladders(tower, sorted(paths[: options.ladders]), options.seed)
    for number, attribute in enumerate(fit_attributes(ladders).values(), 1):
        set_head(tower, number, attribute)
    summary = {"seed": options.seed, "crops": len(crops.targets), "ladders": len(ladders)}
    found = statistics(tower, crops.passed)
    set_head(tower, 0, fit_head([(found, crops.targets, 1.0)], STRENGTH).scaled(SLOPE, 0.0))
    write(options.out / "qualiclip-mini.safetensors", tower, options.licence, summary)
    if rated is not None:
        set_head(tower, 0, fit_opinions(tower, rated, crops, options.seed))
        summary["rated"] = len(rated.logits)
        write(options.out / "qualiclip-mini+.safetensors", tower, options.licence, summary)


def check(options: argparse.Namespace) -> None:
    """Check what can be checked before hours of training."""
    for name, least in (("photographs", 1), ("ladders", LEAST_LADDERS), ("splits", 0)):
        if getattr(options, name) < least:
            raise SettingsError(f"--{name} is {getattr(options, name)}; expected an integer of at least {least}")
    if not options.splits:
        nearest = next(path for path in (options.out, *options.out.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise SettingsError(f"{nearest} is not a folder; expected --out to be one to write to, or a new one")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise SettingsError(f"{nearest} cannot be written to; expected --out to be a folder that can, or a new one")


def read_judge(model: Path) -> OpenQualiCLIP:
    """Load the judge of crops.

    Raises:
        SettingsError: an embedded model, which would be trained to repeat itself, and may hold opinion scores.
        WeightsError: the file cannot be read.
    """
    judge = OpenQualiCLIP("qualiclip", weights=model).eval()
    if judge.origin.backbone == "mobile":
        raise SettingsError(f"--judge {model} is an embedded model; expected one of `qualiclip train --config mini`")
    return judge


def read_tower(trunk: Path) -> MobileTower:
    """Build a tower on a pretrained trunk, with empty heads."""
    try:
        tensors = load_file(trunk)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{trunk} cannot be read ({error}); expected a safetensors file") from error
    tower = MobileTower(len(PAIRS))
    load_into(tower.trunk, tensors, str(trunk))
    return tower.eval().requires_grad_(False)


def read_opinions(table: Path, folder: Path) -> Ratings:
    """Read one opinion score for each image.

    Raises:
        SettingsError: see `read_ratings`; or all opinion scores are equal.
    """
    ratings = read_ratings(table, folder).averaged()
    if len(set(ratings.opinions)) < 2:
        raise SettingsError(f"{table} has {len(set(ratings.opinions))} different opinion scores; expected at least 2")
    return ratings


def read_rated(tower: MobileTower, ratings: Ratings, seed: int) -> Rated:
    """Read rated images, each with its mirror image; both lack a few rows and columns of pixels at random sides.

    Otherwise a model learns how a JPEG file's blocks lie to the network's strides, and its scores of an image change
    when the first row of pixels is cut off.
    """
    rng = random.Random(f"framings {seed}")

    def framed(image: Tensor) -> Tensor:
        height, width = (max(MIN_SIDE, side - FRAME) for side in image.shape[1:])
        top, left = (rng.randint(0, side - kept) for side, kept in zip(image.shape[1:], (height, width), strict=True))
        return image[:, top : top + height, left : left + width]

    def images() -> Iterator[Tensor]:
        for path in ratings.paths:
            image = load_image(path)
            yield framed(image)
            yield framed(image.flip(-1))

    opinions = torch.tensor(ratings.opinions, dtype=torch.float64) * (-1 if ratings.lower_better else 1)
    # Scales of 1, 5, 10 or 100 are taken as such; others by their extremes.
    low, high = float(opinions.min()), float(opinions.max())
    if low >= 0:
        low, high = 0.0, next((scale for scale in (1.0, 5.0, 10.0, 100.0) if high <= scale), high)
    return Rated(pass_frozen(tower, images()), logits_of(opinions, low, high))


def test(tower: MobileTower, rated: Rated, crops: Crops, splits: int, seed: int) -> None:
    """Print the SRCC of repeated splits, of a ridge regression alone and with fine-tuning."""
    import copy

    count = len(rated.logits)
    found: dict[int, list[float]] = {}
    writer = csv.writer(sys.stdout)
    writer.writerow(["split", "epochs", "SRCC"])
    for split in range(splits):
        order = random.Random(f"split {seed} {split}").sample(range(count), count)
        train_part, test_part = order[: round(0.8 * count)], order[round(0.8 * count) :]
        for epochs in (0, 4):
            tuned = copy.deepcopy(tower)
            head = fit_opinions(tuned, rated.part(train_part), crops, seed + split, epochs)
            tested = rated.part(test_part)
            out = head(statistics(tuned, tested.passed)).unflatten(0, (-1, 2)).mean(1)
            srcc = float(spearmanr(out, tested.logits).statistic)
            found.setdefault(epochs, []).append(srcc)
            writer.writerow([split, epochs, f"{srcc:.4f}"])
            sys.stdout.flush()
    for epochs, values in found.items():
        writer.writerow(["median", epochs, f"{statistics_of.median(values):.4f}"])


def write(path: Path, tower: MobileTower, licence: str, summary: dict[str, int]) -> None:
    """Write a model in this package's own format: trunk in half precision, heads in single."""
    unit = math.sqrt(tower.pairs)
    state = {
        f"visual.{name}": value.half() if name.startswith("trunk.") else value
        for name, value in tower.state_dict().items()
    }
    state |= {"prompts_features": torch.eye(2 * tower.pairs), "logit_scale": torch.tensor(math.log(SCALE * unit))}
    metadata = {
        "format": OWN_FORMAT,
        "backbone": "mobile",
        "tower": json.dumps({"pairs": tower.pairs}),
        "prompts": json.dumps([LOOK[name] for name in PAIRS]),
        "temperature": "1",
        "licence": licence,
        "source": "trained with `python -m qualiclip_pyiqa.training.embedded`",
        "training": json.dumps(summary),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, state, metadata)


if __name__ == "__main__":
    sys.exit(main())
