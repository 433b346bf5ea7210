"""Who computes what in the next step: continuous batching with mixed prefill and decode, in plain Python.

`step()` returns a plan: decoding requests first (one token each), then chunks of prompts, within `max_step_tokens`.
By priority, then first come, first served: the head of the queue is never overtaken, and when blocks run out the
last request in this order is preempted and later recomputed, so the first always advances and, among equals, nobody
starves (Yu et al. 2022, Orca; Kwon et al. 2023; chunked prefill: Agrawal et al. 2023, arXiv 2308.16369). Drafted
tokens ride along where there is room. Knows no tensors, no text and no sampling.

    scheduler.add(running); plan = scheduler.step(); ...; scheduler.computed(running, 1)
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from puyu.engine.blocks import BlockPool, block_keys
from puyu.engine.pace import Pace
from puyu.engine.request import Running, Status
from puyu.types import FinishReason

LOGPROB_CHUNK = 256
"""Prompt tokens in a step whose log-probabilities are wanted: each takes a row of logits."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of one request from `start` on, the last ones drafted; `samples` when its next token comes out
    of them."""

    running: Running
    start: int
    length: int
    samples: bool = True
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The ids to compute."""
        return [*self.running.tokens[self.start : self.start + self.length - len(self.drafts)], *self.drafts]

    @property
    def num_rows(self) -> int:
        """How many of its last tokens need logits."""
        if self.running.request.params.prompt_logprobs and self.start < self.running.num_prompt:
            return self.length
        return 1 + len(self.drafts) if self.samples else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step, decodes first."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Waiting and running requests over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_step_tokens: int,
        pools_apart: bool = False,
        max_pause: float = 0.0,
    ) -> None:
        """`pools_apart`: requests that are pooled share blocks with each other alone. `max_pause`: see `pace.py`."""
        assert 0 < max_running <= max_step_tokens, "every running request needs room for one token in a step"
        self.pool, self.max_running, self.max_step_tokens = pool, max_running, max_step_tokens
        self.pools_apart = pools_apart
        self.pace = Pace(max_pause)
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def capacity(self) -> int:
        """The most tokens that one request can ever keep."""
        return self.pool.num_blocks * self.pool.block_size

    def can_ever_fit(self, running: Running) -> bool:
        """Whether the request fits an otherwise empty pool (its last token needs no place)."""
        return running.num_prompt + max(running.request.max_tokens - 1, 0) <= self.capacity

    def add(self, running: Running) -> None:
        """Queue a request; one that can never fit must have been refused before."""
        assert self.can_ever_fit(running), f"request {running.request.id} can never fit the block pool"
        insort(self.waiting, running, key=_rank)

    def step(self) -> Plan:
        """The next step's work; empty only when there is nothing to do."""
        self._grow()
        self._admit()
        plan = Plan(tuple(self._fill()))
        assert plan.chunks or not self.has_work, "there is work, but nothing was scheduled"
        return plan

    def _grow(self) -> None:
        """Give each running request, in order, blocks for all its tokens; preempt the last one when none is left."""
        for running in list(self.running):
            while running.status is Status.RUNNING and not self._has_blocks(running):
                if running.drafts:
                    running.drafts = []
                else:
                    self._preempt(self.running[-1])

    def _has_blocks(self, running: Running) -> bool:
        """Whether there are blocks for the request's tokens and drafts, after taking what is missing."""
        missing = self.pool.blocks_for(len(running.tokens) + len(running.drafts)) - len(running.blocks)
        if missing > 0 and self.pool.can_allocate(missing):
            running.blocks += self.pool.allocate(missing)
            return True
        return missing <= 0

    def _preempt(self, running: Running) -> None:
        self.running.remove(running)
        self._drop_blocks(running)
        running.status = Status.WAITING
        running.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, running, key=_rank)

    def reserve(self, running: Running, count: int) -> int:
        """Blocks for up to `count` tokens beyond the request's own, as far as nobody else will miss them; returns for
        how many there is room."""
        missing = self.pool.blocks_for(len(running.tokens) + count) - len(running.blocks)
        spare = max(self.pool.num_free - len(self.running), 0)
        running.blocks += self.pool.allocate(max(min(missing, spare), 0))
        return max(min(count, len(running.blocks) * self.pool.block_size - len(running.tokens)), 0)

    def _admit(self) -> None:
        """Start waiting requests in order while blocks for all their tokens are free.

        One block is left for each request that runs, else the newcomer would be preempted at once. A request of
        higher priority takes the blocks, or the place, of one of lower.
        """
        for running in list(self.waiting):
            if self._awaits_leader(running):
                continue
            while not self._fits(running):
                if not self.running or self.running[-1].request.priority >= running.request.priority:
                    return
                self._preempt(self.running[-1])
            self._start(running)

    def _awaits_leader(self, running: Running) -> bool:
        """Whether another request is about to compute the same prompt, so that waiting is cheaper."""
        leader = running.request.leader
        if not leader or not self.pool.prefix_cache or running.num_preemptions:
            return False
        return any(other.request.id == leader and other.num_generated == 0 for other in (*self.running, *self.waiting))

    def _fits(self, running: Running) -> bool:
        if len(self.running) >= self.max_running:
            return False
        found = self._cached_blocks(running)
        needed = self.pool.blocks_for(len(running.tokens)) - len(found)
        return needed + len(self.running) <= self.pool.num_free_after(found)

    def _cached_blocks(self, running: Running) -> list[int]:
        """Blocks that need no computing; the last token always does, since its logits are wanted."""
        if not self.pool.prefix_cache or not running.is_shareable:
            return []
        self._update_keys(running)
        return self.pool.match(running.keys[: (len(running.tokens) - 1) // self.pool.block_size])

    def _update_keys(self, running: Running) -> None:
        salt = running.request.adapter.encode()
        if self.pools_apart and running.request.pool:
            salt += b"\0pool"
        running.keys = block_keys(running.tokens, self.pool.block_size, running.keys, salt=salt)

    def _start(self, running: Running) -> None:
        found = self._cached_blocks(running)
        self.pool.share(found)
        running.blocks = found + self.pool.allocate(self.pool.blocks_for(len(running.tokens)) - len(found))
        running.num_computed = running.num_drafted = len(found) * self.pool.block_size
        if running.num_preemptions == 0:
            running.num_cached, running.began = running.num_computed, time.monotonic()
        running.status = Status.RUNNING
        self.waiting.remove(running)
        insort(self.running, running, key=_rank)

    def _fill(self) -> Iterator[Chunk]:
        """Decodes first: they are short and somebody is reading. Prompts share what is left, in order."""
        decoding = [running for running in self.running if running.num_remaining == 1 and not running.request.pool]
        prompts = [running for running in self.running if running.num_remaining > 1 or running.request.pool]
        budget, logprob_budget = self.max_step_tokens - len(decoding), LOGPROB_CHUNK
        for running in decoding:
            drafts = tuple(running.drafts[:budget])
            budget -= len(drafts)
            yield Chunk(running, running.num_computed, 1 + len(drafts), drafts=drafts)
        allowed = self.pace.budget(len(decoding)) if decoding else None
        budget = budget if allowed is None else min(budget, allowed)
        for running in prompts:
            length = min(running.num_remaining, budget)
            if running.request.params.prompt_logprobs:
                length = min(length, logprob_budget)
                logprob_budget -= length
            if length == 0:
                continue
            budget -= length
            samples = length == running.num_remaining and not running.request.pool
            yield Chunk(running, running.num_computed, length, samples)

    def computed(self, running: Running, count: int) -> None:
        """Keys and values of `count` more tokens are written and right: count them, share blocks that became full."""
        assert running.status is Status.RUNNING and running.num_computed + count <= len(running.tokens)
        size = self.pool.block_size
        first, last = running.num_computed // size, (running.num_computed + count) // size
        running.num_computed += count
        if last > first and self.pool.prefix_cache:
            self._update_keys(running)
            self.pool.seal(running.keys[first:last], running.blocks[first:last])

    def finish(self, running: Running, reason: FinishReason) -> bool:
        """End a request wherever it stands and give its blocks back; False when it had ended before."""
        if running.status is Status.FINISHED:
            return False
        if running.status is Status.RUNNING:
            self.running.remove(running)
        else:
            self.waiting.remove(running)
        if reason == "error":
            self.pool.unseal(running.blocks)
        self._drop_blocks(running)
        running.status, running.finish_reason = Status.FINISHED, reason
        return True

    def restart(self) -> None:
        """Forget all cached content and compute the running requests again from their first token."""
        while self.running:
            self._preempt(self.running[-1])
        self.pool.reset()

    def _drop_blocks(self, running: Running) -> None:
        self.pool.release(running.blocks)
        running.blocks, running.num_computed, running.num_drafted, running.drafts = [], 0, 0, []

    def audit(self) -> None:
        """Assert that the pool and the tables of the running requests agree."""
        self.pool.audit(running.blocks for running in self.running)
        for running in self.running:
            assert running.status is Status.RUNNING
            assert len(running.blocks) >= self.pool.blocks_for(running.num_computed)
        for queue in (self.running, self.waiting):
            ranks = [running.rank for running in queue]
            assert ranks == sorted(ranks), "a queue is out of order"


def _rank(running: Running) -> tuple[int, int]:
    return running.rank
