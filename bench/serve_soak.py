"""serve.4: half an hour of mixed load, with 200 idle connections and 100 requests that wait.

    python bench/serve_soak.py [--save] [--minutes 30]

The 317M shape, int4, on the CPU; `max_running` 8, so that of 108 clients that ask without pause, 100 wait. Each asks
by chance for a chat or a completion, as a stream or whole, leaves in the middle, or sends what must be refused; every
answer must be one that the request allows. 200 more connections are opened and stay silent. Resident memory is read
every second; every two seconds one more client sends a short request whose priority puts it before all that wait, and
its time is taken. serve.4a: median memory of the last quarter over that of the second (the first one
fills caches and pools). serve.4b: median time of the short requests, last quarter over second. At the end, descriptors,
blocks and requests must be back where they were, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cpu_shape
import harness
import servers

IDLE, WAITING, RUNNING = 200, 100, 8
READ_EVERY, PROBE_EVERY, SETTLE = 1.0, 2.0, 30.0
FULL_MINUTES = 30.0
SHORT = {"prompt": "short", "max_tokens": 4, "ignore_eos": True, "priority": 1}


class Left(Exception):
    """The client leaves."""


@dataclass
class Soak:
    """One server under load, and what was seen."""

    server: servers.Server
    until: float
    endpoint: Any
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    short: list[tuple[float, float]] = field(default_factory=list)

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    async def exchange(self, path: str, body: Any, *, leave_after: int = 0) -> tuple[int, bytes]:
        """Status and body; `leave_after` bytes the connection is closed."""
        found = bytearray()

        def seen(response: Any, data: bytes, now: float) -> None:
            found.extend(data)
            if leave_after and len(found) >= leave_after:
                raise Left

        response = await self.endpoint.send(self.endpoint.request("POST", path, body), seen)
        return response.status, bytes(found)

    def note(self, kind: str, *, good: bool, what: object = "") -> None:
        self.counts[kind] += 1
        if not good:
            self.wrong.append(f"{kind}: {what}"[:300])

    async def client(self, seed: int) -> None:
        """Ask without pause."""
        rng = random.Random(seed)
        kinds: Sequence[Callable[[random.Random], Awaitable[None]]] = (
            *(self.chat, self.chat_stream, self.completion, self.completion_stream) * 2,
            *(self.leaving, self.refused),
        )
        while self.goes_on:
            await rng.choice(kinds)(rng)

    async def chat(self, rng: random.Random) -> None:
        status, data = await self.exchange("/v1/chat/completions", _chat(rng))
        self.note("chat", good=status == 200 and _ended(json.loads(data)), what=(status, data[:200]))

    async def chat_stream(self, rng: random.Random) -> None:
        status, data = await self.exchange("/v1/chat/completions", _chat(rng) | {"stream": True})
        self.note("chat stream", good=status == 200 and data.endswith(b"data: [DONE]\n\n"), what=(status, data[-200:]))

    async def completion(self, rng: random.Random) -> None:
        status, data = await self.exchange("/v1/completions", _completion(rng))
        self.note("completion", good=status == 200 and _ended(json.loads(data)), what=(status, data[:200]))

    async def completion_stream(self, rng: random.Random) -> None:
        status, data = await self.exchange("/v1/completions", _completion(rng) | {"stream": True})
        good = status == 200 and data.endswith(b"data: [DONE]\n\n")
        self.note("completion stream", good=good, what=(status, data[-200:]))

    async def leaving(self, rng: random.Random) -> None:
        """Go away in the middle of a stream, or while a whole answer is being made."""
        body = _completion(rng) | {"max_tokens": 400, "stream": rng.random() < 0.5}
        with contextlib.suppress(Left, TimeoutError):
            async with asyncio.timeout(rng.uniform(0.2, 6.0)):
                await self.exchange("/v1/completions", body, leave_after=rng.randint(1, 2000))
        self.note("left", good=True)

    async def refused(self, rng: random.Random) -> None:
        """What no server should take."""
        path, body = rng.choice(
            [
                ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
                ("/v1/completions", {"prompt": "x" * 9000, "max_tokens": 1}),
                ("/v1/completions", {"promt": "x"}),
                ("/v1/chat/completions", {"messages": "hello"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}),
                ("/v1/chat/completions", [1, 2]),
            ]
        )
        status, data = await self.exchange(path, body)
        self.note("refused", good=status == 400 and b'"error"' in data, what=(status, data[:200]))
        await asyncio.sleep(0.2)

    async def probe(self, began: float) -> None:
        """Short requests, one after another."""
        while self.goes_on:
            at = time.monotonic()
            status, data = await self.exchange("/v1/completions", SHORT)
            self.note("short", good=status == 200, what=(status, data[:200]))
            self.short.append((at - began, time.monotonic() - at))
            await asyncio.sleep(max(0.0, at + PROBE_EVERY - time.monotonic()))

    async def watch(self, began: float) -> None:
        while self.goes_on:
            self.memory.append((time.monotonic() - began, float(self.server.resident())))
            await asyncio.sleep(READ_EVERY)

    async def idle(self, count: int) -> list[asyncio.StreamWriter]:
        """Connections that say nothing."""
        opened = [await asyncio.open_connection(self.endpoint.host, self.endpoint.port) for _ in range(count)]
        return [writer for _, writer in opened]

    async def metrics(self) -> dict[str, float]:
        """The server's own gauges."""
        _, page = await self.endpoint.ask("GET", "/metrics")
        return servers.gauges(page)


def _completion(rng: random.Random) -> dict[str, Any]:
    asks = servers.prompts(rng.randrange(10**9), 1)
    return {"prompt": asks[0].prompt, "max_tokens": rng.randint(1, 32), "ignore_eos": True}


def _chat(rng: random.Random) -> dict[str, Any]:
    body = _completion(rng)
    return {"messages": [{"role": "user", "content": body.pop("prompt")}], **body, "temperature": 0.8, "seed": 1}


def _ended(answer: Any) -> bool:
    return answer["choices"][0]["finish_reason"] in ("stop", "length")


async def soak(server: servers.Server, *, minutes: float) -> tuple[Soak, dict[str, Any]]:
    """Load, watch, stop, and look whether everything is back."""
    from puyu.load.http import Endpoint

    found = Soak(server, time.monotonic() + 60 * minutes, Endpoint(server.url))
    await found.exchange("/v1/completions", {"prompt": "warm", "max_tokens": 8})
    await found.endpoint.close()
    await asyncio.sleep(1.0)
    files = server.descriptors()
    silent = await found.idle(IDLE)
    began = time.monotonic()
    clients = [found.client(seed) for seed in range(WAITING + RUNNING)]
    await asyncio.gather(*clients, found.probe(began), found.watch(began), _told(found, began))
    open_idle = server.descriptors()
    for writer in silent:
        writer.close()
    await found.endpoint.close()
    end = await _settled(found, files)
    return found, {"descriptors": [files, open_idle, end["descriptors"]], "end": end}


async def _settled(found: Soak, files: int) -> dict[str, float]:
    """The server when nobody asks any more; waits for what it still has to put away."""
    until, end = time.monotonic() + SETTLE, {}
    while time.monotonic() < until:
        await asyncio.sleep(1.0)
        gauges = await found.metrics()
        await found.endpoint.close()
        await asyncio.sleep(0.2)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        end = {name: gauges[name] for name in names} | {"descriptors": float(found.server.descriptors())}
        if not any(end[name] for name in names) and end["descriptors"] <= files:
            return end
    raise SystemExit(f"after the load not everything is back: {end}, {files} descriptors before")


async def _told(found: Soak, began: float) -> None:
    while found.goes_on:
        await asyncio.sleep(min(60.0, max(found.until - time.monotonic(), 0.1)))
        memory = found.memory[-1][1] / 1e6 if found.memory else 0.0
        print(f"  {time.monotonic() - began:.0f} s: {memory:.0f} MB, {dict(found.counts)}", file=sys.stderr)


def growth(rows: Sequence[tuple[float, float]], seconds: float) -> tuple[float, list[float]]:
    """The median of the last quarter of the time over that of the second, and the medians of all four."""
    quarters: list[list[float]] = [[], [], [], []]
    for at, value in rows:
        quarters[min(int(4 * at / seconds), 3)].append(value)
    medians = [statistics.median(part) if part else float("nan") for part in quarters]
    return medians[3] / medians[1], medians


def measure(*, minutes: float) -> tuple[list[harness.Samples], dict[str, Any]]:
    """The whole bench but its probes."""
    folder = cpu_shape.inputs(cpu_shape.SHAPES["317m"]) / "int4"
    with servers.ours(folder, max_running=RUNNING, max_queue=2 * WAITING) as server:
        found, notes = asyncio.run(soak(server, minutes=minutes))
    memory, times = growth(found.memory, 60 * minutes), growth(found.short, 60 * minutes)
    notes |= {"minutes": minutes, "requests": dict(found.counts), "not_as_allowed": found.wrong[:5]}
    notes |= {"resident_by_quarter": memory[1], "short_seconds_by_quarter": times[1]}
    if found.wrong:
        raise SystemExit(f"{len(found.wrong)} answers are none that the request allows: {found.wrong[:3]}")
    return [harness.Samples("serve.4a", [memory[0]]), harness.Samples("serve.4b", [times[0]])], notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES, help="of load; fewer are never saved")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    run = harness.Run("serve_soak")
    samples, run.notes = measure(minutes=arguments.minutes)
    run.finish(samples, save=arguments.save and arguments.minutes >= FULL_MINUTES)


if __name__ == "__main__":
    main()
