"""Ties the front to the engine: submit a request with callbacks, pump steps, abort at any time.

Any thread may submit, abort or pump; one pumps at a time. Requests and aborts wait in an inbox that the next pump
empties first, so an event loop never blocks on a running step and an abort takes effect within one step. A request
for several answers is several requests of the engine; one for beam search is a round of them for each token.

    request_id = driver.submit(GenerateRequest("Once"), done=print)
    while driver.pump(): ...
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from puyu.engine.beam import BeamSearch
from puyu.engine.core import Engine, Event, Stats
from puyu.engine.flight import Answers, BeamFlight, Flight, Pooled
from puyu.engine.front import Front
from puyu.engine.request import Request, Running
from puyu.errors import RequestError
from puyu.model.heads import ScalarModel
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, Delta, FinishReason, GenerateRequest

logger = logging.getLogger(__name__)

Prepared = Sequence[tuple[Request, "Flight | BeamFlight | Pooled"]]


class Driver:
    """The one place where an engine is stepped."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        bank = engine.runner.bank
        self.front = Front(
            tokenizer,
            context=engine.context,
            check_adapter=None if bank is None else bank.check,
            is_reward=isinstance(engine.model, ScalarModel),
            call_format=engine.config.call_format,
        )
        self.lock = threading.RLock()
        """Held while the engine is stepped; hold it to run the model beside the steps."""
        self._inbox: deque[tuple[Request, Flight | BeamFlight | Pooled] | str] = deque()
        self._flights: dict[str, Flight | BeamFlight | Pooled] = {}
        self._groups: dict[str, list[str]] = {}
        """First id -> all ids of what was asked for with one call."""
        self.on_pumped: Callable[[], None] = lambda: None
        """Called when all callbacks of a step have been made."""
        self._last_step = time.monotonic()

    def submit(
        self,
        request: GenerateRequest,
        *,
        done: Callable[[Completion], None],
        show: Callable[[Delta], None] | None = None,
    ) -> str:
        """Validate and queue; returns the request's id. RequestError leaves no trace.

        `show` is told the pieces of each answer as they come, but not its end.
        """
        return self.queue(request, self.front.prepare(request), done=done, show=show)

    def queue(
        self,
        request: GenerateRequest,
        prepared: Sequence[Request],
        *,
        done: Callable[[Completion], None],
        show: Callable[[Delta], None] | None = None,
    ) -> str:
        """Queue what `Front.prepare` made of a request; any thread may prepare."""
        if request.params.beam_width:
            return self._queue([(prepared[0], self._beams(request, prepared[0], done=done, show=show))])
        answers = Answers(request.params, len(prepared), done, show, first_id=prepared[0].id)
        readers = [self.front.reader(request, item) for item in prepared]
        flights = [Flight(reader, index, answers) for index, reader in enumerate(readers)]
        return self._queue(list(zip(prepared, flights, strict=True)))

    def submit_pool(self, request: Request, *, done: Callable[[Running], None]) -> str:
        """Queue what `Front.prepare_pool` made; `done` is told the request with its `pooled` numbers."""
        return self._queue([(request, Pooled(done))])

    def abort(self, request_id: str) -> None:
        """End a request before the next step; one that has ended already is left as it is."""
        self._inbox.append(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or self.engine.has_work

    @property
    def stalled_for(self) -> float:
        """Seconds since the last step, while there is work; 0 when there is none."""
        return time.monotonic() - self._last_step if self.has_work else 0.0

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of requests that have not begun."""
        queued = [item[0] for item in list(self._inbox) if not isinstance(item, str)]
        waiting = [running.request for running in list(self.engine.scheduler.waiting)]
        return sum(len(request.prompt_ids) for request in (*queued, *waiting))

    @property
    def only_waits(self) -> bool:
        """Whether requests wait for the engine to wake up."""
        return self.engine.is_asleep and bool(self._flights)

    def pump(self) -> bool:
        """One step and its callbacks; False when nothing is left to do. What a callback raises is raised here, when
        all others have been told."""
        with self.lock, contextlib.ExitStack() as told:
            told.callback(self.on_pumped)
            self._empty_inbox()
            for event in reversed(self.engine.step()):
                told.callback(self._tell, event)
        self._last_step = time.monotonic()
        return self.has_work

    def end_all(self, reason: FinishReason) -> None:
        """End every request now."""
        with self.lock:
            self._empty_inbox()
            for request_id in list(self._flights):
                self._end(request_id, reason)
            self.on_pumped()

    def uses(self, adapter: str) -> bool:
        """Whether a request that waits or runs needs this adapter."""
        queued = [item[0] for item in list(self._inbox) if not isinstance(item, str)]
        live = [running.request for running in (*self.engine.scheduler.running, *self.engine.scheduler.waiting)]
        return any(request.adapter == adapter for request in (*queued, *live))

    def stats(self) -> Stats:
        return self.engine.stats()

    def _queue(self, items: Prepared) -> str:
        first = items[0][0].id
        if not self.has_work:
            self._last_step = time.monotonic()
        if len(items) > 1:
            self._groups[first] = [request.id for request, _ in items]
        self._inbox.extend(items)  # last: from here on, another thread may run them to their end
        return first

    def _empty_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                for request_id in self._groups.get(item, [item]):
                    self._end(request_id, "abort")
            elif isinstance(item[1], BeamFlight):
                self._next_round(item[1])
            else:
                self._flights[item[0].id] = item[1]
                self._add(item[0])

    def _add(self, request: Request) -> None:
        """To the engine; an adapter may have gone since the request was checked."""
        try:
            self.front.check_adapter(request.adapter)
        except RequestError as error:
            logger.warning("request %s: %s", request.id, error)
            self._land(Running(request, 0, finish_reason="error"))
        else:
            self.engine.add(request)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        beams = self._beams_of(request_id)
        if beams is not None:
            self._end_round(beams, reason)
            return
        running = self.engine.finish(request_id, reason)
        if running is not None:
            self._land(running)

    def _tell(self, event: Event) -> None:
        """Show a token's text; end the request when the engine or a stop string says so."""
        request_id = event.running.request.id
        flight = self._flights.get(request_id)
        if flight is None:
            return  # a stop string has ended it with an earlier token of this very step
        if isinstance(flight, Flight) and event.token is not None:
            flight.push(event.running, event.token)
        if event.finish_reason is not None:
            self._land(event.running)
        elif isinstance(flight, Flight) and (flight.reader.stopped or flight.is_broken):
            self._end(request_id, "error" if flight.is_broken else "stop")

    def _land(self, running: Running) -> None:
        """Hand over what a request gave."""
        flight = self._flights.pop(running.request.id)
        if isinstance(flight, BeamFlight):
            self._take_beam(flight, running)
            return
        flight.land(running)
        if isinstance(flight, Flight) and flight.answers.is_complete:
            self._groups.pop(flight.answers.first_id, None)

    # ---- beam search: a round of one-token requests for each place ----

    def _beams(
        self,
        asked: GenerateRequest,
        request: Request,
        *,
        done: Callable[[Completion], None],
        show: Callable[[Delta], None] | None,
    ) -> BeamFlight:
        search = BeamSearch(request.params, stop_ids=request.stop_ids, max_tokens=request.max_tokens)
        return BeamFlight(request, search, lambda: self.front.reader(asked, request), done, show)

    def _beams_of(self, request_id: str) -> BeamFlight | None:
        flights = {flight for flight in self._flights.values() if isinstance(flight, BeamFlight)}
        return next((flight for flight in flights if flight.request.id == request_id), None)

    def _next_round(self, flight: BeamFlight) -> None:
        """One request for each beam, for its likeliest next tokens."""
        for request in flight.next_round(self.front.new_id):
            self._flights[request.id] = flight
            self.engine.add(request)

    def _take_beam(self, flight: BeamFlight, running: Running) -> None:
        reason = running.finish_reason
        if reason not in ("stop", "length"):
            self._end_round(flight, reason or "error")
        elif flight.take(running):
            self._next_round(flight)

    def _end_round(self, flight: BeamFlight, reason: FinishReason) -> None:
        for request in flight.round:
            self._flights.pop(request.id, None)
            self.engine.finish(request.id, reason)
        flight.end(reason)
