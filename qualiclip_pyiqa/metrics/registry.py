"""The table of metrics: everything that decides a score, as data. A new metric is a new row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import SettingsError, did_you_mean
from .learners import Learner
from .prompts import ATTRIBUTES, LOOK

CONTRIQUE_PAPER = (
    "Madhusudana, Birkbeck, Wang, Adsumilli, Bovik: Image Quality Assessment using Contrastive Learning, "
    "IEEE TIP 2022, arXiv:2110.13266"
)
RE_IQA_PAPER = (
    "Saha, Mishra, Bovik: Re-IQA: Unsupervised Learning for Image Quality Assessment in the Wild, CVPR 2023, "
    "arXiv:2304.00451"
)
CLIPIQA_PAPER = "Wang, Chan, Loy: Exploring CLIP for Assessing the Look and Feel of Images, AAAI 2023, arXiv:2207.12396"
QUALICLIP_PAPER = (
    "Agnolucci, Galteri, Bertini: Quality-Aware Image-Text Alignment for Opinion-Unaware Image Quality Assessment, "
    "2024, arXiv:2403.11176"
)
CLIP_DQA_PAPER = "Zeng, Fu et al.: CLIP-DQA, ISCAS 2025, arXiv:2502.01707"
CLIP_AGIQA_PAPER = "Fu et al.: CLIP-AGIQA, IEEE Signal Processing Letters 2024, arXiv:2406.16641"
RANKING_PAPER = "Yu et al.: ranking-aware adapter for CLIP, ICLR 2025, arXiv:2412.06760"
QGFACE_PAPER = "Song, Wang: QGFace, 2023, arXiv:2312.17494 (the norm as quality: Kim, Jain, Liu: AdaFace, CVPR 2022)"
FITTED_PAPER = "none: ridge regression on the statistics of an image tower"

DEFAULT_METRIC = "qualiclip-mini+"
LOOK_METRIC = f"{DEFAULT_METRIC}:look"  # default where attributes are shown beside quality

MINI_PAPER = "none: a model of this package, see its weights/PROVENANCE.md"


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A row of the table.

    Attributes:
        name: argument of `pyiqa.create_metric`, and the architecture's `model_type`.
        arch: class in `qualiclip_pyiqa.archs`, registered in pyiqa under the same name.
        weights: record of `weights/manifest.toml` that holds the tower; "" for a metric without files, or of a
            file that the user passes.
        summary: one line for tables.
        paper: reference of the method.
        score_range: lowest and highest score; "" if the user's file decides it.
        lower_better: whether a lower score means a better image, unless the user's file decides it.
        captioned: whether the metric ranks by a caption, which follows a colon in a spec.
    """

    name: str
    arch: str
    weights: str
    summary: str
    paper: str
    score_range: str = "0, 1"
    lower_better: bool = False
    captioned: bool = False

    @property
    def records(self) -> tuple[str, ...]:
        """All records of `weights/manifest.toml` that the metric needs."""
        return (self.weights,) if self.weights else ()

    def options(self) -> dict[str, Any]:
        """Return the arguments of the architecture that decide the score."""
        return {"model_type": self.name} | ({"weights": self.weights} if self.weights else {})

    def entry(self) -> dict[str, Any]:
        """Return the metric's entry in pyiqa's table of configurations."""
        scale = {"score_range": self.score_range, "lower_better": self.lower_better} if self.score_range else {}
        return {"metric_opts": {"type": self.arch, **self.options()}, "metric_mode": "NR", **scale}


@dataclass(frozen=True, kw_only=True)
class PromptSpec(MetricSpec):
    """A row for a metric by antonym prompt pairs (`PromptIQA`).

    Attributes:
        backbone: name of the image tower: OpenAI's, open_clip's, or `mini`.
        prompts: prompt set, see `prompts.py`.
        context: record of the learned prompt context; None for fixed prompts.
        context_std: standard deviation of a fresh context's normal initialisation; None: the embedding of the
            placeholder `X`.
        temperature: divides the logits before the softmax of a pair.
        pos_embedding: whether the tower adds its positional table.
    """

    backbone: str
    prompts: str
    context: str | None = None
    context_std: float | None = None
    temperature: float = 1.0
    pos_embedding: bool = False

    @property
    def records(self) -> tuple[str, ...]:
        return (self.weights,) if self.context is None else (self.weights, self.context)

    def options(self) -> dict[str, Any]:
        pretrained = {} if self.context is None else {"pretrained": self.context}
        return {
            **super().options(),
            "backbone": self.backbone,
            "prompts": self.prompts,
            "temperature": self.temperature,
            "pos_embedding": self.pos_embedding,
            **pretrained,
        }


@dataclass(frozen=True, kw_only=True)
class DeepPromptSpec(MetricSpec):
    """A row for a metric by deep prompts (`DeepPromptIQA`), which the user's file holds.

    Attributes:
        backbone: name of the CLIP model, a vision transformer.
        backbone_weights: record of `weights/manifest.toml` that holds it.
        learners: a score each.
        whole_view: whether the image tower sees the whole image, resized, beside each window.
        dataset: what it was published for, and so what to train it on.
    """

    backbone: str = "ViT-B/32"
    backbone_weights: str = "ViT-B-32"
    learners: tuple[Learner, ...]
    whole_view: bool
    dataset: str

    @property
    def records(self) -> tuple[str, ...]:
        return (self.backbone_weights,)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(MetricSpec):
    """A row for a metric on encoders trained by contrast (`ContriqueIQA`, `ReIQA`).

    Attributes:
        backbone: `contrique` or `re-iqa`, see `pretrained.contrastive`.
        encoders: records of the encoders.
        regression: record of the regression on their features; empty if the user's file has it.
    """

    backbone: str
    encoders: tuple[str, ...]
    regression: str = ""

    @property
    def records(self) -> tuple[str, ...]:
        return (*self.encoders, self.regression) if self.regression else self.encoders

    def options(self) -> dict[str, Any]:
        return super().options() | ({"regression": self.regression} if self.regression else {})


_clipiqa = partial(PromptSpec, arch="OpenCLIPIQA", paper=CLIPIQA_PAPER, backbone="RN50", weights="RN50")
_qualiclip = partial(
    PromptSpec,
    arch="OpenQualiCLIP",
    paper=QUALICLIP_PAPER,
    backbone="RN50",
    weights="QualiCLIP",
    prompts="qualiclip",
    context_std=0.02,  # as in the authors' code for QualiCLIP+
    # pyiqa's value. The authors' torch.hub code has 1; averaged over pairs, the two rank images differently.
    temperature=2.0,
)
_contrique = partial(
    EncoderSpec,
    arch="ContriqueIQA",
    paper=CONTRIQUE_PAPER,
    backbone="contrique",
    weights="CONTRIQUE",
    encoders=("CONTRIQUE",),
    score_range="0, 100",  # of the opinion scores; the regression is not bounded
)
_embedded = partial(
    PromptSpec,
    arch="OpenQualiCLIP",
    paper=MINI_PAPER,
    backbone="mobile",
    weights="qualiclip-mini",
    prompts="quality",
)

_TABLE: tuple[MetricSpec, ...] = (
    _embedded(
        name="qualiclip-mini",
        summary="small tower of this package, fitted without opinion scores; embedded, no download",
    ),
    _embedded(
        name="qualiclip-mini+",
        weights="qualiclip-mini+",
        summary="the same tower, fine-tuned to opinion scores of CLIVE; embedded, no download",
    ),
    *(
        _embedded(name=f"qualiclip-mini-{attribute}", prompts=attribute, summary=f"embedded: {positive} / {negative}")
        for attribute, (positive, negative) in LOOK.items()
        if attribute != "quality"
    ),
    _qualiclip(
        name="qualiclip",
        summary="CLIP RN50 aligned to quality without opinion scores, 7 prompt pairs",
    ),
    _qualiclip(
        name="qualiclip-hub",
        temperature=1.0,
        summary="the same weights on the scale of the authors' torch.hub code",
    ),
    _qualiclip(
        name="qualiclip+",
        context="QualiCLIP+_koniq",
        summary="QualiCLIP with 14 prompt contexts learned on KonIQ-10k",
    ),
    _qualiclip(
        name="qualiclip+-clive",
        context="QualiCLIP+_clive",
        summary="QualiCLIP with 14 prompt contexts learned on CLIVE",
    ),
    _qualiclip(
        name="qualiclip+-flive",
        context="QualiCLIP+_flive",
        summary="QualiCLIP with 14 prompt contexts learned on FLIVE",
    ),
    _qualiclip(
        name="qualiclip+-spaq",
        context="QualiCLIP+_spaq",
        summary="QualiCLIP with 14 prompt contexts learned on SPAQ",
    ),
    _clipiqa(
        name="clipiqa",
        prompts="clipiqa",
        summary="zero-shot CLIP RN50, pyiqa's 5 prompt pairs",
    ),
    _clipiqa(
        name="clipiqa-paper",
        prompts="quality",
        summary="zero-shot CLIP RN50, the paper's one prompt pair",
    ),
    _clipiqa(
        name="clipiqa+",
        prompts="clipiqa+",
        context="CLIP-IQA+_learned_prompts",
        summary="one prompt context learned on KonIQ-10k",
    ),
    _clipiqa(
        name="clipiqa+_rn50_512",
        prompts="clipiqa+",
        context="CLIPIQA+_RN50_512",
        pos_embedding=True,
        summary="prompt contexts learned on KonIQ-10k at 512 px, positional table on",
    ),
    _clipiqa(
        name="clipiqa+_vitL14_512",
        prompts="clipiqa+",
        backbone="ViT-L/14",
        weights="ViT-L-14",
        context="CLIPIQA+_ViTL14_512",
        pos_embedding=True,
        summary="the same on ViT-L/14",
    ),
    _contrique(
        name="contrique",
        regression="CONTRIQUE_koniq",
        summary="ResNet-50 trained by contrast, regression on KonIQ-10k",
    ),
    _contrique(name="contrique-clive", regression="CONTRIQUE_clive", summary="the same, regression on CLIVE"),
    _contrique(
        name="contrique-live",
        regression="CONTRIQUE_live",
        lower_better=True,
        summary="the same, regression on LIVE; predicts DMOS",
    ),
    _contrique(
        name="contrique-csiq",
        regression="CONTRIQUE_csiq",
        score_range="0, 1",
        lower_better=True,
        summary="the same, regression on CSIQ; predicts DMOS",
    ),
    EncoderSpec(
        name="reiqa",
        arch="ReIQA",
        weights="",
        backbone="re-iqa",
        encoders=("Re-IQA_quality", "Re-IQA_content"),
        score_range="",
        summary="two ResNet-50s trained by contrast; no regression was published: needs yours, made by `qualiclip fit`",
        paper=RE_IQA_PAPER,
    ),
    MetricSpec(
        name="ranking-aware",
        arch="RankingAwareIQA",
        weights="ranking-aware",
        score_range="-inf, inf",
        captioned=True,
        summary="how much of what a `caption` asks an image shows; the caption has no default",
        paper=RANKING_PAPER,
    ),
    MetricSpec(
        name="face-norm",
        arch="FaceNorm",
        weights="face-norm",
        score_range="0, inf",
        summary="norm of an aligned face's embedding (QGFace, AdaFace): recognisability, not quality as people see it",
        paper=QGFACE_PAPER,
    ),
    MetricSpec(
        name="fitted",
        arch="FittedIQA",
        weights="",
        score_range="",
        summary="ridge regression on a tower's statistics, from your file of `qualiclip fit`",
        paper=FITTED_PAPER,
    ),
    DeepPromptSpec(
        name="clip-dqa",
        arch="DeepPromptIQA",
        weights="",
        summary="dehazed photographs: CLIP ViT-B/32 with prompts in every block, from your file of `qualiclip tune`",
        paper=CLIP_DQA_PAPER,
        learners=(Learner("quality", ("good photo.", "bad photo."), text_maps=True, visual_maps=True),),
        whole_view=True,
        dataset="dehazed photographs",
    ),
    DeepPromptSpec(
        name="clip-agiqa",
        arch="DeepPromptIQA",
        weights="",
        summary="AI-generated images, and their alignment with a text: as `clip-dqa`, with two sets of prompts",
        paper=CLIP_AGIQA_PAPER,
        learners=(
            Learner(
                "quality", ("good photo.", "bad photo."), text_maps=False, visual_maps=True, mixed_with="alignment"
            ),
            Learner("alignment", ("aligned photo.", "misaligned photo."), text_maps=False, visual_maps=False),
        ),
        whole_view=False,
        dataset="AI-generated images",
    ),
    *(
        _clipiqa(name=f"clipiqa-{attribute}", prompts=attribute, summary=f"zero-shot: {positive} / {negative}")
        for attribute, (positive, negative) in ATTRIBUTES.items()
    ),
)
METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _TABLE}


def metric_spec(name: str) -> MetricSpec:
    """Return the row of a metric.

    Raises:
        SettingsError: an unknown name; the message suggests the nearest one.

    Example:
        >>> metric_spec("qualiclip").temperature
        2.0
    """
    if name not in METRICS:
        raise SettingsError(
            f"unknown metric {name!r}; expected one of {', '.join(METRICS)}{did_you_mean(name, METRICS)}"
        )
    return METRICS[name]


def with_context() -> list[str]:
    """Return the names of the metrics that have a learned prompt context."""
    return [name for name, spec in METRICS.items() if isinstance(spec, PromptSpec) and spec.context is not None]


def with_deep_prompts() -> list[str]:
    """Return the names of the metrics by deep prompts."""
    return [name for name, spec in METRICS.items() if isinstance(spec, DeepPromptSpec)]


def guess_lower_better(column: str) -> bool:
    """Guess a score's direction from its column's name, for any metric of pyiqa.

    The name is that of the metric, possibly with prompts and an attribute: `clipiqa:look.contrast`.

    Only for tables that do not record it: any other name counts as higher is better. `Scorer.lower_better` has the
    direction of the metric itself.

    Example:
        >>> guess_lower_better("qualiclip-mini"), guess_lower_better("niqe")
        (False, True)
    """
    for name in (column, column.rpartition(".")[0], column.partition(":")[0]):
        if name in METRICS:
            return METRICS[name].lower_better
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return bool(DEFAULT_CONFIGS.get(column, {}).get("lower_better", False))
