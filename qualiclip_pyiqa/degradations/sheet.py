"""Draw a contact sheet of a degradation bank: every type at every level.

python -m qualiclip_pyiqa.degradations.sheet PHOTO [--bank camera] -o sheet.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import ImageError, SettingsError
from ..files import replacing
from ..images.tensors import load_image
from .bank import DEGRADATIONS, degrade
from .banks import BANKS
from .base import LEVELS, Bank

TOP, LEFT, GAP = 24, 190, 2  # pixels: headings, labels, and between cells


def contact_sheet(rgb: Tensor, seed: int = 0, cell: int = 160, bank: Bank = DEGRADATIONS) -> Image.Image:
    """Draw a row per type and a column per level, pristine first.

    Cells show the middle of the photograph at its own size, so that effects on single pixels can be seen; degradations
    are applied to a square of twice that size.

    Args:
        rgb: (3, H, W), float, RGB in 0..1.
        seed: of the random choices.
        cell: width and height of a cell, pixels.
        bank: the types to draw.
    """
    side = min(2 * cell, *rgb.shape[-2:])
    top, left = ((length - side) // 2 for length in rgb.shape[-2:])
    square = rgb[None, :, top : top + side, left : left + side]
    sheet = Image.new("RGB", (LEFT + (LEVELS + 1) * (cell + GAP), TOP + len(bank) * (cell + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for level in range(LEVELS + 1):
        pen.text((LEFT + level * (cell + GAP) + 4, 6), f"level {level}" if level else "pristine", fill="black")
    for row, (name, degradation) in enumerate(bank.items()):
        y = TOP + row * (cell + GAP)
        lines = [name.replace("_", " "), f"({degradation.group})", *([] if degradation.monotone else ["not monotone"])]
        pen.text((6, y + 6), "\n".join(lines), fill="black")
        for level in range(LEVELS + 1):
            pixels = (degrade(square, name, level, seed, bank)[0] * 255).round().byte().movedim(0, -1).cpu().numpy()
            shown = Image.fromarray(pixels).crop(((side - cell) // 2, (side - cell) // 2, *[(side + cell) // 2] * 2))
            sheet.paste(shown.resize((cell, cell)), (LEFT + level * (cell + GAP), y))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack the characters of a file name
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="python -m qualiclip_pyiqa.degradations.sheet",
        description="Draw the contact sheet of a degradation bank: every type at every level.",
    )
    parser.add_argument("photo", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--bank", choices=BANKS, default="kadid", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    suffix = arguments.output.suffix.lower()
    try:
        if Image.registered_extensions().get(suffix) not in Image.SAVE:
            raise SettingsError(f"{arguments.output} has no suffix of an image format; expected such as .png")
        sheet = contact_sheet(load_image(arguments.photo), arguments.seed, bank=BANKS[arguments.bank])
        with replacing(arguments.output) as part:
            sheet.save(part, Image.registered_extensions()[suffix])
    except (ImageError, SettingsError) as error:
        print(f"sheet: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:  # ValueError: the format has no such size or mode
        print(f"sheet: {arguments.output} cannot be written ({error})", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
