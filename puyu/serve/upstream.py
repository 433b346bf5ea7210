"""One HTTP request to a replica over a connection of its own: asyncio streams and h11, nothing read ahead.

    async with exchange(("127.0.0.1", 8001), question) as answer:
        body = await answer.read()

What goes wrong has two names, because only one of them may have cost the replica its life: `Unreached` (no
connection, so the replica has not seen the request) and `Torn` (the connection ended before the answer did). Leaving
the block closes the connection, which makes the replica abort the request. Bodies pass as bytes, whatever has come
at once in one piece; nothing is parsed. Knows nothing of which replica is right or what an answer means.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import h11

from puyu.errors import PuyuError

CONNECT_SECONDS = 5.0
READ_BYTES = 1 << 16
# Belong to one connection, not to the message (RFC 9110, 7.6.1), or are written anew by the next sender.
OF_THE_CONNECTION = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection", b"expect"}
)
ASKED_ANEW = OF_THE_CONNECTION | {b"host", b"content-length", b"authorization"}
ANSWERED_ANEW = OF_THE_CONNECTION | {b"date", b"server", b"x-request-id"}

Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]


class Unreached(PuyuError):
    """No connection: the replica has not seen the request."""


class Torn(PuyuError):
    """The connection ended before the answer did."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request that can be sent as often as needed."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes = b""

    def to_bytes(self, address: Address, key: str) -> bytes:
        """The request on the wire; h11.LocalProtocolError for one that is not HTTP."""
        headers = [(name, value) for name, value in self.headers if name.lower() not in ASKED_ANEW]
        host = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        headers += [(b"host", host.encode()), (b"content-length", b"%d" % len(self.body)), (b"connection", b"close")]
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        sender = h11.Connection(h11.CLIENT)
        head = sender.send(h11.Request(method=self.method, target=self.target, headers=headers))
        return (head or b"") + self.body


class Answer:
    """A response whose head has come."""

    def __init__(self, reader: asyncio.StreamReader, method: bytes) -> None:
        self._reader = reader
        self._wire = h11.Connection(h11.CLIENT)
        # The request has been written already; h11 only has to know which answer to expect.
        self._wire.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"replica")]))
        self._wire.send(h11.EndOfMessage())
        self.status = 0
        self.headers: Headers = []

    @property
    def is_stream(self) -> bool:
        """Whether these are server-sent events."""
        return self.header(b"content-type").startswith(b"text/event-stream")

    def header(self, name: bytes) -> bytes:
        return next((value for known, value in self.headers if known == name), b"")

    async def head(self) -> None:
        """Wait for status and headers."""
        while not isinstance(event := self._next(), h11.Response):
            if event is h11.NEED_DATA:
                await self._more()
        self.status = event.status_code
        self.headers = [(name, value) for name, value in event.headers if name not in ANSWERED_ANEW]

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body; each piece is all that had come."""
        while True:
            pending: list[bytes] = []
            while isinstance(event := self._next(), h11.Data):
                pending.append(bytes(event.data))
            if pending:
                yield b"".join(pending)
            if event is not h11.NEED_DATA:
                return
            await self._more()

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._wire.next_event()
        except h11.RemoteProtocolError as error:
            raise Torn(f"the answer broke off: {error}") from error

    async def _more(self) -> None:
        try:
            self._wire.receive_data(await self._reader.read(READ_BYTES))
        except OSError as error:
            raise Torn(f"the connection broke off: {error}") from error


@contextlib.asynccontextmanager
async def exchange(
    address: Address,
    question: Question,
    *,
    key: str = "",
    opened: Callable[[asyncio.StreamWriter], None] = lambda writer: None,
) -> AsyncIterator[Answer]:
    """Send a request and wait for the head of its answer. `opened` gets the connection, to cut it from outside."""
    data = question.to_bytes(address, key)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(*address, limit=READ_BYTES)
    except (OSError, TimeoutError) as error:
        raise Unreached(f"{address[0]}:{address[1]} cannot be reached: {error}") from error
    try:
        opened(writer)
        answer = Answer(reader, question.method)
        await _send(writer, data)
        await answer.head()
        yield answer
    finally:
        writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    # A refusal may come before the body has been read; then it is the answer that counts, not the failed write.
    with contextlib.suppress(OSError):
        await writer.drain()
