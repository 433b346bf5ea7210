"""A scripted HTTP server: raw bytes to order, in the pieces that a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Write = Callable[[bytes], Awaitable[None]]
Script = Callable[["Asked", Write], Awaitable[None]]


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Scripted:
    """The server's side: what was asked, and how many texts were being written at once."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    busy: int = 0
    most_busy: int = 0

    @property
    def generations(self) -> list[Any]:
        """Bodies of the requests for text."""
        return [item.body for item in self.asked if item.path.endswith("completions")]


async def read_request(reader: asyncio.StreamReader) -> Asked | None:
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, json.loads(data) if data else None)


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Scripted]:
    """Answers every request by the script; a script that raises ConnectionAbortedError hangs up."""
    found = Scripted("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.connections += 1

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)

        try:
            while (asked := await read_request(reader)) is not None:
                found.asked.append(asked)
                found.busy += asked.path.endswith("completions")
                found.most_busy = max(found.most_busy, found.busy)
                try:
                    await script(asked, write)
                finally:
                    found.busy -= asked.path.endswith("completions")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()


def plain(value: Any, status: int = 200) -> bytes:
    """A whole JSON response."""
    data = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def text(piece: str, reason: str | None = None) -> bytes:
    """An event of the completions route."""
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": reason}]})


def usage(prompt: int, output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})


MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model", "max_model_len": 512}]}


async def care(asked: Asked, write: Write, *, counts: bool = True) -> bool:
    """The routes beside generation: models, and tokens of a text (one for each word and one to begin with)."""
    if asked.path == "/v1/models":
        await write(plain(MODELS))
    elif asked.path == "/tokenize" and counts:
        await write(plain({"tokens": [0] * (1 + len(asked.body["prompt"].split())), "count": 0}))
    elif not asked.path.endswith("completions"):
        await write(plain({"error": {"message": "no such route"}}, 404))
    else:
        return False
    return True


async def answer(asked: Asked, write: Write) -> None:
    """A good answer of as many tokens as were asked for, two in each piece, and its usage."""
    wanted = asked.body["max_tokens"]
    await write(STREAM)
    for start in range(0, wanted, 2):
        await write(chunk(text("word " * min(2, wanted - start))))
    words = len(asked.body["prompt"].split()) + 1 if "prompt" in asked.body else 9  # as /tokenize counts
    await write(chunk(text("", "length")) + chunk(usage(words, wanted)) + chunk(event("[DONE]")) + END)
