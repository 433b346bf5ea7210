"""HTTP/1.1 as a load generator needs it: raw asyncio streams, and the moment at which bytes arrive.

    endpoint = Endpoint("http://127.0.0.1:8000")
    status, answer = await endpoint.ask("GET", "/v1/models")

A general client spends more time on a chunk than a small model on a token, and the load would be the client's.
Connections are used again, as browsers and SDKs do. Knows no redirects, proxies, cookies or compression.
Format: RFC 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from puyu.errors import ConfigError, ResourceError

Seen = Callable[["Response", bytes, float], None]
"""Told the response so far, the body's new bytes and the time, after each read."""

READ_BYTES = 1 << 16
MAX_HEAD = 1 << 16


class Torn(ResourceError):
    """A response that ended before it was complete, or that is no HTTP."""


class Response:
    """Bytes of one response in any pieces -> status, headers, and the decoded body as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_done = False
        self._buffer = bytearray()
        self._left: float = 0.0
        self._read: Callable[[bytearray], bool] = self._head

    def push(self, data: bytes) -> bytes:
        """What these bytes add to the body."""
        self._buffer += data
        body = bytearray()
        while not self.is_done and self._read(body):
            continue
        return bytes(body)

    def end(self) -> None:
        """The connection was closed; Torn unless that is how this body ends."""
        if not self.is_done and self._left != math.inf:
            where = "its head" if not self.status else "its body"
            raise Torn(f"the connection was closed inside a response, in {where}")
        self.is_done = True

    @property
    def keeps_open(self) -> bool:
        """Whether another request may follow on the connection."""
        return self.is_done and self._left != math.inf and self.headers.get("connection", "").lower() != "close"

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise Torn("a line of the response has no end; is this an HTTP server?")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _head(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        if not self.status:
            self.status = _status(line)
        elif line:
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()
        else:
            self._begin_body()
        return True

    def _begin_body(self) -> None:
        if 100 <= self.status < 200:  # an interim answer; the real one follows
            self.status, self.headers = 0, {}
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._read = self._size
        else:
            length = self.headers.get("content-length", "")
            self._left = float(length) if length.isdigit() else math.inf
            self._read, self.is_done = self._plain, self._left == 0 or self.status in (204, 304)

    def _plain(self, body: bytearray) -> bool:
        taken = self._take(body)
        self.is_done = self._left == 0
        return taken

    def _size(self, body: bytearray) -> bool:
        line = self._line()
        if line is None:
            return False
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise Torn(f"the response has a chunk of the size {line[:20]!r}") from error
        self._read = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, body: bytearray) -> bool:
        taken = self._take(body)
        if self._left == 0:
            self._read = self._gap
        return taken

    def _gap(self, body: bytearray) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise Torn("a chunk of the response does not end where it says")
        del self._buffer[:2]
        self._read = self._size
        return True

    def _trailer(self, body: bytearray) -> bool:
        line = self._line()
        self.is_done = line == b""
        return line is not None

    def _take(self, body: bytearray) -> bool:
        count = int(min(self._left, len(self._buffer)))
        body += self._buffer[:count]
        del self._buffer[:count]
        self._left -= count
        return count > 0


def _status(line: bytes) -> int:
    parts = line.split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise Torn(f"no HTTP/1.1 response but {line[:40]!r}", remedy="check the address")
    return int(parts[1])


class Endpoint:
    """One server. `url` is with or without `/v1`; `api_key` is sent as a bearer token."""

    def __init__(self, url: str, *, api_key: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url: not an HTTP address: {url!r}", remedy="for example http://127.0.0.1:8000")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self.port = parts.hostname, parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.clock = clock
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\nAccept: application/json, text/event-stream\r\n{key}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """The bytes of a request."""
        data = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        about = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if body is not None else ""
        return f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._headers}{about}\r\n".encode() + data

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON answer, its text where it is no JSON; ResourceError where nobody answers."""
        found = bytearray()
        try:
            response = await self.send(self.request(method, path, body), lambda _, data, now: found.extend(data))
        except OSError as error:
            raise ResourceError(f"no answer from {self.url}: {error}", remedy="start the server first") from error
        with contextlib.suppress(ValueError):
            return response.status, json.loads(found)
        return response.status, found.decode("utf-8", "replace")

    async def send(self, request: bytes, seen: Seen) -> Response:
        """One exchange; leaving it early closes the connection, which tells the server. OSError, Torn."""
        while True:
            reader, writer, is_used = await self._connect()
            response, began = Response(), False
            try:
                writer.write(request)
                await writer.drain()
                while not response.is_done and (data := await reader.read(READ_BYTES)):
                    began = True
                    now = self.clock()
                    seen(response, response.push(data), now)
                if not began and is_used:
                    continue  # the server had closed this idle connection meanwhile
                response.end()
                return response
            except ConnectionError:
                if began or not is_used:
                    raise
            finally:
                if response.keeps_open:
                    self._idle.append((reader, writer))
                else:
                    writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """A connection, and whether it has been used before."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer, True
            writer.close()
        return *await asyncio.open_connection(self.host, self.port, ssl=self.tls), False

    async def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()
