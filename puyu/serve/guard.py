"""What stands before every route: host check, API key, body size. Plain ASGI, no knowledge of the routes.

- A server on loopback answers only to loopback names, so that a web page whose name was re-bound to 127.0.0.1
  cannot use it. There is no CORS, and bodies must be JSON, which browsers do not send to others unasked.
- The key is compared in constant time and guards everything except /health.
- A body beyond the limit is refused by its announced length, or while it is read.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puyu.serve.protocol import error_body

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/health"})


@dataclass(frozen=True, slots=True)
class Guard:
    """Wraps an application."""

    app: ASGIApp
    api_key: str
    max_body: int
    local_only: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope) -> tuple[int, dict[str, Any]] | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.local_only and host_name(headers.get(b"host", b"").decode("latin-1")) not in LOCAL_NAMES:
            return 403, error_body("this server answers only to loopback names", kind="invalid_request_error")
        if self.api_key and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
                message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
                return 401, error_body(message, kind="authentication_error", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return 413, _too_large(self.max_body)
        return None

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                raise HTTPException(413, _too_large(self.max_body)["error"]["message"])
            return message

        return limited


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _too_large(limit: int) -> dict[str, Any]:
    message = f"the body is larger than {limit} bytes; raise --max-body-mb if it must be"
    return error_body(message, kind="invalid_request_error", code="request_too_large")


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
