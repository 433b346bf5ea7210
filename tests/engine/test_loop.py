"""The engine behind asyncio: batches with others, aborts within a step, shuts down cleanly."""

from __future__ import annotations

import asyncio
import threading

import pytest

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.driver import Driver
from puyu.engine.loop import AsyncEngine
from puyu.errors import ResourceError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Delta, GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model

LONG = GenerateRequest("Hello", SamplingParams(max_tokens=100, ignore_eos=True))


@pytest.fixture
def driver(tokenizer: Tokenizer) -> Driver:
    engine = Engine(tiny_model(2, vocab_size=tokenizer.vocab_size), EngineConfig(cache_tokens=2048, prefix_cache=False))
    return Driver(engine, tokenizer)


def is_idle(driver: Driver) -> bool:
    driver.engine.audit()
    stats = driver.stats()
    return not driver.has_work and stats.num_free_blocks == stats.num_blocks


def test_concurrent_requests_equal_lone_ones(driver: Driver) -> None:
    requests = [
        GenerateRequest(f"Hello {i}", SamplingParams(max_tokens=5 + i, temperature=1.0, seed=i, ignore_eos=True))
        for i in range(12)
    ]

    async def together() -> list[str]:
        async with AsyncEngine(driver) as engine:
            return [c.raw_text for c in await asyncio.gather(*(engine.generate(r) for r in requests))]

    async def alone() -> list[str]:
        async with AsyncEngine(driver) as engine:
            return [(await engine.generate(r)).raw_text for r in requests]

    texts = asyncio.run(together())
    steps = driver.stats().num_steps
    assert steps < sum(r.params.max_tokens for r in requests), "they did not share steps"
    assert asyncio.run(alone()) == texts
    assert is_idle(driver)


def test_leaving_a_stream_or_cancelling_a_wait_aborts_the_request(driver: Driver) -> None:
    async def run() -> None:
        async with AsyncEngine(driver) as engine:
            stream = engine.stream(LONG)
            await anext(stream)
            await stream.aclose()
            waiting = asyncio.create_task(engine.generate(LONG))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            after = await engine.generate(GenerateRequest("Hi", SamplingParams(max_tokens=3, ignore_eos=True)))
            assert after.usage.completion_tokens == 3

    asyncio.run(run())
    assert is_idle(driver)
    assert driver.stats().num_generated_tokens < 2 * LONG.params.max_tokens


def test_close_ends_what_is_under_way_and_refuses_the_rest(driver: Driver) -> None:
    before = set(threading.enumerate())

    async def run() -> None:
        engine = AsyncEngine(driver)
        stream = engine.stream(LONG)
        await anext(stream)
        await asyncio.to_thread(engine.close, drain=0)
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason == "abort"
        with pytest.raises(ResourceError, match="shutting down"):
            await engine.generate(LONG)
        engine.close()  # twice is once

    asyncio.run(run())
    assert is_idle(driver)
    assert set(threading.enumerate()) <= before


def test_a_stream_that_nobody_takes_is_aborted_in_the_end(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puyu.engine.loop.MAX_BEHIND", 10)

    async def run() -> list[Delta]:
        async with AsyncEngine(driver) as engine:
            batches = engine.batches([await engine.prepare(LONG)])
            taken = await anext(batches)
            while driver.has_work:
                await asyncio.sleep(0.005)
            async for batch in batches:
                taken += batch
            return taken

    deltas = asyncio.run(run())
    assert deltas[-1].finish_reason == "abort" and 10 < len(deltas) < 100
    assert is_idle(driver)


def test_close_lets_requests_finish_when_there_is_time(driver: Driver) -> None:
    async def run() -> str | None:
        engine = AsyncEngine(driver)
        stream = engine.stream(LONG)
        await anext(stream)
        await asyncio.to_thread(engine.close, drain=60)
        return [delta.finish_reason async for delta in stream][-1]

    assert asyncio.run(run()) == "length"


def test_an_engine_that_broke_says_so_and_hangs_nobody(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise MemoryError("the scheduler is gone")

    async def run() -> None:
        engine = AsyncEngine(driver)
        monkeypatch.setattr(driver.engine.scheduler, "step", broken)
        completion = await engine.generate(LONG)
        assert completion.finish_reason == "error" and not engine.is_alive
        with pytest.raises(ResourceError, match="the scheduler is gone"):
            await engine.generate(LONG)
        await asyncio.to_thread(engine.close)

    asyncio.run(run())
    assert is_idle(driver)


def test_work_beside_the_steps_waits_for_the_lock(driver: Driver) -> None:
    async def run() -> int:
        async with AsyncEngine(driver) as engine:
            waiting = asyncio.create_task(engine.generate(LONG))
            number = await engine.run(lambda: 42)
            await waiting
            return number

    assert asyncio.run(run()) == 42
