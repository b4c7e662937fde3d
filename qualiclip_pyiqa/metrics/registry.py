"""The one table of metrics: what decides each score, as data. Everything else reads it from here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from .prompts import ATTRIBUTES

CLIPIQA_PAPER = "Wang, Chan, Loy: Exploring CLIP for Assessing the Look and Feel of Images, AAAI 2023, arXiv:2207.12396"
QUALICLIP_PAPER = (
    "Agnolucci, Galteri, Bertini: Quality-Aware Image-Text Alignment for Opinion-Unaware Image Quality Assessment, "
    "2024, arXiv:2403.11176"
)


@dataclass(frozen=True)
class MetricSpec:
    """What decides a metric's score. Every score is in 0..1, higher is better, on the whole picture at its own size.

    Attributes:
        name: the name `pyiqa.create_metric` takes; also the `model_type` of the architecture.
        arch: class of `qualiclip_pyiqa.archs`, under this name in pyiqa's registry.
        backbone: image tower: an OpenAI CLIP name, any open_clip name, or `mini`.
        prompts: prompt set of `prompts.py`.
        weights: record of `weights/manifest.toml` that holds the tower.
        context: record of the learned prompt context; None for fixed prompts.
        temperature: divides the logits before the softmax of a pair.
        pos_embedding: whether the tower adds its positional table.
        summary: one line for tables.
        paper: where the method comes from.
    """

    name: str
    arch: str
    backbone: str
    prompts: str
    weights: str
    summary: str
    paper: str
    context: str | None = None
    temperature: float = 1.0
    pos_embedding: bool = False
    score_range: str = "0, 1"
    lower_better: bool = False

    def entry(self) -> dict[str, Any]:
        """This metric's entry in pyiqa's config dict, with everything that decides its score in `metric_opts`."""
        opts: dict[str, Any] = {
            "type": self.arch,
            "model_type": self.name,
            "backbone": self.backbone,
            "prompts": self.prompts,
            "weights": self.weights,
            "temperature": self.temperature,
            "pos_embedding": self.pos_embedding,
        }
        if self.context is not None:
            opts["pretrained"] = self.context
        return {
            "metric_opts": opts,
            "metric_mode": "NR",
            "score_range": self.score_range,
            "lower_better": self.lower_better,
        }


def _clipiqa(
    name: str, prompts: str, summary: str, backbone: str = "RN50", weights: str = "RN50", **more: Any
) -> MetricSpec:
    return MetricSpec(name, "OpenCLIPIQA", backbone, prompts, weights, summary, CLIPIQA_PAPER, **more)


def _qualiclip(name: str, summary: str, temperature: float = 2.0, context: str | None = None) -> MetricSpec:
    # Temperature 2 is pyiqa's; the authors' torch.hub code has 1, and averaged over pairs the two do not rank alike.
    return MetricSpec(
        name,
        "OpenQualiCLIP",
        "RN50",
        "qualiclip",
        "QualiCLIP",
        summary,
        QUALICLIP_PAPER,
        context=context,
        temperature=temperature,
    )


def _qualiclip_plus(name: str, dataset: str, record: str) -> MetricSpec:
    return _qualiclip(name, f"QualiCLIP with 14 prompt contexts learned on {dataset}", context=record)


_SPECS = (
    MetricSpec(
        "qualiclip-mini",
        "OpenQualiCLIP",
        "mini",
        "qualiclip",
        "qualiclip-mini",
        "small tower trained from scratch by this package on QualiCLIP's strategy; embedded, no download",
        QUALICLIP_PAPER,
    ),
    _qualiclip("qualiclip", "CLIP RN50 aligned to quality without opinion scores, 7 prompt pairs"),
    _qualiclip("qualiclip-hub", "the same weights on the scale of the authors' torch.hub code", temperature=1.0),
    _qualiclip_plus("qualiclip+", "KonIQ-10k", "QualiCLIP+_koniq"),
    _qualiclip_plus("qualiclip+-clive", "CLIVE", "QualiCLIP+_clive"),
    _qualiclip_plus("qualiclip+-flive", "FLIVE", "QualiCLIP+_flive"),
    _qualiclip_plus("qualiclip+-spaq", "SPAQ", "QualiCLIP+_spaq"),
    _clipiqa("clipiqa", "clipiqa", "zero-shot CLIP RN50, pyiqa's 5 prompt pairs"),
    _clipiqa("clipiqa-paper", "quality", "zero-shot CLIP RN50, the paper's one prompt pair"),
    _clipiqa(
        "clipiqa+",
        "clipiqa+",
        "one prompt context learned on KonIQ-10k",
        context="CLIP-IQA+_learned_prompts",
    ),
    _clipiqa(
        "clipiqa+_rn50_512",
        "clipiqa+",
        "prompt contexts learned on KonIQ-10k at 512 px, positional table on",
        context="CLIPIQA+_RN50_512",
        pos_embedding=True,
    ),
    _clipiqa(
        "clipiqa+_vitL14_512",
        "clipiqa+",
        "the same on ViT-L/14",
        backbone="ViT-L/14",
        weights="ViT-L-14",
        context="CLIPIQA+_ViTL14_512",
        pos_embedding=True,
    ),
    *(
        _clipiqa(f"clipiqa-{attribute}", attribute, f"zero-shot: {positive} / {negative}")
        for attribute, (positive, negative) in ATTRIBUTES.items()
    ),
)
METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _SPECS}


def metric_spec(name: str) -> MetricSpec:
    """The row of a metric; an unknown name is a SettingsError that offers the nearest one."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise SettingsError(f"unknown metric {name!r}; did you mean {near!r}? Known: {', '.join(METRICS)}")
    return METRICS[name]


def lower_is_better(column: str) -> bool:
    """Direction of a score by its column, `METRIC` or `METRIC.ATTRIBUTE`, for any metric of pyiqa.

    A column that is no metric's name counts as higher is better, as every metric of this package is.
    """
    for name in (column, column.rpartition(".")[0]):
        if name in METRICS:
            return METRICS[name].lower_better
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return bool(DEFAULT_CONFIGS.get(column, {}).get("lower_better", False))
