"""Scripted replicas: small servers in the test's own loop that answer, or fail, exactly where a test wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from puyu.serve.config import ServeConfig
from puyu.serve.fleet import Fleet, Patience
from puyu.serve.routed import RouterServer
from puyu.serve.router import Router
from puyu.serve.server import address, bind
from puyu.serve.upstream import Address

QUICK = Patience(start=5, health_every=0.02, health_answer=0.2, failures=2, first_pause=0.05, longest_pause=1, stop=1)
Script = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


@dataclass
class Fake:
    """One life of a replica; `script` answers every request but /health. See `fleet.Process`."""

    script: Script
    address: Address = ("", 0)
    is_sick: bool = False
    asked: list[bytes] = field(default_factory=list)
    left: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def open(self) -> Fake:
        self.server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.address = self.server.sockets[0].getsockname()[:2]
        return self

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line.split()[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        body = await reader.readexactly(int(length))
        if head.startswith(b"GET /health"):
            if self.is_sick:
                await asyncio.sleep(60)
            await whole({"status": "ok"})(writer, b"")
            return
        self.asked.append(head + body)
        work = asyncio.ensure_future(self.script(writer, body))
        gone = asyncio.ensure_future(reader.read())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        self.left += not work.done()
        for side in (work, gone):
            side.cancel()

    def die(self) -> None:
        """As by SIGKILL."""
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        self.over.set()

    async def wait(self) -> str:
        await self.over.wait()
        return "was ended"

    async def stop(self, seconds: float) -> None:
        self.die()

    def tail(self) -> str:
        return "its last words"


# -- scripts ---------------------------------------------------------------------------------------------------


def whole(value: Any, status: int = 200, **headers: str) -> Script:
    async def answer(writer: asyncio.StreamWriter, body: bytes) -> None:
        data = json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status} OK", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {text}" for name, text in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()

    return answer


def torn(*pieces: bytes, pause: float = 0.0) -> Script:
    """Send some bytes and die."""

    async def answer(writer: asyncio.StreamWriter, body: bytes) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if pieces:  # what was written must be read before the connection is reset
            await asyncio.sleep(0.02)
        writer.transport.abort()

    return answer


async def silent(writer: asyncio.StreamWriter, body: bytes) -> None:
    await asyncio.sleep(60)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return b'data: {"text": "%s"}\n\n' % text.encode()


# -- the router around them ------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A router with its fleet; `lives[i]` are the fakes that have filled place i, the newest last."""

    http: httpx.AsyncClient
    router: Router
    server: RouterServer
    lives: dict[int, list[Fake]]

    @property
    def fleet(self) -> Fleet:
        return self.router.fleet

    def asked(self) -> list[int]:
        """How many requests each place has had."""
        return [sum(len(fake.asked) for fake in self.lives[index]) for index in sorted(self.lives)]


@asynccontextmanager
async def staged(*scripts: Script, patience: Patience = QUICK, **options: Any) -> AsyncIterator[Stage]:
    """One replica for each script, behind a real router."""
    lives: dict[int, list[Fake]] = {index: [] for index in range(len(scripts))}

    async def launch(index: int) -> Fake:
        lives[index].append(await Fake(scripts[index]).open())
        return lives[index][-1]

    config = ServeConfig(port=0, replicas=len(scripts), **options)
    fleet = Fleet(len(scripts), launch, key="inner", patience=patience)
    router = Router(fleet)
    server = RouterServer(router, config)
    await fleet.start()
    with bind(config) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(20), httpx.AsyncClient(base_url=address(listener), timeout=10) as http:
                yield Stage(http, router, server, lives)
        finally:
            server.should_exit = True
            await serving
            await fleet.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
