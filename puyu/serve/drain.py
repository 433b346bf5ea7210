"""uvicorn with a stop that tells the engine: refuse new requests, let those under way finish for a while, end the rest.

A stream that is ended so gets an error event and `[DONE]`, never a torn body.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from puyu.engine.llm import LLM

GRACE_SECONDS = 5


class DrainingServer(uvicorn.Server):
    """Serves one application over one engine."""

    def __init__(self, app: FastAPI, llm: LLM, *, drain_seconds: int) -> None:
        # uvicorn's own limit is only for connections that do not end after their request has.
        grace = drain_seconds + GRACE_SECONDS
        options = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=grace)
        super().__init__(options)
        self.llm, self.drain_seconds = llm, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after SIGTERM, Ctrl-C or `should_exit`."""
        closing = asyncio.create_task(asyncio.to_thread(self.llm.loop.close, drain=self.drain_seconds))
        await super().shutdown(sockets)
        await closing
