"""CLIP-DQA and CLIP-AGIQA: windows of an image seen by a CLIP with learned prompts in every block.

    f = feature of a window (D,)      t = features of the positive and the negative text (2, D)      all unit length
    score = mean over windows of softmax(exp(logit_scale) * f @ t.T)[positive]

(CLIP-DQA: Zeng, Fu et al., arXiv:2502.01707; CLIP-AGIQA: Fu et al., arXiv:2406.16641.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError, one_line
from ..pretrained.deep_prompts import LoadedPrompts, check_clip, clip_sha256, find_clip, load_prompts
from ..pretrained.files import WeightFile
from ..pretrained.manifest import WeightRecord, find_record, openai_record
from ..pretrained.model import LoadedModel, check_backbone, load_model
from ..pretrained.verify import provenance
from ..towers import backbones
from ..towers.base import freeze
from ..towers.resampling import resize_like_pillow
from ..towers.vit import ViTTower
from .base import BlindMetric, pixel_statistics
from .deep_prompts import DeepPrompts, PromptFrame, visual_prompts
from .prompt_iqa import positive_probabilities
from .registry import DeepPromptSpec, metric_spec, with_deep_prompts
from .specs import FILE_SUFFIX

# Both metrics were trained with these statistics of ImageNet, not with CLIP's (torchvision's models).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STRIDE = 64  # pixels between windows, in both papers' code
LENGTH = 8  # tokens of a prompt, in both papers' code
STD = 0.02  # of fresh prompts, in both papers' code
# Windows in one pass of the image tower: memory does not grow with the image.
WINDOWS = {"cuda": 256, "cpu": 16}


def how_to_train(metric: str) -> str:
    """Return the command that makes a metric's file."""
    return f"qualiclip tune -m {metric} --ratings CSV --images DIR --out RUN"


class DeepPromptIQA(BlindMetric):
    """A metric by deep prompts: `clip-dqa` or `clip-agiqa`, with prompts from the user's file.

    All windows of the size that the image tower was trained on (224x224 for ViT-B/32) are scored, at a stride of 64
    pixels from the top left, and their scores averaged. Columns at the right and rows at the bottom that fill no window
    are not seen, except in the whole view of `clip-dqa`.

    Args:
        model_type: `clip-dqa` or `clip-agiqa`.
        weights: file of `qualiclip tune`, or of the authors' code (for `clip-agiqa` that of the quality prompts, beside
            that of the alignment prompts).
        backbone: name of a vision transformer of open_clip; None: the one that the file names, or ViT-B/32.
        backbone_weights: file or record with the CLIP model; None: OpenAI's, or the user's own that prompts of
            `qualiclip tune` were learned on, which lies beside them or in a folder of QUALICLIP_PYIQA_WEIGHTS.
        pretrained: False for fresh prompts, which are to be trained.
        n_ctx: tokens of a fresh prompt (default 8).
        tile: see `BlindMetric`; windows lie in each tile.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least `minimum_side`, any floating-point dtype
        -> scores (N, A), float32 (float64 for a metric in double precision), in 0..1, higher is better; a column for
        each of `attributes`: quality, and for `clip-agiqa` alignment of image and text.

    Raises:
        SettingsError: no file, an unknown or contradictory setting.
        WeightsError: a weight file that is missing, damaged or of another model; prompts learned on another CLIP model.
    """

    __module__ = "qualiclip_pyiqa.archs"  # the path in pickles, wherever the class is defined

    tower: ViTTower
    prompt_features: Tensor

    def __init__(
        self,
        model_type: str = "clip-dqa",
        weights: str | Path | None = None,
        backbone: str | None = None,
        backbone_weights: str | Path | None = None,
        pretrained: bool = True,
        n_ctx: int | None = None,
        tile: int | None = None,
    ) -> None:
        spec = self.spec = _spec(model_type)
        super().__init__(model_type, spec.paper, spec.score_range, spec.lower_better, tile)
        loaded = _loaded(spec, weights, pretrained)
        length = _length(loaded, n_ctx)
        backbone = _backbone(spec, loaded, backbone)
        if backbone_weights is None and loaded is not None:
            backbone_weights = find_clip(loaded)
        model = load_model(_weights_of(spec, backbone, backbone_weights), backbone)
        self.origin = model.origin
        self.clip_sha256 = clip_sha256(model)
        own = backbone_weights is not None and find_record(backbone_weights) is None
        self.clip_file = Path(str(backbone_weights)).absolute().name if own else ""
        if loaded is not None:
            check_clip(loaded, model, self.clip_sha256)
        self.logit_scale = float(torch.tensor(model.logit_scale, dtype=torch.float32).exp())
        self.tower = _image_tower(spec, model)
        self.minimum_side = self.window = _side(self.tower, backbone)
        if tile is not None and tile < self.window:
            raise SettingsError(f"tile is {tile}; {model_type} on {backbone} needs at least {self.window}")
        self.learners = spec.learners
        self.context_files: tuple[WeightFile, ...] = () if loaded is None else loaded.files
        text = model.text_tower()
        self.prompt_learner = self._prompts(loaded, (len(text.blocks), text.token_embedding.weight.shape[1]), length)
        self.frames = nn.ModuleList(PromptFrame(text, learner.words, self.length) for learner in self.learners)
        del text.token_embedding  # 25 of its 63 million values; the frames have copied the rows they need
        self.text_tower = freeze(text)
        self._refresh()
        self.register_load_state_dict_post_hook(_refresh_after_load)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(learner.attribute for learner in self.learners)

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        prompts = next(iter(self.prompt_learner.values()))
        assert isinstance(prompts, DeepPrompts)
        return prompts.visual[0].shape[0]

    def encode(self, rgb: Tensor) -> Tensor:
        """Compute the features of all windows: (N, 3, H, W) -> (N, T * A * D), T windows and A attributes."""
        size = self.window
        whole = self.whole_view(rgb)
        prompts = self.visual_prompts()
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():  # no loop of a length that is not known
            rows, columns = ((side - size) // STRIDE + 1 for side in rgb.shape[2:])
            numbers, within = (torch.arange(count, device=rgb.device) for count in (rows * columns, size))
            tops, lefts = (start[:, None] * STRIDE + within for start in (numbers // columns, numbers % columns))
            views = rgb[:, :, tops[:, :, None], lefts[:, None]].transpose(1, 2)[:, :, None]
            if whole is not None:
                views = torch.cat([views, whole[:, None, None].expand_as(views)], dim=2)
            return self.encode_views(views.flatten(0, 1), prompts).unflatten(0, views.shape[:2]).flatten(1)
        grid = rgb.unfold(2, size, STRIDE).unfold(3, size, STRIDE).permute(0, 2, 3, 1, 4, 5)  # a view, no copy
        images, rows, columns = grid.shape[:3]
        places = list(itertools.product(range(images), range(rows), range(columns)))
        at_once = WINDOWS.get(rgb.device.type, WINDOWS["cuda"])
        parts = []
        for start in range(0, len(places), at_once):
            part = places[start : start + at_once]
            seen = [torch.stack([grid[place] for place in part])]
            if whole is not None:
                seen.append(whole[[image for image, _, _ in part]])
            parts.append(self.encode_views(torch.stack(seen, dim=1), prompts))
        return torch.cat(parts).unflatten(0, (images, rows * columns)).flatten(1)

    def whole_view(self, rgb: Tensor) -> Tensor | None:
        """Resize whole images to the size of a window, as Pillow does: (N, 3, S, S); None if they are not seen."""
        return resize_like_pillow(rgb, self.window, self.window) if self.spec.whole_view else None

    def visual_prompts(self) -> list[list[Tensor]]:
        """Return the visual prompts of each attribute for each block."""
        return visual_prompts(self.learners, dict(self.prompt_learner.items()))

    def encode_views(self, views: Tensor, prompts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Compute image features of windows: (M, V, 3, S, S) in the metric's dtype -> (M, A * D).

        Args:
            views: of each window; V is 2, the window and the whole view, or 1.
            prompts: as from `visual_prompts`.
        """
        return torch.cat([self.tower.forward_prompted(views, each) for each in prompts], dim=1)

    def rate(self, features: Tensor) -> Tensor:
        """Score the output of `encode`: (M, T * A * D) -> (M, A), the mean over windows."""
        text = self._encode_texts() if self.training else self.prompt_features
        scores = []
        each = features.unflatten(1, (-1, len(self.learners), text.shape[1]))
        for number, pair in enumerate(text.split(2)):
            found = positive_probabilities(each[:, :, number].flatten(0, 1), pair, self.logit_scale)
            scores.append(found.unflatten(0, each.shape[:2]).mean(dim=1))
        return torch.cat(scores, dim=1)

    def encodes_like(self, other: BlindMetric) -> bool:
        """Whether two metrics with equal towers have equal features: those of equal prompts and views."""
        if not super().encodes_like(other) or not isinstance(other, DeepPromptIQA) or self.spec != other.spec:
            return False
        own, others = self.prompt_learner.state_dict(), other.prompt_learner.state_dict()
        return own.keys() == others.keys() and all(
            value.dtype == others[key].dtype and torch.equal(value, others[key].to(value.device))
            for key, value in own.items()
        )

    def train(self, mode: bool = True) -> DeepPromptIQA:
        """Set the training mode, in which the texts are encoded at every step; towers stay in eval mode."""
        was_training = self.training
        super().train(mode)
        self.text_tower.eval()
        if was_training and not mode:
            self._refresh()
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values, for a log or a paper's appendix."""
        size = f"{self.window}x{self.window}"
        area = (
            "the whole image"
            if self.tile is None
            else f"windows of at most {self.tile}x{self.tile} pixels, evenly spread"
        )
        whole = f"; beside each, {area} resized to {size} by Pillow's bilinear rule" if self.spec.whole_view else ""
        files = dict(zip(("context", "alignment_context"), map(provenance, self.context_files), strict=False))
        return (
            super().describe()
            | {
                "resize": f"{area}: the mean score of all {size} windows at a stride of {STRIDE} pixels{whole}",
                "backbone": self.origin.backbone,
                "activation": self.origin.activation,
                "pixel_mean": pixel_statistics(self.tower, "mean"),
                "pixel_std": pixel_statistics(self.tower, "std"),
                "prompts": {learner.attribute: [list(learner.words)] for learner in self.learners},
                "prompt_length": self.length,
                "prompt_precision": "float16, but for the first block's text prompts",
                "logit_scale": self.logit_scale,
                "weights": provenance(self.origin.file),
            }
            | {"context": None, **files}
        )

    def _prompts(self, loaded: LoadedPrompts | None, text: tuple[int, int], length: int) -> nn.ModuleDict:
        """Build the prompts of each learner: fresh ones, or those of the file."""
        visual = len(self.tower.blocks), len(self.tower.class_embedding)
        prompts = nn.ModuleDict(
            {each.attribute: DeepPrompts(each, text, visual, length, STD) for each in self.learners}
        )
        if loaded is not None:
            try:
                prompts.load_state_dict({key: value.float() for key, value in loaded.tensors.items()})
            except RuntimeError as error:
                raise WeightsError(
                    f"{loaded.path} does not fit {self.model_type} on {self.origin.backbone}: {one_line(error)[:300]}"
                ) from error
        return prompts

    def _encode_texts(self) -> Tensor:
        """Encode the texts with their prompts -> (2A, D), positive and negative alternating, not normalised."""
        found = []
        for learner, frame in zip(self.learners, self.frames, strict=True):
            prompts = self.prompt_learner[learner.attribute]
            assert isinstance(prompts, DeepPrompts) and isinstance(frame, PromptFrame)
            found.append(frame.encode(self.text_tower, prompts.text_prompts()))  # type: ignore[arg-type]
        return torch.cat(found)

    @torch.no_grad()
    def _refresh(self) -> None:
        features = F.normalize(self._encode_texts().float(), dim=-1).to(self._like)
        self.register_buffer("prompt_features", features, persistent=False)


def _refresh_after_load(module: DeepPromptIQA, _: Any) -> None:  # at module level, so that a metric can be pickled
    module._refresh()


def _spec(model_type: str) -> DeepPromptSpec:
    spec = metric_spec(model_type)
    if not isinstance(spec, DeepPromptSpec):
        raise SettingsError(f"{model_type} has no deep prompts; expected one of {', '.join(with_deep_prompts())}")
    return spec


def _loaded(spec: DeepPromptSpec, weights: str | Path | None, pretrained: bool) -> LoadedPrompts | None:
    """Read the user's file; None for fresh prompts."""
    if not pretrained:
        if weights:
            raise SettingsError(f"weights={weights} are learned prompts, but pretrained=False asks for fresh ones")
        return None
    if not weights:
        raise SettingsError(
            f"{spec.name} has no published weights; pass weights=FILE (on the command line `qualiclip score -m "
            f"FILE{FILE_SUFFIX}`), trained on {spec.dataset} with `{how_to_train(spec.name)}` or with the authors' code"
        )
    return load_prompts(weights, spec.name, [learner.attribute for learner in spec.learners])


def _backbone(spec: DeepPromptSpec, loaded: LoadedPrompts | None, wanted: str | None) -> str:
    """Choose the CLIP model; refuse another one than the prompts' before its weights are looked for."""
    if loaded is None or not loaded.backbone:
        return wanted or spec.backbone
    check_backbone(loaded.path, loaded.backbone)
    if wanted is not None:
        own, other = map(backbones.find_backbone, (loaded.backbone, wanted))
        if (own.vision, own.text, own.embed_dim) != (other.vision, other.text, other.embed_dim):
            raise SettingsError(
                f"{loaded.path} holds prompts learned on {loaded.backbone}, not on {wanted}; leave backbone out"
            )
    return wanted or loaded.backbone


def _length(loaded: LoadedPrompts | None, n_ctx: int | None) -> int:
    """Return the tokens of a prompt: those in a file, or of a fresh one."""
    if loaded is None:
        if n_ctx is not None and n_ctx < 1:
            raise SettingsError(f"n_ctx is {n_ctx}; expected at least one token")
        return LENGTH if n_ctx is None else n_ctx
    first = loaded.tensors.get("quality.visual.0")
    if first is None or first.dim() != 2:
        raise WeightsError(f"{loaded.path} holds no visual prompts of shape (length, width)")
    if n_ctx not in (None, first.shape[0]):
        raise SettingsError(
            f"{loaded.path.name} has prompts of {first.shape[0]} tokens, not n_ctx={n_ctx}; leave it out"
        )
    return first.shape[0]


def _weights_of(spec: DeepPromptSpec, backbone: str, wanted: str | Path | None) -> str | Path | WeightRecord:
    """Choose the CLIP model's weights: those asked for, or OpenAI's."""
    if wanted is not None:
        return wanted
    backbones.find_backbone(backbone)
    return spec.backbone_weights if backbone == spec.backbone else openai_record(backbones.plain_name(backbone))


def _image_tower(spec: DeepPromptSpec, model: LoadedModel) -> ViTTower:
    """Build the frozen image tower with the pixel statistics that the prompts were learned with."""
    statistics: Mapping[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    tower = replace(model, tower_options={**model.tower_options, **statistics}).image_tower(pos_embedding=True)
    if not isinstance(tower, ViTTower):
        raise SettingsError(
            f"{spec.name} needs a vision transformer that takes prompts, which backbone {model.backbone!r} is not; "
            "choose one such as 'ViT-B-32'"
        )
    freeze(tower)
    return tower


def _side(tower: ViTTower, backbone: str) -> int:
    """Return the side in pixels of the images that a tower's positional table is for."""
    count = len(tower.positional_embedding) - 1
    side = math.isqrt(count)
    if side * side != count or tower.patch[0] != tower.patch[1]:
        raise SettingsError(f"backbone {backbone!r} takes no square images; choose another")
    return side * tower.patch[0]
