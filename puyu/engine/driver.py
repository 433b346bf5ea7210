"""Ties the front to the engine: submit a request with callbacks, pump steps, abort at any time.

Any thread may submit, abort or pump; one pumps at a time. Requests and aborts wait in an inbox that the next pump
empties first, so an event loop never blocks on a running step and an abort takes effect within one step.

    flight = driver.submit(GenerateRequest("Once"), done=print)
    while driver.pump(): ...
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from puyu.engine.core import Engine, Event, Stats
from puyu.engine.front import Front, Reader
from puyu.engine.request import Request, Running
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, FinishReason, GenerateRequest


@dataclass(frozen=True, slots=True)
class Flight:
    """One request under way and who is told about it. Callbacks run in the pumping thread and must be quick."""

    request: Request
    reader: Reader
    done: Callable[[Completion], None]
    text: Callable[[str], None] | None = None

    @property
    def is_watched(self) -> bool:
        """Whether its text is needed token by token."""
        return self.text is not None or bool(self.request.params.stop)


class Driver:
    """The one place where an engine is stepped."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.front = Front(tokenizer, context=engine.context)
        self.lock = threading.RLock()
        """Held while the engine is stepped; hold it to run the model beside the steps."""
        self._inbox: deque[Flight | str] = deque()
        self._flights: dict[str, Flight] = {}

    def submit(
        self,
        request: GenerateRequest,
        *,
        done: Callable[[Completion], None],
        text: Callable[[str], None] | None = None,
    ) -> str:
        """Validate and queue; returns the request's id. RequestError leaves no trace."""
        prepared = self.front.prepare(request)
        reader = Reader(prepared, self.tokenizer, chat=not isinstance(request.prompt, str))
        self._inbox.append(Flight(prepared, reader, done, text))
        return prepared.id

    def abort(self, request_id: str) -> None:
        """End a request before the next step; one that has ended already is left as it is."""
        self._inbox.append(request_id)

    @property
    def num_queued(self) -> int:
        """Requests that have not begun."""
        return len(self._inbox) + len(self.engine.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or self.engine.has_work

    def pump(self) -> bool:
        """One step and its callbacks; False when nothing is left to do."""
        with self.lock:
            self._empty_inbox()
            for event in self.engine.step():
                self._tell(event)
            return self.has_work

    def end_all(self, reason: FinishReason) -> None:
        """End every request now."""
        with self.lock:
            self._empty_inbox()
            for request_id in list(self._flights):
                self._end(request_id, reason)

    def stats(self) -> Stats:
        return self.engine.stats()

    def _empty_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Flight):
                self._flights[item.request.id] = item
                self.engine.add(item.request)
            else:
                self._end(item, "abort")

    def _end(self, request_id: str, reason: FinishReason) -> None:
        running = self.engine.finish(request_id, reason)
        if running is not None:
            self._land(self._flights.pop(request_id), running)

    def _tell(self, event: Event) -> None:
        """Show a token's text; end the request when the engine or a stop string says so."""
        request_id = event.running.request.id
        flight = self._flights[request_id]
        if flight.is_watched and event.token is not None:
            piece = flight.reader.push(event.token)
            if piece and flight.text is not None:
                flight.text(piece)
        if event.finish_reason is not None:
            self._land(self._flights.pop(request_id), event.running)
        elif flight.reader.stopped:
            self._end(request_id, "stop")

    def _land(self, flight: Flight, running: Running) -> None:
        """Build the completion and hand it over; a request nobody watched is read here in one go."""
        reason = running.finish_reason
        assert reason is not None
        if not flight.is_watched:
            for token in running.generated:
                flight.reader.push(token)
        rest = flight.reader.close()
        if rest and flight.text is not None:
            flight.text(rest)
        if flight.reader.stopped and reason == "length":
            reason = "stop"
        completion = flight.reader.completion(running.generated, running.logprobs, reason=reason, usage=running.usage)
        flight.done(completion)
