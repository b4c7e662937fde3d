"""Read the images of a request, within limits of bytes, number and time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from ..errors import counted, one_line
from ..images.convert import source_name
from .pace import Pace

# Bytes of all uploads that a replica holds at once.
HELD_BYTES = 2**29
# Of a body that is one image: declared to be one, or nothing in particular (as curl's --data-binary does).
_RAW = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
# Seconds without a byte of an upload, after which its place is given to others.
IDLE = 10.0
_NAME = 200  # characters of a file's name that are repeated in an answer


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        line: why.
        retry_after: seconds after which the client may try again; for status 503.
    """

    def __init__(self, status: int, line: str, retry_after: int = 1) -> None:
        super().__init__(line)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Upload:
    """An encoded image, and its file's name if the request has one."""

    name: str | None
    data: bytes


class Uploads:
    """Reads requests, whose bytes count until they are answered.

    Args:
        max_bytes: of a body.
        max_images: of a request.
        timeout: seconds from the start of a request to its answer.

    Attributes:
        held: bytes of all uploads.
        pace: predicts whether a request can be answered in time.
    """

    def __init__(self, max_bytes: int, max_images: int, timeout: float) -> None:
        self.max_bytes, self.max_images, self.timeout = max_bytes, max_images, timeout
        self.held = 0
        self.pace = Pace()

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Read the body, one image or several as files of a form, and limit the time of the context too.

        Raises:
            RequestError: another kind of body, too large, too many images or none, too many uploads at once,
                not in time, or so much work before it that it cannot be answered in time.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        count = 0

        async def receive() -> Message:
            nonlocal count
            try:
                async with asyncio.timeout(IDLE):
                    message = await request.receive()
            except TimeoutError:
                raise RequestError(408, f"the upload stopped for {IDLE:g} seconds") from None
            size = len(message.get("body", b""))
            count += size
            self.held += size
            if count > self.max_bytes:
                raise self._too_large()
            if self.held > HELD_BYTES:
                raise self._overloaded("the server holds as many uploads as it can; try again later")
            return message

        end = asyncio.get_running_loop().time() + self.timeout
        try:
            async with _until(end, self._slow):
                images = await self._images(Request(request.scope, receive))
            self._check_pace(len(images), end - asyncio.get_running_loop().time())
            with self.pace.images(len(images)):
                async with _until(end, self._late):
                    yield images
        finally:
            self.held -= count

    async def _images(self, request: Request) -> list[Upload]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await self._form(request)
        if kind and not kind.startswith(_RAW):
            raise RequestError(
                415,
                f"the body is of type {source_name(kind[:100])}; expected an image, or a form (multipart/form-data)",
            )
        data = await request.body()
        if not data:
            raise RequestError(400, "the body is empty; expected an image")
        return [Upload(None, data)]

    async def _form(self, request: Request) -> list[Upload]:
        expected = f"expected 1 to {self.max_images} files, such as those of: curl -F image=@FILE -F image=@FILE"
        images = []
        try:
            async with request.form(max_files=self.max_images, max_fields=8) as form:
                for field, value in form.multi_items():
                    if not isinstance(value, UploadFile):
                        raise RequestError(
                            400, f"the form's field {_shown(field)} is not a file; options belong into the URL's query"
                        )
                    images.append(Upload(_shown(value.filename), await value.read()))
        except HTTPException as error:  # of Starlette's parser
            why = one_line(error.detail).rstrip(".")
            raise RequestError(400, f"the form cannot be read ({why}); {expected}") from error
        if not images:
            raise RequestError(400, f"the form has no file; {expected}")
        return images

    def _check_pace(self, count: int, left: float) -> None:
        """Refuse a request that cannot be answered in the seconds left, unless there is nothing before it."""
        ahead, wait = self.pace.ahead, self.pace.wait(count)
        if ahead and wait > left:
            raise self._overloaded(
                f"{counted(ahead, 'image')} before this request and its own need about {wait:.0f} seconds, but "
                f"{max(0, left):.0f} are left of {self.timeout:g}; try again later"
            )

    def _slow(self) -> RequestError:
        return RequestError(408, f"the upload did not end within {self.timeout:g} seconds")

    def _late(self) -> RequestError:
        return self._overloaded(f"no answer within {self.timeout:g} seconds; try again later")

    def _overloaded(self, line: str) -> RequestError:
        """Return the error of a request that could be answered once enough others are."""
        return RequestError(503, line, max(1, math.ceil(self.pace.wait(1) - self.timeout)))

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body is too large; at most {self.max_bytes} bytes are accepted")


@asynccontextmanager
async def _until(end: float, error: Callable[[], RequestError]) -> AsyncIterator[None]:
    """Raise an error at a time of the event loop's clock."""
    try:
        async with asyncio.timeout_at(end):
            yield
    except TimeoutError:
        raise error() from None


def _shown(name: str | None) -> str | None:
    """Return a file's name as one printable line of bounded length."""
    return source_name(name[-_NAME:]) if name else None
