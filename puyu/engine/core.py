"""The engine: add a request, step until it ends, abort it at any time. Ids in, ids out; knows no text.

Each step schedules, runs the model once over prompts and decodes together, samples all rows, and counts. What goes
wrong with one request ends that request; what goes wrong with a step ends the requests of that step. Either way
their blocks come back and the others go on. One thread steps at a time (`driver.py`).

    engine = Engine(model, EngineConfig())
    engine.add(Request("a", (1, 5, 6), max_tokens=8)); events = engine.step()
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from puyu.configure import Config
from puyu.engine.blocks import BlockPool
from puyu.engine.request import Request, Running, Status
from puyu.engine.runner import Runner, Span
from puyu.engine.sampler import Choice, Sampled, sample
from puyu.engine.scheduler import Chunk, Plan, Scheduler
from puyu.errors import ResourceError
from puyu.log import logger
from puyu.model.heads import CausalLM
from puyu.model.paged import KVCache
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
    prefix_cache: bool = True
    """Whether requests with an equal beginning share its keys and values."""
    context: int = Field(default=0, ge=0)
    """Tokens that one request may have; 0 is what the model was trained for. `LLM(path)` stretches the positions of a
    model for more (`ModelConfig.stretched`)."""
    allow_pickle: bool = False
    """Whether `LLM(path)` reads weights from pickle files where there are no safetensors."""
    overlap: bool = False
    """Whether the next step is scheduled while the last one runs (`overlap.py`); for GPUs."""


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


class Engine:
    """Owns block pool, scheduler and runner. Shares the weights of `model`; after a change of weights call
    `reset_prefix_cache`."""

    def __init__(self, model: CausalLM, config: EngineConfig | None = None, *, num_ids: int | None = None) -> None:
        """`num_ids`: how many ids the tokenizer knows, when the model's vocabulary is padded beyond them."""
        self.model, self.num_ids = model, num_ids
        self.config = config = config or EngineConfig()
        weight = model.trunk.embedding.weight
        dtype = model.trunk.compute_dtype or weight.dtype
        num_blocks = _num_blocks(model, config, dtype=dtype)
        cache = KVCache(
            model.config, num_blocks=num_blocks, block_size=config.block_size, device=weight.device, dtype=dtype
        )
        self.runner = Runner(model, cache)
        pool = BlockPool(num_blocks=num_blocks, block_size=config.block_size, prefix_cache=config.prefix_cache)
        max_running = min(config.max_running, config.max_step_tokens)
        self.scheduler = Scheduler(pool, max_running=max_running, max_step_tokens=config.max_step_tokens)
        self._live: dict[str, Running] = {}
        self._orders = itertools.count()
        self._steps = self._computed = self._generated = self._cached = self._failed = 0

    @property
    def context(self) -> int:
        """Tokens that one request may have, prompt and answer together."""
        longest = self.model.config.max_positions
        return min(longest, self.config.context or longest, self.scheduler.capacity)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> Running:
        """Queue a request; the front has made sure that it fits."""
        assert request.id not in self._live, f"request id {request.id} is in use"
        assert 0 < len(request.prompt_ids) <= self.context - request.max_tokens, "a request longer than the context"
        running = Running(request, next(self._orders))
        self.scheduler.add(running)
        self._live[request.id] = running
        return running

    def finish(self, request_id: str, reason: FinishReason = "abort") -> Running | None:
        """End a request now and give its blocks back; None when it had ended before."""
        running = self._live.pop(request_id, None)
        if running is not None:
            self.scheduler.finish(running, reason)
        return running

    def step(self) -> list[Event]:
        """Run the model once; the events of all requests that got a token or ended."""
        plan = self.scheduler.step()
        if not plan.chunks:
            return []
        try:
            sampled = self._compute(plan)
        except Exception:  # noqa: BLE001 - logged and counted; the requests of this step end with reason "error"
            logger.exception("a step of %d requests failed", len(plan.chunks))
            return [self._fail(chunk.running) for chunk in plan.chunks]
        return self._count(plan, sampled)

    def _compute(self, plan: Plan) -> Sampled:
        spans = [span_of(chunk) for chunk in plan.chunks]
        logits_SV = self.runner.run(spans)
        choices = [choice_of(chunk.running) for chunk in plan.chunks if chunk.samples]
        with torch.inference_mode():
            return sample(logits_SV, choices, num_ids=self.num_ids) if choices else Sampled([], None)

    def _count(self, plan: Plan, sampled: Sampled) -> list[Event]:
        """Take over a computed step: rows that are not finite fail first, so that nothing of them is shared."""
        sampling = [chunk.running for chunk in plan.chunks if chunk.samples]
        rows = list(zip(sampling, sampled.tokens, sampled.logprobs or itertools.repeat(None), strict=False))
        events = [self._fail(running) for running, token, _ in rows if token is None]
        self.scheduler.computed(plan)
        self._steps += 1
        self._computed += plan.num_tokens
        for running, token, logprob in rows:
            if token is not None:
                events.append(self._append(running, token, logprob))
        return events

    def _append(self, running: Running, token: int, logprob: float | None) -> Event:
        if running.num_generated == 0:
            self._cached += running.num_cached
        reason = running.append(token, logprob if running.request.params.logprobs else None)
        self._generated += 1
        if reason is not None:
            self.finish(running.request.id, reason)
        return Event(running, token, reason)

    def _fail(self, running: Running) -> Event:
        self._failed += 1
        self.finish(running.request.id, "error")
        return Event(running, None, "error")

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values: call it after the weights have changed.

        Requests under way are computed again from their first token, with the new weights.
        """
        self.scheduler.restart()

    def stats(self) -> Stats:
        """A snapshot for logs and metrics."""
        scheduler = self.scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_steps=self._steps,
            num_computed_tokens=self._computed,
            num_generated_tokens=self._generated,
            num_cached_tokens=self._cached,
            num_preemptions=scheduler.num_preemptions,
            num_failed=self._failed,
        )

    def audit(self) -> None:
        """Assert that every block is accounted for and the live requests are those of the scheduler."""
        self.scheduler.audit()
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert {running.request.id for running in queued} == set(self._live), "live requests and queues disagree"
        assert all(running.status is not Status.FINISHED for running in queued)


def span_of(chunk: Chunk) -> Span:
    running, stop = chunk.running, chunk.start + chunk.length
    return Span(running.tokens[chunk.start : stop], chunk.start, running.blocks, chunk.samples)


def choice_of(running: Running) -> Choice:
    params = running.request.params
    return Choice(params, running.draws.random() if params.temperature > 0 else 0.0)


def _num_blocks(model: CausalLM, config: EngineConfig, *, dtype: torch.dtype) -> int:
    """How many blocks the cache gets; ResourceError when not even one fits."""
    if config.cache_tokens:
        return -(-config.cache_tokens // config.block_size)
    wanted = config.max_running * -(-model.config.max_positions // config.block_size)
    size = KVCache.block_bytes(model.config, block_size=config.block_size, dtype=dtype)
    fitting = int(_free_bytes(model.trunk.embedding.weight.device) * config.cache_fraction) // size
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
