"""The scheduler under random arrivals, lengths and aborts: nothing leaks, nobody starves, budgets hold."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.engine.blocks import BlockPool
from puyu.engine.request import Request, Running, Status
from puyu.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Arrival:
    """A request that comes before step `at`, and is aborted before step `abort_at` if it still runs."""

    at: int
    num_prompt: int
    max_tokens: int
    abort_at: int | None
    shared: bool


arrivals = st.builds(
    Arrival,
    at=st.integers(0, 30),
    num_prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 12),
    abort_at=st.none() | st.integers(0, 60),
    shared=st.booleans(),
)


def _running(order: int, arrival: Arrival) -> Running:
    base = 0 if arrival.shared else 1000 * (order + 1)
    prompt = tuple(base + i for i in range(arrival.num_prompt))
    return Running(Request(str(order), prompt, max_tokens=arrival.max_tokens), order)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    wanted=st.lists(arrivals, min_size=1, max_size=14),
    block_size=st.integers(1, 5),
    num_blocks=st.integers(6, 40),
    max_running=st.integers(1, 6),
    extra=st.integers(0, 20),
    prefix_cache=st.booleans(),
)
def test_random_traffic(
    wanted: list[Arrival], block_size: int, num_blocks: int, max_running: int, extra: int, prefix_cache: bool
) -> None:
    pool = BlockPool(num_blocks=num_blocks, block_size=block_size, prefix_cache=prefix_cache)
    scheduler = Scheduler(pool, max_running=max_running, max_step_tokens=max_running + extra)
    everybody = [_running(order, arrival) for order, arrival in enumerate(sorted(wanted, key=lambda a: a.at))]
    plans = dict(zip(everybody, sorted(wanted, key=lambda a: a.at), strict=True))
    accepted = [running for running in everybody if scheduler.can_ever_fit(running)]
    # every step computes at least one token of the oldest; each preemption repeats at most one sequence
    limit = 200 + 40 * sum(len(r.tokens) + r.request.max_tokens for r in accepted)
    step = 0
    while step <= 61 or scheduler.has_work:
        for running in accepted:
            if plans[running].at == step:
                scheduler.add(running)
            if plans[running].abort_at == step and plans[running].at <= step:
                scheduler.finish(running, "abort")
                scheduler.finish(running, "abort")  # twice is once
        _one_step(scheduler)
        step += 1
        assert step < limit, "some request never ends"
    for running in accepted:
        assert running.status is Status.FINISHED
        if running.finish_reason == "length":
            assert running.num_generated == running.request.max_tokens
    assert pool.num_free == pool.num_blocks


def _one_step(scheduler: Scheduler) -> None:
    oldest = min([*scheduler.running, *scheduler.waiting], key=lambda r: r.order, default=None)
    plan = scheduler.step()
    assert plan.num_tokens <= scheduler.max_step_tokens
    assert len({chunk.running for chunk in plan.chunks}) == len(plan.chunks)
    assert oldest is None or any(chunk.running is oldest for chunk in plan.chunks) or _decodes_fill(plan, scheduler)
    for chunk in plan.chunks:
        running = chunk.running
        assert chunk.start == running.num_computed and chunk.length > 0
        assert len(running.blocks) * scheduler.pool.block_size >= chunk.start + chunk.length
    lengths = [chunk.length for chunk in plan.chunks]
    first_prompt = next((i for i, length in enumerate(lengths) if length > 1), len(lengths))
    assert all(length == 1 for length in lengths[:first_prompt])
    scheduler.audit()
    scheduler.computed(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            reason = chunk.running.append(7, None)
            if reason is not None:
                scheduler.finish(chunk.running, reason)
    scheduler.audit()


def _decodes_fill(plan: object, scheduler: Scheduler) -> bool:
    """The oldest may wait for one step only if decodes use up the whole budget."""
    return sum(r.num_remaining == 1 for r in scheduler.running) >= scheduler.max_step_tokens


def test_prefix_is_shared_and_its_last_token_is_computed() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=16, block_size=2), max_running=4, max_step_tokens=64)
    first = Running(Request("a", (1, 2, 3, 4), max_tokens=3), 0)
    scheduler.add(first)
    _one_step(scheduler)
    second = Running(Request("b", (1, 2, 3, 4), max_tokens=3), 1)
    scheduler.add(second)
    plan = scheduler.step()
    assert second.num_cached == 2, "the last block must be computed again: its logits are wanted"
    assert second.blocks[0] == first.blocks[0] and second.blocks[1] != first.blocks[1]
    assert [(c.start, c.length) for c in plan.chunks if c.running is second] == [(2, 2)]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=6, block_size=2, prefix_cache=False), max_running=3, max_step_tokens=16)
    old, new = (Running(Request(n, (o, o, o), max_tokens=6), o) for o, n in enumerate("ab"))
    waiting = Running(Request("c", (5,), max_tokens=1), 2)
    scheduler.add(old)
    _one_step(scheduler)
    scheduler.add(new)
    scheduler.add(waiting)
    while not new.num_preemptions and scheduler.has_work:
        _one_step(scheduler)
    assert old.status is Status.RUNNING and scheduler.waiting[0] is new
    while scheduler.has_work:
        _one_step(scheduler)
    assert (old.num_generated, new.num_generated, waiting.num_generated) == (6, 6, 1)


def test_restart_recomputes_and_forgets() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=8, block_size=2), max_running=4, max_step_tokens=64)
    running = Running(Request("a", (1, 2, 3, 4, 5), max_tokens=3), 0)
    scheduler.add(running)
    _one_step(scheduler)
    assert scheduler.pool.num_cached == 2
    scheduler.restart()
    scheduler.audit()
    assert running.status is Status.WAITING and scheduler.pool.num_cached == 0
    assert scheduler.step().chunks[0].start == 0
