"""The engine behind asyncio: one background thread steps, any number of coroutines wait for their own request.

Leaving a stream early (a client that went away) aborts its request within one step. `close` refuses new requests,
lets those under way finish for a while, aborts the rest and joins the thread. Knows no HTTP.

    async with AsyncEngine(driver) as engine:
        async for delta in engine.stream(GenerateRequest("Once")): ...
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, TypeVar

from puyu.engine.core import Stats
from puyu.engine.driver import Driver
from puyu.errors import RequestError, ResourceError
from puyu.log import logger
from puyu.types import Completion, Delta, GenerateRequest

T = TypeVar("T")
ASLEEP_SECONDS = 0.25


class AsyncEngine:
    """Steps a driver in a thread of its own, from the first request on until `close`."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._stopped = False
        self.failure: BaseException | None = None
        """What ended the thread, if it did not end by `close`; every later request is refused."""

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    async def generate(self, request: GenerateRequest) -> Completion:
        """Run one request to its end; cancelling the wait aborts it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()

        def done(completion: Completion) -> None:
            _call_soon(loop, _set_result, future, completion)

        request_id = await self._submit(request, done=done)
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self._abort(request_id)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Text as it comes; each answer's last delta has tool calls and finish reason, the very last the usage."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | Completion] = asyncio.Queue()

        def put(item: Delta | Completion) -> None:
            _call_soon(loop, queue.put_nowait, item)

        def text(index: int, piece: str) -> None:
            put(Delta(piece, index=index))

        request_id, ended = await self._submit(request, done=put, text=text), False
        try:
            while not ended:
                item = await queue.get()
                ended = isinstance(item, Completion)
                for delta in last_deltas(item) if isinstance(item, Completion) else [item]:
                    yield delta
        finally:
            if not ended:
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
        while self.driver.has_work and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        thread.join()

    async def _submit(self, request: GenerateRequest, **callbacks: Any) -> str:
        """Queue a request; a grammar is compiled in another thread, so that the event loop goes on."""
        prepare = partial(self.driver.front.prepare, request)
        prepared = prepare() if request.params.guide is None else await asyncio.to_thread(prepare)
        with self._wake:  # from here on the thread cannot end without having seen the request
            if self.failure is not None:
                raise ResourceError(f"the engine has stopped: {self.failure}", remedy="start it again; see the log")
            if self._closing:
                raise RequestError("the engine is shutting down", remedy="send the request to another server")
            request_id = self.driver.queue(request, prepared, **callbacks)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="puyu-engine", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        return request_id

    def _abort(self, request_id: str) -> None:
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


def _set_result(future: asyncio.Future[Completion], completion: Completion) -> None:
    if not future.done():
        future.set_result(completion)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> None:
    """Hand something to an event loop; a loop that has ended no longer wants it."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise
