"""`qualiclip score --reference PATH`: the references of full-reference metrics."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ..errors import ImageError, SettingsError
from ..images.convert import ReadRules, read_size, source_name
from ..images.parquet import is_parquet

if TYPE_CHECKING:
    from ..scoring.building import MetricLike
    from ..scoring.sources import References


def add_reference_option(parser: argparse.ArgumentParser) -> None:
    """Add `--reference PATH`, which `references_of` reads."""
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="for full-reference metrics such as psnr, ssim and ckdn: the folder of the references, found by the names "
        "of the images, or one file, the reference of every image",
    )


def references_of(
    arguments: argparse.Namespace,
    metrics: Mapping[str, MetricLike],
    folders: Collection[str],
    images: Collection[str],
    parquet: Collection[str],
) -> References | None:
    """Return the references of a run, before metrics are built; None if the metrics need none.

    Args:
        arguments: parsed ones.
        metrics: by name.
        folders: in which images were searched.
        images: that were found.
        parquet: Parquet files of images.

    Raises:
        SettingsError: metrics need `--reference` and it is missing, or the other way round; it is no folder or file, or
            cannot be searched for these images.
    """
    from ..scoring.building import needs_reference, refuse_foreign_prompts
    from ..scoring.sources import ReferenceFolder

    path = arguments.reference
    for metric in metrics.values():
        refuse_foreign_prompts(metric)  # psnr:look would count as a metric that needs no reference
    needing = [name for name, metric in metrics.items() if needs_reference(metric)]
    if path is None and arguments.engine == "local" and needing:
        raise SettingsError(
            f"{', '.join(needing)}: a full-reference metric compares each image with a reference; "
            "pass --reference PATH, a folder or a file"
        )
    if path is None:
        return None
    if arguments.engine != "local":
        raise SettingsError(f"--reference cannot be used with --engine {arguments.engine}; score without --engine")
    if not needing:
        raise SettingsError(
            f"--reference has no effect on {', '.join(metrics)}; leave it out, or add a full-reference metric such as "
            "-m psnr"
        )
    if os.path.isdir(path):  # noqa: PTH112 - '' is no Path
        if parquet:
            raise SettingsError(
                f"{next(iter(parquet))} is a Parquet file, whose images have no names to find references by; pass "
                "one file as --reference, or folders of images"
            )
        found = ReferenceFolder(path, folders)
        found.check(images)
        return found
    if not path or not os.path.lexists(path):
        url = "a URL" if "://" in path else "missing"
        raise SettingsError(
            f"--reference {source_name(path) or repr(path)} is {url}; expected a folder of references, or an image"
        )
    if is_parquet(path):
        raise SettingsError(f"--reference {source_name(path)} is a Parquet file; expected a folder, or an image")
    try:
        read_size(path, ReadRules(max_pixels=arguments.max_pixels))
    except ImageError as error:
        raise SettingsError(f"--reference: {error}") from None
    return str(path)
