"""`qualiclip explain`: draw which places of an image are good or bad."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ImageError, decimals
from ..images.convert import source_name
from ..screen import Screen, loading
from . import (
    READ_RULES,
    Commands,
    add_force_option,
    add_map_range_option,
    add_metric_option,
    add_read_rules,
    check_new,
    chosen_metrics,
    put,
    read_options,
    say,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..explain.mapper import Mapper
    from ..explain.quality_map import QualityMap


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="draw which places of an image are good or bad",
        description="Map an image's quality by one or more metrics: draw the image, and each map over it with its "
        "score and scale, and print the drawing's name, the scores, and once how the maps relate to them. `qualiclip "
        "score --maps DIR` maps every image of a folder. docs/maps.md says which map finds what. "
        "Exit status: 0 all were drawn, 1 some were not, 2 wrong usage.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="IMAGE", nargs="+", help="file of an image")
    add_metric_option(parser)
    parser.add_argument(
        "--kind",
        metavar="KIND",
        help="local: scores of each place's surroundings; contributions: shares of the logit (CLIP's towers); gradcam, "
        "occlusion: what the score depends on (default: local, or occlusion for metrics that have no local scores)",
    )
    parser.add_argument(
        "--attribute", action="append", metavar="NAME", help="attribute to map; repeatable (default: all of the metric)"
    )
    add_map_range_option(parser, "--range")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file of the drawing, such as map.png (or .svg, .pdf, .jpg, .webp); for several images, map-1.png, "
        "map-2.png and so on, in their order",
    )
    add_force_option(parser)
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")
    add_read_rules(parser)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..explain.quality_map import check_scale
    from ..figures import check_figure, save_figure

    metrics = chosen_metrics(arguments)
    scale = None if arguments.range is None else check_scale(*arguments.range)
    check_figure(arguments.output)
    outputs = numbered(arguments.output, len(arguments.path))
    for output in outputs:
        check_new(output, arguments.force)
    reading = read_options(arguments, READ_RULES)
    with loading(", ".join(metrics)):
        from ..explain.drawing import draw_maps
        from ..explain.mapper import Mapper
        from ..images.tensors import load_image

        mappers = [
            Mapper({name: metric}, arguments.kind, arguments.attribute, arguments.device)
            for name, metric in metrics.items()
        ]
    said: set[str] = set()
    failed = 0
    with tqdm(total=len(outputs), unit="image", file=Screen(), disable=None) as bar:
        for path, output in zip(arguments.path, outputs, strict=True):
            try:
                rgb = load_image(path, **reading)
                maps = _maps(mappers, rgb)
            except ImageError as error:
                failed += 1
                with tqdm.external_write_mode(file=Screen()):
                    say(f"qualiclip: {error}")
            else:
                if scale is not None:
                    maps = [each.scaled(*scale) for each in maps]
                save_figure(draw_maps(rgb, maps, title=source_name(path)), output)
                with tqdm.external_write_mode(file=Screen()):
                    put(f"{source_name(path)}  {source_name(output)}")
                    put("\n".join(f"  {line}" for line in _lines(maps, said)))
            bar.update()
    return int(failed > 0)


def _maps(mappers: Sequence[Mapper], rgb: Tensor) -> list[QualityMap]:
    """Map an image (3, H, W) by every metric, with a progress bar if it takes many passes."""
    from tqdm import tqdm

    total = sum(mapper.passes(rgb.shape[1], rgb.shape[2]) for mapper in mappers)
    hidden = True if total == len(mappers) else None  # one pass each is no wait
    with tqdm(total=total, unit="pass", leave=False, file=Screen(), disable=hidden) as passes:
        return [each for mapper in mappers for each in mapper.maps(rgb[None], passes.update)[0]]


def _lines(maps: Sequence[QualityMap], said: set[str]) -> Iterator[str]:
    """Format the scores of an image, and what is new about its maps; `said` are the explanations of earlier images."""
    from ..explain.quality_map import explanations

    for each in maps:
        yield f"{source_name(each.metric)}  {source_name(each.attribute)}  {decimals(each.score)}"
    found = explanations(maps)
    yield from (line for line in found if line not in said)
    said.update(found)


def numbered(output: Path, count: int) -> list[Path]:
    """Return the files of several drawings: `map.png` itself for one, else `map-1.png`, `map-2.png` and so on."""
    if count == 1:
        return [output]
    digits = len(str(count))
    return [output.with_name(f"{output.stem}-{number:0{digits}}{output.suffix}") for number in range(1, count + 1)]
