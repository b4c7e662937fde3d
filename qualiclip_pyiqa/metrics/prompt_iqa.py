"""CLIP-IQA and QualiCLIP as ordinary modules: an image tower, antonym prompt features, and the softmax of each pair.

    f = image feature, unit length (N, D)      t = prompt features, unit length, positive/negative alternating (2P, D)
    z = exp(logit_scale) * f @ t.T / temperature           s = mean over pairs of softmax(z of a pair)[positive]

(CLIP-IQA: Wang et al., AAAI 2023, equation 3; the temperature is pyiqa's for QualiCLIP.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PromptError, SettingsError, WeightsError
from ..pretrained import weights as weight_files
from ..pretrained.model import LoadedModel, WeightFile, load_model
from ..towers import backbones
from ..towers.base import freeze
from ..towers.text import TextTower
from .base import BlindMetric
from .prompt_learner import PromptLearner
from .prompts import Prompts, resolve_prompts
from .registry import METRICS, MetricSpec, metric_spec


class PromptIQA(BlindMetric):
    """A blind quality metric by antonym prompt pairs; `OpenCLIPIQA` and `OpenQualiCLIP` are the two to construct.

    The tower and the prompt features are buffers: they follow `.to()`, `deepcopy` and pickle, and no optimiser, state
    dict or checkpoint sees them. Only a prompt context (`prompt_learner`) is a parameter, and the state dict holds
    exactly what pyiqa's `params` files hold for the metric.

    Args:
        model_type: a name of `METRICS`; it decides the defaults of everything below.
        backbone: image tower; an OpenAI name as pyiqa spells it or any of `open_clip.list_models()`. A file trained
            with this package says itself which tower it holds.
        pretrained: for metrics with a learned context: True for the published one, False for a fresh one to be
            trained, or the name of a weight record or a file. Metrics with fixed prompts have no context to choose.
        pos_embedding: whether the tower adds its positional table, resized to the picture.
        temperature: divides the logits. A file trained with this package brings its own, which any value but the
            metric's usual one overrules.
        n_ctx, ctx_init, prompt_specific_ctx: a fresh context's length (16 tokens), first words, and whether each text
            has its own. A learned one says itself what it is.
        prompts: a set's name, a list of (positive, negative) pairs, or a mapping attribute -> pair or pairs.
        weights: record of the manifest, or a file, that holds the tower.
        tile: another rule, never the default, for towers whose time grows faster than the picture: the mean score of
            windows of at most so many pixels a side, evenly spread over the picture. Its scores are not those of the
            whole picture (docs/speed.md says how far they are apart), and `describe()` names it.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any float dtype; the whole picture
        at its own size, never resized -> scores (N, A) float32 (float64 for a double network) in 0..1, higher is
        better, one column for each of `attributes` (A = 1 unless `prompts` is a mapping).

    Raises:
        SettingsError, PromptError, WeightsError: see the classes; ImageError from `forward`.
    """

    default_type: ClassVar[str]
    context_std: ClassVar[float | None]

    prompt_features: Tensor
    membership: Tensor

    def __init__(
        self,
        model_type: str | None = None,
        backbone: str | None = None,
        pretrained: bool | str | Path = True,
        pos_embedding: bool | None = None,
        temperature: float | None = None,
        n_ctx: int | None = None,
        ctx_init: str = "",
        prompt_specific_ctx: bool = True,
        prompts: Any = None,
        weights: str | Path | None = None,
        tile: int | None = None,
    ) -> None:
        model_type = model_type or self.default_type
        spec = _spec_of(type(self).__name__, model_type, pretrained)
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        if temperature is not None and not temperature > 0:
            raise SettingsError(f"temperature is {temperature}; expected a positive number")
        self.pos_embedding = spec.pos_embedding if pos_embedding is None else bool(pos_embedding)
        backbone = backbone or spec.backbone
        model = load_model(_weights_of(spec, backbone, weights), backbone, resolve_prompts("qualiclip").texts)
        self.origin = model.origin
        # A file that was trained with this package knows which temperature its scale was chosen for; pyiqa passes the
        # metric's own on, which is no wish of the caller's.
        own = model.temperature if temperature in (None, spec.temperature) else None
        self.temperature = float(own or temperature or spec.temperature)

        self.tower = freeze(model.image_tower(self.pos_embedding))
        self.logit_scale = float(torch.tensor(model.logit_scale, dtype=torch.float32).exp())
        self.prompts = resolve_prompts(spec.prompts if prompts is None else prompts)
        self.prompt_learner: PromptLearner | None = None
        self.text_tower: TextTower | None = None
        self.context_file: WeightFile | None = None
        if spec.context is None:
            if not isinstance(pretrained, bool):
                raise SettingsError(f"{model_type} has fixed prompts; expected pretrained=True, not {pretrained!r}")
            self._set_features(self.prompts, _fixed_features(self.prompts, model))
        else:
            learn: dict[str, Any] = {"ctx_init": ctx_init, "prompt_specific_ctx": prompt_specific_ctx}
            if n_ctx is not None:
                learn["n_ctx"] = n_ctx
            self._set_context(spec, pretrained, prompts is not None and prompts != spec.prompts, learn, model)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the score's A columns."""
        return self.prompts.attributes

    def set_prompts(self, prompts: Any) -> None:
        """Score by other antonym prompt pairs from now on; takes what the constructor's `prompts=` takes.

        Raises:
            PromptError: prompts that make no sense, or that this model cannot encode.
            WeightsError: the weight file, which is read again for it, changed since the metric was made.
            SettingsError: the metric has a learned context, which belongs to its own prompts.
        """
        if self.prompt_learner is not None:
            raise SettingsError(f"{self.model_type} has a learned context; other prompts need one of their own")
        resolved = resolve_prompts(prompts)
        self._set_features(resolved, _fixed_features(resolved, self.origin.reload()))

    def rate(self, features: Tensor) -> Tensor:
        """Scores (M, A) of image features (M, D)."""
        text = self._encode_context() if self.prompt_learner is not None and self.training else self.prompt_features
        # A logit is a hundred times a cosine: half precision would cost the second digit of the score.
        with torch.autocast(features.device.type, enabled=False):
            precise = torch.promote_types(features.dtype, torch.float32)
            image = F.normalize(features.to(precise), dim=-1)
            text = F.normalize(text.to(precise), dim=-1)
            logits = image @ text.T * (self.logit_scale / self.temperature)
            positive = logits.unflatten(1, (-1, 2)).softmax(dim=-1)[..., 0]
            membership = self.membership.to(precise)
            return positive @ membership / membership.sum(dim=0)

    def train(self, mode: bool = True) -> PromptIQA:
        """In train mode the context is encoded at every step; the frozen towers stay in eval mode."""
        was_training = self.training
        super().train(mode)
        if self.text_tower is not None:
            self.text_tower.eval()
        if was_training and not mode and self.prompt_learner is not None and self.text_tower is not None:
            self._refresh()
        return self

    def describe(self) -> dict[str, Any]:
        """Everything that decides a score, as plain values for a log or a paper's appendix.

        Hashes are those of what was loaded: None, with a warning, for a file that changed since. Hashing a large file
        takes a second.
        """
        return super().describe() | {
            "backbone": self.origin.backbone,
            "activation": self.origin.activation,
            "pixel_mean": self._pixels("mean"),
            "pixel_std": self._pixels("std"),
            "prompts": self.prompts.as_dict(),
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "pos_embedding": self.pos_embedding,
            "weights": self.origin.file.provenance(),
            "context": None if self.context_file is None else self.context_file.provenance(),
        }

    def _pixels(self, name: str) -> list[float] | None:
        """Statistics by which the tower normalises RGB in 0..1; None for one that takes it as it is."""
        values = getattr(self.tower, name, None)
        return None if values is None else [round(value, 6) for value in values.flatten().tolist()]

    def _set_features(self, prompts: Prompts, features: Tensor) -> None:
        """Keep (2P, D) features, and which pair counts for which attribute: a matrix (P, A) of 0 and 1."""
        # A later set of prompts follows the network to its device and dtype.
        like = getattr(self, "prompt_features", torch.empty(0))
        membership = torch.zeros(len(prompts.pairs), len(prompts.groups))
        row = 0
        for column, (_, pairs) in enumerate(prompts.groups):
            membership[row : row + len(pairs), column] = 1
            row += len(pairs)
        self.prompts = prompts
        self.register_buffer("prompt_features", F.normalize(features.float(), dim=-1).to(like), persistent=False)
        self.register_buffer("membership", membership.to(like), persistent=False)

    def _set_context(
        self,
        spec: MetricSpec,
        pretrained: bool | str | Path,
        own_prompts: bool,
        learn: dict[str, Any],
        model: LoadedModel,
    ) -> None:
        text = model.text_tower()
        if pretrained is False:
            self.prompt_learner = PromptLearner(text, self.prompts.texts, std=self.context_std, **learn)
        else:
            record: Any = spec.context if pretrained is True else pretrained
            if record == spec.context and model.backbone != spec.backbone:
                raise SettingsError(
                    f"the context of {spec.name} was learned on {spec.backbone}, not {model.backbone}; "
                    "pass pretrained=False to train one, or pretrained=FILE"
                )
            if own_prompts or learn["ctx_init"]:
                raise SettingsError(
                    "prompts and ctx_init start a fresh context, but a learned one was asked for; pass pretrained=False"
                )
            path = weight_files.find(record)
            self.context_file = WeightFile.of(path)
            loaded, _ = weight_files.read(path, layout="context")
            ctx = loaded.get("prompt_learner.ctx")
            if ctx is None or ctx.dim() not in (2, 3):
                raise WeightsError(f"{path} holds no prompt context ('prompt_learner.ctx')")
            if learn.get("n_ctx", ctx.shape[-2]) != ctx.shape[-2]:
                raise SettingsError(
                    f"{path.name} has {ctx.shape[-2]} context tokens, not n_ctx={learn['n_ctx']}; "
                    "leave n_ctx out, or pass pretrained=False"
                )
            self.prompt_learner = PromptLearner(text, self.prompts.texts, n_ctx=ctx.shape[-2])
            learned = dict(self.prompt_learner.state_dict())
            learned.update({key.removeprefix("prompt_learner."): value.float() for key, value in loaded.items()})
            try:
                self.prompt_learner.load_state_dict(learned)
            except RuntimeError as error:
                raise WeightsError(
                    f"{path} does not fit {model.backbone} and "
                    f"{len(self.prompts.texts)} prompts: {' '.join(str(error).split())}"
                ) from error
        del text.token_embedding  # 25 of its 63 million values, and the learner has taken what it needs
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


def _refresh_after_load(module: PromptIQA, _: Any) -> None:  # at module level, so that a metric can be pickled
    module._refresh()


class OpenCLIPIQA(PromptIQA):
    """CLIP-IQA and CLIP-IQA+ (Wang, Chan, Loy, AAAI 2023); all arguments are `PromptIQA`'s."""

    __module__ = "qualiclip_pyiqa.archs"  # a pickle's path to the class, wherever it is defined
    default_type = "clipiqa"
    context_std = None


class OpenQualiCLIP(PromptIQA):
    """QualiCLIP and QualiCLIP+ (Agnolucci et al., arXiv:2403.11176); all arguments are `PromptIQA`'s."""

    __module__ = "qualiclip_pyiqa.archs"
    default_type = "qualiclip+"
    context_std = 0.02


def _spec_of(arch: str, model_type: str, pretrained: bool | str | Path) -> MetricSpec:
    base = model_type
    if model_type not in METRICS and pretrained is not True:
        # As with pyiqa, a context of one's own may have a name of its own: `clipiqa+_mine`.
        base = next((name for name in ("clipiqa+", "qualiclip+") if model_type.startswith(name)), model_type)
    spec = metric_spec(base)
    if spec.arch != arch:
        raise SettingsError(f"model_type {model_type!r} belongs to {spec.arch}, not to {arch}")
    return spec


def _weights_of(spec: MetricSpec, backbone: str, wanted: str | Path | None) -> str | Path | weight_files.WeightRecord:
    """The weights of a metric with a backbone: those that were asked for, its usual ones, or OpenAI's."""
    record = spec.weights if wanted is None else wanted
    if record != spec.weights or backbone == spec.backbone:
        return record
    if spec.arch != "OpenCLIPIQA":
        raise SettingsError(
            f"{spec.name} is a {spec.backbone}; for backbone {backbone!r} pass weights=FILE of a trained model"
        )
    return weight_files.openai_record(backbones.plain_name(backbone))


def _fixed_features(prompts: Prompts, model: LoadedModel) -> Tensor:
    """Features (2P, D) of fixed prompts: those that the file holds if it holds all, else encoded."""
    stored = model.stored_features
    if all(text in stored for text in prompts.texts):
        return torch.stack([stored[text] for text in prompts.texts])
    if not model.has_text_tower:
        strange = next(text for text in prompts.texts if text not in stored)
        raise PromptError(
            f"{model.path.name} has no text tower and no feature for {strange!r}; "
            f"expected some of {', '.join(map(repr, stored))}"
        )
    return model.encode(prompts.texts)
