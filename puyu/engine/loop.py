"""The engine behind asyncio: one background thread steps, any number of coroutines wait for their own request.

What a step brings goes to the event loop in one message for all requests together. Leaving a stream early (a client
that went away) aborts its request within one step, and so does falling too far behind. `close` refuses new requests,
lets those under way finish for a while, aborts the rest and joins the thread. Knows no HTTP.

    async with AsyncEngine(driver) as engine:
        async for delta in engine.stream(GenerateRequest("Once")): ...
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from puyu.engine.core import Stats
from puyu.engine.driver import Driver
from puyu.engine.request import Request, Running
from puyu.errors import ResourceError
from puyu.log import logger
from puyu.types import Completion, Delta, GenerateRequest

T = TypeVar("T")
ASLEEP_SECONDS = 0.25
LONG_TEXT = 20_000
"""Characters of a prompt from which on it is encoded in another thread."""
MAX_BEHIND = 4096
"""Pieces that a stream may have left unread before its request is aborted."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been checked: what was asked, and what the engine will run, once for each answer."""

    request: GenerateRequest
    parts: tuple[Request, ...]

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.parts[0].prompt_ids)

    @property
    def num_answers(self) -> int:
        return self.request.params.n


class AsyncEngine:
    """Steps a driver in a thread of its own, from the first request on until `close`."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        driver.on_pumped = self._send
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._stopped = False
        self._outbox: list[_Letter] = []
        """What callbacks of the step under way have for event loops; touched with the driver's lock alone."""
        self.failure: BaseException | None = None
        """What ended the thread, if it did not end by `close`; every later request is refused."""

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    async def prepare(self, request: GenerateRequest) -> Asked:
        """Check and render a request; what may take long is done in another thread, so that the event loop goes on.
        RequestError names a field that cannot be accepted."""
        prepare = partial(self.driver.front.prepare, request)
        takes_long = request.params.guide is not None or bool(request.tools) or _length(request) > LONG_TEXT
        return Asked(request, await asyncio.to_thread(prepare) if takes_long else prepare())

    async def generate(self, request: GenerateRequest | Asked) -> Completion:
        """Run one request to its end; cancelling the wait aborts it."""
        asked = request if isinstance(request, Asked) else await self.prepare(request)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        done = self._to(partial(_set_result, future))
        return await self._result(future, self._submit(partial(self.driver.queue, asked.request, asked.parts), done))

    async def pool(self, request: Request) -> Running:
        """Run what `Front.prepare_pool` made; its numbers are `pooled`."""
        future: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        done = self._to(partial(_set_result, future))
        return await self._result(future, self._submit(partial(self.driver.submit_pool, request), done))

    async def _result(self, future: asyncio.Future[T], request_id: str) -> T:
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._abort(request_id)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Text as it comes; each answer's last delta has tool calls and finish reason, the very last the usage."""
        async with contextlib.aclosing(self.batches([await self.prepare(request)])) as batches:
            async for batch in batches:
                for delta in batch:
                    yield delta

    async def batches(self, asked: Sequence[Asked]) -> AsyncGenerator[list[Delta], None]:
        """What has come since the last time, of several requests together. Their answers are counted through: index
        0 to n - 1 are those of the first request."""
        ids: list[str] = []
        letters = _Mailbox(overflown=lambda: self._abort(*ids))
        try:
            for at, item in enumerate(asked):
                first = sum(other.num_answers for other in asked[:at])
                show = self._to(partial(_put_delta, letters, first))
                done = self._to(partial(_put_end, letters, first, len(ids)))
                ids.append(self._submit(partial(self.driver.queue, item.request, item.parts, show=show), done))
            while len(letters.ended) < len(asked) or not letters.is_empty:
                yield await letters.take()
        finally:
            for at, request_id in enumerate(ids):
                if at not in letters.ended:
                    self._abort(request_id)

    async def run(self, function: Callable[[], T]) -> T:
        """Run something that needs the model while no step runs."""

        def locked() -> T:
            with self.driver.lock:
                return function()

        return await asyncio.to_thread(locked)

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self.failure is None and not self._closing

    def stats(self) -> Stats:
        return self.driver.stats()

    def close(self, *, drain: float = 5.0) -> None:
        """Refuse new requests, wait up to `drain` seconds for those under way, abort the rest, join the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        thread = self._thread
        if thread is None:
            return
        deadline = time.monotonic() + drain
        while self.driver.has_work and thread.is_alive() and not self._stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        thread.join()

    def hurry(self) -> None:
        """Let a `close` under way wait no longer."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()

    def _submit(self, queue: Callable[..., str], done: Callable[[Any], None]) -> str:
        with self._wake:  # from here on the thread cannot end without having seen the request
            if self.failure is not None:
                raise ResourceError(f"the engine has stopped: {self.failure}", remedy="start it again; see the log")
            if self._closing:
                raise ResourceError("the engine is shutting down", remedy="send the request to another server")
            request_id = queue(done=done)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="puyu-engine", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        return request_id

    def _to(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        """A callback of the driver that has `function` called in this event loop, after the step."""
        loop = asyncio.get_running_loop()
        return lambda value: self._outbox.append(_Letter(loop, function, value))

    def _send(self) -> None:
        """Hand over what a step has brought."""
        letters, self._outbox = self._outbox, []
        for loop in {letter.loop for letter in letters}:
            _call_soon(loop, _deliver, [letter for letter in letters if letter.loop is loop])

    def _abort(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.driver.abort(request_id)
        self.nudge()

    def nudge(self) -> None:
        """Let the thread look for work: the engine has been woken up."""
        with self._wake:
            self._wake.notify_all()

    def _work(self) -> None:
        try:
            while self._wait():
                self.driver.pump()
        except BaseException as error:  # noqa: BLE001 - logged, kept in `failure`, told to every request
            with self._wake:
                self.failure = error
            logger.exception("the engine's thread has ended")
        finally:
            self.driver.end_all("abort" if self.failure is None else "error")

    def _wait(self) -> bool:
        """Sleep until there is work; False when the engine is to stop."""
        with self._wake:
            # while the engine sleeps, somebody still has to look at deadlines
            patience = ASLEEP_SECONDS if self.driver.only_waits else None
            self._wake.wait_for(lambda: self._stopped or self.driver.has_work, patience)
            return not self._stopped


def last_deltas(completion: Completion) -> list[Delta]:
    """The end of a stream: tool calls and finish reason of every answer, the usage with the last."""
    answers = completion.choices
    return [
        Delta(
            tool_calls=answer.message.tool_calls,
            finish_reason=answer.finish_reason,
            usage=completion.usage if index == len(answers) - 1 else None,
            index=index,
        )
        for index, answer in enumerate(answers)
    ]


class _Letter(NamedTuple):
    """A call for an event loop."""

    loop: asyncio.AbstractEventLoop
    function: Callable[[Any], None]
    value: Any


def _deliver(letters: Sequence[_Letter]) -> None:
    for letter in letters:
        letter.function(letter.value)


class _Mailbox:
    """Deltas that nobody has taken yet. Lives in the event loop's thread."""

    def __init__(self, *, overflown: Callable[[], object]) -> None:
        self.ended: set[int] = set()
        """Places of the requests that have come to their end."""
        self._items: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._overflown: Callable[[], object] | None = overflown

    def put(self, items: Sequence[Delta]) -> None:
        self._items += items
        if len(self._items) > MAX_BEHIND and self._overflown is not None:
            self._overflown()
            self._overflown = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_empty(self) -> bool:
        return not self._items

    async def take(self) -> list[Delta]:
        """All that is there; waits for the first."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


def _put_delta(letters: _Mailbox, first: int, delta: Delta) -> None:
    letters.put([replace(delta, index=first + delta.index) if first else delta])


def _put_end(letters: _Mailbox, first: int, at: int, completion: Completion) -> None:
    letters.ended.add(at)
    letters.put([replace(delta, index=first + delta.index) for delta in last_deltas(completion)])


def _length(request: GenerateRequest) -> int:
    """Characters of a prompt; ids need no encoding."""
    if isinstance(request.prompt, str):
        return len(request.prompt)
    return sum(len(message.text) for message in request.prompt if not isinstance(message, int))


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
    """Hand something to an event loop; a loop that has ended no longer wants it."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise
