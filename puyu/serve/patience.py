"""Connections that begin a request and do not go on: closed after a while, so that they cannot fill the server.

uvicorn closes connections that are idle after an answer. A connection that never sends a whole request head is not
idle to it; here it is. A head that has no end is refused (431), where uvicorn's quick parser would keep all of it. And
what is no HTTP at all is answered by the same error object as everything else.
"""

from __future__ import annotations

import asyncio
import json
from types import FrameType
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp, Scope

from puyu.serve.config import ServeConfig
from puyu.serve.protocol import error_body

MAX_HEAD = 64 * 1024
"""Bytes of a request's head, or of what follows its body, beyond the first piece that is read."""
_HEAD = "HTTP/1.1 {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"


_Protocol: Any = object
"""What the methods below find in the class that comes after theirs."""


class Patient(_Protocol):
    """What is laid over one of uvicorn's HTTP protocols, which share no base class."""

    patience: float
    """Seconds to wait for a request's head."""
    loop: Any
    cycle: Any
    transport: Any
    _timer: asyncio.TimerHandle | None = None
    _begun = False
    """Whether the quick parser is within a request."""
    _size = 0
    """Bytes since the request began, or since a piece of its body came."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.patience, self._give_up)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        super().data_received(data)
        if self._begun and self._size > MAX_HEAD and not self.transport.is_closing():
            self._refuse("431 Request Header Fields Too Large", f"a head may have {MAX_HEAD} bytes")
        if self._is_waiting and self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._give_up)
        elif not self._is_waiting:
            self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._begun, self._size = True, 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._begun = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for what cannot be read."""
        self._refuse("400 Bad Request", msg)

    def _refuse(self, status: str, message: str) -> None:
        """Say so and close; answers that have begun, or come first, are only cut off."""
        comes_next = not getattr(self, "pipeline", None)  # which one of the two has
        if self._is_waiting or (comes_next and not self.cycle.response_started):
            self.transport.write(refusal(status, message))
        self.transport.close()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _is_waiting(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        self._timer = None
        if self._is_waiting and not self.transport.is_closing():
            self.transport.close()


def patient(base: Any, *, seconds: float) -> Any:
    """A subclass of one of uvicorn's HTTP protocols that waits for a request's head no longer than `seconds`."""
    return type("PatientProtocol", (Patient, base), {"patience": seconds})


def refusal(status: str, message: str) -> bytes:
    """The whole answer to what never becomes a request."""
    data = json.dumps(error_body(message, kind="invalid_request_error")).encode()
    return _HEAD.format(status, len(data)).encode() + data


class PatientServer(uvicorn.Server):
    """uvicorn as this house sets it; how it stops, subclasses say. A second signal sets `force_exit`."""

    def __init__(self, app: ASGIApp, config: ServeConfig, *, lifespan: Literal["on", "off"]) -> None:
        options = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan=lifespan,
            ws="none",
            server_header=False,
            proxy_headers=False,  # a header of anybody's shall not say who the client is
            ssl_certfile=config.tls_cert or None,
            ssl_keyfile=config.tls_key or None,
        )
        options.load()
        options.http_protocol_class = patient(options.http_protocol_class, seconds=config.body_seconds)
        super().__init__(options)

    def cut(self, scope: Scope) -> None:
        """Close the connection of an ASGI scope without waiting for its reader."""
        self._abort(scope["client"])

    def cut_all(self) -> None:
        """Close all that is left: connections that do not end by themselves."""
        self.force_exit = True
        self._abort(None)

    def _abort(self, client: Any) -> None:
        for connection in list(self.server_state.connections):
            if client is None or getattr(connection, "client", None) == client:
                getattr(connection, "transport").abort()  # noqa: B009 - uvicorn's protocols share no base class

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
