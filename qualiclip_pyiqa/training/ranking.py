"""Train the ranking-aware adapter on opinion scores, with both of CLIP's towers frozen.

The authors' loss (Yu et al., ICLR 2025, arXiv:2412.06760) on batches of images under one caption. Unlike theirs, the
text tower's embeddings and last norm are frozen too, and there are no negatives, which belong to counting.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingsError
from ..evaluation.ratings import Ratings
from ..files import replacing, writing
from ..images.tensors import load_image
from ..pretrained.read import read
from ..screen import Screen
from ..towers.adapter import PREFIX, RankingAdapter, adapter_of, caption_tokens, token_tower
from ..towers.backbones import Backbone, find_backbone
from ..towers.base import freeze
from ..towers.resampling import resize_like_pillow
from .validation import correlations

FILE, LOG = "ranking-aware.pt", "log.jsonl"
_HEAD = "visual.head."  # LAION's, which has no use here
_PROJECTION = "visual.trunk.head.fc."


@dataclasses.dataclass(frozen=True)
class RankingRecipe:
    """How the adapter is trained; defaults are the authors', as far as they are known.

    Attributes:
        epochs: passes over the training images.
        batch: images of a step, all of which are compared with each other; an incomplete last batch is skipped.
        learning_rate, weight_decay: of AdamW. The authors' command line is garbled, so the rate is presumed.
        seed: determines a fresh adapter, the order, the mirroring and the dropout.

    Raises:
        SettingsError: a value out of range.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 2)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; expected at least {least}")
        if not 0 < self.learning_rate < 1:
            raise SettingsError(f"learning_rate is {self.learning_rate!r}; expected a number between 0 and 1")
        if not 0 <= self.weight_decay < 1:
            raise SettingsError(f"weight_decay is {self.weight_decay!r}; expected 0 to less than 1")


def train_ranking(
    weights: str | Path,
    caption: str,
    ratings: Ratings,
    out: Path,
    recipe: RankingRecipe | None = None,
    watched: Ratings | None = None,
    backbone: str = "convnext_large_d_320",
    device: str = "cpu",
) -> Path:
    """Train adapter and both heads, and write a checkpoint for `RankingAwareIQA(weights=..., caption=caption)`.

    Args:
        weights: a checkpoint of the authors' or of this function, whose adapter is trained further; or a whole CLIP of
            `backbone`, such as LAION's, for a fresh adapter on a random projection that stays frozen, as the authors'.
        caption: what the opinion scores are about.
        ratings: at least two images; scores of any range, averaged where an image has several. Where lower is better,
            they are mirrored within their range.
        out: folder, created if it does not exist, for the checkpoint and `log.jsonl`.
        recipe: see `RankingRecipe`.
        watched: further rated images, whose SRCC and PLCC are logged after each epoch and decide nothing.
        backbone: see `RankingAwareIQA`.
        device: of the training.

    Returns:
        `out / "ranking-aware.pt"`, in the layout of open_clip's training.

    Raises:
        SettingsError: no caption, the file exists, fewer than two images or a single score, a loss that is not finite.
        WeightsError: the weights are missing, damaged or of another model.
        ImageError: an image that cannot be read.
    """
    if not caption.strip():
        raise SettingsError("the caption is empty; expected what the opinion scores are about")
    recipe = recipe or RankingRecipe()
    target = out / FILE
    if target.exists():
        raise SettingsError(f"{target} exists; choose another folder")
    ratings = ratings.averaged()
    targets = _targets(ratings)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        definition = find_backbone(backbone)
        state = _prepared(read(weights).tensors, definition)
        network = _Network(definition, state, caption, str(weights)).to(device)
        out.mkdir(parents=True, exist_ok=True)
        with (out / LOG).open("w", encoding="utf-8") as log:
            settings = {"recipe": dataclasses.asdict(recipe), "caption": caption, "backbone": definition.name}
            log.write(json.dumps(settings | {"training_images": len(targets)}) + "\n")
            for figures in _epochs(network, ratings, targets, recipe, watched):
                log.write(json.dumps(figures) + "\n")
                log.flush()
    trained = {f"{PREFIX}{key}": value.detach().cpu() for key, value in network.adapter.state_dict().items()}
    # Not to the path, whose random name torch would write into the file.
    with writing(target), replacing(target) as part, part.open("wb") as file:
        torch.save({"epoch": recipe.epochs, "name": "ranking-aware", "state_dict": state | trained}, file)
    return target


def ranking_loss(scores: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compute the parts of the authors' loss on images under one caption, and their sum under `loss`.

    Shape:
        scores, targets: (N,), of any range; logits: (N, N), see `RankingAdapter.compare` -> scalars:
        `regression` = 0.2 log(1 + SmoothL1(scores, targets)), `rank` = the binary cross-entropy of the logits to
        whether the row's target is higher than the column's.

    Example:
        >>> scores, targets = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 3.0])
        >>> parts = ranking_loss(scores, torch.tensor([[0.1, -0.4], [0.9, -0.2]]), targets)
        >>> {name: round(value.item(), 4) for name, value in parts.items()}
        {'regression': 0.0811, 'rank': 0.5492, 'loss': 0.6303}
    """
    regression = 0.2 * torch.log1p(F.smooth_l1_loss(scores, targets))
    higher = (targets[:, None] > targets[None]).to(logits.dtype)
    rank = F.binary_cross_entropy_with_logits(logits, higher)
    return {"regression": regression, "rank": rank, "loss": regression + rank}


class _Network(nn.Module):
    """Frozen towers and the adapter to train."""

    text: Tensor

    def __init__(self, definition: Backbone, state: Mapping[str, Tensor], caption: str, what: str) -> None:
        super().__init__()
        self.size = int(definition.vision["image_size"])
        self.tower = freeze(token_tower(definition, state, what))
        self.register_buffer("text", caption_tokens(definition, state, caption, what), persistent=False)
        fresh = not any(key.startswith(PREFIX) for key in state)
        self.adapter = RankingAdapter(definition.embed_dim) if fresh else adapter_of(definition.embed_dim, state, what)
        for parameter in self.adapter.parameters():
            parameter.data = parameter.data.clone()  # the file may be memory-mapped

    def forward(self, images: list[Tensor], mirrored: Tensor, filter: str) -> Tensor:
        """Fuse images (3, H, W) of any sizes with the caption: (N, L, W)."""
        device = self.text.device
        with torch.no_grad():
            rows = [resize_like_pillow(rgb[None].to(device), self.size, self.size, filter) for rgb in images]
            pixels = torch.cat([row.flip(-1) if flip else row for row, flip in zip(rows, mirrored, strict=True)])
            tokens = self.tower(pixels).flatten(2).transpose(1, 2)
        fused: Tensor = self.adapter(tokens, self.text)
        return fused


def _epochs(
    network: _Network, ratings: Ratings, targets: Tensor, recipe: RankingRecipe, watched: Ratings | None
) -> Iterator[dict[str, float | None]]:
    """Train; yield the mean losses of each epoch, and the agreement with the watched images."""
    optimiser = torch.optim.AdamW(
        network.adapter.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    batch = min(recipe.batch, len(targets))
    starts = range(0, len(targets) - batch + 1, batch)
    with tqdm(total=recipe.epochs * len(starts), desc="train", unit="step", file=Screen(), disable=None) as bar:
        for epoch in range(1, recipe.epochs + 1):
            network.adapter.train()
            order = torch.randperm(len(targets))
            sums: dict[str, float] = {}
            for start in starts:
                chosen = order[start : start + batch]
                images = [load_image(ratings.paths[int(index)]) for index in chosen]
                fused = network(images, torch.rand(batch, dtype=torch.float32) < 0.5, "bicubic")
                adapter = network.adapter
                parts = ranking_loss(adapter.score(fused), adapter.compare(fused), targets[chosen].to(fused))
                if not math.isfinite(float(parts["loss"].detach())):
                    raise SettingsError(f"the loss is not finite in epoch {epoch}; choose a lower learning rate")
                optimiser.zero_grad(set_to_none=True)
                parts["loss"].backward()
                optimiser.step()
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(starts)
                bar.update()
            yield {"epoch": epoch, **sums, **_agreement(network, watched)}


@torch.no_grad()
def _agreement(network: _Network, watched: Ratings | None) -> dict[str, float | None]:
    if watched is None or not watched.paths:
        return {}
    network.adapter.eval()
    averaged, plain = watched.averaged(), torch.zeros(1, dtype=torch.bool)
    scores = [float(network.adapter.score(network([load_image(path)], plain, "bilinear"))) for path in averaged.paths]
    srcc, plcc = correlations(scores, averaged)
    return {"validation_srcc": srcc, "validation_plcc": plcc}


def _targets(ratings: Ratings) -> Tensor:
    """Return the opinion scores, mirrored within their range where lower is better: (n,)."""
    opinions = torch.tensor(ratings.opinions, dtype=torch.float32)
    if len(opinions) < 2 or opinions.min() == opinions.max():
        raise SettingsError(f"{len(opinions)} rated images of one score teach no order; expected at least two scores")
    return opinions.min() + opinions.max() - opinions if ratings.lower_better else opinions


def _prepared(state: Mapping[str, Tensor], definition: Backbone) -> dict[str, Tensor]:
    """Return a whole CLIP's tensors in the layout of a checkpoint: with a random projection of image tokens."""
    out = {key: value for key, value in state.items() if not key.startswith(_HEAD)}
    norm = out.get("visual.trunk.head.norm.weight")
    if f"{_PROJECTION}weight" not in out and norm is not None:
        projection = nn.Conv2d(len(norm), definition.embed_dim, 1)
        out |= {f"{_PROJECTION}{key}": value for key, value in projection.state_dict().items()}
    return out
