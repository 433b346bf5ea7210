"""An engine with one step in flight: the next one is scheduled and launched before the last one's tokens are known.

Sampled ids stay on the device and feed the next step there; meanwhile the host schedules, reads texts and serves. A
request in flight carries a placeholder for the token to come (-1 - its row), so the scheduler counts it like any
other. What cannot wait is not run ahead: when blocks run short, which may preempt somebody, and when a request ends
with the token under way, the flight lands first; while a request needs the host between two tokens (a grammar,
penalties, guesses), all steps are the plain engine's. A request that turns out to have ended rode along for one token
more; that row is dropped. Its blocks may go to others at once: steps run in order on the device, so whoever gets them
writes later. Idea: mini-sglang's overlap loop, vLLM's asynchronous scheduling. Tokens equal those of `Engine` (tested).

    engine = make_engine(model, EngineConfig(overlap=True))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puyu.engine.core import Engine, EngineConfig, Event
from puyu.engine.edits import needs_edits
from puyu.engine.request import Running, Status
from puyu.engine.rows import span_of
from puyu.engine.runner import Output, Span
from puyu.engine.sampler import Choice, Sampled, sample
from puyu.engine.scheduler import Chunk, Plan
from puyu.log import logger
from puyu.model.heads import CausalLM, ScalarModel
from puyu.types import FinishReason


class Ticket(NamedTuple):
    """A launched step: its tokens where the device has them (for the next step), and for the host when it waits."""

    tokens: Callable[[], Tensor | None]
    result: Callable[[], Sampled]


class _Flight(NamedTuple):
    plan: Plan
    ticket: Ticket

    @property
    def sampling(self) -> list[Running]:
        return [chunk.running for chunk in self.plan.chunks if chunk.samples]


class OverlapEngine(Engine):
    """`Engine` with the same face; `step` returns the events of the step that was launched one call before."""

    def __init__(self, model: CausalLM | ScalarModel, config: EngineConfig | None = None, **parts: Any) -> None:
        super().__init__(model, config, **parts)
        self._flight: _Flight | None = None
        self._landed: list[Event] = []
        on_gpu = self.runner.gpu is not None and self.runner.device.type == "cuda"
        self._lane: _Stream | _Thread = _Stream(self) if on_gpu else _Thread(self)

    @property
    def has_work(self) -> bool:
        return super().has_work or self._flight is not None or bool(self._landed)

    def step(self, now: float | None = None) -> list[Event]:
        """Launch the next step where that is safe, then take over the one in flight."""
        if not self._suits():
            self._drain()
            events, self._landed = self._landed, []
            return events + super().step(now)
        late = self._expire(time.monotonic() if now is None else now)
        self._landed += [Event(running, None, "timeout") for running in late]
        if not self._may_run_ahead():
            self._drain()
        before, self._flight = self._flight, None
        plan = self._plan(before)
        ticket = self._lane.launch(plan, before.ticket if before else None) if plan.chunks else None
        if before is not None:
            self._landed += self._land(before)
        if ticket is not None:
            self._take_off(_Flight(plan, ticket))
        events, self._landed = self._landed, []
        return events

    def finish(self, request_id: str, reason: FinishReason = "abort") -> Running | None:
        """As in `Engine`; the token under way is dropped."""
        running = self._live.get(request_id)
        if running is not None:
            _drop_placeholder(running)
        return super().finish(request_id, reason)

    def settle(self) -> None:
        """As in `Engine`: the step in flight lands."""
        self._drain()

    def _suits(self) -> bool:
        """Whether nothing has to happen on the host between two tokens."""
        plain = self.drafter is None and not self.config.deterministic and not self.is_asleep
        return plain and all(_is_plain(running) for running in self._live.values())

    def _may_run_ahead(self) -> bool:
        """Whether all requests can grow, and the waiting ones start, without preempting one."""
        if self._flight is None or not self.scheduler.running:
            return True
        pool, running = self.scheduler.pool, self.scheduler.running
        lowest = min(run.request.priority for run in running)
        if any(waiting.request.priority > lowest for waiting in self.scheduler.waiting):
            return False
        return sum(pool.blocks_for(len(run.tokens)) - len(run.blocks) for run in running) <= pool.num_free

    def _plan(self, before: _Flight | None) -> Plan:
        """The scheduler's plan without requests that end with the token under way."""
        plan = self.scheduler.step()
        if before is None:
            return plan
        return Plan(tuple(chunk for chunk in plan.chunks if not _is_ending(chunk.running)))

    def _take_off(self, flight: _Flight) -> None:
        """Count the step as computed; whoever ended meanwhile is left out."""
        for chunk in flight.plan.chunks:
            if chunk.running.status is Status.RUNNING:
                chunk.running.num_computed = chunk.start + chunk.length
        for row, running in enumerate(flight.sampling):
            if running.status is Status.RUNNING:
                running.tokens.append(-1 - row)
        self._flight = flight

    def _drain(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._landed += self._land(flight)

    def _land(self, flight: _Flight) -> list[Event]:
        """Wait for the tokens and take the step over, without the requests that ended while it flew."""
        chunks = tuple(chunk for chunk in flight.plan.chunks if chunk.running.status is Status.RUNNING)
        try:
            sampled = flight.ticket.result()
        except Exception:  # noqa: BLE001 - logged and counted; the requests of this step end with reason "error"
            logger.exception("a step of %d requests failed", len(flight.plan.chunks))
            return [self._fail(chunk.running) for chunk in chunks]
        for chunk in chunks:
            chunk.running.num_computed = chunk.start  # what was counted ahead is counted for good below
        rows = [row for row, running in enumerate(flight.sampling) if running.status is Status.RUNNING]
        for row in rows:
            _drop_placeholder(flight.sampling[row])
        logprobs = None if sampled.logprobs is None else [sampled.logprobs[row] for row in rows]
        kept = Sampled([sampled.tokens[row] for row in rows], logprobs, {})
        return self._count(Plan(chunks), kept, Output(torch.empty(0, 0), {}))


def make_engine(model: CausalLM | ScalarModel, config: EngineConfig | None = None, **parts: Any) -> Engine:
    """The engine that the configuration asks for; `parts` as in `Engine`."""
    kind = OverlapEngine if config is not None and config.overlap else Engine
    return kind(model, config, **parts)


def _is_plain(running: Running) -> bool:
    """Whether its next token depends on nothing but the logits and a number drawn before."""
    request, params = running.request, running.request.params
    reported = params.prompt_logprobs or params.top_logprobs
    return not (request.pool or request.adapter or reported or needs_edits(request))


def _choice(chunk: Chunk) -> Choice:
    running, params = chunk.running, chunk.running.request.params
    return Choice(params, running.draw(running.num_generated) if params.temperature > 0 else 0.0)


def _is_ending(running: Running) -> bool:
    """Whether the token under way is the last that was asked for."""
    return running.num_generated >= running.request.max_tokens


def _drop_placeholder(running: Running) -> None:
    if running.tokens[-1] < 0:
        running.tokens.pop()


def _inputs(plan: Plan) -> tuple[list[Span], list[Choice]]:
    """Frozen now: the requests go on changing while the step runs."""
    spans = [span_of(chunk) for chunk in plan.chunks]
    frozen = [span._replace(tokens=tuple(span.tokens), blocks=tuple(span.blocks)) for span in spans]
    return frozen, [_choice(chunk) for chunk in plan.chunks if chunk.samples]


class _Thread:
    """One worker thread that computes step after step: for CPUs, and for tests of everything above it."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._worker = engine, ThreadPoolExecutor(1, "puyu-step")

    def launch(self, plan: Plan, before: Ticket | None) -> Ticket:
        spans, choices = _inputs(plan)
        future: Future[Sampled] = self._worker.submit(self._compute, spans, choices, before)
        return Ticket(lambda: _as_feed(future.result()), future.result)

    def _compute(self, spans: Sequence[Span], choices: Sequence[Choice], before: Ticket | None) -> Sampled:
        needed = any(token < 0 for span in spans for token in span.tokens)
        with torch.inference_mode():
            feed = before.tokens() if before is not None and needed else None
            logits_SV = self._engine.runner.run(spans, feed).logits_SV
            return sample(logits_SV, choices, num_ids=self._engine.num_ids) if choices else Sampled([], None, {})


def _as_feed(sampled: Sampled) -> Tensor:
    """Tokens of a step; a row that failed feeds 0, and what comes of it is dropped."""
    return torch.tensor([token or 0 for token in sampled.tokens], dtype=torch.int32)


class _Stream:
    """The GPU's own queue: sampling is a kernel, and the host waits for an event only when it needs the numbers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def launch(self, plan: Plan, before: Ticket | None) -> Ticket:
        try:
            return self._launch(*_inputs(plan), before)
        except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
            return _failed(error)

    def _launch(self, spans: Sequence[Span], choices: Sequence[Choice], before: Ticket | None) -> Ticket:
        from puyu.engine.kernels.sampling import Knobs, sample_rows

        engine = self._engine
        logits_SV = engine.runner.run(spans, before.tokens() if before is not None else None).logits_SV
        if not choices:
            return Ticket(lambda: None, lambda: Sampled([], None, {}))
        asked = [(choice.params, choice.uniform) for choice in choices]
        rows = [(p.temperature, float(p.top_k), p.top_p, p.min_p, uniform) for p, uniform in asked]
        knobs = Knobs.of(rows, logits_SV.device)
        tokens_S, logprobs_S = sample_rows(logits_SV, knobs, num_ids=engine.num_ids or logits_SV.shape[1])
        both = torch.stack((tokens_S, logprobs_S.view(torch.int32))).to("cpu", non_blocking=True)  # pinned by torch
        wait = _milestone(logits_SV.device)

        def result() -> Sampled:
            wait()
            tokens = [None if token < 0 else token for token in both[0].tolist()]
            wanted = any(choice.params.logprobs for choice in choices)
            return Sampled(tokens, both[1].view(torch.float32).tolist() if wanted else None, {})

        return Ticket(lambda: tokens_S.clamp(min=0), result)


def _milestone(device: torch.device) -> Callable[[], None]:
    """Waits, when called, for all that has been launched until now; a CPU has finished it already."""
    if device.type != "cuda":
        return lambda: None
    done = torch.cuda.Event()
    done.record()
    return done.synchronize


def _failed(error: Exception) -> Ticket:
    def result() -> Sampled:
        raise error

    return Ticket(lambda: None, result)
