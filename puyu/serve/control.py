"""Control routes, under /control/: sleep and wake, new weights, adapters, a forgotten prefix cache.

They are there only where a control key is set (`--control-key`, `PUYU_CONTROL_KEY`, or `puyu keys new --control`), and
only that key opens them. Paths are read on the server's own disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from puyu.errors import RequestError
from puyu.serve.protocol import Part
from puyu.serve.service import Service


class SleepBody(Part):
    level: int = Field(default=1, ge=1, le=2)
    """1 gives the key/value cache back, 2 the weights as well."""


class WeightsBody(Part):
    path: str = Field(min_length=1)
    """A checkpoint folder of the same shape."""


class AdapterBody(Part):
    name: str = Field(min_length=1, max_length=128)
    path: str = Field(min_length=1)


BODIES: dict[str, type[Part]] = {
    "/control/sleep": SleepBody,
    "/control/weights": WeightsBody,
    "/control/adapters": AdapterBody,
}


def add_control(app: FastAPI, service: Service) -> None:
    """The routes; the guard stands before them."""
    llm = service.llm

    async def done(function: Callable[..., Any], *arguments: Any) -> Response:
        """Between two steps, in another thread; then the state."""
        await asyncio.to_thread(function, *arguments)
        return state()

    def state() -> Response:
        stats = llm.stats()
        return JSONResponse(
            {
                "asleep": llm.is_asleep,
                "adapters": list(llm.adapters),
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "blocks": stats.num_blocks,
                "free_blocks": stats.num_free_blocks,
            }
        )

    @app.get("/control/state")
    async def show() -> Response:
        """What the engine is doing."""
        return state()

    @app.post("/control/sleep")
    async def sleep(body: SleepBody) -> Response:
        """Give memory back; requests under way wait, new ones are refused with 503."""
        return await done(llm.sleep, body.level)

    @app.post("/control/wake")
    async def wake() -> Response:
        """Take the memory again."""
        return await done(llm.wake)

    @app.post("/control/weights")
    async def weights(body: WeightsBody) -> Response:
        """New weights in place; what is under way is computed again with them."""
        return await done(llm.update_weights, _folder(body.path))

    @app.post("/control/adapters")
    async def load(body: AdapterBody) -> Response:
        """Read a LoRA adapter; requests name it as `model`."""
        if body.name == service.name:
            raise RequestError("this is the name of the model itself", param="name")
        return await done(llm.load_adapter, body.name, _folder(body.path))

    @app.delete("/control/adapters/{name}")
    async def unload(name: str) -> Response:
        """Forget an adapter that no request uses."""
        return await done(llm.unload_adapter, name)

    @app.post("/control/reset_prefix_cache")
    async def reset() -> Response:
        """Forget cached keys and values."""
        return await done(llm.reset_prefix_cache)


def _folder(path: str) -> Path:
    """A folder on this disk: nothing is fetched because a request says so."""
    if not Path(path).is_dir():
        raise RequestError(f"there is no folder {path} on the server", param="path")
    return Path(path)
