"""Many replicas behind one address: requests are forwarded, and sent again when a replica fails before it answered.

    run(ServeConfig(model="runs/nano/ppo", replicas=4), listener)

What a client sees when a replica dies, hangs or is full:

- nothing, while its answer had not begun: another replica answers. A whole answer begins when all of it has come, a
  stream with its first event.
- in a stream that had begun, an error event and `[DONE]`; events are never cut in the middle.
- 429 with Retry-After when every replica has refused it as full; 503 with Retry-After when no replica is up.
- 500 for a request under way at MOST_FALLS deaths of replicas: it may be what kills them, so no third one is tried.

The key, the host check and the limit on bodies (`guard.py`) stand here; replicas listen on loopback behind a key that
only this process knows. `/health` and `/metrics` are the router's own, every other path is forwarded as it is. Chunks
of a stream pass unread. The process loads no model and imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from puyu.log import say
from puyu.serve.affinity import chain
from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Fleet, Launch, Replica
from puyu.serve.guard import Guard
from puyu.serve.leaving import Gone, race
from puyu.serve.local import launcher
from puyu.serve.merge import merge
from puyu.serve.protocol import error_body
from puyu.serve.upstream import Answer, Headers, Question, Torn, Unreached

MOST_FALLS = 2
MOST_TRIES = 16
BUSY = (429, 503)
RETRY_SECONDS = 1
GRACE_SECONDS = 1
METRICS_SECONDS = 2.0
DONE = b"data: [DONE]\n\n"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
JSON = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, ready to be sent."""

    status: int
    headers: Headers
    body: bytes


@dataclass(slots=True)
class Counts:
    """What the router has done since it started."""

    forwarded: Counter[int] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    broken_streams: int = 0


@dataclass(slots=True)
class Course:
    """How one request has fared so far."""

    tried: set[int] = field(default_factory=set)
    falls: int = 0
    refusal: Reply | None = None


class Router:
    """The ASGI application in front of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.counts = fleet, Counts()
        self.is_draining = self.is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/health":
            await send_reply(send, self.health())
        elif scope["path"] == "/metrics":
            await send_reply(send, await self.metrics())
        else:
            with contextlib.suppress(Gone):
                await self._forward(scope, receive, send)

    # -- forwarding -------------------------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            question = Question(*_line(scope), list(scope["headers"]), await read_body(receive))
        except HTTPException as error:
            kind = "invalid_request_error"
            await send_reply(send, self._refusal(error.status_code, error.detail, kind=kind))
        else:
            await race(self._answer(question, hashes_of(scope["path"], question.body), send), receive)

    async def _answer(self, question: Question, hashes: list[int], send: Send) -> None:
        """Try replicas until one has answered or there is a reason to give up."""
        course = Course()
        while (replica := self._next(hashes, course)) is not None:
            serial = replica.serial
            course.tried.add(serial)
            try:
                reply = await self._ask(replica, question, send)
            except Unreached:
                replica.doubt(serial)
                self.counts.again["unreached"] += 1
            except Torn:
                replica.doubt(serial)
                self.counts.again["torn"] += 1
                course.falls += 1
            except h11.LocalProtocolError as error:
                course.refusal = self._refusal(400, f"not an HTTP request: {error}", kind="invalid_request_error")
                break
            else:
                if reply is None:
                    return
                if reply.status == 503:
                    replica.doubt(serial)
                self.counts.again[str(reply.status)] += 1
                course.refusal = reply
        await send_reply(send, self._verdict(course))

    def _next(self, hashes: list[int], course: Course) -> Replica | None:
        if self.is_draining and not course.tried:
            return None
        if self.is_over or course.falls >= MOST_FALLS or len(course.tried) >= MOST_TRIES:
            return None
        return self.fleet.choose(hashes, without=course.tried)

    async def _ask(self, replica: Replica, question: Question, send: Send) -> Reply | None:
        """Forward once. None: the client has its answer. A Reply: this replica is full or stops, others may not be."""
        async with replica.ask(question) as answer:
            self.counts.forwarded[replica.index] += 1
            headers = [*answer.headers, (b"puyu-replica", b"%d" % replica.index)]
            if answer.is_stream and answer.status == 200:
                await self._stream(answer, headers, send)
                return None
            reply = Reply(answer.status, headers, await answer.read())
        if reply.status in BUSY:
            return reply
        await send_reply(send, reply)
        return None

    async def _stream(self, answer: Answer, headers: Headers, send: Send) -> None:
        """Pass events on from the first one; when the replica fails after it, say so in the stream and end it."""
        has_begun, is_whole = False, False
        try:
            async for events in whole_events(answer):
                if not has_begun:
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    has_begun = True
                await send({"type": "http.response.body", "body": events, "more_body": True})
                is_whole = events.endswith(DONE)
        except Torn:
            if not has_begun:
                raise
            if not is_whole:
                self.counts.broken_streams += 1
                await send({"type": "http.response.body", "body": self._broken() + DONE, "more_body": True})
        if not has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    # -- refusals ---------------------------------------------------------------------------------------------

    def _broken(self) -> bytes:
        why = "the server is stopping" if self.is_over else "the replica that answered has failed"
        return (
            b"data: "
            + json.dumps(error_body(f"{why}; the answer is incomplete", kind="server_error")).encode()
            + b"\n\n"
        )

    def _verdict(self, course: Course) -> Reply:
        """Why no replica has answered."""
        if course.falls >= MOST_FALLS:
            return self._refusal(500, f"{course.falls} replicas failed while they worked on this request")
        if course.refusal is not None:
            return course.refusal
        if self.is_draining:
            return self._refusal(503, "the server is stopping; there is no answer")
        return self._refusal(503, "no replica is up at the moment")

    def _refusal(self, status: int, message: str, *, kind: str = "server_error") -> Reply:
        self.counts.refused[status] += 1
        return Reply(status, [JSON], json.dumps(error_body(message, kind=kind)).encode())

    # -- the router's own pages -------------------------------------------------------------------------------

    def health(self) -> Reply:
        """200 while requests are accepted, with the state of every replica."""
        is_open = not self.is_draining and bool(self.fleet.up())
        names = ("index", "state", "in_flight", "deaths")
        rows = [{name: getattr(replica, name) for name in names} for replica in self.fleet.replicas]
        status = "ok" if is_open else "stopping" if self.is_draining else "down"
        return Reply(200 if is_open else 503, [JSON], json.dumps({"status": status, "replicas": rows}).encode())

    async def metrics(self) -> Reply:
        """Every replica's page with the label `replica`, and the router's own counters; silent ones are left out."""
        replicas = self.fleet.up()
        pages = await asyncio.gather(*(_page(replica) for replica in replicas))
        merged = merge({str(replica.index): page for replica, page in zip(replicas, pages, strict=True)})
        body = (merged + "\n".join(self._own_rows()) + "\n").encode()
        return Reply(200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], body)

    def _own_rows(self) -> list[str]:
        replicas, counts = self.fleet.replicas, self.counts
        return [
            *_rows("replica_up", "gauge", {f'replica="{r.index}"': int(r.state == "up") for r in replicas}),
            *_rows("replica_in_flight", "gauge", {f'replica="{r.index}"': r.in_flight for r in replicas}),
            *_rows("replica_deaths_total", "counter", {f'replica="{r.index}"': r.deaths for r in replicas}),
            *_rows("forwarded_total", "counter", {f'replica="{i}"': n for i, n in sorted(counts.forwarded.items())}),
            *_rows("sent_again_total", "counter", {f'reason="{r}"': n for r, n in sorted(counts.again.items())}),
            *_rows("refused_total", "counter", {f'status="{s}"': n for s, n in sorted(counts.refused.items())}),
            *_rows("broken_streams_total", "counter", {"": counts.broken_streams}),
        ]


def _rows(name: str, kind: str, samples: dict[str, int]) -> list[str]:
    name = f"puyu:router_{name}"
    return [f"# TYPE {name} {kind}", *(f"{name}{{{at}}} {n}" if at else f"{name} {n}" for at, n in samples.items())]


async def _page(replica: Replica) -> str:
    with contextlib.suppress(Unreached, Torn, TimeoutError):
        async with asyncio.timeout(METRICS_SECONDS), replica.ask(Question(b"GET", b"/metrics", [])) as answer:
            return (await answer.read()).decode()
    return ""


# -- bodies ----------------------------------------------------------------------------------------------------


def _line(scope: Scope) -> tuple[bytes, bytes]:
    """Method and target as they came."""
    if scope["method"] not in METHODS:
        raise HTTPException(405, f"the method {scope['method']} is not served")
    path, query = scope["raw_path"], scope["query_string"]
    return scope["method"].encode(), path + b"?" + query if query else path


async def read_body(receive: Receive) -> bytes:
    """All of it; Gone when the client leaves before its end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone("the client went away")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def hashes_of(path: str, body: bytes) -> list[int]:
    """What the choice of a replica goes by; a body that cannot be read is for the replica to refuse."""
    if path not in ("/v1/chat/completions", "/v1/completions"):
        return []
    try:
        return chain(json.loads(body))
    except (ValueError, RecursionError):
        return []


async def whole_events(answer: Answer) -> AsyncIterator[bytes]:
    """A stream's bytes, cut only between events: the beginning of an event waits for its end."""
    rest = b""
    async for piece in answer.pieces():
        piece = rest + piece
        end = len(piece) if piece.endswith(b"\n\n") else piece.rfind(b"\n\n") + 2 if b"\n\n" in piece else 0
        rest = piece[end:]
        if end:
            yield piece[:end]
    if rest:
        yield rest


async def send_reply(send: Send, reply: Reply) -> None:
    """Send a whole answer; whoever is refused for a while hears for how long."""
    headers = reply.headers
    if reply.status in BUSY and all(name != b"retry-after" for name, _ in headers):
        headers = [*headers, (b"retry-after", b"%d" % RETRY_SECONDS)]
    if all(name != b"content-length" for name, _ in headers):
        headers = [*headers, (b"content-length", b"%d" % len(reply.body))]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


# -- the process -----------------------------------------------------------------------------------------------


def guarded(router: Router, config: ServeConfig) -> ASGIApp:
    """The router behind the checks of `guard.py`."""
    limit = int(config.max_body_mb * 1e6)
    return Guard(router, api_key=config.api_key, max_body=limit, local_only=config.is_local)


class RouterServer(uvicorn.Server):
    """uvicorn with a stop that lets requests finish for `drain_seconds` and then ends them with a stated error."""

    def __init__(self, router: Router, config: ServeConfig) -> None:
        grace = config.drain_seconds + GRACE_SECONDS
        app = guarded(router, config)
        options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
        self.router, self.drain_seconds = router, config.drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after SIGTERM, Ctrl-C or `should_exit`."""
        self.router.is_draining = True
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self.drain_seconds)
        self.router.is_over = True
        self.router.fleet.cut()


def run(config: ServeConfig, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; returns after draining, when every replica has ended."""
    key = secrets.token_urlsafe(32)
    with _launching(config, key) as launch:
        asyncio.run(_serve(config, listener, launch=launch, key=key))
    say("stopped")


def _launching(config: ServeConfig, key: str) -> contextlib.AbstractContextManager[Launch]:
    if config.engine == "local":
        return contextlib.nullcontext(launcher(config, key=key))
    from puyu.serve.cluster import on_ray

    return on_ray(config, key=key)


async def _serve(config: ServeConfig, listener: socket.socket, *, launch: Launch, key: str) -> None:
    from puyu.serve.server import address, outlive_signals

    url, name = address(listener), config.served_name or Path(config.model).name
    say(f"loading {config.model} in {config.replicas} replicas ...")
    fleet = Fleet(config.replicas, launch, key=key)
    try:
        await fleet.start()
        say(f"serving {name} at {url}   (OpenAI clients: base_url={url}/v1)   Ctrl-C stops")
        outlive_signals()
        await RouterServer(Router(fleet), config).serve(sockets=[listener])
    finally:
        await fleet.stop()
