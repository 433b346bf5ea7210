"""uvicorn with a stop that tells the engine: refuse new requests, let those under way finish for a while, end the rest.

A stream that is ended so gets an error event and `[DONE]`, never a torn body. A second signal ends at once. When the
engine's thread has died, the server ends too, and says so by its exit code, so that a supervisor can start it again.
"""

from __future__ import annotations

import asyncio
import socket

from fastapi import FastAPI

from puyu.engine.llm import LLM
from puyu.serve.config import ServeConfig
from puyu.serve.patience import PatientServer

GRACE_SECONDS = 0.5
"""After the engine has ended all requests: for their last bytes."""


class DrainingServer(PatientServer):
    """Serves one application over one engine."""

    def __init__(self, app: FastAPI, llm: LLM, config: ServeConfig) -> None:
        super().__init__(app, config, lifespan="on")
        self.llm, self.drain_seconds = llm, config.drain_seconds
        app.state.service.cut = self.cut

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.llm.loop.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after a signal, `should_exit`, or the engine's death."""
        closing = asyncio.create_task(asyncio.to_thread(self.llm.loop.close, drain=self.drain_seconds))
        ended = asyncio.create_task(super().shutdown(sockets))
        while not closing.done():
            if self.force_exit:
                self.llm.loop.hurry()
            await asyncio.wait({closing}, timeout=0.05)
        await asyncio.wait({ended}, timeout=GRACE_SECONDS)
        if not ended.done():  # what is left are connections that do not end by themselves
            self.cut_all()
        await ended
        await closing
