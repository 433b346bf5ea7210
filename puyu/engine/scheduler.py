"""Who computes what in the next step: continuous batching with mixed prefill and decode, in plain Python.

`step()` returns a plan: decoding requests first (one token each), then chunks of prompts, within `max_step_tokens`.
First come, first served: the head of the queue is never overtaken, and when blocks run out the newest request is
preempted and later recomputed, so the oldest always advances and nobody starves (Yu et al. 2022, Orca; Kwon et
al. 2023; chunked prefill: Agrawal et al. 2023, arXiv 2308.16369). Knows no tensors, no text and no sampling.

    scheduler.add(running); plan = scheduler.step(); ...; scheduler.computed(plan); scheduler.finish(running, "stop")
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from puyu.engine.blocks import BlockPool, block_keys
from puyu.engine.request import Running, Status
from puyu.types import FinishReason


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of one request from `start` on; `samples` when its next token comes out of them."""

    running: Running
    start: int
    length: int
    samples: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step, decodes first."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Waiting and running requests over one block pool."""

    def __init__(self, pool: BlockPool, *, max_running: int, max_step_tokens: int) -> None:
        assert 0 < max_running <= max_step_tokens, "every running request needs room for one token in a step"
        self.pool, self.max_running, self.max_step_tokens = pool, max_running, max_step_tokens
        self.waiting: deque[Running] = deque()
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
        return running.num_prompt + running.request.max_tokens - 1 <= self.capacity

    def add(self, running: Running) -> None:
        """Queue a request; one that can never fit must have been refused before."""
        assert self.can_ever_fit(running), f"request {running.request.id} can never fit the block pool"
        self.waiting.append(running)

    def step(self) -> Plan:
        """The next step's work; empty only when there is nothing to do."""
        self._grow()
        self._admit()
        plan = Plan(tuple(self._fill()))
        assert plan.chunks or not self.has_work, "there is work, but nothing was scheduled"
        return plan

    def _grow(self) -> None:
        """Give each running request, oldest first, blocks for all its tokens; preempt the newest when none is left."""
        for running in list(self.running):
            while running.status is Status.RUNNING:
                missing = self.pool.blocks_for(len(running.tokens)) - len(running.blocks)
                if missing <= 0:
                    break
                if self.pool.can_allocate(missing):
                    running.blocks += self.pool.allocate(missing)
                else:
                    self._preempt(self.running[-1])

    def _preempt(self, running: Running) -> None:
        self.running.remove(running)
        self._drop_blocks(running)
        running.status = Status.WAITING
        running.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(running)

    def _admit(self) -> None:
        """Start waiting requests in order while blocks for all their tokens are free.

        One block is left for each request that runs, else the newcomer would be preempted at once.
        """
        while self.waiting and len(self.running) < self.max_running:
            running = self.waiting[0]
            found = self._cached_blocks(running)
            needed = self.pool.blocks_for(len(running.tokens)) - len(found)
            if needed + len(self.running) > self.pool.num_free_after(found):
                return
            self.waiting.popleft()
            self._start(running, found, needed)

    def _cached_blocks(self, running: Running) -> list[int]:
        """Blocks that need no computing; the last token always does, since its logits are wanted."""
        if not self.pool.prefix_cache:
            return []
        running.keys = block_keys(running.tokens, self.pool.block_size, running.keys)
        return self.pool.match(running.keys[: (len(running.tokens) - 1) // self.pool.block_size])

    def _start(self, running: Running, found: list[int], needed: int) -> None:
        self.pool.share(found)
        running.blocks = found + self.pool.allocate(needed)
        running.num_computed = len(found) * self.pool.block_size
        if running.num_preemptions == 0:
            running.num_cached = running.num_computed
        running.status = Status.RUNNING
        self.running.append(running)

    def _fill(self) -> Iterator[Chunk]:
        """Decodes first: they are short and somebody is reading. Prompts share what is left, oldest first."""
        budget, prompts = self.max_step_tokens, []
        for running in self.running:
            if running.num_remaining == 1:
                budget -= 1
                yield Chunk(running, running.num_computed, 1)
            else:
                prompts.append(running)
        for running in prompts:
            length = min(running.num_remaining, budget)
            if length == 0:
                return
            budget -= length
            yield Chunk(running, running.num_computed, length, length == running.num_remaining)

    def computed(self, plan: Plan) -> None:
        """Keys and values of the plan are written: count them and share the blocks that became full.

        Requests that failed in the step were finished before and are left out.
        """
        size = self.pool.block_size
        for chunk in plan.chunks:
            running = chunk.running
            if running.status is not Status.RUNNING:
                continue
            running.num_computed = chunk.start + chunk.length
            first, last = chunk.start // size, running.num_computed // size
            if last > first and self.pool.prefix_cache:
                running.keys = block_keys(running.tokens, size, running.keys)
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
        running.blocks, running.num_computed = [], 0

    def audit(self) -> None:
        """Assert that the pool and the tables of the running requests agree."""
        self.pool.audit(running.blocks for running in self.running)
        for running in self.running:
            assert running.status is Status.RUNNING
            assert len(running.blocks) >= self.pool.blocks_for(running.num_computed)
        orders = [running.order for running in self.running]
        assert orders == sorted(orders), "running requests are not in the order of arrival"
