"""What each step of `qualiclip tune` sees: which images, cropped and mirrored how, and their features.

Where only texts are learned, features of whole images are computed once for each orientation. With random crops the
tower runs at every step, without gradient; with prompts in the image tower, with a gradient in these.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ImageError, SettingsError
from ..images.convert import read_size, source_name
from ..images.tensors import load_image
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from ..metrics.prompt_iqa import PromptIQA
from ..screen import Screen
from .recipes import Recipe

THREADS = min(8, os.cpu_count() or 1)  # that decode images; as many batches of crops are prepared ahead

Item = TypeVar("Item")
#: A metric whose prompts can be learned.
Tunable: TypeAlias = PromptIQA | DeepPromptIQA


class Draw(NamedTuple):
    """Images of a step (B,), which of them are mirrored (B,), and where they are cropped: (B, 2) in 0..1, y and x."""

    indices: Tensor
    mirrored: Tensor
    places: Tensor


def plan(count: int, recipe: Recipe, done: int = 0) -> Iterator[Draw]:
    """Draw the images of every step after the first `done`, determined by the recipe's seed."""
    return islice(_plan(count, recipe), done, None)


def _plan(count: int, recipe: Recipe) -> Iterator[Draw]:
    generator = torch.Generator().manual_seed(recipe.seed)
    batch = min(recipe.batch, count)
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator)
        mirrored = torch.rand(count, generator=generator, dtype=torch.float32) < 0.5
        places = torch.rand(count, 2, generator=generator, dtype=torch.float32)
        for start in range(0, count - batch + 1, batch):
            part = slice(start, start + batch)
            yield Draw(order[part], mirrored[part] & recipe.mirror, places[part])


def batches_of(net: Tunable, paths: Sequence[Path], recipe: Recipe, done: int = 0) -> Iterator[Tensor]:
    """Yield the image features (B, D) of each step after the first `done`, to be taken as by `net.score`."""
    if isinstance(net, DeepPromptIQA):
        return _view_features(net, paths, recipe, done)
    return (_crop_features if recipe.crop else _cached_features)(net, paths, recipe, done)


def check_sizes(net: Tunable, training: Sequence[Path], watched: Sequence[Path], recipe: Recipe) -> None:
    """Refuse images that are too small, before any training.

    Raises:
        SettingsError: crops of another size than the metric's windows.
        ImageError: an image that is smaller than the crop or the smallest that can be scored, or unreadable.
    """
    if not isinstance(net, DeepPromptIQA):
        if recipe.crop:
            _check_sides(
                training, recipe.crop, f"the crop of {recipe.crop} pixels", "use a smaller crop, or 0 for whole images"
            )
        return
    if recipe.crop not in (0, net.window):
        raise SettingsError(f"crop is {recipe.crop}; {net.model_type} learns on its windows of {net.window} pixels")
    _check_sides([*training, *watched], net.window, f"a window of {net.window} pixels", "enlarge them")


def _check_sides(paths: Sequence[Path], least: int, what: str, advice: str) -> None:
    small = {path: side for path in paths if (side := min(read_size(path))) < least}
    if small:
        worst = min(small, key=lambda path: small[path])
        raise ImageError(
            f"{len(small)} of {len(paths)} images are smaller than {what} ({source_name(worst)} has a side of "
            f"{small[worst]}); leave them out, or {advice}"
        )


def _ahead(load: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
    """Yield `load` of each item in order, a few ahead in threads: decoding mostly runs without Python's lock."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@torch.no_grad()
def whole_features(net: PromptIQA, paths: Sequence[Path], what: str, mirror: bool = False) -> Tensor:
    """Compute the image features (N, D) of whole images at their own sizes."""
    device = net.prompt_features.device
    rows = [
        net.features((rgb.flip(-1) if mirror else rgb)[None].to(device))
        for rgb in tqdm(
            _ahead(load_image, paths), what, len(paths), unit="image", file=Screen(), leave=False, disable=None
        )
    ]
    return torch.cat(rows) if rows else torch.empty(0, device=device)


@torch.no_grad()
def whole_scores(net: Tunable, paths: Sequence[Path]) -> Tensor:
    """Score whole images: (N, A). The metric is in eval mode meanwhile, so that texts are encoded once."""
    was_training, device = net.training, net.prompt_features.device
    net.eval()
    shown = tqdm(
        _ahead(load_image, paths),
        "validation images",
        len(paths),
        unit="image",
        file=Screen(),
        leave=False,
        disable=None,
    )
    rows = [net(rgb[None].to(device)) for rgb in shown]
    net.train(was_training)
    return torch.cat(rows)


def _cached_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe, done: int) -> Iterator[Tensor]:
    """Yield the image features (B, D) of each step's whole images, all computed before the first step."""
    plain = whole_features(net, paths, "training images")
    mirrored = whole_features(net, paths, "mirrored", mirror=True)
    for draw in plan(len(paths), recipe, done):
        yield torch.where(draw.mirrored[:, None].to(plain.device), mirrored[draw.indices], plain[draw.indices])


def _crop_features(net: PromptIQA, paths: Sequence[Path], recipe: Recipe, done: int) -> Iterator[Tensor]:
    """Yield the image features (B, D) of each step's random crops."""

    def crops(draw: Draw) -> Tensor:
        return torch.stack(
            [_cropped(load_image(paths[int(k)]), place, recipe.crop, m) for k, m, place in zip(*draw, strict=True)]
        )

    for batch in _ahead(crops, plan(len(paths), recipe, done)):
        with torch.no_grad():
            features = net.features(batch.to(net.prompt_features.device))
        yield features  # outside of no_grad, which would otherwise apply to the caller too


def _view_features(net: DeepPromptIQA, paths: Sequence[Path], recipe: Recipe, done: int) -> Iterator[Tensor]:
    """Yield the features (B, A * D) of a random window of each step's images, with a gradient in the prompts."""

    def seen(index: Tensor, mirrored: Tensor, place: Tensor) -> Tensor:
        rgb = load_image(paths[int(index)])
        views = [_cropped(rgb, place, net.window, mirrored)]
        whole = net.whole_view(rgb[None])
        if whole is not None:
            views.append(whole[0].flip(-1) if mirrored else whole[0])
        return torch.stack(views)

    def views(draw: Draw) -> Tensor:
        return torch.stack([seen(*each) for each in zip(*draw, strict=True)])

    like = net.prompt_features
    for batch in _ahead(views, plan(len(paths), recipe, done)):
        yield net.encode_views(batch.to(like), net.visual_prompts())


def _cropped(rgb: Tensor, place: Tensor, crop: int, mirrored: Tensor) -> Tensor:
    """Cut a square out of an image (3, H, W); `place` is (2,) in 0..1, y and x."""
    top, left = (int(p * (side - crop + 1)) for p, side in zip(place.tolist(), rgb.shape[1:], strict=True))
    rgb = rgb[:, top : top + crop, left : left + crop]
    return rgb.flip(-1) if mirrored else rgb
