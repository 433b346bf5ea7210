"""The scheduler under random arrivals, lengths and aborts: nothing leaks, nobody starves, budgets hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.engine.blocks import BlockPool
from puyu.engine.request import Request, Running, Status
from puyu.engine.scheduler import Chunk, Scheduler


@dataclass(frozen=True)
class Arrival:
    """A request that comes before step `at`, and is aborted before step `abort_at` if it still runs.

    `drafts`: how many tokens are guessed for it at a time, of which `right` are right. `pool`: it generates nothing.
    """

    at: int
    num_prompt: int
    max_tokens: int
    abort_at: int | None
    shared: bool
    priority: int
    drafts: int
    right: int
    pool: bool


arrivals = st.builds(
    Arrival,
    at=st.integers(0, 30),
    num_prompt=st.integers(1, 24),
    max_tokens=st.integers(1, 12),
    abort_at=st.none() | st.integers(0, 60),
    shared=st.booleans(),
    priority=st.sampled_from([0, 0, 0, 1, 5]),
    drafts=st.sampled_from([0, 0, 1, 4]),
    right=st.integers(0, 4),
    pool=st.sampled_from([False, False, False, True]),
)


def _running(order: int, arrival: Arrival) -> Running:
    base = 0 if arrival.shared else 1000 * (order + 1)
    prompt = tuple(base + i for i in range(arrival.num_prompt))
    leader = "0" if order % 3 == 2 and arrival.shared else ""
    limits = {"priority": arrival.priority, "leader": leader}
    if arrival.pool:
        return Running(Request(str(order), prompt, max_tokens=0, pool="last", **limits), order)
    return Running(Request(str(order), prompt, max_tokens=arrival.max_tokens, **limits), order)


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
        _one_step(scheduler, plans)
        step += 1
        assert step < limit, "some request never ends"
    for running in accepted:
        assert running.status is Status.FINISHED
        if running.finish_reason == "length":
            assert running.num_generated == running.request.max_tokens
    assert pool.num_free == pool.num_blocks


def _one_step(scheduler: Scheduler, plans: Mapping[Running, Arrival] | None = None) -> None:
    first = min([*scheduler.running, *scheduler.waiting], key=lambda r: r.rank, default=None)
    _guess(scheduler, plans or {})
    plan = scheduler.step()
    assert plan.num_tokens <= scheduler.max_step_tokens
    assert len({chunk.running for chunk in plan.chunks}) == len(plan.chunks)
    waits = first is not None and first.request.leader and first.status is Status.WAITING
    served = first is None or any(chunk.running is first for chunk in plan.chunks)
    assert served or waits or _decodes_fill(plan, scheduler)
    for chunk in plan.chunks:
        running = chunk.running
        assert chunk.start == running.num_computed and chunk.length > len(chunk.drafts)
        assert len(running.blocks) * scheduler.pool.block_size >= chunk.start + chunk.length
    prompts = [chunk.running.num_remaining > 1 or bool(chunk.running.request.pool) for chunk in plan.chunks]
    assert prompts == sorted(prompts), "decodes first"
    scheduler.audit()
    for chunk in plan.chunks:
        _take(scheduler, chunk, (plans or {}).get(chunk.running))
    scheduler.audit()


def _guess(scheduler: Scheduler, plans: Mapping[Running, Arrival]) -> None:
    """Draft for decoding requests as the engine does."""
    for running in scheduler.running:
        room = running.request.max_tokens - running.num_generated - 1
        if running in plans and running.num_remaining == 1 and running.num_generated and room > 0:
            running.drafts = [7] * scheduler.reserve(running, min(room, plans[running].drafts))


def _take(scheduler: Scheduler, chunk: Chunk, arrival: Arrival | None) -> None:
    """Accept some drafts and one token more, and end what has ended."""
    running, reason = chunk.running, None
    running.drafts = []
    right = min(len(chunk.drafts), arrival.right if arrival else 0)
    if chunk.samples:
        for _ in range(1 + right):
            reason = running.append(7)
            assert reason is None or running.num_generated == running.request.max_tokens
    scheduler.computed(running, chunk.length - len(chunk.drafts) + right)
    pooled = running.request.pool and running.num_computed == running.num_prompt
    if reason is not None or pooled:
        scheduler.finish(running, reason or "stop")


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


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower_one() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=3, block_size=4), max_running=2, max_step_tokens=16)
    low, equal, high = (
        Running(Request(str(order), (order, 2, 3), max_tokens=6, priority=priority), order)
        for order, priority in enumerate((0, 0, 3))
    )
    scheduler.add(low)
    _one_step(scheduler)
    scheduler.add(equal)
    scheduler.add(high)
    assert scheduler.waiting == [high, equal]
    while not high.num_generated:
        _one_step(scheduler)
    assert scheduler.running[0] is high
    while scheduler.has_work:
        _one_step(scheduler)
    assert (low.num_preemptions, high.num_preemptions) == (1, 0), "the pool holds one of them at a time"
    assert [running.num_generated for running in (low, equal, high)] == [6, 6, 6]


def test_an_equal_priority_never_preempts_to_begin() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=2, block_size=4), max_running=1, max_step_tokens=16)
    first, second = (Running(Request(str(order), (1, 2), max_tokens=4, priority=2), order) for order in range(2))
    scheduler.add(first)
    _one_step(scheduler)
    scheduler.add(second)
    _one_step(scheduler)
    assert first.status is Status.RUNNING and second.status is Status.WAITING and first.num_preemptions == 0


def test_a_follower_waits_for_its_leader_and_shares_its_prompt() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=16, block_size=2), max_running=4, max_step_tokens=5)
    prompt = (1, 2, 3, 4, 5, 6, 7)
    leader = Running(Request("a", prompt, max_tokens=3), 0)
    follower = Running(Request("b", prompt, max_tokens=3, leader="a"), 1)
    other = Running(Request("c", (9,), max_tokens=1), 2)
    for running in (leader, follower, other):
        scheduler.add(running)
    _one_step(scheduler)
    assert leader.num_computed == 4 and follower.status is Status.WAITING
    assert other.status is Status.FINISHED, "a follower holds nobody up"
    while follower.status is Status.WAITING:
        _one_step(scheduler)
    assert follower.num_cached == 6 and follower.blocks[:3] == leader.blocks[:3]


def test_another_adapter_shares_no_blocks() -> None:
    scheduler = Scheduler(BlockPool(num_blocks=16, block_size=2), max_running=4, max_step_tokens=64)
    runs = [Running(Request(str(i), (1, 2, 3, 4, 5), 3, adapter=name), i) for i, name in enumerate(["x", "", "x"])]
    scheduler.add(runs[0])
    _one_step(scheduler)
    for running in runs[1:]:
        scheduler.add(running)
    scheduler.step()
    assert [running.num_cached for running in runs] == [0, 0, 4]
