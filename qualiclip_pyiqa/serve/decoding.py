"""Decode uploads in worker processes, for coroutines: bounded in number, in bytes and in time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from ..errors import SettingsError
from ..images.convert import ReadRules
from ..images.workers import DecodedImage, Decoder

# Bytes of decoded images waiting to be scored, beyond which no further one is decoded.
DECODED_BYTES = 2**28


class Decoding:
    """Decoding processes that a server's coroutines share.

    Args:
        workers: number of processes, at least 1.
        rules: how files become pixels.
        timeout: seconds per image, after which its process is replaced.

    Attributes:
        failure: why the processes do not work, if they do not; None while they do.

    Raises:
        SettingsError: this Python cannot start other processes.
    """

    def __init__(self, workers: int, rules: ReadRules, timeout: float) -> None:
        self._decoder = Decoder(workers, 2 * workers, self, rules, timeout)
        if not self._decoder.workers:
            raise SettingsError("a server needs decoding processes, which cannot be started here (see the log)")
        self.workers = workers
        self.failure: Exception | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[np.ndarray]] = {}
        self._slots = asyncio.Semaphore(self._decoder.ahead)
        self._held = 0  # bytes of pixels in use
        self._room = asyncio.Event()
        self._room.set()

    @asynccontextmanager
    async def pixels(self, data: bytes) -> AsyncIterator[np.ndarray]:
        """Decode an image, whose memory counts until the context ends.

        Raises:
            ImageError: it cannot be decoded, or not in time.
        """
        pixels = await self._decode(data)
        self._hold(pixels.nbytes)
        try:
            yield pixels
        finally:
            self._hold(-pixels.nbytes)

    def put(self, image: DecodedImage, /) -> None:
        """Take a result from a thread of the decoder."""
        future = self._waiting.pop(image.number)
        future.get_loop().call_soon_threadsafe(self._take, future, image.result)

    def close(self) -> None:
        """Kill the processes."""
        self._decoder.close()

    async def _decode(self, data: bytes) -> np.ndarray:
        await self._slots.acquire()
        try:
            await self._room.wait()
        except BaseException:
            self._slots.release()
            raise
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._decoder.submit(number, data)
        return await future  # the slot is free when the result is here, even if nobody waits for it any more

    def _take(self, future: asyncio.Future[np.ndarray], result: np.ndarray | Exception) -> None:
        self._decoder.pending -= 1
        self._slots.release()
        if isinstance(result, SettingsError):  # the processes do not start
            self.failure = result
        if future.cancelled():
            return
        if isinstance(result, np.ndarray):
            future.set_result(result)
        else:
            future.set_exception(result)

    def _hold(self, count: int) -> None:
        self._held += count
        if self._held < DECODED_BYTES:
            self._room.set()
        else:
            self._room.clear()
