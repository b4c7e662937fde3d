"""Predict how long a replica needs for the images that it has accepted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOW = 64  # images whose time counts


class Pace:
    """Measures the seconds per image while there is work, over the last images.

    Args:
        clock: returns seconds.

    Attributes:
        ahead: number of images accepted and not answered yet.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.ahead = 0
        self._clock = clock
        self._since = clock()
        self._busy = 0.0  # seconds with work until `_since`
        self._ends: deque[float] = deque([0.0], WINDOW + 1)  # of images, in seconds with work

    @contextmanager
    def images(self, count: int) -> Iterator[None]:
        """Work on images; they are measured if the context ends without an exception."""
        self._update()
        self.ahead += count
        try:
            yield
            self._update()
            self._ends.extend([self._busy] * count)
        finally:
            self._update()
            self.ahead -= count

    def wait(self, count: int = 0) -> float:
        """Return the predicted seconds until all images, and so many more, are answered; 0 without a measurement."""
        self._update()
        measured = len(self._ends) - 1
        return (self.ahead + count) * (self._busy - self._ends[0]) / measured if measured else 0.0

    def _update(self) -> None:
        now = self._clock()
        if self.ahead:
            self._busy += now - self._since
        self._since = now
