"""Replicas that are kept alive: started, watched, taken out when they fail, started again with growing pauses.

    fleet = Fleet(3, launch, key=key)
    await fleet.start()                      # all are up, or ResourceError with the log's end of the one that is not
    replica = fleet.choose(hashes)
    async with replica.ask(question) as answer: ...

A replica is out as soon as its process ends, or when `/health` has failed or hung `failures` times in a row; then its
connections are cut, so that nobody waits for it, and its process is killed. Who had trouble with a replica says
`doubt()`: it is left aside until its health has been asked again, which happens at once. What a process is, `launch`
alone knows (`local.py`: a child; `cluster.py`: a Ray actor). Every start has a new number (`serial`), so that what is
remembered of an earlier life never leads to a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import unquote

from puyu.errors import ResourceError
from puyu.log import say
from puyu.serve.affinity import Affinity
from puyu.serve.guard import CONTROL
from puyu.serve.upstream import Address, Answer, Question, Torn, Unreached, exchange

HEALTH = Question(b"GET", b"/health", [])
State = Literal["starting", "up", "doubted", "down"]


class Process(Protocol):
    """What runs one replica."""

    address: Address

    async def wait(self) -> str:
        """Return when it has ended, saying how."""

    async def stop(self, seconds: float) -> None:
        """End it: politely, and by force after `seconds`."""

    def tail(self) -> str:
        """The end of its log."""


Launch = Callable[[int], Awaitable[Process]]


def control_key(key: str) -> str:
    """The inner key of a replica's control routes, which must not be that of the others."""
    return f"{key}-control" if key else ""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds."""

    start: float = 600.0
    health_every: float = 1.0
    health_answer: float = 5.0
    failures: int = 3
    first_pause: float = 0.5
    longest_pause: float = 30.0
    stop: float = 1.0


class Settled:
    """What has been asked of all replicas and still counts, for those that start later. `lock` keeps the order."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.questions: dict[str, Question] = {}

    def add(self, question: Question) -> None:
        """Remember a control request that was done; the newest of a kind is enough."""
        path = question.target.decode("latin-1").partition("?")[0].removeprefix(CONTROL)
        kind, _, name = path.partition("/")
        if question.method == b"GET" or kind == "reset_prefix_cache":
            return
        if kind == "adapters":
            kind += "/" + (unquote(name) or json.loads(question.body)["name"])
        kind = "sleep" if kind == "wake" else kind
        self.questions.pop(kind, None)
        self.questions[kind] = question


class Replica:
    """One place in the fleet and whatever process fills it at the moment."""

    serials = itertools.count(1)

    def __init__(self, index: int, launch: Launch, *, key: str, patience: Patience, settled: Settled) -> None:
        self.index, self.serial, self.in_flight, self.deaths = index, 0, 0, 0
        self.state: State = "down"
        self.address: Address = ("", 0)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._launch, self._key, self._patience, self._settled = launch, key, patience, settled
        self._writers: set[asyncio.StreamWriter] = set()
        self._look = asyncio.Event()

    @contextlib.asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Answer]:
        """See `exchange`; counts as in flight, and breaks off when the replica is taken out."""
        mine: list[asyncio.StreamWriter] = []

        def opened(writer: asyncio.StreamWriter) -> None:
            mine.append(writer)
            self._writers.add(writer)

        key = control_key(self._key) if question.target.startswith(CONTROL.encode()) else self._key
        self.in_flight += 1
        try:
            async with exchange(self.address, question, key=key, opened=opened) as answer:
                yield answer
        finally:
            self.in_flight -= 1
            self._writers.difference_update(mine)

    def doubt(self, serial: int) -> None:
        """Something went wrong with the process of this serial: leave it aside until its health has been asked."""
        if self.serial == serial and self.state == "up":
            self.state = "doubted"
            self._look.set()

    def cut(self) -> None:
        """Break off every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def keep(self) -> None:
        """Start it, and again whenever it has ended; runs until cancelled, or until the first start has failed."""
        pause = self._patience.first_pause
        while True:
            began = time.monotonic()
            why = await self._live()
            if self.ready.exception() is not None:
                return
            self.deaths += 1
            if time.monotonic() - began > 2 * self._patience.longest_pause:
                pause = self._patience.first_pause
            say(f"replica {self.index} {why}; it starts again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._patience.longest_pause)

    async def _live(self) -> str:
        """One life, from the start of a process to its end; says why it ended."""
        self.state = "starting"
        try:
            process = await self._launch(self.index)
        except (ResourceError, OSError) as error:
            return self._ended(f"could not be started: {error}", "")
        self.address = process.address
        self.serial = next(Replica.serials)
        sides = [asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._watch())]
        grace = self._patience.stop  # of a fleet that stops; a replica that failed gets none
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            why, grace = done.pop().result(), 0.0
        finally:
            self.state = "down"
            self.cut()
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
            await process.stop(grace)
        return self._ended(why, process.tail())

    def _ended(self, why: str, tail: str) -> str:
        """Before the replica was ready for the first time, its end is the fleet's."""
        self.state = "down"
        if not self.ready.done():
            message = f"replica {self.index} did not start ({why}): {tail}"
            self.ready.set_exception(ResourceError(message, remedy="mend what its log says"))
        return why

    async def _watch(self) -> str:
        """Wait until it answers, then look at its health; returns when it must be taken out, saying why."""
        deadline = time.monotonic() + self._patience.start
        while not await self._is_healthy():
            if time.monotonic() > deadline:
                return f"did not answer within {self._patience.start:g} s of its start"
            await asyncio.sleep(0.05)
        async with self._settled.lock:
            if not await self._catches_up():
                return "could not be brought to the state of the others"
            self.state = "up"
        failures = 0
        while failures < self._patience.failures:
            self.state = "up" if failures == 0 else "doubted"
            if not self.ready.done():
                self.ready.set_result(None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._patience.health_every)
            self._look.clear()
            failures = 0 if await self._is_healthy() else failures + 1
        return "did not answer /health"

    async def _catches_up(self) -> bool:
        """Do what the others have been told; what this one refuses has lost its meaning (an adapter that is gone)."""
        for question in self._settled.questions.values():
            try:
                async with self.ask(question) as answer:
                    done = answer.status < 500
            except (Unreached, Torn):
                done = False
            if not done:
                return False
        return True

    async def _is_healthy(self) -> bool:
        try:
            async with asyncio.timeout(self._patience.health_answer):
                async with exchange(self.address, HEALTH) as answer:
                    return answer.status == 200
        except (Unreached, Torn, TimeoutError):
            return False


class Fleet:
    """All replicas and the choice among them."""

    def __init__(self, size: int, launch: Launch, *, key: str = "", patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self.settled = Settled()
        shared: dict[str, Any] = {"key": key, "patience": self._patience, "settled": self.settled}
        self.replicas = [Replica(index, launch, **shared) for index in range(size)]
        self.affinity = Affinity()
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when every replica is up; ResourceError when one of them ends before. `stop` must follow."""
        self._keepers = [asyncio.create_task(replica.keep()) for replica in self.replicas]
        ready = asyncio.gather(*(replica.ready for replica in self.replicas))
        waiting: list[asyncio.Future[Any]] = [ready, *self._keepers]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for keeper in self._keepers:
            if keeper.done():
                keeper.result()  # a mistake of ours shall not leave us waiting
        await ready

    async def stop(self) -> None:
        """End every process; none is started again."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def up(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state == "up"]

    def choose(self, hashes: Sequence[int], *, without: Collection[int] = ()) -> Replica | None:
        """The best live replica for a prompt, except the serials in `without`; None when there is none."""
        live = {replica.serial: replica for replica in self.up() if replica.serial not in without}
        if not live:
            return None
        return live[self.affinity.choose(hashes, {serial: each.in_flight for serial, each in live.items()})]

    def cut(self) -> None:
        """Break off everything that is under way."""
        for replica in self.replicas:
            replica.cut()
