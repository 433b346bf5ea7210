"""The process of `puyu serve --replicas N`: a router, its door, and the replicas behind it.

    run(ServeConfig(model="runs/nano/ppo", replicas=4), listener, url)

What stands before the routes of one server stands here before the router: TLS, CORS, the guard with its keys and
limits. Replicas get none of it, but listen on loopback behind a key that only this process knows. SIGTERM and Ctrl-C
let requests finish for `drain_seconds`; what is left then ends with a stated error, and the replicas with it. The
process loads no model and imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Scope

from puyu.log import say
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Fleet, Launch
from puyu.serve.guard import Guard
from puyu.serve.keys import KeyRing
from puyu.serve.local import launcher
from puyu.serve.patience import patient
from puyu.serve.router import Router

GRACE_SECONDS = 0.5
"""After all requests have been ended: for their last bytes."""


def key_ring(config: ServeConfig) -> KeyRing:
    """All keys of a configuration."""
    return KeyRing.of(config.keys_file, api_key=config.api_key, control_key=config.control_key)


def guarded(router: Router, config: ServeConfig) -> ASGIApp:
    """The router behind the checks that a server of one model has, too."""
    app: ASGIApp = Guard(
        router,
        keys=key_ring(config),
        max_body=int(config.max_body_mb * 1e6),
        local_only=config.is_local,
        body_seconds=config.body_seconds,
    )
    if config.cors_origins:
        app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


class RouterServer(uvicorn.Server):
    """uvicorn with a stop that lets requests finish for `drain_seconds`, or until a second signal."""

    def __init__(self, router: Router, config: ServeConfig) -> None:
        settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        files: dict[str, Any] = {"ssl_certfile": config.tls_cert or None, "ssl_keyfile": config.tls_key or None}
        options = uvicorn.Config(guarded(router, config), lifespan="off", ws="none", **settings, **files)
        options.load()
        options.http_protocol_class = patient(options.http_protocol_class, seconds=config.body_seconds)
        super().__init__(options)
        self.router, self.drain_seconds = router, config.drain_seconds
        self._again = asyncio.Event()
        router.cut = self.cut

    def cut(self, scope: Scope) -> None:
        """Close the connection of an ASGI scope without waiting for its reader."""
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == scope["client"]:
                getattr(connection, "transport").abort()  # noqa: B009 - uvicorn's protocols share no base class

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not."""
        if self.should_exit:
            self._again.set()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after a signal or `should_exit`."""
        self.router.is_draining = True
        ended = asyncio.create_task(super().shutdown(sockets))
        again = asyncio.create_task(self._again.wait())
        await asyncio.wait({ended, again}, timeout=self.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        self.router.end()
        await asyncio.wait({ended}, timeout=GRACE_SECONDS)
        if not ended.done():  # what is left are clients that do not read
            self.force_exit = True
            for connection in list(self.server_state.connections):
                getattr(connection, "transport").abort()  # noqa: B009
        await ended


def run(config: ServeConfig, listener: socket.socket, url: str) -> None:
    """Serve until SIGTERM or Ctrl-C; returns after draining, when every replica has ended."""
    key = secrets.token_urlsafe(32)
    key_ring(config)  # a key file that cannot be read is said before models are loaded
    with _launching(config, key) as launch:
        asyncio.run(_serve(config, listener, launch=launch, key=key, url=url))
    say("stopped")


def _launching(config: ServeConfig, key: str) -> contextlib.AbstractContextManager[Launch]:
    if config.engine == "local":
        return contextlib.nullcontext(launcher(config, key=key))
    from puyu.serve.cluster import on_ray

    return on_ray(config, key=key)


async def _serve(config: ServeConfig, listener: socket.socket, *, launch: Launch, key: str, url: str) -> None:
    from puyu.serve.server import outlive_signals

    name = config.served_name or Path(config.model).name
    say(f"loading {config.model} in {config.replicas} replicas ...")
    fleet = Fleet(config.replicas, launch, key=key)
    try:
        await fleet.start()
        server = RouterServer(Router(fleet, slow_seconds=config.slow_seconds), config)
        say(f"serving {name} at {url}   (OpenAI clients: base_url={url}/v1)   Ctrl-C stops")
        outlive_signals()
        await server.serve(sockets=[listener])
    finally:
        await fleet.stop()
