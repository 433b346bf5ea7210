"""The engine: add a request, step until it ends, abort it at any time. Ids in, ids out; knows no text.

Each step schedules, runs the model once over prompts and decodes together, samples all rows, and counts. Drafted
tokens are kept as far as they are what sampling gives anyway, so they change the speed and nothing else. What goes
wrong with one request ends that request; what goes wrong with a step ends the requests of that step. Either way
their blocks come back and the others go on. One thread steps at a time (`driver.py`).

    engine = Engine(model, EngineConfig())
    engine.add(Request("a", (1, 5, 6), max_tokens=8)); events = engine.step()
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from puyu.configure import Config
from puyu.engine.blocks import BlockPool
from puyu.engine.bounds import margin_bound
from puyu.engine.request import Request, Running, Status
from puyu.engine.rows import Row, append, by_chunk, sample_plan, span_of
from puyu.engine.runner import Output, Runner
from puyu.engine.sampler import Sampled
from puyu.engine.scheduler import Chunk, Plan, Scheduler
from puyu.engine.speculate import Drafter, LookupDrafter, Wanted
from puyu.errors import ResourceError
from puyu.log import logger
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.kv_cache import CacheStorage, KVCache
from puyu.model.lora import AdapterBank
from puyu.types import FinishReason


class EngineConfig(Config):
    """Sizes of the engine. The defaults suit a laptop and a small model."""

    block_size: int = Field(default=16, ge=1)
    """Tokens per block of the key/value cache."""
    cache_tokens: int = Field(default=0, ge=0)
    """Tokens that the cache holds for all requests together; 0 takes what `max_running` full contexts need,
    at most `cache_fraction` of the free memory."""
    cache_fraction: float = Field(default=0.3, gt=0, le=0.95)
    """Share of the free memory that the cache may take when `cache_tokens` is 0."""
    max_running: int = Field(default=128, ge=1)
    """Requests that run at the same time; more wait in a queue."""
    max_step_tokens: int = Field(default=2048, ge=1)
    """Tokens computed in one step; longer prompts are computed in chunks."""
    max_pause_ms: float = Field(default=0.0, ge=0)
    """While answers are being written, prompts are computed in pieces that keep a step within this time, by what steps
    have taken so far; 0 is no limit, which gives the most throughput."""
    cache_dtype: CacheStorage = "auto"
    """How keys and values are kept: as the model computes them, or as int8 or int4 codes (half and a quarter of
    bf16), made without calibration."""
    prefix_cache: bool = True
    """Whether requests with an equal beginning share its keys and values."""
    context: int = Field(default=0, ge=0)
    """Tokens that one request may have; 0 is what the model was trained for. `LLM(path)` stretches the positions of a
    model for more (`ModelConfig.stretched`)."""
    call_format: str = "auto"
    """How the model writes tool calls: auto (what its chat template shows), internlm2, hermes, llama3, react, none."""
    allow_pickle: bool = False
    """Whether `LLM(path)` reads weights from pickle files where there are no safetensors."""
    overlap: bool = False
    """Whether the next step is scheduled while the last one runs (`overlap.py`); for GPUs."""
    draft_tokens: int = Field(default=0, ge=0, le=32)
    """Tokens to guess ahead of each decoding request; 0 is off. Without a draft model, they are looked up in the
    request's own text."""
    deterministic: bool = False
    """Whether a request's tokens and log-probabilities depend on nothing but itself: not on batch mates, chunks, the
    prefix cache or preemption. Slower."""


class Event(NamedTuple):
    """One thing that happened to a request in a step: a token, or its end, or both."""

    running: Running
    token: int | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine at one moment, and its counts since it was made."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_steps: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    num_failed: int
    num_drafted: int
    num_accepted: int
    """Drafted tokens that were kept."""


class Engine:
    """Owns block pool, scheduler and runner. Shares the weights of `model`; after a change of weights call
    `reset_prefix_cache`. A `ScalarModel` can only score (requests with `pool`)."""

    def __init__(
        self,
        model: CausalLM | ScalarModel,
        config: EngineConfig | None = None,
        *,
        num_ids: int | None = None,
        drafter: Drafter | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        """`num_ids`: how many ids the tokenizer knows, when the model's vocabulary is padded beyond them."""
        self.config = config = config or EngineConfig()
        self.model, self.num_ids = model, num_ids
        self.drafter = (drafter or LookupDrafter()) if config.draft_tokens else None
        dtype = model.trunk.compute_dtype or model.trunk.embedding.weight.dtype
        num_blocks = _num_blocks(model, config, dtype=dtype, drafter=self.drafter)
        sizes = {"num_blocks": num_blocks, "block_size": config.block_size}
        cache = KVCache(model.config, **sizes, device=model.trunk.device, dtype=dtype, storage=config.cache_dtype)
        self.runner = Runner(model, cache, bank=bank, alone=config.deterministic, num_ids=num_ids)
        pool = BlockPool(num_blocks=num_blocks, block_size=config.block_size, prefix_cache=config.prefix_cache)
        max_running = min(config.max_running, config.max_step_tokens)
        self.scheduler = Scheduler(
            pool,
            max_running=max_running,
            max_step_tokens=config.max_step_tokens,
            pools_apart=config.deterministic,  # their keys come from another kernel than those of decoding
            max_pause=config.max_pause_ms / 1000,
        )
        if self.drafter is not None:
            self.drafter.attach(cache)
        self._live: dict[str, Running] = {}
        self._sums: dict[str, Tensor] = {}
        self._orders = itertools.count()
        self._counts = dict.fromkeys(("steps", "computed", "generated", "cached", "failed", "drafted", "accepted"), 0)

    @property
    def margin_bound(self) -> float:
        """Greedy tokens may differ from schedule to schedule only where the two likeliest logits are closer than this
        share of the largest; 0 in deterministic mode."""
        if self.config.deterministic:
            return 0.0
        return margin_bound(self.model, codes=self.config.cache_dtype != "auto")

    @property
    def context(self) -> int:
        """Tokens that one request may have, prompt and answer together."""
        longest = self.model.config.max_positions
        return min(longest, self.config.context or longest, self.scheduler.capacity)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work and not self.is_asleep

    def add(self, request: Request) -> Running:
        """Queue a request; the front has made sure that it fits."""
        assert request.id not in self._live, f"request id {request.id} is in use"
        assert 0 < len(request.prompt_ids) <= self.context - request.max_tokens, "a request longer than the context"
        assert request.pool or (request.max_tokens and isinstance(self.model, CausalLM)), "nothing to generate"
        running = Running(request, next(self._orders))
        self.scheduler.add(running)
        self._live[request.id] = running
        return running

    def finish(self, request_id: str, reason: FinishReason = "abort") -> Running | None:
        """End a request now and give its blocks back; None when it had ended before."""
        running = self._live.pop(request_id, None)
        if running is not None:
            self.scheduler.finish(running, reason)
            self._sums.pop(request_id, None)
        return running

    def step(self, now: float | None = None) -> list[Event]:
        """Run the model once; the events of all requests that got a token or ended. `now`: `time.monotonic()`."""
        late = [Event(running, None, "timeout") for running in self._expire(time.monotonic() if now is None else now)]
        if self.is_asleep:
            return late
        self._draft()
        plan = self.scheduler.step()
        if not plan.chunks:
            return late
        began = time.perf_counter()
        try:
            output = self.runner.run([span_of(chunk) for chunk in plan.chunks])
            sampled = sample_plan(plan, output, num_ids=self.num_ids, alone=self.config.deterministic)
        except Exception:  # noqa: BLE001 - logged and counted; the requests of this step end with reason "error"
            logger.exception("a step of %d requests failed", len(plan.chunks))
            return late + [self._fail(chunk.running) for chunk in plan.chunks]
        self.scheduler.pace.measured(plan.num_tokens, time.perf_counter() - began)
        return late + self._count(plan, sampled, output)

    def _expire(self, now: float) -> list[Running]:
        """End what has waited or taken too long."""
        late = [running for running in self._live.values() if _deadline(running) <= now]
        for running in late:
            self.finish(running.request.id, "timeout")
        return late

    def _draft(self) -> None:
        if self.drafter is None:
            return
        wanted: list[tuple[Running, int]] = []
        for running in self.scheduler.running:
            room = min(running.request.max_tokens - running.num_generated - 1, self.config.draft_tokens)
            if running.num_remaining == 1 and running.num_generated and room > 0:
                room = self.scheduler.reserve(running, room)
                wanted += [(running, room)] if room else []
        for (running, _), drafts in zip(wanted, self._guesses(self.drafter, wanted), strict=True):
            running.drafts = drafts

    def _guesses(self, drafter: Drafter, wanted: Wanted) -> list[list[int]]:
        """What may come next; nothing where guessing fails, which costs speed alone."""
        try:
            return drafter.propose(wanted)
        except Exception:  # noqa: BLE001 - logged; the step goes on without guesses
            logger.exception("drafting for %d requests failed", len(wanted))
            return [[] for _ in wanted]

    def _count(self, plan: Plan, sampled: Sampled, output: Output) -> list[Event]:
        """Take over a computed step: requests with a row that is not finite fail first, so that nothing of them is
        shared."""
        found = list(zip(plan.chunks, by_chunk(plan, sampled), strict=True))
        events = [self._fail(chunk.running) for chunk, rows in found if any(row.token is None for row in rows[:1])]
        self._counts["steps"] += 1
        self._counts["computed"] += plan.num_tokens
        for index, (chunk, rows) in enumerate(found):
            chunk.running.drafts = []
            if chunk.running.status is Status.RUNNING:
                events += self._pool(chunk, output.hidden[index]) if index in output.hidden else self._take(chunk, rows)
        return events

    def _take(self, chunk: Chunk, rows: Sequence[Row]) -> list[Event]:
        """Append the tokens of one chunk: as many as its drafts were right, and one more."""
        running, events = chunk.running, []
        if rows and running.num_generated == 0:
            self._counts["cached"] += running.num_cached
        for row, draft in zip(rows, [*chunk.drafts, None], strict=bool(rows)):
            if row.token is None:
                break  # a guess led astray: the token is sampled again in the next step
            events.append(Event(running, row.token, append(running, row)))
            if events[-1].finish_reason is not None or row.token != draft:
                break
        self._counts["generated"] += len(events)
        self._counts["drafted"] += len(chunk.drafts)
        self._counts["accepted"] += max(len(events) - 1, 0)
        self.scheduler.computed(running, chunk.length - len(chunk.drafts) + max(len(events) - 1, 0))
        reason = events[-1].finish_reason if events else None
        if reason == "error":
            self._fail(running)
        elif reason is not None:
            self.finish(running.request.id, reason)
        return events

    def _pool(self, chunk: Chunk, hidden_LD: Tensor) -> list[Event]:
        """Gather hidden states; at the prompt's end they become the embedding, or the reward."""
        running = chunk.running
        request, end = running.request, chunk.start + chunk.length
        hidden_LD = hidden_LD if hidden_LD.dtype == torch.float64 else hidden_LD.float()
        state_D = hidden_LD.double().sum(dim=0) if request.pool == "mean" else hidden_LD[-1]
        if request.pool == "mean" and chunk.start:
            state_D += self._sums[request.id]
        self._sums[request.id] = state_D
        self.scheduler.computed(running, chunk.length)
        if end < running.num_prompt:
            return []
        state_D = self._sums.pop(request.id) / (end if request.pool == "mean" else 1)
        if not bool(state_D.isfinite().all()):
            return [self._fail(running)]
        if isinstance(self.model, ScalarModel):
            with torch.inference_mode():
                state_D = self.model.scalar(state_D[None])
        running.pooled = state_D.tolist()
        self.finish(request.id, "stop")
        return [Event(running, None, "stop")]

    def _fail(self, running: Running) -> Event:
        self._counts["failed"] += 1
        if running.guide is not None and running.guide.is_error():
            logger.warning("request %s: its grammar failed: %s", running.request.id, running.guide.get_error())
        self.finish(running.request.id, "error")
        return Event(running, None, "error")

    def settle(self) -> None:
        """Wait for what the device still computes; weights may change afterwards."""

    def sleep(self) -> None:
        """Give the cache's memory back; requests under way wait and are computed again after `wake`."""
        self.settle()
        self.scheduler.restart()
        self.runner.cache.release()
        self.runner.release()
        if self.drafter is not None:
            self.drafter.detach()

    def wake(self) -> None:
        """Take memory for the cache again."""
        if self.is_asleep:
            self.runner.cache.allocate()
            self.runner.renew()
            if self.drafter is not None:
                self.drafter.attach(self.runner.cache)

    @property
    def is_asleep(self) -> bool:
        return self.runner.cache.is_released

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values: call it after the weights have changed.

        Requests under way are computed again from their first token, with the new weights.
        """
        self.settle()
        self.scheduler.restart()
        if not self.is_asleep:
            self.runner.renew()
        for running in self._live.values():
            if not running.num_generated:
                del running.prompt_logprobs[1:]

    def stats(self) -> Stats:
        """A snapshot for logs and metrics."""
        scheduler = self.scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_steps=self._counts["steps"],
            num_computed_tokens=self._counts["computed"],
            num_generated_tokens=self._counts["generated"],
            num_cached_tokens=self._counts["cached"],
            num_preemptions=scheduler.num_preemptions,
            num_failed=self._counts["failed"],
            num_drafted=self._counts["drafted"],
            num_accepted=self._counts["accepted"],
        )

    def audit(self) -> None:
        """Assert that every block is accounted for and the live requests are those of the scheduler."""
        self.scheduler.audit()
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert {running.request.id for running in queued} == set(self._live), "live requests and queues disagree"
        assert all(running.status is not Status.FINISHED for running in queued)


def _deadline(running: Running) -> float:
    """When the request ends at the latest; sooner while it has not begun."""
    request = running.request
    waits = running.status is Status.WAITING and not running.num_preemptions
    return min(request.deadline, request.queue_deadline if waits else math.inf)


def _num_blocks(
    model: CausalLM | ScalarModel, config: EngineConfig, *, dtype: torch.dtype, drafter: Drafter | None
) -> int:
    """How many blocks the cache gets; ResourceError when not even one fits."""
    if config.cache_tokens:
        return -(-config.cache_tokens // config.block_size)
    wanted = config.max_running * -(-model.config.max_positions // config.block_size)
    size = KVCache.block_bytes(model.config, block_size=config.block_size, dtype=dtype, storage=config.cache_dtype)
    size += drafter.block_bytes(config.block_size) if drafter is not None else 0
    fitting = int(_free_bytes(model.trunk.device) * config.cache_fraction) // size
    if fitting < 1:
        raise ResourceError("no memory is left for the key/value cache", remedy="close other programs")
    return min(wanted, fitting)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kilobytes = next(line.split()[1] for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
        return int(kilobytes) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
