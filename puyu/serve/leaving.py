"""Work for a client that may go away: the work is cancelled as soon as nobody waits for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from puyu.errors import PuyuError

T = TypeVar("T")


class Gone(PuyuError):
    """The client went away; nobody reads the answer."""


async def race(work: Awaitable[T], receive: Receive) -> T:
    """The work's result, or Gone when the client leaves first. Whatever happens, both sides have ended on return."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone("the client went away")
        return task.result()
    finally:
        for side in (task, watch):
            side.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
