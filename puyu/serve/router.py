"""Many replicas behind one address: requests are forwarded, and sent again when a replica fails before it answered.

    app = Router(fleet)          # ASGI; `routed.py` makes a server of it

What a client sees when a replica dies, hangs or is full:

- nothing, while its answer had not begun: another replica answers. A whole answer begins when all of it has come, a
  stream with its first event.
- in a stream that had begun, an error event, and `[DONE]` where the route has one; no event is cut in the middle.
- 429 with Retry-After when every replica has refused it as full; 503 with Retry-After when no replica is up.
- 500 for a request under way at MOST_FALLS deaths of replicas: it may be what kills them, so no third one is tried.

`/health` and `/metrics` are the router's own; what goes to `/control/` goes to every replica, and to those that start
later; every other path is forwarded as it is. Chunks of a stream pass unread. Replicas tell what a request has cost
(`guard.py`), so that the limits of keys hold here, too. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import h11
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from puyu.log import logger
from puyu.serve.affinity import chain
from puyu.serve.fleet import Fleet, Replica
from puyu.serve.guard import CONTROL, SPENT, SPENT_HEADER, SPENT_LINE
from puyu.serve.http import Gone, race
from puyu.serve.merge import merge
from puyu.serve.protocol import error_body
from puyu.serve.upstream import Answer, Headers, Question, Torn, Unreached

MOST_FALLS = 2
MOST_TRIES = 16
BUSY = (429, 503)
RETRY_SECONDS = 1
METRICS_SECONDS = 2.0
DONE = b"data: [DONE]\n\n"
PROMPTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
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


class Outlet:
    """The way back to one client; knows for how long it has taken nothing."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self._send, self._since = scope, send, 0.0

    async def __call__(self, message: Message) -> None:
        self._since = time.monotonic()
        await self._send(message)
        self._since = 0.0

    def waited(self) -> float:
        return time.monotonic() - self._since if self._since else 0.0

    def spend(self, tokens: bytes) -> None:
        """Leave for the guard what the request has cost."""
        if tokens.isdigit():
            self.scope[SPENT] = int(tokens)


class Router:
    """The ASGI application in front of a fleet. `cut` closes the connection of a scope; the server sets it."""

    def __init__(self, fleet: Fleet, *, slow_seconds: float = 30.0) -> None:
        self.fleet, self.slow_seconds, self.counts = fleet, slow_seconds, Counts()
        self.is_draining = self.is_over = False
        self.cut: Callable[[Scope], None] = lambda scope: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/health":
            await send_reply(send, self.health())
        elif scope["path"] == "/metrics":
            await send_reply(send, await self.metrics())
        else:
            with contextlib.suppress(Gone):
                await self._forward(scope, receive, send)

    def end(self) -> None:
        """Answer everything that is under way with the error that says so."""
        self.is_draining = self.is_over = True
        self.fleet.cut()

    # -- forwarding -------------------------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = [*scope["headers"], (SPENT_HEADER, b"tell")]
            question = Question(*_line(scope), headers, await read_body(receive))
        except HTTPException as error:
            kind = "invalid_request_error"
            await send_reply(send, self._refusal(error.status_code, error.detail, kind=kind))
            return
        outlet = Outlet(scope, send)
        if scope["path"].startswith(CONTROL):
            work = self._everywhere(question, outlet)
        else:
            work = self._answer(question, hashes_of(scope["path"], question.body), outlet)
        await race(work, receive, watch=lambda: self._cut_if_slow(outlet))

    def _cut_if_slow(self, outlet: Outlet) -> None:
        if outlet.waited() > self.slow_seconds:
            logger.warning("a client took nothing for %g s and was cut off", self.slow_seconds)
            self.cut(outlet.scope)

    async def _answer(self, question: Question, hashes: list[int], outlet: Outlet) -> None:
        """Try replicas until one has answered or there is a reason to give up."""
        course = Course()
        while (replica := self._next(hashes, course)) is not None:
            serial = replica.serial
            course.tried.add(serial)
            try:
                reply = await self._ask(replica, question, outlet)
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
        await send_reply(outlet, self._verdict(course))

    def _next(self, hashes: list[int], course: Course) -> Replica | None:
        if self.is_draining and not course.tried:
            return None
        if self.is_over or course.falls >= MOST_FALLS or len(course.tried) >= MOST_TRIES:
            return None
        return self.fleet.choose(hashes, without=course.tried)

    async def _ask(self, replica: Replica, question: Question, outlet: Outlet) -> Reply | None:
        """Forward once. None: the client has its answer. A Reply: this replica is full or stops, others may not be."""
        async with replica.ask(question) as answer:
            self.counts.forwarded[replica.index] += 1
            headers = [*answer.headers, (b"puyu-replica", b"%d" % replica.index)]
            if answer.is_stream and answer.status == 200:
                await self._stream(answer, headers, question, outlet)
                return None
            reply = await _whole(answer, headers, outlet)
        if reply.status in BUSY:
            return reply
        await send_reply(outlet, reply)
        return None

    async def _stream(self, answer: Answer, headers: Headers, question: Question, outlet: Outlet) -> None:
        """Pass events on from the first one; when the replica fails after it, say so in the stream and end it."""
        count, is_whole = 0, False
        try:
            async for events in whole_events(answer):
                if SPENT_LINE in events:
                    events, _, spent = events.rpartition(SPENT_LINE)
                    outlet.spend(spent.strip())
                    is_whole = True
                is_whole = is_whole or events.endswith(DONE)
                if not events:
                    continue
                if not count:
                    await outlet({"type": "http.response.start", "status": 200, "headers": headers})
                count += max(events.count(b"\n\n"), 1)
                await outlet({"type": "http.response.body", "body": events, "more_body": True})
        except Torn:
            if not count:
                raise
            if not is_whole:
                self.counts.broken_streams += 1
                await outlet({"type": "http.response.body", "body": self._broken(question, count), "more_body": True})
        if not count:
            await outlet({"type": "http.response.start", "status": 200, "headers": headers})
        await outlet({"type": "http.response.body", "body": b""})

    async def _everywhere(self, question: Question, outlet: Outlet) -> None:
        """A control route: every replica does it, those that start later as well; the first refusal is the answer."""
        async with self.fleet.settled.lock:
            replicas = self.fleet.up()
            replies = await asyncio.gather(*(self._control(replica, question) for replica in replicas))
            refusal = next((reply for reply in replies if reply is not None and reply.status != 200), None)
            done = {r.index: json.loads(reply.body) for r, reply in zip(replicas, replies, strict=True) if reply}
            if refusal is None and done:
                self.fleet.settled.add(question)
        if refusal is not None or not done:
            await send_reply(outlet, refusal or self._verdict(Course()))
        else:
            await send_reply(outlet, Reply(200, [JSON], json.dumps({"replicas": done}).encode()))

    async def _control(self, replica: Replica, question: Question) -> Reply | None:
        serial = replica.serial
        try:
            async with replica.ask(question) as answer:
                return Reply(answer.status, answer.headers, await answer.read())
        except (Unreached, Torn):
            replica.doubt(serial)
            return None

    # -- refusals ---------------------------------------------------------------------------------------------

    def _broken(self, question: Question, count: int) -> bytes:
        """The end of a stream of so many events, in the words of its route."""
        why = "the server is stopping" if self.is_over else "the replica that answered has failed"
        message = f"{why}; the answer is incomplete"
        if question.target.startswith(b"/v1/responses"):
            error = {"type": "error", "code": "server_error", "message": message, "param": None}
            return b"event: error\ndata: %s\n\n" % json.dumps(error | {"sequence_number": count}).encode()
        return b"data: %s\n\n" % json.dumps(error_body(message, kind="server_error")).encode() + DONE

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
    if path not in PROMPTED:
        return []
    try:
        return chain(json.loads(body))
    except (ValueError, RecursionError):
        return []


async def _whole(answer: Answer, headers: Headers, outlet: Outlet) -> Reply:
    """All of an answer that is no stream; what it has cost stays here."""
    outlet.spend(answer.header(SPENT_HEADER))
    headers = [(name, value) for name, value in headers if name != SPENT_HEADER]
    return Reply(answer.status, headers, await answer.read())


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
