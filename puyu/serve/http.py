"""Waiting for work while watching the client: who goes away, or reads too slowly, gives the work up at once.

Plain ASGI and asyncio; knows neither the engine nor OpenAI's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from puyu.errors import PuyuError
from puyu.log import logger

T = TypeVar("T")
MAX_PARTS = 200_000
"""Objects, lists and keys of a body: eight megabytes of `[],[],` would be hundreds in memory, and seconds of work."""
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
DIRECT = "puyu.send"
"""Key of the ASGI scope under which a guard leaves the server's own `send`."""


class CheckedRoute(APIRoute):
    """A route that refuses bodies of too many parts before anything is made of them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handler(_CheckedRequest(request.scope, request.receive))

        return checked


class _CheckedRequest(Request):
    async def json(self) -> Any:
        if num_parts(await self.body()) > MAX_PARTS:
            raise HTTPException(400, f"the body holds more than {MAX_PARTS} objects, lists and keys")
        return await super().json()


def num_parts(data: bytes) -> int:
    """Objects, lists and keys of JSON text, at most; what stands within texts is left out where it matters."""
    if _marks(data) <= MAX_PARTS:
        return _marks(data)
    return _marks(_TEXTS.sub(b"", data))


def _marks(data: bytes) -> int:
    return sum(data.count(mark) for mark in (b"[", b"{", b":"))


class Refused(PuyuError):
    """An answer other than 400 that the server gives on purpose."""

    def __init__(self, status: int, body: dict[str, Any], *, retry_after: int | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.retry_after = status, body, retry_after


class Gone(PuyuError):
    """The client went away; nobody reads the answer."""


class EventResponse(Response):
    """Server-sent events. Watches for the client's leaving while it writes: then the work is cancelled at once.

    A client that takes nothing for `slow_seconds` is cut off: `cut` is called with the ASGI scope.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], *, slow_seconds: float, cut: Callable[[Scope], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.chunks, self.slow_seconds, self.cut = chunks, slow_seconds, cut
        self._sending_since = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Gone):
            await race(self._write(send, scope.get(DIRECT, send)), receive, watch=lambda: self._cut_if_slow(scope))

    async def _write(self, send_ends: Send, send: Send) -> None:
        """Frameworks wrap `send` several times to watch start and end; the pieces go to the server directly."""
        await send_ends({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                self._sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._sending_since = 0.0
        await send_ends({"type": "http.response.body", "body": b""})

    def _cut_if_slow(self, scope: Scope) -> None:
        if self._sending_since and time.monotonic() - self._sending_since > self.slow_seconds:
            logger.warning("a client took nothing for %g s and was cut off", self.slow_seconds)
            self.cut(scope)


async def until_gone(http: Request, work: Awaitable[T]) -> T:
    """The work's result; when the client leaves first, the work is cancelled and Gone is raised."""
    return await race(work, http.receive)


async def race(work: Awaitable[T], receive: Callable[[], Any], *, watch: Callable[[], None] | None = None) -> T:
    """See `until_gone`; whatever happens, both sides have ended on return. `watch` is called now and then."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        done: set[Any] = set()
        while not done:
            done, _ = await asyncio.wait({task, left}, timeout=watch and 1.0, return_when=asyncio.FIRST_COMPLETED)
            if watch is not None:
                watch()
        if not task.done():
            raise Gone("the client went away")
        return task.result()
    finally:
        for side in (task, left):
            side.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def all_or_none(works: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
