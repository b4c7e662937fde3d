"""Measure what the attributes of an embedded model follow, on photographs that are held out.

    python benchmarks/attributes.py --pristine DIR [--weights NAME_OR_FILE...] [--limit N] [--crop PIXELS]
        [--json FILE.json]

Photographs are those held out by the folder's `manifest.csv` (columns `file` and `held_out`), cut to their middle. Each
is degraded by every type that some attribute is fitted to (its own types), at every level.

- Steps: share of steps between neighbouring levels, from the pristine image on, in which the score moves in the
  direction that the attribute is fitted to.
- Movement: mean absolute change from the pristine image, over levels and photographs, relative to the attribute's mean
  over its own types; once of scores (0..1) and once of their logits. Columns are the types of the other attributes, or
  one type. Types marked open change the attribute by design, so its fit leaves them out.
- Faults named: attributes are ordered by how far their logits lie below the pristine photographs' mean, in standard
  deviations of these photographs. One fault is named if its attribute is the first, two faults of different attributes
  (one type of each, at the same level) if their attributes are the first two. By chance that is 1 of 6, and 1 of 15.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import common
import numpy as np
from numpy.typing import NDArray
from scipy.special import logit
from torch import Tensor
from tqdm import tqdm

from qualiclip_pyiqa import load_image
from qualiclip_pyiqa.degradations.bank import DEGRADATIONS
from qualiclip_pyiqa.degradations.base import GROUP_ORDER, LEVELS
from qualiclip_pyiqa.degradations.compose import degrade_all
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.ladders import ladder, steps
from qualiclip_pyiqa.scoring.scorer import Scorer
from qualiclip_pyiqa.training.embedded.attributes import ATTRIBUTES, change

OWN = {name: DEGRADATIONS[name] for attribute in ATTRIBUTES.values() for name in attribute.own}  # all own types
FAULT_LEVELS = (3, 4)  # of the faults to be named; at the last one, colours of color_saturation_1 return
# One type for each attribute that lowers its score.
FAULTS = {key: next(name for name, sign in each.own.items() if sign < 0) for key, each in ATTRIBUTES.items()}
PAIRS = list(itertools.combinations(FAULTS, 2))
TINY = 1e-6  # distance from 0 and 1 below which scores have one logit
Floats: TypeAlias = NDArray[np.float64]
Row: TypeAlias = dict[str, Any]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", default=["qualiclip-mini"], metavar="NAME_OR_FILE")
    parser.add_argument("--limit", type=int, default=65, help="photographs, at most (default: 65)")
    parser.add_argument("--crop", type=int, default=384, metavar="PIXELS", help="side of the middle that is used")
    options = parser.parse_args()
    if options.quick:
        options.limit, options.crop = 2, 64
    try:
        _, held_out = common.photographs(options.pristine)
        paths = common.spread(held_out, options.limit)
        rows = [row for name in options.weights for row in measure(name, paths, options.crop)]
    except (ImageError, SettingsError, WeightsError) as error:
        sys.exit(f"error: {error}")
    common.report(options, rows, weights=", ".join(options.weights))


def measure(model: str, paths: Sequence[str], crop: int) -> list[Row]:
    """Score all degraded photographs by all attributes and summarise."""
    attributes = list(ATTRIBUTES)
    scorer = Scorer({"look": common.load(model, prompts="look")}, device="cpu", workers=0)
    count = steps(OWN) + len(PAIRS) * len(FAULT_LEVELS)
    records = scorer.score(image for number, path in enumerate(paths) for image in degraded(path, number, crop))
    values = np.empty((len(paths) * count, len(attributes)))
    for number, record in enumerate(tqdm(records, total=len(values), unit="image", file=sys.stderr, disable=None)):
        if record.error is not None:
            raise ImageError(f"{paths[number // count]}: {record.error}")
        values[number] = [record.scores[f"look.{name}"] for name in attributes]
    scores = dict(zip(attributes, values.reshape(len(paths), count, -1).transpose(2, 0, 1), strict=True))
    logits = {name: logit(each.clip(TINY, 1 - TINY)) for name, each in scores.items()}
    rows = [*own_steps(scores), *movements("scores", scores), *movements("logits", logits), *named(logits)]
    return [{"model": Path(model).name, "photographs": len(paths)} | row for row in rows]


def degraded(path: str, seed: int, crop: int) -> Iterator[Tensor]:
    """Yield the middle of a photograph, its ladders by all own types, and then with each pair of faults."""
    rgb = load_image(path)
    side = min(crop, *rgb.shape[1:])
    top, left = ((length - side) // 2 for length in rgb.shape[1:])
    rgb = rgb[:, top : top + side, left : left + side]
    yield from ladder(rgb, seed, OWN)
    for pair, level in itertools.product(PAIRS, FAULT_LEVELS):
        names = sorted((FAULTS[name] for name in pair), key=lambda name: GROUP_ORDER.index(OWN[name].group))
        yield (degrade_all(rgb[None], names, level, seed)[0] * 255).round() / 255


def levels_of(values: Floats, name: str) -> Floats:
    """Select one type's ladder, the pristine image first: (V, images) -> (V, LEVELS + 1)."""
    first = 1 + LEVELS * list(OWN).index(name)
    return values[:, [0, *range(first, first + LEVELS)]]


def own_steps(scores: Mapping[str, Floats]) -> Iterator[Row]:
    """Count the steps along own types that go in the right direction."""
    for attribute, values in scores.items():
        right: dict[str, list[bool]] = {}
        for name in ATTRIBUTES[attribute].own:
            ladders = levels_of(values, name)
            neighbours = dict.fromkeys(step for chain in OWN[name].chains for step in pairwise(chain))
            for i, j in neighbours:
                direction = np.sign(change(ATTRIBUTES[attribute], name, j))
                if direction:  # else level j is no change
                    right.setdefault(name, []).extend((direction * (ladders[:, j] - ladders[:, i]) > 0).tolist())
        together = [each for found in right.values() for each in found]
        row = {"measured": "steps along own types", "attribute": attribute, "steps": len(together)}
        yield row | {"right": float(np.mean(together))} | {name: float(np.mean(each)) for name, each in right.items()}


def movements(unit: str, scores: Mapping[str, Floats]) -> Iterator[Row]:
    """Compare an attribute's movement along others' types with that along its own."""
    tables: list[Row] = []
    for attribute, values in scores.items():
        moved = {name: float(np.abs(levels_of(values, name)[:, 1:] - values[:, :1]).mean()) for name in OWN}
        own = float(np.mean([moved[name] for name in ATTRIBUTES[attribute].own]))
        row: Row = {"measured": f"movement of {unit}", "attribute": attribute, "own movement": own}
        relative = {name: each / own if own else None for name, each in moved.items()}
        by_attribute = {
            other: sum(moved[name] for name in each.own) / len(each.own) / own if own else None
            for other, each in ATTRIBUTES.items()
        }
        yield row | by_attribute
        opened = [name for name in OWN if name in ATTRIBUTES[attribute].open]
        tables.append(
            {"measured": f"movement of {unit}, by type", "attribute": attribute}
            | relative
            | {"open": ", ".join(opened) or None}
        )
    yield from tables


def named(logits: Mapping[str, Floats]) -> Iterator[Row]:
    """Count how often one fault, and two faults, are those that the lowest attributes name."""
    table = np.stack(list(logits.values()), axis=-1)  # (V, images, attributes)
    pristine = table[:, 0]
    order = ((table - pristine.mean(0)) / np.maximum(pristine.std(0), TINY)).argsort(axis=-1)
    attributes = list(logits)
    for number, attribute in enumerate(attributes):
        for name, sign in ATTRIBUTES[attribute].own.items():
            if sign < 0:
                first = 1 + LEVELS * list(OWN).index(name)
                lowest = order[:, [first + level - 1 for level in FAULT_LEVELS], 0]
                row = {"measured": "one fault", "attribute": attribute, "faults": name}
                yield row | {"named": float((lowest == number).mean())}
    shares, either = [], []
    for number, pair in enumerate(PAIRS):
        first = steps(OWN) + len(FAULT_LEVELS) * number
        lowest = order[:, first : first + len(FAULT_LEVELS), :2]
        hits = sum((lowest == attributes.index(name)).any(-1).astype(int) for name in pair)
        shares.append(float((hits == 2).mean()))
        either.append(float((hits >= 1).mean()))
        row = {"measured": "two faults", "attribute": " + ".join(pair)}
        row["faults"] = " + ".join(FAULTS[name] for name in pair)
        yield row | {"named": shares[-1], "at least one named": either[-1]}
    row = {"measured": "two faults", "attribute": f"mean of {len(PAIRS)} pairs"}
    yield row | {"named": float(np.mean(shares)), "at least one named": float(np.mean(either))}


if __name__ == "__main__":
    main()
