"""Settings of a server: the arguments of `serve.app.build`."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from ..errors import SettingsError
from ..images.convert import ReadRules
from ..scoring.building import blind_only
from ..scoring.scorer import Scorer

# CPU cores of a replica without a GPU; small batches gain little from more.
CORES = 4


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class ServeSettings(BaseModel):
    """What a server scores by, and what it accepts.

    Attributes:
        metrics: specs as for `Scorer`: names, files that exist on every node, with or without prompts; one, or a list.
        precision, compile, batch_size, ignore_orientation, ignore_profile, allow_truncated: as for `Scorer`.
        batch_wait: seconds that an image waits for others to share its batch.
        workers: number of decoding processes of a replica, at least 1. Default: as for `Scorer`, by its `cpus`.
        max_bytes: of a request's body.
        max_pixels: of an image; larger ones are refused before they are decoded.
        max_images: of a request.
        timeout: seconds from the arrival of a request at a replica to its answer; what cannot be answered in time is
            refused as soon as this is known.
        decode_timeout: seconds to decode an image.
        replicas: a number, "MIN:MAX", or "auto" for Ray Serve's own automatic scaling.
        cpus: CPU cores of a replica. Default: 4 or the machine's; 1 beside a GPU.
        gpus: GPUs of a replica, in fractions to share one. Default: 1 if this machine has any.
        max_ongoing: number of requests that a replica works on or keeps waiting.
        max_queued: number of requests that wait for a replica at each proxy; more are answered with 503.

    Example:
        >>> ServeSettings(metrics="qualiclip-mini+").metrics
        ('qualiclip-mini+',)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: Annotated[tuple[str, ...], BeforeValidator(_several)]
    precision: str = "fp32"
    compile: bool = False
    batch_size: int | None = Field(None, ge=1)
    batch_wait: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)
    workers: int | None = Field(None, ge=1)
    ignore_orientation: bool = False
    ignore_profile: bool = False
    allow_truncated: bool = False
    max_bytes: int = Field(32 * 2**20, ge=1)
    max_pixels: int = Field(50_000_000, ge=1)
    max_images: int = Field(16, ge=1)
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    decode_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    replicas: str = "1"
    cpus: float | None = Field(None, gt=0)
    gpus: float | None = Field(None, ge=0)
    max_ongoing: int = Field(64, ge=1)
    max_queued: int = Field(64, ge=1)

    @field_validator("replicas", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> str:
        text = str(value)
        numbers = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if text != "auto" and (numbers is None or int(numbers[2] or numbers[1]) < max(1, int(numbers[1]))):
            raise ValueError("expected a number of at least 1, MIN:MAX or auto")
        return text

    def rules(self) -> ReadRules:
        """Return how uploads become pixels."""
        return ReadRules(self.ignore_orientation, self.allow_truncated, self.max_pixels, self.ignore_profile)

    def resources(self) -> tuple[float, float]:
        """Return the CPU cores and GPUs of a replica."""
        gpus = self.gpus
        if gpus is None:
            import torch

            gpus = float(torch.cuda.is_available())
        return self.cpus or (1 if gpus else min(CORES, os.cpu_count() or 1)), gpus

    def scorer(self, device: str) -> Scorer:
        """Build the metrics.

        Raises:
            SettingsError, PromptError, WeightsError: as `Scorer`.
        """
        return Scorer(
            blind_only(self.metrics, "on a server"),
            device=device,
            batch_size=self.batch_size,
            workers=self.workers,
            precision=self.precision,
            compile=self.compile,
            max_pixels=self.max_pixels,
            ignore_orientation=self.ignore_orientation,
            allow_truncated=self.allow_truncated,
            decode_timeout=self.decode_timeout,
            ignore_profile=self.ignore_profile,
        )


def make_settings(**values: Any) -> ServeSettings:
    """Make settings; a wrong one is a `SettingsError` of one line.

    Example:
        >>> make_settings(metrics=["qualiclip-mini"], max_bytes=0)
        Traceback (most recent call last):
            ...
        qualiclip_pyiqa.errors.SettingsError: max_bytes is 0: input should be greater than or equal to 1
    """
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, first["loc"])) or "settings"
        raise SettingsError(f"{where} is {first['input']!r}: {message[:1].lower()}{message[1:]}") from None
