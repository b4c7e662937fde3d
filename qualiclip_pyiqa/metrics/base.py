"""Base class of all blind metrics: image features from a frozen tower, and scores of those features."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ImageError, SettingsError, did_you_mean, kind_of
from ..images.convert import MIN_SIDE, check_size

# How `metric(path)` and, by default, `Scorer` read images.
READING = (
    "EXIF orientation applied; embedded ICC profiles converted to sRGB; alpha laid over white; "
    "8-bit levels divided by 255, 16-bit levels by 65535"
)


class BlindMetric(nn.Module):
    """Base class of blind (no-reference) metrics: `forward(x)` is `score(features(x))`.

    A subclass sets `tower` and implements `rate`, and extends `encode` if its features take more than one pass of the
    tower. This class provides input checks, windows (`tile`), dtypes, the tower's eval mode and the common part of
    `describe`. In a `Scorer`, metrics with equal towers and the same `encode` share their features.

    The tower's tensors should be non-persistent buffers (`towers.base.freeze`), so that the state dict holds only what
    was learned for the metric.

    Args:
        model_type: name of the metric.
        paper: reference of the method.
        score_range: lowest and highest score, such as `"0, 1"`.
        lower_better: whether a lower score means a better image.
        tile: score windows of at most this many pixels a side, evenly spread over the image, and average the scores.
            For towers whose time grows faster than the image. Scores differ from those of the whole image, and
            `describe()` states the rule. None, the default: the whole image at its own size.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype
        -> (N, A), float32 or, for a metric in double precision, float64; one column for each of `attributes`.

    Raises:
        SettingsError: `tile` is not an integer of at least 32, or an option that the metric does not have.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Brightness(BlindMetric):
        ...     def __init__(self):
        ...         super().__init__("brightness", paper="none")
        ...         self.tower = nn.Identity()
        ...     def encode(self, rgb):
        ...         return rgb.mean(dim=(2, 3))
        ...     def rate(self, features):
        ...         return features.mean(dim=1, keepdim=True)
        >>> Brightness()(torch.full((2, 3, 32, 48), 0.25))
        tensor([[0.2500],
                [0.2500]])
    """

    tower: nn.Module
    minimum_side: int = MIN_SIDE  # of an image in pixels
    _like: Tensor

    def __new__(cls, *_args: object, **options: object) -> Self:
        """Refuse options that the metric does not have, by its name; Python would name `__init__`.

        Raises:
            SettingsError: an unknown option.
        """
        parameters = inspect.signature(cls.__init__).parameters.values()
        known = [each.name for each in parameters if each.name not in ("self", "model_type")]
        wrong = next((name for name in options if name not in (*known, "model_type")), None)
        if wrong is not None and all(each.kind is not each.VAR_KEYWORD for each in parameters):
            raise SettingsError(
                f"{options.get('model_type', cls.__name__)} has no option {wrong!r}; expected some of "
                f"{', '.join(known)}{did_you_mean(wrong, known)}"
            )
        return super().__new__(cls)

    def __init__(
        self,
        model_type: str,
        paper: str,
        score_range: str = "0, 1",
        lower_better: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < MIN_SIDE):
            raise SettingsError(f"tile is {tile!r}; expected None or an integer of at least {MIN_SIDE}")
        self.model_type = model_type
        self.paper = paper
        self.score_range = score_range
        self.lower_better = lower_better
        self.tile = tile
        # Follows `.to()`, and so holds the metric's device and dtype.
        self.register_buffer("_like", torch.empty(0, dtype=torch.float32), persistent=False)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the A columns of the scores."""
        return ("quality",)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Compute image features, which metrics with equal towers can share.

        Shape:
            x: as in `forward` -> (N, D), or with `tile` (N, T, D) for T windows.

        Raises:
            ImageError: wrong type, shape or dtype, or an image smaller than `minimum_side`. Values are not checked.
        """
        x = self.prepare(x)
        if self.tile is None:
            return self.encode(x)
        return torch.stack([self.encode(window) for window in windows(x, self.tile)], dim=1)

    def prepare(self, x: Tensor) -> Tensor:
        """Check images, and convert them to RGB (N, 3, H, W) in the metric's dtype, as `encode` takes them.

        Raises:
            ImageError: as `features`.
        """
        return check_batch(x, self.minimum_side).to(self._like.dtype)

    def score(self, features: Tensor) -> Tensor:
        """Score the output of `features`: (N, D), or (N, T, D) with the mean over T windows, -> (N, A)."""
        if features.dim() == 2:
            return self.rate(features)
        return self.rate(features.flatten(0, 1)).unflatten(0, features.shape[:2]).mean(dim=1)

    def encode(self, rgb: Tensor) -> Tensor:
        """Compute features (N, D) of images (N, 3, H, W) in the metric's dtype; by default one pass of the tower."""
        features: Tensor = self.tower(rgb)
        return features

    def rate(self, features: Tensor) -> Tensor:
        """Score features: (M, D) -> (M, A). Every subclass implements it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement rate(features)")

    def encodes_like(self, other: BlindMetric) -> bool:
        """Whether two metrics with equal towers have equal features.

        A metric whose `encode` depends on more than the tower extends this.
        """
        own, others = ((type(metric).features, type(metric).encode, metric.tile) for metric in (self, other))
        return own == others

    def train(self, mode: bool = True) -> BlindMetric:
        """Set the training mode; the frozen tower always stays in eval mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def describe(self) -> dict[str, Any]:
        """Return everything that decides a score, in plain values, for a log or a paper's appendix.

        Subclasses add their own entries.
        """
        return {
            "metric": self.model_type,
            "architecture": type(self).__name__,
            "resize": "none: the whole image at its own size"
            if self.tile is None
            else f"none: the mean score of windows of at most {self.tile}x{self.tile} pixels, evenly spread",
            "reading": READING,
            "minimum_side": self.minimum_side,
            "score_range": self.score_range,
            "lower_better": self.lower_better,
            "direction": "lower is better" if self.lower_better else "higher is better",
            "paper": self.paper,
            "version": version("qualiclip-pyiqa"),
        }

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the frozen buffers, which are equal on all ranks and which DistributedDataParallel need not send.

        The attribute is private to PyTorch; if it is renamed, training only sends more.
        """
        persistent = self.state_dict().keys()
        return [name for name, _ in self.named_buffers() if name not in persistent]


def check_batch(x: Tensor, least: int = MIN_SIDE) -> Tensor:
    """Validate images and expand grey ones to (N, 3, H, W).

    Raises:
        ImageError: wrong type, shape or dtype, no image, or one with a side of less than `least` pixels.
    """
    if not isinstance(x, Tensor):
        raise ImageError(
            f"image is {kind_of(x)}; expected a tensor (N, 3, H, W), which qualiclip_pyiqa.as_batch makes of a path, "
            "PIL image or array"
        )
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ImageError(f"image tensor has shape {tuple(x.shape)}; expected (N, 3, H, W) or (N, 1, H, W)")
    if not len(x):  # whose mean, as of a loss, would be NaN
        raise ImageError(f"image tensor has shape {tuple(x.shape)}; expected at least one image")
    if not x.is_floating_point():
        raise ImageError(f"image tensor has dtype {x.dtype}; expected floating point in 0..1")
    check_size(x.shape[2], x.shape[3], "image", least)
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)


def pixel_statistics(tower: nn.Module, name: str) -> list[float] | None:
    """Return a tower's `mean` or `std` for RGB in 0..1; None for a tower without pixel normalisation."""
    values = getattr(tower, name, None)
    return None if values is None else [round(value, 6) for value in values.flatten().tolist()]


def windows(x: Tensor, tile: int) -> list[Tensor]:
    """Cut images (N, 3, H, W) into the fewest windows of at most `tile` pixels a side that cover them, evenly."""
    tops, lefts = (_window_starts(side, tile) for side in x.shape[2:])
    return [x[:, :, top : top + tile, left : left + tile] for top in tops for left in lefts]


def _window_starts(side: int, tile: int) -> list[int]:
    """Return the first pixels of the fewest windows of `tile` pixels that cover `side`, evenly spread."""
    count = -(-side // tile)
    return [0] if count == 1 else [round(k * (side - tile) / (count - 1)) for k in range(count)]
