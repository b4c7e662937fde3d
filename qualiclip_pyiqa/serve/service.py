"""Score uploads: decoding processes, one thread for the networks, batches, maps. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from ..errors import ImageError
from ..explain.quality_map import QualityMap
from ..images.advice import without_advice
from ..images.formats import UNKNOWN_FORMAT, usable_formats
from ..metrics.words import meaning_of
from ..scoring.network import Scored
from .answers import ImageAnswer, MapForm, map_answer
from .decoding import Decoding
from .maps import Maps, overlay
from .settings import ServeSettings
from .uploads import Upload, Uploads

#: Scores one image's pixels, as part of a batch.
ScoreOne: TypeAlias = Callable[[np.ndarray], Awaitable[Scored]]
#: Takes the outcome of each image: "scored", "refused" (it cannot be decoded) or "failed" (no metric scored it).
Count: TypeAlias = Callable[[str], object]

_Value = TypeVar("_Value")
_USUAL = 512, 384  # width and height of the image whose time is the first measurement


@dataclass(frozen=True)
class MapWish:
    """Which map a request asks for; None of metric and attribute: the first."""

    form: MapForm
    metric: str | None = None
    attribute: str | None = None


class Service:
    """What a replica does. `score_one` and `count` may be replaced before use.

    Args:
        settings: of the server.
        device: for the networks.

    Raises:
        SettingsError, PromptError, WeightsError: as `Scorer`; or decoding processes cannot be started.
    """

    def __init__(self, settings: ServeSettings, device: str = "cpu") -> None:
        self.settings = settings
        self.scorer = settings.scorer(device)
        self._network = self.scorer.networks[0]
        self.maps = Maps(settings.metrics, self._network.metrics)
        self.decoding = Decoding(max(1, self.scorer.workers), settings.rules(), settings.decode_timeout)
        self.uploads = Uploads(settings.max_bytes, settings.max_images, settings.timeout)
        self._thread = ThreadPoolExecutor(1, "network")
        self.score_one: ScoreOne = self._alone
        self.count: Count = lambda outcome: None
        self._description: dict[str, Any] | None = None

    async def warm_up(self) -> None:
        """Start the decoding processes, run the networks, measure their pace, and find out which metrics have maps."""
        file = io.BytesIO()
        scale = min(1.0, math.sqrt(self.settings.max_pixels / math.prod(_USUAL)))
        size = (int(_USUAL[0] * scale), int(_USUAL[1] * scale))
        Image.linear_gradient("L").resize(size).convert("RGB").save(file, "JPEG")
        image = Upload(None, file.getvalue())
        await asyncio.gather(*(self._scored(image, None) for _ in range(self.decoding.workers)))
        with self.uploads.pace.images(1):
            await self._scored(image, None)
        await self._run(self.maps.probe, np.full((64, 96, 3), 120, np.uint8))

    async def score(self, upload: Upload, wish: MapWish | None = None) -> ImageAnswer:
        """Score an upload; an image that cannot be decoded is an answer with an error.

        Raises:
            SettingsError: the wished map does not exist.
        """
        try:
            answer = await self._scored(upload, wish)
        except ImageError as error:
            self.count("refused")
            return ImageAnswer(name=upload.name, error=named(upload, error))
        self.count("scored" if answer.scores else "failed")
        return answer

    async def overlay(self, upload: Upload, wish: MapWish) -> bytes:
        """Map an upload: a PNG to be laid over it.

        Raises:
            ImageError: it cannot be decoded.
            SettingsError: there is no such map.
        """
        try:
            async with self.decoding.pixels(upload.data) as pixels:
                found = await self._mapped(pixels, wish)
        except ImageError as error:
            self.count("refused")
            raise ImageError(named(upload, error)) from error
        self.count("mapped")
        return await asyncio.to_thread(overlay, found)

    async def score_batch(self, images: Sequence[np.ndarray]) -> list[Scored]:
        """Score images of any sizes, those of one size together, in their order."""
        return await self._run(self._by_size, images)

    async def describe(self) -> dict[str, Any]:
        """Return everything that affects the scores, as `Scorer.describe`."""
        if self._description is None:
            self._description = await self._run(self.scorer.describe)
        return self._description

    def close(self) -> None:
        """Kill the decoding processes, and wait for the networks."""
        self.decoding.close()
        self._thread.shutdown(cancel_futures=True)

    async def _scored(self, upload: Upload, wish: MapWish | None) -> ImageAnswer:
        async with self.decoding.pixels(upload.data) as pixels:
            scored = await self.score_one(pixels)
            found = None if wish is None else await self._mapped(pixels, wish)
            height, width = pixels.shape[:2]
        answered = None if wish is None or found is None else await asyncio.to_thread(map_answer, found, wish.form)
        return ImageAnswer(
            name=upload.name,
            width=width,
            height=height,
            scores=scored.scores,
            lower_better={column: self.scorer.lower_better[column] for column in scored.scores},
            meanings={
                column: meaning_of(self.scorer.comparatives[column], self.scorer.lower_better[column])
                for column in scored.scores
            },
            error=scored.error,
            map=answered,
        )

    async def _alone(self, pixels: np.ndarray) -> Scored:
        return (await self.score_batch([pixels]))[0]

    async def _mapped(self, pixels: np.ndarray, wish: MapWish) -> QualityMap:
        return await self._run(self.maps.map, pixels, wish.metric, wish.attribute)

    async def _run(self, work: Callable[..., _Value], *arguments: Any) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _by_size(self, images: Sequence[np.ndarray]) -> list[Scored]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, pixels in enumerate(images):
            groups.setdefault((pixels.shape, pixels.dtype), []).append(number)
        found: dict[int, Scored] = {}
        for numbers in groups.values():
            found.update(zip(numbers, self._network([images[n] for n in numbers]), strict=True))
        return [found[number] for number in range(len(images))]


def named(upload: Upload, error: ImageError) -> str:
    """Return an error of an upload, which has no path, with its file's name, and with what a client can do about it."""
    predicate = without_advice(str(error).removeprefix("bytes "))
    if predicate == UNKNOWN_FORMAT:
        known = ", ".join(usable_formats()[:8])
        predicate = f"is not in a supported format; expected {known} or another of GET /describe"
    return f"{upload.name or 'the image'} {predicate}"
