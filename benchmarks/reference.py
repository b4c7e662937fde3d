"""Measure the percentiles of the embedded models' scores on the photographs that they were trained on.

    python benchmarks/reference.py --pristine DIR [--photographs N] [--write reference.toml]

`qualiclip describe` compares images with the table that --write makes, `qualiclip_pyiqa/report/reference.toml`. It
holds the sha256 of each model, without which it would say something about another one. Photographs that the folder's
`manifest.csv` holds out are not used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import common
import numpy as np
from tqdm import tqdm

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.files import replacing
from qualiclip_pyiqa.metrics.prompts import LOOK
from qualiclip_pyiqa.pretrained.files import file_sha256
from qualiclip_pyiqa.pretrained.find import find

MODELS = ("qualiclip-mini+", "qualiclip-mini")
PERCENTS = np.arange(101)


def write_table(path: Path, percentiles: dict[str, dict[str, list[float]]], sides: Sequence[int]) -> None:
    """Write percentiles by model and attribute, and the photographs' longer sides, as the package's table."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    # Folders by name alone: where they lie is the machine's matter.
    options = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
    lines = [
        f"# Written by `python benchmarks/reference.py {options}`,",
        f"# {date}: percentiles 0 to 100 of the scores of whole photographs, by antonym prompt pair.",
        "",
        f"photographs = {len(sides)}",
        'description = "photographs of the embedded models\' training set"',
        f"longer_side = [{', '.join(f'{side:.0f}' for side in np.percentile(sides, (5, 95)))}]"
        "  # pixels: the 5th and 95th percentile",
    ]
    for model, attributes in percentiles.items():
        lines += ["", "[[models]]", f'name = "{model}"', f'sha256 = "{file_sha256(find(model))}"', "", "[models.pairs]"]
        for attribute, values in attributes.items():
            positive, negative = LOOK[attribute]
            lines.append(f'"{positive}/{negative}" = [{", ".join(f"{value:.5g}" for value in values)}]')
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pristine", type=Path, required=True, metavar="DIR", help="photographs with a manifest.csv")
    parser.add_argument("--photographs", type=int, metavar="N", help="at most, spread evenly over all (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the package's table")
    options = parser.parse_args()
    paths, _ = common.photographs(options.pristine)
    if options.quick:
        options.photographs = 3
    if options.photographs is not None:
        if options.photographs < 1:
            parser.error(f"--photographs is {options.photographs}; expected at least 1")
        paths = common.spread(paths, options.photographs)
    scorer = Scorer([f"{model}:look" for model in MODELS], device="cpu")
    scores: dict[str, list[float]] = {column: [] for column in scorer.columns}
    sides = []
    for record in tqdm(scorer.score(paths), total=len(paths), unit="photograph", disable=None):
        if record.error is not None:
            raise ImageError(record.error)
        sides.append(max(record.width or 0, record.height or 0))
        for column, score in record.scores.items():
            scores[column].append(score)
    percentiles = {
        model: {name: np.percentile(scores[f"{model}:look.{name}"], PERCENTS).tolist() for name in LOOK}
        for model in MODELS
    }
    rows = [
        {"model": model, "attribute": name, "photographs": len(paths)}
        | {f"{percent} %": values[percent] for percent in (0, 5, 25, 50, 75, 95, 100)}
        for model, attributes in percentiles.items()
        for name, values in attributes.items()
    ]
    common.report(options, rows, weights="embedded")
    if options.write:
        write_table(options.write, percentiles, sides)


if __name__ == "__main__":
    try:
        main()
    except (ImageError, SettingsError) as error:
        sys.exit(f"error: {error}")
