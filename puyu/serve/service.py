"""One model behind the routes: which requests are let in, how they run, what is counted. Knows no ASGI.

A request takes a seat for each answer that it asks for; beyond `max_running` + `max_queue` seats, or with more than
`max_queue_tokens` prompt tokens waiting, the answer is 429 with a guess of when to come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from puyu.engine.llm import LLM
from puyu.engine.loop import Asked
from puyu.errors import RequestError
from puyu.model.heads import ScalarModel
from puyu.serve.answers import BROKEN, total
from puyu.serve.config import ServeConfig
from puyu.serve.http import Refused, all_or_none
from puyu.serve.metrics import Metrics, Watch
from puyu.serve.protocol import error_body
from puyu.serve.vectors import Vector
from puyu.types import Completion, Delta, GenerateRequest, Message, SamplingParams, Usage

BROKEN_STATUS = {"abort": 503, "timeout": 504}
LONGEST_WAIT = 60


class Service:
    """What the routes share."""

    def __init__(self, llm: LLM, config: ServeConfig, defaults: SamplingParams) -> None:
        self.llm, self.config, self.defaults = llm, config, defaults
        self.name = config.served_name or llm.name
        self.limit = llm.driver.engine.config.max_running + config.max_queue
        self.metrics = Metrics(self.name)
        self.created = int(time.time())
        self.in_flight = 0
        self.cut: Callable[[Any], None] = lambda scope: None
        """Closes the connection of an ASGI scope without waiting for its reader; set by the server."""

    # ---- who is let in ----

    @property
    def trouble(self) -> str:
        """Why no request can be served now; empty when all is well."""
        if not self.llm.loop.is_alive:
            return "the engine has stopped or is stopping"
        if self.llm.driver.stalled_for > self.config.stall_seconds:
            return "the engine makes no progress"
        return ""

    def check(self, model: str | None) -> str:
        """`adapter_of`, and a refusal of everything while the engine sleeps or has stopped."""
        if trouble := self.trouble:
            raise Refused(503, error_body(trouble, kind="server_error"), retry_after=5)
        if self.llm.is_asleep:
            raise Refused(503, error_body("the engine is asleep", kind="server_error"), retry_after=5)
        return self.adapter_of(model)

    def adapter_of(self, model: str | None) -> str:
        """The adapter that a model's name stands for, empty for the model itself; refuses other names."""
        if model is None or model == self.name:
            return ""
        if model in self.llm.adapters:
            return model
        known = ", ".join(repr(name) for name in (self.name, *self.llm.adapters))
        message = f"there is no model {model!r} here; this server has {known}"
        raise Refused(404, error_body(message, kind="invalid_request_error", param="model", code="model_not_found"))

    @contextlib.contextmanager
    def seats(self, count: int) -> Iterator[None]:
        """Places among the requests that run or wait; 429 when they are taken."""
        if count > self.limit:
            message = f"{count} answers in one request are more than this server can hold, {self.limit}"
            raise RequestError(message, param="n", remedy="ask for fewer, or raise --max-queue")
        if self.in_flight + count > self.limit:
            raise self._busy("too many requests are waiting")
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count

    def _busy(self, message: str) -> Refused:
        rounds = self.in_flight / self.llm.driver.engine.config.max_running
        wait = min(max(math.ceil(rounds * self.metrics.mean_seconds()), 1), LONGEST_WAIT)
        body = error_body(message, kind="rate_limit_error", code="rate_limit_exceeded")
        return Refused(429, body, retry_after=wait)

    async def prepare(
        self, requests: Sequence[GenerateRequest], adapter: str, *, words: Mapping[str, str]
    ) -> list[Asked]:
        """Checked requests with the server's limits; 429 when too many prompt tokens wait. `words`: what the route
        calls a parameter."""
        if self.in_flight >= self.limit:  # before any work is done for it
            raise self._busy("too many requests are waiting")
        with in_words(words):
            asked = [await self.llm.loop.prepare(self._limited(request, adapter)) for request in requests]
        self._require_room(sum(item.num_prompt for item in asked))
        for item in asked:
            self.metrics.add("request_params_n", item.num_answers)
        return asked

    def _require_room(self, tokens: int) -> None:
        """429 when so many more prompt tokens would wait too long; alone they are always let in."""
        waiting = self.llm.driver.waiting_tokens
        if waiting and waiting + tokens > self.config.max_queue_tokens:
            raise self._busy("too many prompt tokens are waiting")

    def _limited(self, request: GenerateRequest, adapter: str) -> GenerateRequest:
        timeout = _sooner(request.timeout, self.config.answer_seconds)
        queue_timeout = _sooner(request.queue_timeout, self.config.queue_seconds)
        return replace(request, adapter=adapter, timeout=timeout, queue_timeout=queue_timeout)

    # ---- running ----

    async def generate(self, asked: Sequence[Asked]) -> list[Completion]:
        """All to their end; Refused when the engine failed on one."""
        with self.seats(sum(item.num_answers for item in asked)):
            return await all_or_none([self._generate(item) for item in asked])

    async def _generate(self, asked: Asked) -> Completion:
        with self._watched() as watch:
            completion = await self.llm.loop.generate(asked)
            watch.ended(completion.finish_reason, completion.usage)
        for answer in completion.choices:
            refuse_broken(answer.finish_reason)
        return completion

    async def stream(self, asked: Sequence[Asked]) -> AsyncGenerator[list[Delta], None]:
        """Batches of deltas; leaving early aborts the requests."""
        with self.seats(sum(item.num_answers for item in asked)), self._watched() as watch:
            async with contextlib.aclosing(self.llm.loop.batches(asked)) as batches:
                usages: list[Usage] = []
                async for batch in batches:
                    if any(delta.text for delta in batch):
                        watch.piece()
                    usages += [delta.usage for delta in batch if delta.usage is not None]
                    if batch[-1].finish_reason is not None and len(usages) == len(asked):
                        times = usages[0].times
                        watch.ended(batch[-1].finish_reason, replace(total(usages), times=times))
                    yield batch

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Watch]:
        """Count a request however it ends; one that is left before its end counts as aborted."""
        watch = Watch(self.metrics)
        try:
            yield watch
        except (asyncio.CancelledError, GeneratorExit):
            watch.ended("abort", Usage())
            raise

    # ---- vectors ----

    async def vectors(
        self, inputs: Sequence[str | tuple[int, ...]], adapter: str, *, pooling: str = "mean", param: str = "input"
    ) -> list[Vector]:
        """Pooled states of texts or ids."""
        if isinstance(self.llm.model, ScalarModel):
            raise RequestError("this is a reward model, it embeds nothing", param="model", remedy="use /v1/reward")
        front, requests = self.llm.driver.front, [GenerateRequest(item) for item in inputs]

        def encoded() -> list[list[int]]:
            for request in requests:
                front.check_size(request)
            return [front.prompt_ids(request) for request in requests]

        with in_words({"prompt": param, "input": param}):
            rows = await asyncio.to_thread(encoded)
            return await self._pooled(rows, adapter, pooling=pooling)

    async def rewards(self, conversations: Sequence[Sequence[Message]]) -> list[Vector]:
        """A reward model's scores."""
        with in_words({"input": "conversations"}):
            rows = await asyncio.to_thread(self.llm.reward_ids, conversations)
            return await self._pooled(rows, "", pooling="last")

    async def _pooled(self, rows: Sequence[list[int]], adapter: str, *, pooling: str) -> list[Vector]:
        front, config = self.llm.driver.front, self.config
        self._require_room(sum(len(ids) for ids in rows))
        limits: dict[str, Any] = {
            "deadline": _moment(config.answer_seconds),
            "queue_deadline": _moment(config.queue_seconds),
        }
        requests = [replace(front.prepare_pool(ids, pooling=pooling, adapter=adapter), **limits) for ids in rows]
        with self.seats(1):
            found = await all_or_none([self.llm.loop.pool(request) for request in requests])
        for running in found:
            refuse_broken(running.finish_reason or "error")
        return [Vector(running.pooled, running.num_prompt) for running in found]


def refuse_broken(reason: str) -> None:
    """Refused for an answer that is none."""
    if reason in BROKEN:
        raise Refused(BROKEN_STATUS.get(reason, 500), error_body(BROKEN[reason], kind="server_error"))


def _moment(seconds: float) -> float:
    return time.monotonic() + seconds if seconds else math.inf


@contextlib.contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Errors name a field as the body does."""
    try:
        yield
    except RequestError as error:
        param = words.get(error.param or "", error.param)
        raise RequestError(error.message, param=param, remedy=error.remedy, code=error.code) from error


def _sooner(asked: float | None, most: float) -> float | None:
    """The smaller limit; 0 is none."""
    return asked if not most else most if asked is None else min(asked, most)
