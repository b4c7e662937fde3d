"""The server's HTTP interface: a FastAPI app over a `Service`, without Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ImageError, SettingsError, did_you_mean, one_line, visible
from ..images.formats import usable_formats
from .answers import ErrorAnswer, ImageAnswer, ImagesAnswer, MapForm
from .docs import docs_page
from .service import MapWish, Service
from .uploads import RequestError, Upload

# The page loads nothing from anywhere else.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# Name -> the room that has it, and its type. The page looks like a report, and changes its theme like one.
_ASSETS = {
    "page.css": ("serve", "page.css", "text/css"),
    "page.js": ("serve", "page.js", "text/javascript"),
    "report.css": ("report", "page.css", "text/css"),
    "format.js": ("report", "format.js", "text/javascript"),
    "theme.js": ("report", "theme.js", "text/javascript"),
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "An image of any format that the package opens, which is identified by its content; as the body "
        "itself, or as a file of a form.",
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "no image, too many images, an unknown map, or a wrong query"},
    408: {"model": ErrorAnswer, "description": "the upload took too long"},
    413: {"model": ErrorAnswer, "description": "too many bytes"},
    415: {"model": ErrorAnswer, "description": "the body is neither an image nor a form"},
    422: {"model": ErrorAnswer, "description": "no image could be scored: damaged, too large, of another format"},
    503: {"model": ErrorAnswer, "description": "overloaded, or not answered in time; try again after Retry-After"},
}

Attribute = Annotated[str | None, Query(description="attribute to map; default: the metric's first")]
Metric = Annotated[str | None, Query(description="metric to map by; default: the first")]


def make_app(service: Callable[[], Service], metrics: Callable[[], str]) -> FastAPI:
    """Make the app.

    Args:
        service: returns the service, on each request.
        metrics: returns the text of `/metrics`; may take some time.
    """
    app = FastAPI(
        title="qualiclip",
        version=version("qualiclip-pyiqa"),
        description="Scores of no-reference image quality.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(HeadAsGet)
    _add_errors(app)
    _add_pages(app)

    @app.post(
        "/score",
        summary="Score one image, or several",
        response_model=ImageAnswer | ImagesAnswer,
        responses=_PROBLEMS,
        openapi_extra=_BODY,
        dependencies=[_options("map", "metric", "attribute")],
    )
    async def score(
        request: Request,
        map: Annotated[
            MapForm | None, Query(description="also answer the quality map, as values or as a PNG's data URL")
        ] = None,
        metric: Metric = None,
        attribute: Attribute = None,
    ) -> Response:
        """An image as the body is answered by its scores; the files of a form by a list in their order."""
        if map is None and (metric is not None or attribute is not None):
            name = "metric" if attribute is None else "attribute"
            raise RequestError(400, f"{name} chooses a quality map, and has no effect without map=values or map=png")
        wish = None if map is None else MapWish(map, metric, attribute)
        own = service()
        if wish is not None:
            own.maps.check(wish.metric, wish.attribute)
        async with own.uploads.read(request) as images:
            answers = await _all(own, images, wish)
        scored = any(answer.scores for answer in answers)
        one = not request.headers.get("content-type", "").lower().startswith("multipart/")
        if one and not scored:
            raise RequestError(422, answers[0].error or "the image was not scored")
        content: dict[str, Any] = {"images": [answer.model_dump(mode="json") for answer in answers]}
        if one:
            (content,) = content["images"]
        elif not scored:
            content["error"] = answers[0].error
        return JSONResponse(content, 200 if scored else 422)

    @app.post(
        "/map",
        summary="Draw the quality map of one image",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "a PNG to lay over the image"}, **_PROBLEMS},
        openapi_extra=_BODY,
        dependencies=[_options("metric", "attribute")],
    )
    async def draw(request: Request, metric: Metric = None, attribute: Attribute = None) -> Response:
        """A PNG in the image's proportions: bad places are red, good ones transparent."""
        own = service()
        own.maps.check(metric, attribute)
        async with own.uploads.read(request) as images:
            if len(images) > 1:
                raise RequestError(400, f"the form has {len(images)} files; expected one image to map")
            png = await own.overlay(images[0], MapWish("png", metric, attribute))
        return Response(png, media_type="image/png")

    @app.get("/describe", summary="What affects the scores, and the limits of a request", dependencies=[_options()])
    async def describe() -> dict[str, Any]:
        own = service()
        limits = own.settings
        return {
            **await own.describe(),
            "metrics": own.maps.list(),
            "limits": {
                "bytes": limits.max_bytes,
                "pixels": limits.max_pixels,
                "images": limits.max_images,
                "seconds": limits.timeout,
                "decode_seconds": limits.decode_timeout,
            },
            "formats": list(usable_formats()),
        }

    @app.get("/health", summary="Whether a replica answers", responses={503: {"model": ErrorAnswer}})
    async def health() -> dict[str, str]:
        failure = service().decoding.failure
        if failure is not None:
            raise RequestError(503, str(failure))
        return {"status": "ok"}

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    async def figures() -> PlainTextResponse:
        return PlainTextResponse(await asyncio.to_thread(metrics), media_type="text/plain; version=0.0.4")

    return app


def _options(*names: str) -> Any:
    """Return a dependency that refuses options of the query that have no effect: unknown ones, and repeated ones.

    `/health`, `/metrics` and pages do without: what probes and proxies append to their address is no wish.
    """

    async def check(request: Request) -> None:
        for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
            if name not in names:
                expected = f"{', '.join(names) or 'none'}{did_you_mean(name, names)}"
                raise RequestError(400, f"{name[:100]!r} is not an option of {request.url.path}; expected {expected}")
            if times > 1:
                raise RequestError(400, f"{name} is given {times} times; expected once")

    return Depends(check)


class HeadAsGet:
    """Middleware: HEAD, which probes use, is answered like GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, send_head)
        else:
            await self.app(scope, receive, send)


async def _all(own: Service, images: list[Upload], wish: MapWish | None) -> list[ImageAnswer]:
    """Score images at once; the first failure that is not an image's own ends all."""
    tasks = [asyncio.ensure_future(own.score(image, wish)) for image in images]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _add_errors(app: FastAPI) -> None:
    """Answer every error with one line of JSON."""

    def problem(status: int, line: object, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": one_line(line)}, status, headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.status == 503 else None
        return problem(error.status, error, headers)

    @app.exception_handler(ImageError)
    async def bad_image(_: Request, error: ImageError) -> JSONResponse:
        return problem(422, error)

    @app.exception_handler(SettingsError)
    async def bad_setting(_: Request, error: SettingsError) -> JSONResponse:
        return problem(400, error)

    @app.exception_handler(RequestValidationError)
    async def bad_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name, message = first["loc"][-1], first["msg"]
        expected = f"expected {first['ctx']['expected']}" if "expected" in first.get("ctx", {}) else message
        return problem(400, f"{name} is {str(first.get('input'))[:100]!r}; {expected}")

    @app.exception_handler(HTTPException)
    async def bad_request(request: Request, error: HTTPException) -> JSONResponse:
        path, line = request.url.path, error.detail
        if error.status_code == 404:
            known = [route.path for route in app.routes if isinstance(route, Route) and "{" not in route.path]
            line = f"{visible(path[:200])} does not exist{did_you_mean(path, known)}; GET /docs describes what does"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            line = f"{path} does not answer {request.method}; expected {allowed}; GET /docs describes requests"
        return problem(error.status_code, line, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_asset("serve", "page.html"), headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers=_HEADERS)

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404)
        room, file, kind = _ASSETS[name]
        return Response(_asset(room, file), media_type=kind, headers=_HEADERS)


def _asset(room: str, name: str) -> str:
    return (files(f"qualiclip_pyiqa.{room}") / "assets" / name).read_text("utf-8")
