"""What trackers of Accelerate (TensorBoard, Weights & Biases, ...) show of a validation besides the log's figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from ..errors import SettingsError
from ..explain.drawing import draw_maps
from ..explain.mapper import Mapper
from ..figures import figure_pixels
from ..images.convert import source_name
from ..images.tensors import Source, load_image
from ..metrics.base import BlindMetric
from ..metrics.prompt_iqa import PromptIQA
from ..metrics.prompts import Prompts
from ..metrics.registry import QUALICLIP_PAPER
from ..optional import require
from ..towers.base import freeze
from .alignment import PROMPTS, Aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Name of one of Accelerate's trackers, or one of the caller's own.
Tracker: TypeAlias = str | GeneralTracker
#: Takes the number of steps and figures by name; None where one does not exist.
Track: TypeAlias = Callable[[int, Mapping[str, float | None]], None]

TRACKERS = ("tensorboard", "wandb")
PROJECT = "qualiclip"  # at Weights & Biases, and the folder of TensorBoard's events


def check_trackers(trackers: Sequence[Tracker]) -> list[Tracker]:
    """Return the trackers, each once.

    Raises:
        SettingsError: an unknown one, or one whose package is not installed.
    """
    for tracker in trackers:
        if isinstance(tracker, GeneralTracker):
            continue
        if tracker not in TRACKERS:
            raise SettingsError(f"tracker is {tracker!r}; expected one of {', '.join(TRACKERS)}")
        if tracker == "wandb":
            try:
                require("wandb", "train", "the tracker wandb")
            except SettingsError as error:
                raise SettingsError("the tracker wandb needs wandb: pip install wandb") from error
    return list(dict.fromkeys(trackers))


def start_trackers(accelerator: Accelerator, out: Path, step: int) -> None:
    """Start the trackers of a run that has taken `step` steps; TensorBoard forgets later ones."""
    # WANDB_MODE=offline and the like apply.
    own = {"tensorboard": {"purge_step": step + 1}, "wandb": {"dir": str(out), "name": out.resolve().name}}
    accelerator.init_trackers(PROJECT, init_kwargs=own)


class AlignedMetric(PromptIQA):
    """The metric of a tower in training: its quality, and each antonym prompt pair as an attribute.

    Args:
        tower: copied and frozen.
        aligned: whose anchors and scale it has.
    """

    def __init__(self, tower: nn.Module, aligned: Aligned) -> None:
        BlindMetric.__init__(self, "quality", QUALICLIP_PAPER)
        self.tower = freeze(copy.deepcopy(tower))
        self.temperature = float(aligned.metadata["temperature"])
        self.logit_scale = float(torch.tensor(aligned.logit_scale, dtype=torch.float32).exp())
        self.text_tower = self.prompt_learner = self.context_file = None
        pairs = tuple((positive.rstrip(".").lower(), ((positive, negative),)) for positive, negative in PROMPTS)
        self._set_features(Prompts((("quality", tuple(PROMPTS)), *pairs)), torch.cat([aligned.anchors.cpu()] * 2))
        self.to(aligned.anchors.device)


@torch.no_grad()
def show_scores(metric: AlignedMetric, pristine: Tensor) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Score pristine photographs, and draw the quality map of the first.

    Args:
        metric: of the tower in training.
        pristine: (V, 3, S, S) uint8.

    Returns:
        The mean of each score as `score/NAME`; the drawing (H, W, 3): local scores, or occlusion for a tower without.
    """
    device = metric.prompt_features.device
    scores = torch.cat([metric(part.to(device).float().div(255)) for part in pristine.split(8)]).mean(0)
    means = {f"score/{name}": round(float(s), 5) for name, s in zip(metric.attributes, scores, strict=True)}
    return means, quality_drawing(metric, pristine[0].float().div(255), "a validation photograph")


def quality_drawing(metric: BlindMetric, picture: Source, title: str) -> NDArray[np.uint8]:
    """Draw the quality map of an image (H, W, 3): local scores, or occlusion for a tower without."""
    rgb = load_image(picture)
    found = Mapper(metric, attributes=["quality"]).maps(rgb[None])[0]
    return figure_pixels(draw_maps(rgb, found, title=title))


@contextmanager
def tracking(
    trackers: Sequence[Tracker],
    out: Path,
    net: BlindMetric,
    scores_of: Callable[[], Tensor],
    paths: Sequence[Path],
    done: int = 0,
) -> Iterator[Track]:
    """Start trackers of a run without Accelerate, yield what tells them of an epoch, and end them.

    They get the epoch's figures, the mean score of some images, and the quality map of the first. Without trackers,
    nothing is done.

    Args:
        trackers: as from `check_trackers`.
        out: folder of the run.
        net: in training.
        scores_of: returns the newest scores (N, A) of these images.
        paths: the images; may be empty.
        done: steps that an earlier attempt at this run has taken.
    """
    if not trackers:
        yield lambda step, values: None
        return
    accelerator = Accelerator(log_with=list(trackers), project_dir=out / "tensorboard")
    start_trackers(accelerator, out, done)

    @torch.no_grad()
    def track(step: int, values: Mapping[str, float | None]) -> None:
        accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if paths:
            scores = scores_of()[:, :1]
            accelerator.log({"score/quality": float(scores.double().mean())}, step=step)
            if torch.isfinite(scores).all():  # else the next step reports it
                log_image(accelerator, "map/quality", quality_drawing(net, paths[0], source_name(paths[0])), step)

    try:
        yield track
    finally:
        accelerator.end_training()


def log_image(accelerator: Accelerator, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image (H, W, 3) to every tracker that takes images."""
    for tracker in accelerator.trackers:
        take = getattr(tracker, "log_images", None)
        if take is not None:
            layout: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            take({name: image[None]}, step=step, **layout)
