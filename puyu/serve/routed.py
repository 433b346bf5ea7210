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
import time
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from puyu.log import say
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Fleet, Launch
from puyu.serve.guard import Guard
from puyu.serve.keys import KeyRing
from puyu.serve.local import launcher
from puyu.serve.patience import PatientServer
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


class RouterServer(PatientServer):
    """Lets requests finish for `drain_seconds`, or until a second signal."""

    def __init__(self, router: Router, config: ServeConfig) -> None:
        super().__init__(guarded(router, config), config, lifespan="off")
        self.router, self.drain_seconds = router, config.drain_seconds
        router.cut = self.cut

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after a signal or `should_exit`."""
        self.router.is_draining = True
        ended = asyncio.create_task(super().shutdown(sockets))
        until = time.monotonic() + self.drain_seconds
        while not (ended.done() or self.force_exit) and time.monotonic() < until:
            await asyncio.wait({ended}, timeout=0.05)
        self.router.end()
        await asyncio.wait({ended}, timeout=GRACE_SECONDS)
        if not ended.done():  # what is left are clients that do not read
            self.cut_all()
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
