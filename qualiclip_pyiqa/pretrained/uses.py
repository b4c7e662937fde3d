"""What weight files are that are no whole model, and how to use them: for errors where a whole model is expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from .folders import FOLDERS_VARIABLE
from .manifest import manifest

# Layout -> what such a file is, the metric, and where the metric takes it.
_PARTS = {
    "contrique": ("CONTRIQUE's encoder", "contrique", "create_metric('contrique', weights=FILE)"),
    "ridge": ("a regression on CONTRIQUE's features", "contrique", "create_metric('contrique', regression=FILE)"),
    "face": ("a network of face recognition", "face-norm", "create_metric('face-norm', weights=FILE)"),
    "ranking-aware": (
        "CLIP with the ranking-aware adapter",
        "ranking-aware:CAPTION",
        "create_metric('ranking-aware', weights=FILE, caption=CAPTION)",
    ),
}


def metric_of_authors(names: Collection[str]) -> str:
    """Return the metric of deep prompts of the authors' code: CLIP-AGIQA's alone has the first block's `ctx` apart.

    Example:
        >>> metric_of_authors(["ctx", "prompts_vis.0"]), metric_of_authors(["prompts_text.0", "prompts_vis.0"])
        ('clip-agiqa', 'clip-dqa')
    """
    return "clip-agiqa" if "ctx" in names else "clip-dqa"


def prompts_of(layout: str, names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Return the metric whose deep prompts a file holds; None for other files.

    Args:
        layout: of the file, see `layouts.detect_layout`.
        names: of its tensors.
        metadata: of the file.
    """
    if layout == "deep-prompts":
        return metric_of_authors(names)
    return metadata["metric"] if layout == "qualiclip-pyiqa-prompts" else None


def how_to_use(path: Path, layout: str, names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Say in one line what a file is and how to use it; None for a whole model, or a file of no known layout.

    Args:
        path: of the file.
        layout, names, metadata: see `prompts_of`.
    """
    if (metric := prompts_of(layout, names, metadata)) is not None:
        own = "it" if path.suffix == ".safetensors" else "what `qualiclip weights convert` makes of it"
        return f"{path} holds prompts of {metric}; pass {own} as -m FILE, or create_metric({metric!r}, weights=FILE)"
    if layout == "context":
        return f"{path} is a learned prompt context; use it with create_metric(METRIC, pretrained=FILE)"
    if layout == "re-iqa":
        return (
            f"{path} is one of Re-IQA's two encoders; fit a metric on both with `qualiclip fit -m reiqa "
            "--backbone-weights FOLDER`, and pass its file as -m FILE"
        )
    if layout not in _PARTS:
        return None
    what, metric, call = _PARTS[layout]
    published = ", ".join(record.file for record in manifest().values() if record.layout == layout)
    return (
        f"{path} is {what}, a part of {metric.partition(':')[0]}; use it with {call}, or put the published file "
        f"({published}, or the same name in .safetensors) into a folder of {FOLDERS_VARIABLE} and pass -m {metric}"
    )
