"""What stands before every route: host check, API keys and their limits, body size and time. Plain ASGI.

- A server on loopback answers only to loopback names, so that a web page whose name was re-bound to 127.0.0.1
  cannot use it. There is no CORS unless asked for, and bodies must be JSON, which browsers do not send unasked.
- Keys guard everything except /health. Control routes want a key of their own, and are not there without one.
- A body beyond the limit is refused by its announced length, or while it is read; one that does not come, too (408).
- Every answer has an `x-request-id`, which the log repeats with status and time, never with text.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puyu.log import logger
from puyu.serve.http import DIRECT
from puyu.serve.keys import Account, KeyRing
from puyu.serve.protocol import error_body

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/health"})
CONTROL = "/control/"
BODY_SECONDS = 60.0
SPENT = "puyu.spent"
"""Key of the ASGI scope under which a route leaves the tokens that a request has used."""
SPENT_HEADER = b"puyu-spent"
"""Whoever sends it is told them, too: by this header, or at the end of a stream by a comment. A router asks so."""
SPENT_LINE = b": spent "


class Denied(Exception):
    """The answer to a request that goes no further."""

    def __init__(self, status: int, body: dict[str, Any], *, retry_after: int | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.retry_after = status, body, retry_after


@dataclass(frozen=True, slots=True)
class Guard:
    """Wraps an application."""

    app: ASGIApp
    keys: KeyRing
    max_body: int
    local_only: bool
    body_seconds: float = BODY_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope, send)
        try:
            account = self._account(scope)
        except Denied as denied:
            await visit.deny(denied)
            return
        if account is not None:
            account.in_flight += 1
        try:
            await self.app(scope, _Body(self, receive), visit.send)
        finally:
            if account is not None:
                account.in_flight -= 1
                account.tokens.take(scope.get(SPENT, 0))
            visit.log(account)

    def _account(self, scope: Scope) -> Account | None:
        """Whose request it is; Denied says why it goes no further."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.local_only and host_name(headers.get(b"host", b"").decode("latin-1")) not in LOCAL_NAMES:
            raise Denied(403, error_body("this server answers only to loopback names", kind="invalid_request_error"))
        account = None
        if scope["path"] not in OPEN_PATHS:
            account = self._keyed(scope["path"], headers.get(b"authorization", b"").decode("latin-1"))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.max_body):
            raise Denied(413, _too_large(self.max_body))
        wait = account.admit(self.keys.clock()) if account is not None else 0.0
        if wait:
            body = error_body("this key's limit is reached", kind="rate_limit_error", code="rate_limit_exceeded")
            raise Denied(429, body, retry_after=min(math.ceil(wait), 3600))
        return account

    def _keyed(self, path: str, given: str) -> Account | None:
        """The account of the key; control routes are unknown where no key opens them."""
        wants_control = path.startswith(CONTROL)
        scheme, _, token = given.partition(" ")
        account = self.keys.find(token) if scheme.lower() == "bearer" else None
        if wants_control and not self.keys.has_control:
            raise Denied(404, error_body("Not Found", kind="invalid_request_error"))
        if account is not None and account.key.control == wants_control:
            return account
        if self.keys.is_empty and not wants_control:
            return None
        if account is not None:
            message = "a control key opens the control routes alone, and only a control key does"
            raise Denied(403, error_body(message, kind="permission_error", code="wrong_key"))
        message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
        raise Denied(401, error_body(message, kind="authentication_error", code="invalid_api_key"))


class _Body:
    """`receive` of a request: its body within the limits of size and time, then whatever else comes."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard, self.receive = guard, receive
        self.seen, self.is_complete = 0, False
        self.until = time.monotonic() + guard.body_seconds

    async def __call__(self) -> Message:
        if self.is_complete:
            return await self.receive()
        try:
            async with asyncio.timeout(max(self.until - time.monotonic(), 0.001)):
                message = await self.receive()
        except TimeoutError as error:
            late = f"the body did not come within {self.guard.body_seconds:g} s"
            raise HTTPException(408, late, headers={"Connection": "close"}) from error
        self.seen += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.seen > self.guard.max_body:
            raise HTTPException(413, _too_large(self.guard.max_body)["error"]["message"])
        return message


class _Visit:
    """One request's way through: its id, its status, its line in the log."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self.to_client = scope, send
        self.id, self.began, self.status = uuid.uuid4().hex, time.monotonic(), 0
        scope["puyu.request"], scope[DIRECT] = self.id, send
        self.tells, self.streams = any(name == SPENT_HEADER for name, _ in scope["headers"]), False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        if self.tells:
            self._tell(message)
        await self.to_client(message)

    def _tell(self, message: Message) -> None:
        """Add what the request has cost: to the head of an answer, or to the end of a stream."""
        spent = str(self.scope.get(SPENT, 0)).encode()
        if message["type"] == "http.response.start":
            self.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            if not self.streams:
                message["headers"].append((SPENT_HEADER, spent))
        elif self.streams and not message.get("more_body", False):
            message["body"] = message.get("body", b"") + SPENT_LINE + spent + b"\n\n"

    async def deny(self, denied: Denied) -> None:
        data = json.dumps(denied.body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        if denied.retry_after is not None:
            headers.append((b"retry-after", str(denied.retry_after).encode()))
        await self.send({"type": "http.response.start", "status": denied.status, "headers": headers})
        await self.to_client({"type": "http.response.body", "body": data})
        self.log(None)

    def log(self, account: Account | None) -> None:
        who, seconds = account.key.name if account is not None else "-", time.monotonic() - self.began
        path = self.scope["path"] if self.scope["path"].isprintable() else "?"
        words = (self.id, who, self.scope["method"], path[:100], self.status, self.scope.get(SPENT, 0), seconds)
        logger.info("request %s %s %s %s %d, %d tokens, %.3f s", *words)


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _too_large(limit: int) -> dict[str, Any]:
    message = f"the body is larger than {limit} bytes; raise --max-body-mb if it must be"
    return error_body(message, kind="invalid_request_error", code="request_too_large")
