"""CLIP-IQA and QualiCLIP: image features are compared with antonym prompt pairs, by a softmax over each pair.

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

from ..errors import PromptError, SettingsError, WeightsError, quoted
from ..pretrained.files import WeightFile
from ..pretrained.layouts import OWN_TOWERS
from ..pretrained.manifest import WeightRecord, openai_record
from ..pretrained.model import LoadedModel, load_model
from ..pretrained.verify import provenance
from ..towers import backbones
from ..towers.autocast import without_autocast
from ..towers.base import freeze
from ..towers.text import TextTower
from .base import BlindMetric, pixel_statistics
from .prompt_learner import FreshContext, PromptLearner, load_learner
from .prompts import Prompts, PromptsLike, resolve_prompts
from .registry import METRICS, PromptSpec, metric_spec, with_context


def positive_probabilities(features: Tensor, text: Tensor, scale: float) -> Tensor:
    """Compute the softmax over each antonym prompt pair's scaled cosines, and return the positive prompt's share.

    Args:
        features: image features, normalised here.
        text: features of positive and negative prompts, alternating, normalised here.
        scale: factor on the cosines: exp(logit_scale) / temperature.

    Shape:
        (N, D), (2P, D) -> (N, P) in 0..1, in float32 or the wider dtype of the features.
    """
    # Logits are a hundred times the cosines, so half precision would change the second digit of a score.
    with without_autocast(features):
        precise = torch.promote_types(features.dtype, torch.float32)
        image = F.normalize(features.to(precise), dim=-1)
        text = F.normalize(text.to(precise), dim=-1)
        logits = image @ text.T * scale
        return logits.unflatten(1, (-1, 2)).softmax(dim=-1)[..., 0]


class PromptIQA(BlindMetric):
    """A blind metric by antonym prompt pairs. Construct `OpenCLIPIQA` or `OpenQualiCLIP`, or call `create_metric`.

    The tower and the prompt features are non-persistent buffers: they follow `.to()`, `deepcopy` and pickle, but are
    invisible to optimisers and state dicts. Only a prompt context (`prompt_learner`) is a parameter; the state dict
    matches pyiqa's `params` files for the metric.

    Args:
        model_type: a name in `METRICS`, which decides the defaults of all other arguments. A context of your own
            (`pretrained=False` or a file) may have a name that extends a metric's: `clipiqa+_mine`.
        backbone: name of the image tower: OpenAI's as pyiqa spells it, or one of `open_clip.list_models()`. Files
            trained with this package name their own.
        pretrained: for metrics with a learned context: True for the published one, False for a fresh one, or the name
            of a weight record or a file. Metrics with fixed prompts take True.
        pos_embedding: whether the tower adds its positional table, resized to the image.
        temperature: divides the logits. Files trained with this package have their own, which any value except the
            metric's default overrides.
        n_ctx: length of a fresh context in tokens (default 16), or the required length of a learned one.
        ctx_init: words that a fresh context starts from; they set its length.
        prompt_specific_ctx: whether a fresh context is one per text; otherwise all texts share one.
        prompts: name of a prompt set, a list of (positive, negative) pairs, or a mapping from attribute to a pair or
            pairs.
        weights: name of a weight record, a file, or a folder in the layout of Hugging Face transformers, that holds the
            tower.
        tile: see `BlindMetric`; docs/speed.md says how far such scores are from those of the whole image.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype; the whole
        image at its own size, never resized -> scores (N, A), float32 (float64 for a metric in double precision), in
        0..1, higher is better; one column for each of `attributes` (A = 1 unless `prompts` is a mapping).

    In float32 a batch's scores equal those of its images alone to 2e-6. On NVIDIA GPUs since Ampere, a metric of
    `pyiqa.create_metric` is less precise than its network or a `Scorer`, as pyiqa allows TF32 in convolutions whatever
    the caller has set.

    Raises:
        SettingsError: an unknown or contradictory setting.
        PromptError: invalid prompts, or prompts that the model cannot encode.
        WeightsError: a weight file that is missing, damaged or of another model.

    Example:
        >>> import torch
        >>> from qualiclip_pyiqa import OpenQualiCLIP
        >>> metric = OpenQualiCLIP("qualiclip-mini").eval()
        >>> metric(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 1])
        >>> sharp = OpenQualiCLIP("qualiclip-mini", prompts={"sharpness": ("Sharp photo.", "Blurry photo.")})
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
        wanted = spec.prompts if prompts is None else prompts
        if model.backbone == "mobile" and wanted == "qualiclip":
            wanted = "quality"  # files of embedded models have one pair for it, whatever metric's name they load under
        self.prompts = resolve_prompts(wanted)
        self.text_tower: TextTower | None = None
        self.prompt_learner: PromptLearner | None = None
        self.context_file: WeightFile | None = None
        if spec.context is None:
            features = _fixed_features(self.prompts, model)
            width = getattr(self.tower, "feature_dim", features.shape[1])
            if features.shape[1] != width:
                raise WeightsError(f"{model.path} has prompt features of length {features.shape[1]}; expected {width}")
            self._set_features(self.prompts, features)
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
        self._set_text_tower(text)

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.prompts.attributes

    def set_prompts(self, prompts: PromptsLike) -> None:
        """Replace the antonym prompt pairs.

        Args:
            prompts: as in the constructor.

        Raises:
            PromptError: invalid prompts, or prompts that the model cannot encode.
            WeightsError: the weight file, which is read again for new texts, changed since the metric was built.
            SettingsError: the metric has a learned context, which was learned for its own prompts.
        """
        if self.prompt_learner is not None:
            raise SettingsError(f"{self.model_type} has a learned context, which fits its own prompts only")
        resolved = resolve_prompts(prompts)
        self._set_features(resolved, _fixed_features(resolved, self.origin.reload()))

    def rate(self, features: Tensor) -> Tensor:
        """Score image features, normalised here: (M, D) -> (M, A)."""
        text = self._encode_context() if self.prompt_learner is not None and self.training else self.prompt_features
        positive = positive_probabilities(features, text, self.logit_scale / self.temperature)
        with without_autocast(features):
            membership = self.membership.to(positive.dtype)
            return positive @ membership / membership.sum(dim=0)

    def train(self, mode: bool = True) -> PromptIQA:
        """Set the training mode, in which the context is encoded at every step; towers stay in eval mode."""
        was_training = self.training
        super().train(mode)
        if self.text_tower is not None:
            self.text_tower.eval()
        if was_training and not mode and self.prompt_learner is not None:
            self._refresh()
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values, for a log or a paper's appendix.

        Hashes are of the files as they were loaded; None, with a warning, for a file that has changed since. Hashing a
        large file takes a second.
        """
        return super().describe() | {
            "backbone": self.origin.backbone,
            "activation": self.origin.activation,
            "pixel_mean": pixel_statistics(self.tower, "mean"),
            "pixel_std": pixel_statistics(self.tower, "std"),
            "prompts": self.prompts.as_dict(),
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "pos_embedding": self.pos_embedding,
            "weights": provenance(self.origin.file),
            "context": None if self.context_file is None else provenance(self.context_file),
        }

    def _set_features(self, prompts: Prompts, features: Tensor) -> None:
        """Store prompt features (2P, D) and the membership matrix (P, A): 1 where a pair belongs to an attribute."""
        like = self._like
        membership = torch.zeros(len(prompts.pairs), len(prompts.groups), dtype=torch.float32)
        row = 0
        for column, (_, pairs) in enumerate(prompts.groups):
            membership[row : row + len(pairs), column] = 1
            row += len(pairs)
        self.prompts = prompts
        self.register_buffer("prompt_features", F.normalize(features.float(), dim=-1).to(like), persistent=False)
        self.register_buffer("membership", membership.to(like), persistent=False)

    def _set_text_tower(self, text: TextTower) -> None:
        """Store the frozen text tower that encodes the context, and encode the context."""
        del text.token_embedding  # 25 of its 63 million values; the learner has copied the rows it needs
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
        """Look up a metric's row, and check it against this class and `pretrained`."""
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
    """Choose a metric's weights for a backbone: those asked for, the metric's own, or OpenAI's."""
    record = spec.weights if wanted is None else wanted
    if record != spec.weights or backbone == spec.backbone:
        return record
    if backbone not in OWN_TOWERS:
        backbones.find_backbone(backbone)
    if spec.arch != "OpenCLIPIQA":
        raise SettingsError(
            f"{spec.name} has backbone {spec.backbone}; for {backbone!r} pass weights=FILE of a trained model"
        )
    return openai_record(backbones.plain_name(backbone))


def _check_learned(
    spec: PromptSpec, record: str | Path, backbone: str, prompts: PromptsLike | None, ctx_init: str
) -> None:
    """Refuse settings that contradict a learned context."""
    if record == spec.context and backbone != spec.backbone:
        raise SettingsError(
            f"the context of {spec.name} was learned on {spec.backbone}, not {backbone}; "
            "pass pretrained=False to train one, or pretrained=FILE"
        )
    if ctx_init or prompts not in (None, spec.prompts):
        raise SettingsError(
            "prompts and ctx_init are for a fresh context, but a learned one was asked for; pass pretrained=False"
        )


def _fixed_features(prompts: Prompts, model: LoadedModel) -> Tensor:
    """Return features (2P, D) of fixed prompts: those in the weight file if it has all, else encoded or cached ones."""
    stored = model.stored_features
    missing = [text for text in prompts.texts if text not in stored]
    if not missing:
        return torch.stack([stored[text] for text in prompts.texts])
    if not model.has_text_tower and not stored:
        raise PromptError(f"{model.path} has no text tower, which encodes prompts; expected a whole CLIP")
    if not model.has_text_tower:
        raise PromptError(
            f"{model.path.name} has no text tower and no feature for {quoted(missing[0])}; "
            f"expected some of {', '.join(map(repr, stored))}"
        )
    return model.prompt_features(prompts.texts)
