"""The client side of serve_harness.py: plays the steps of a case over one socket and collects the answers.

Standard library alone, and below any HTTP library, since a case may break the protocol where it likes. It judges
nothing: what came back, how the connection ended and how long it took is all that it tells.

    outcome = await play(("127.0.0.1", 8000), [Step("send", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")])
    outcome.answers[0].status
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["send", "pause", "trickle", "half", "leave", "await", "deaf"]
Ended = Literal["answered", "left", "closed", "hang", "refused"]
MAX_HEAD = 1 << 16
NO_BODY = (204, 304)


class Step(NamedTuple):
    """What a client does: send `data`; pause `value` seconds; trickle `data` over `value` seconds; half-close; leave;
    await `value` bytes of the answer; be deaf (take nothing) for `value` seconds."""

    kind: Kind
    data: bytes = b""
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Outcome:
    """What a case gave. `torn`: the connection ended within an answer. `silent`: seconds until the connection was
    closed by the server, where it owed nothing."""

    ended: Ended
    answers: list[Answer] = field(default_factory=list)
    torn: bool = False
    seconds: float = 0.0


class Answers:
    """An incremental reader of HTTP/1.1 answers. ValueError where the bytes are no HTTP."""

    def __init__(self, *, heads: Sequence[bool] = ()) -> None:
        """`heads`: which answers are to HEAD requests and so have no body."""
        self.done: list[Answer] = []
        self._heads, self._data = heads, bytearray()
        self._status, self._headers, self._body = 0, dict[str, str](), bytearray()
        self._left: int | None = 0
        self._mode: Literal["head", "length", "chunk", "end"] = "head"

    @property
    def is_between(self) -> bool:
        """Whether no answer has begun that is not whole."""
        return self._mode == "head" and not self._data

    def feed(self, data: bytes) -> None:
        self._data += data
        while self._advance():
            continue

    def end(self) -> None:
        """The connection has been closed: an answer without a length is whole now."""
        if self._mode == "end":
            self._finish()

    def _advance(self) -> bool:
        """Whether something could be taken from what has come."""
        if self._mode == "head":
            return self._read_head()
        if self._mode == "length":
            assert self._left is not None
            return self._take(self._left) and self._finish()
        if self._mode == "chunk":
            return self._read_chunk()
        self._body += self._data
        self._data.clear()
        return False

    def _read_head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            if len(self._data) > MAX_HEAD or (self._data and not b"HTTP/1.".startswith(self._data[:7])):
                raise ValueError("what came is no HTTP answer")
            return False
        first, *rows = bytes(self._data[:end]).decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdigit():
            raise ValueError(f"no HTTP answer begins with {first[:40]!r}")
        del self._data[: end + 4]
        self._status = int(status[:3])
        self._headers = {name.strip().lower(): value.strip() for name, _, value in (row.partition(":") for row in rows)}
        self._body = bytearray()
        return self._begin_body()

    def _begin_body(self) -> bool:
        if 100 <= self._status < 200 and self._status != 101:
            return True  # "continue": the answer itself follows
        is_head = len(self.done) < len(self._heads) and self._heads[len(self.done)]
        if is_head or self._status in NO_BODY:
            return self._finish()
        if self._headers.get("transfer-encoding", "").lower() == "chunked":
            self._mode = "chunk"
        elif "content-length" in self._headers:
            self._mode, self._left = "length", int(self._headers["content-length"])
        else:
            self._mode = "end"
        return True

    def _read_chunk(self) -> bool:
        end = self._data.find(b"\r\n", 0, 64)
        if end < 0:
            return False
        size, start = int(bytes(self._data[:end]), 16), end + 2
        if len(self._data) < start + size + 2:
            return False
        self._body += self._data[start : start + size]
        del self._data[: start + size + 2]
        return self._finish() if size == 0 else True

    def _take(self, count: int) -> bool:
        if len(self._data) < count:
            return False
        self._body += self._data[:count]
        del self._data[:count]
        return True

    def _finish(self) -> bool:
        self.done.append(Answer(self._status, self._headers, bytes(self._body)))
        self._mode = "head"
        return True


class _Line(asyncio.Protocol):
    """One connection: everything that comes goes to the reader of answers at once."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.transport = answers, None
        self.closed, self.wrong, self.count = False, "", 0
        self.news, self.writable = asyncio.Event(), asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.count += len(data)
        try:
            self.answers.feed(data)
        except ValueError as error:
            self.wrong = str(error)
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.answers.end()
        self.news.set()
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    async def until(self, condition: Any) -> None:
        """Wait until the condition holds or the connection is closed."""
        while not condition() and not self.closed and not self.wrong:
            self.news.clear()
            await self.news.wait()


async def play(
    address: tuple[str, int], steps: Sequence[Step], *, owed: int = 1, limit: float = 60.0, heads: Sequence[bool] = ()
) -> Outcome:
    """Play the steps, then wait for `owed` answers; 0 waits for the server to close."""
    began = time.monotonic()
    line = _Line(Answers(heads=heads))
    try:
        await _connect(address, line, deaf=any(step.kind == "deaf" for step in steps))
    except OSError:
        return Outcome("refused", seconds=time.monotonic() - began)
    ended: Ended = "hang"
    try:
        async with asyncio.timeout(limit):
            ended = await _converse(line, steps, owed)
    except TimeoutError:
        pass
    finally:
        assert line.transport is not None
        line.transport.abort()
    torn = ended == "closed" and not line.answers.is_between
    found = Outcome(ended, line.answers.done, torn, time.monotonic() - began)
    if line.wrong:
        found.answers.append(Answer(0, {}, line.wrong.encode()))
    return found


async def _connect(address: tuple[str, int], line: _Line, *, deaf: bool) -> None:
    """A small receive buffer makes a deaf client felt by the server soon."""
    plug = socket.socket()
    plug.setblocking(False)
    try:
        if deaf:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(plug, address), 20)
        await loop.create_connection(lambda: line, sock=plug)
    except (OSError, TimeoutError) as error:
        plug.close()
        raise OSError(str(error)) from error


async def _converse(line: _Line, steps: Sequence[Step], owed: int) -> Ended:
    for step in steps:
        if line.closed:
            break
        if step.kind == "leave":
            return "left"
        await _do(line, step)
    await line.until(lambda: owed and len(line.answers.done) >= owed)
    return "answered" if owed and len(line.answers.done) >= owed else "closed"


async def _do(line: _Line, step: Step) -> None:
    transport: Any = line.transport
    if step.kind == "send":
        transport.write(step.data)
        await line.writable.wait()
    elif step.kind == "pause":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(step.value):
                await line.until(lambda: False)
    elif step.kind == "trickle":
        for at in range(0, len(step.data), size := max(len(step.data) // 20, 1)):
            if line.closed:
                return
            transport.write(step.data[at : at + size])
            await asyncio.sleep(step.value / 20)
    elif step.kind == "half":
        with contextlib.suppress(OSError, RuntimeError):
            transport.write_eof()
    elif step.kind == "await":
        await line.until(lambda: line.count >= step.value)
    elif step.kind == "deaf":
        transport.pause_reading()
        await asyncio.sleep(step.value)
        if not line.closed:
            transport.resume_reading()
