"""CLIP-IQA and QualiCLIP: an image tower, features of antonym prompt pairs, and the softmax of each pair.

    f = image feature, unit length (N, D)      t = prompt features, unit length, positive/negative alternating (2P, D)
    z = exp(logit_scale) * f @ t.T / temperature           s = mean over pairs of softmax(z of a pair)[positive]

(CLIP-IQA: Wang et al., AAAI 2023, equation 3; the temperature is pyiqa's for QualiCLIP.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PromptError, SettingsError
from ..pretrained.files import WeightFile
from ..pretrained.manifest import WeightRecord, openai_record
from ..pretrained.model import LoadedModel, load_model
from ..pretrained.verify import provenance
from ..towers import backbones
from ..towers.base import freeze
from ..towers.text import TextTower
from .base import BlindMetric
from .prompt_learner import FreshContext, PromptLearner, load_learner
from .prompts import Prompts, PromptsLike, resolve_prompts
from .registry import METRICS, PromptSpec, metric_spec, with_context


def positive_probabilities(features: Tensor, text: Tensor, scale: float) -> Tensor:
    """Compute the softmax of each antonym prompt pair's scaled cosines, at its positive prompt.

    Args:
        features: image features, of any length.
        text: features of positive and negative prompts, alternating; of any length.
        scale: multiplies cosines: exp(logit_scale) / temperature.

    Shape:
        (N, D), (2P, D) -> (N, P) in 0..1, in float32 or the wider dtype of the features.
    """
    # A logit is a hundred times a cosine: half precision would cost the second digit of the score.
    with torch.autocast(features.device.type, enabled=False):
        precise = torch.promote_types(features.dtype, torch.float32)
        image = F.normalize(features.to(precise), dim=-1)
        text = F.normalize(text.to(precise), dim=-1)
        logits = image @ text.T * scale
        return logits.unflatten(1, (-1, 2)).softmax(dim=-1)[..., 0]


class PromptIQA(BlindMetric):
    """A blind metric by antonym prompt pairs. Construct `OpenCLIPIQA` or `OpenQualiCLIP`, or call `create_metric`.

    The tower and the prompt features are buffers: they follow `.to()`, `deepcopy` and pickle, and no optimiser, state
    dict or checkpoint sees them. Only a prompt context (`prompt_learner`) is a parameter; the state dict holds exactly
    what pyiqa's `params` files hold for the metric.

    Args:
        model_type: a name in `METRICS`; it decides the defaults of all other arguments. A context of your own
            (`pretrained=False` or a file) may have a name of its own that starts with a metric's: `clipiqa+_mine`.
        backbone: image tower: an OpenAI name as pyiqa spells it, or one of `open_clip.list_models()`. A file that was
            trained with this package names its own.
        pretrained: for metrics with a learned context: True for the published one, False for a fresh one to be
            trained, or the name of a weight record or a file. Metrics with fixed prompts take True.
        pos_embedding: whether the tower adds its positional table, resized to the image.
        temperature: divides the logits. A file that was trained with this package has its own; any value except the
            metric's default overrides it.
        n_ctx: length of a fresh context, in tokens (default 16), or the length that a learned one must have.
        ctx_init: first words of a fresh context, which set its length.
        prompt_specific_ctx: whether a fresh context is one per text; otherwise all texts share one.
        prompts: name of a prompt set, a list of (positive, negative) pairs, or a mapping from attribute to a pair or
            pairs.
        weights: record of the manifest, or a file, that holds the tower.
        tile: see `BlindMetric`. How far such scores are from those of the whole image: docs/speed.md.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype; the whole
        image at its own size, never resized -> scores (N, A), float32 (float64 for a metric in double precision), in
        0..1, higher is better; one column for each of `attributes` (A = 1 unless `prompts` is a mapping).

    A batch's scores equal those of its images alone to 2e-6 in float32. On an NVIDIA GPU since Ampere, a metric of
    `pyiqa.create_metric` is less precise than its network or a `Scorer`: pyiqa runs it under cuDNN flags that allow
    TF32 in convolutions, whatever the caller has set.

    Raises:
        SettingsError: an unknown or contradictory setting.
        PromptError: prompts that make no sense, or that the model cannot encode.
        WeightsError: a weight file that is missing, damaged or another model's.

    Example:
        >>> import torch
        >>> from qualiclip_pyiqa import OpenQualiCLIP
        >>> metric = OpenQualiCLIP("qualiclip-mini").eval()
        >>> metric(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 1])
        >>> sharp = OpenQualiCLIP("qualiclip-mini", prompts={"sharpness": ("Sharp image.", "Blurry image.")})
        >>> sharp.attributes
        ('sharpness',)
    """

    prompt_features: Tensor
    membership: Tensor

    def __init__(
        self,
        model_type: str,
        backbone: str | None = None,
        pretrained: bool | str | Path = True,
        pos_embedding: bool | None = None,
        temperature: float | None = None,
        n_ctx: int | None = None,
        ctx_init: str = "",
        prompt_specific_ctx: bool = True,
        prompts: PromptsLike | None = None,
        weights: str | Path | None = None,
        tile: int | None = None,
    ) -> None:
        spec = self._spec(model_type, pretrained)
        if temperature is not None and not temperature > 0:
            raise SettingsError(f"temperature is {temperature}; expected a positive number")
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        self.pos_embedding = spec.pos_embedding if pos_embedding is None else bool(pos_embedding)
        backbone = backbone or spec.backbone
        model = load_model(_weights_of(spec, backbone, weights), backbone, resolve_prompts("qualiclip").texts)
        self.origin = model.origin
        # pyiqa always passes the metric's default, so a value equal to it does not override the file's.
        own = model.temperature if temperature in (None, spec.temperature) else None
        self.temperature = float(own or temperature or spec.temperature)
        self.logit_scale = float(torch.tensor(model.logit_scale, dtype=torch.float32).exp())
        self.tower = freeze(model.image_tower(self.pos_embedding))
        self.prompts = resolve_prompts(spec.prompts if prompts is None else prompts)
        self.text_tower: TextTower | None = None
        self.prompt_learner: PromptLearner | None = None
        self.context_file: WeightFile | None = None
        if spec.context is None:
            self._set_features(self.prompts, _fixed_features(self.prompts, model))
            return
        text = model.text_tower()
        if pretrained is False:
            fresh = FreshContext(n_ctx, ctx_init, prompt_specific_ctx, spec.context_std)
            texts = self.prompts.texts
            self.prompt_learner = PromptLearner(text, texts, fresh.values(text, len(texts)))
        else:
            record = spec.context if pretrained is True else pretrained
            _check_learned(spec, record, model.backbone, prompts, ctx_init)
            self.prompt_learner, self.context_file = load_learner(record, text, self.prompts.texts, n_ctx)
        self._keep_text_tower(text)

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.prompts.attributes

    def set_prompts(self, prompts: PromptsLike) -> None:
        """Score by other antonym prompt pairs from now on.

        Args:
            prompts: as in the constructor.

        Raises:
            PromptError: prompts that make no sense, or that the model cannot encode.
            WeightsError: the weight file, which is read again for new texts, changed since the metric was built.
            SettingsError: the metric has a learned context, which belongs to its own prompts.
        """
        if self.prompt_learner is not None:
            raise SettingsError(f"{self.model_type} has a learned context; other prompts need one of their own")
        resolved = resolve_prompts(prompts)
        self._set_features(resolved, _fixed_features(resolved, self.origin.reload()))

    def rate(self, features: Tensor) -> Tensor:
        """Scores (M, A) of image features (M, D), which need not be of unit length."""
        text = self._encode_context() if self.prompt_learner is not None and self.training else self.prompt_features
        positive = positive_probabilities(features, text, self.logit_scale / self.temperature)
        with torch.autocast(features.device.type, enabled=False):
            membership = self.membership.to(positive.dtype)
            return positive @ membership / membership.sum(dim=0)

    def train(self, mode: bool = True) -> PromptIQA:
        """Set the training mode: in train mode the context is encoded at every step. Towers stay in eval mode."""
        was_training = self.training
        super().train(mode)
        if self.text_tower is not None:
            self.text_tower.eval()
        if was_training and not mode and self.prompt_learner is not None:
            self._refresh()
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, as plain values for a log or the appendix of a paper.

        Hashes are those of the files that were loaded; None, with a warning, for a file that changed since. Hashing a
        large file takes a second.
        """
        return super().describe() | {
            "backbone": self.origin.backbone,
            "activation": self.origin.activation,
            "pixel_mean": self._pixel_statistics("mean"),
            "pixel_std": self._pixel_statistics("std"),
            "prompts": self.prompts.as_dict(),
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "pos_embedding": self.pos_embedding,
            "weights": provenance(self.origin.file),
            "context": None if self.context_file is None else provenance(self.context_file),
        }

    def _pixel_statistics(self, name: str) -> list[float] | None:
        """`mean` or `std` by which the tower normalises RGB in 0..1; None for a tower that takes it as it is."""
        values = getattr(self.tower, name, None)
        return None if values is None else [round(value, 6) for value in values.flatten().tolist()]

    def _set_features(self, prompts: Prompts, features: Tensor) -> None:
        """Keep prompt features (2P, D), and which pair counts for which attribute as a matrix (P, A) of 0 and 1."""
        # Prompts that are set later follow the metric to its device and dtype.
        like = self._like
        membership = torch.zeros(len(prompts.pairs), len(prompts.groups), dtype=torch.float32)
        row = 0
        for column, (_, pairs) in enumerate(prompts.groups):
            membership[row : row + len(pairs), column] = 1
            row += len(pairs)
        self.prompts = prompts
        self.register_buffer("prompt_features", F.normalize(features.float(), dim=-1).to(like), persistent=False)
        self.register_buffer("membership", membership.to(like), persistent=False)

    def _keep_text_tower(self, text: TextTower) -> None:
        """Freeze the text tower that encodes the learned context, and encode it."""
        del text.token_embedding  # 25 of its 63 million values; the learner has copied what it needs
        freeze(text)
        self.text_tower = text
        self._refresh()
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _encode_context(self) -> Tensor:
        assert self.prompt_learner is not None and self.text_tower is not None
        return self.text_tower(*self.prompt_learner())

    @torch.no_grad()
    def _refresh(self) -> None:
        self._set_features(self.prompts, self._encode_context())

    @classmethod
    def _spec(cls, model_type: str, pretrained: bool | str | Path) -> PromptSpec:
        """The row of a metric, checked against this class and `pretrained`."""
        base = model_type
        if model_type not in METRICS and pretrained is not True:  # as in pyiqa, `clipiqa+_mine` is a `clipiqa+`
            base = max((name for name in with_context() if model_type.startswith(name)), key=len, default=model_type)
        spec = metric_spec(base)
        if not isinstance(spec, PromptSpec) or spec.arch not in {each.__name__ for each in cls.__mro__}:
            raise SettingsError(f"model_type {model_type!r} belongs to {spec.arch}, not to {cls.__name__}")
        if spec.context is None and not isinstance(pretrained, bool):
            raise SettingsError(f"{model_type} has fixed prompts; expected pretrained=True, not {pretrained!r}")
        return spec


def _refresh_after_load(module: PromptIQA, _: Any) -> None:  # at module level, so that a metric can be pickled
    module._refresh()


class OpenCLIPIQA(PromptIQA):
    """CLIP-IQA and CLIP-IQA+ (Wang, Chan, Loy, AAAI 2023); for all arguments see `PromptIQA`."""

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined


class OpenQualiCLIP(PromptIQA):
    """QualiCLIP and QualiCLIP+ (Agnolucci et al., arXiv:2403.11176); for all arguments see `PromptIQA`."""

    __module__ = "qualiclip_pyiqa.archs"


def _weights_of(spec: PromptSpec, backbone: str, wanted: str | Path | None) -> str | Path | WeightRecord:
    """The weights of a metric with a backbone: those that were asked for, the metric's own, or OpenAI's."""
    record = spec.weights if wanted is None else wanted
    if record != spec.weights or backbone == spec.backbone:
        return record
    if spec.arch != "OpenCLIPIQA":
        raise SettingsError(
            f"{spec.name} is a {spec.backbone}; for backbone {backbone!r} pass weights=FILE of a trained model"
        )
    return openai_record(backbones.plain_name(backbone))


def _check_learned(
    spec: PromptSpec, record: str | Path, backbone: str, prompts: PromptsLike | None, ctx_init: str
) -> None:
    """Refuse settings that a learned context has no place for."""
    if record == spec.context and backbone != spec.backbone:
        raise SettingsError(
            f"the context of {spec.name} was learned on {spec.backbone}, not {backbone}; "
            "pass pretrained=False to train one, or pretrained=FILE"
        )
    if ctx_init or prompts not in (None, spec.prompts):
        raise SettingsError(
            "prompts and ctx_init start a fresh context, but a learned one was asked for; pass pretrained=False"
        )


def _fixed_features(prompts: Prompts, model: LoadedModel) -> Tensor:
    """Features (2P, D) of fixed prompts: stored ones if the file has all of them, otherwise encoded."""
    stored = model.stored_features
    missing = [text for text in prompts.texts if text not in stored]
    if not missing:
        return torch.stack([stored[text] for text in prompts.texts])
    if not model.has_text_tower:
        raise PromptError(
            f"{model.path.name} has no text tower and no feature for {missing[0]!r}; "
            f"expected some of {', '.join(map(repr, stored))}"
        )
    return model.encode(prompts.texts)
