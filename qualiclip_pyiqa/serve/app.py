"""The Ray Serve application. Replicas, autoscaling, queues and batches are Ray Serve's own.

qualiclip serve qualiclip-mini+
serve run qualiclip_pyiqa.serve.app:build metrics=qualiclip-mini+
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.util.metrics import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..scoring.allocator import keep_freed_memory
from ..scoring.network import Scored
from .figures import cluster_figures
from .http import make_app
from .service import Service
from .settings import ServeSettings, make_settings

logger = logging.getLogger(__name__)

NAME = "qualiclip"
# Ray Serve's warnings (a slow start, a replica that is slow to tell its queue's length) are nothing that a user can act
# on, and it writes them to the terminal too; `/metrics` counts requests.
LOGGING: dict[str, Any] = {"log_level": "ERROR", "enable_access_log": False}


class ClientsLeave:
    """Middleware: what Ray raises when a client has left becomes ASGI's message for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self.app(scope, received, send)


def _app() -> FastAPI:
    def service() -> Service:
        replica: Any = serve.get_replica_context().servable_object
        own: Service = replica.service
        return own

    app = make_app(service, cluster_figures)
    app.add_middleware(ClientsLeave)
    return app


@serve.deployment(name=NAME)
@serve.ingress(_app)
class QualityServer:
    """A replica: HTTP, decoding processes and networks."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # as serve.ingress allows
        cpus, gpus = settings.resources()
        keep_freed_memory()
        torch.set_num_threads(max(1, int(cpus)))
        self.service = Service(settings, "cuda" if gpus else "cpu")
        await self.service.warm_up()
        self.score_batch.set_max_batch_size(self.service.scorer.batch_size)  # type: ignore[attr-defined]
        self.score_batch.set_batch_wait_timeout_s(settings.batch_wait)  # type: ignore[attr-defined]
        self.service.score_one = self.score_batch
        images = Counter("qualiclip_images", "Images by outcome: scored, mapped, refused or failed.", ("outcome",))
        self.service.count = lambda outcome: images.inc(tags={"outcome": outcome})

    @serve.batch
    async def score_batch(self, images: list[np.ndarray]) -> list[Scored]:
        return await self.service.score_batch(images)

    def check_health(self) -> None:
        """Let Ray Serve replace a replica whose decoding processes do not work."""
        if self.service.decoding.failure is not None:
            raise self.service.decoding.failure

    def __del__(self) -> None:
        if hasattr(self, "service"):  # it was built
            self.service.close()


def build(args: ServeSettings | dict[str, Any]) -> Application:
    """Build the application, for `serve.run`, `serve run` and Ray Serve's configuration files.

    Args:
        args: settings, or their values by name. A configuration file may override what concerns replicas under
            `deployments`.

    Raises:
        SettingsError: a wrong setting.
    """
    settings = args if isinstance(args, ServeSettings) else make_settings(**args)
    cpus, gpus = settings.resources()
    settings = settings.model_copy(update={"cpus": cpus, "gpus": gpus})
    application: Application = QualityServer.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.timeout,
        max_constructor_retry_count=2,
        logging_config=LOGGING,
        **_scaling(settings.replicas),
    ).bind(settings)
    return application


def _scaling(replicas: str) -> dict[str, Any]:
    """Convert `ServeSettings.replicas` to options of Ray Serve."""
    low, colon, high = replicas.partition(":")
    if colon:
        return {"autoscaling_config": {"min_replicas": int(low), "max_replicas": int(high)}}
    return {"num_replicas": replicas if replicas == "auto" else int(replicas)}
