"""The overlapping engine against the plain one: real scheduler, real model, a thread in place of the device."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.overlap import OverlapEngine
from puyu.engine.request import Request, Running
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model

CONFIG = {"block_size": 4, "max_step_tokens": 12, "max_running": 5}


def requests_of(seed: int, count: int = 12) -> list[Request]:
    """Prompts with equal beginnings, greedy and seeded, some that a frequent token ends early."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(90) for _ in range(9))
    made = []
    for index in range(count):
        prompt = shared[: rng.randrange(0, 9)] + tuple(rng.randrange(90) for _ in range(rng.randrange(1, 8)))
        temperature = rng.choice((0.0, 0.9))
        params = SamplingParams(temperature=temperature, seed=index, top_k=rng.choice((0, 7)), logprobs=index % 2 == 0)
        stops = frozenset(rng.sample(range(97), 10)) if index % 3 == 0 else frozenset()
        made.append(Request(str(index), prompt, max_tokens=rng.randrange(1, 12), params=params, stop_ids=stops))
    return made


def run(engine: Engine, requests: list[Request], *, aborted: tuple[str, ...] = ()) -> dict[str, Running]:
    """All requests, arriving one every other step."""
    waiting, found, steps = list(requests), {}, 0
    while waiting or engine.has_work:
        if waiting and steps % 2 == 0:
            request = waiting.pop(0)
            found[request.id] = engine.add(request)
        for event in engine.step():
            assert event.token is None or event.token >= 0
        steps += 1
        if steps in (5, 9) and aborted:
            engine.finish(aborted[steps // 9])
        engine.audit()
        assert steps < 1000
    return found


@pytest.mark.parametrize("tokens", [400, 28], ids=["room", "preemption"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_are_those_of_the_plain_engine(model: CausalLM, seed: int, tokens: int) -> None:
    plain = Engine(model, EngineConfig(cache_tokens=tokens, **CONFIG))
    overlapped = OverlapEngine(model, EngineConfig(cache_tokens=tokens, overlap=True, **CONFIG))
    expected, ours = run(plain, requests_of(seed)), run(overlapped, requests_of(seed))
    for name, running in expected.items():
        assert list(ours[name].generated) == list(running.generated), name
        assert ours[name].finish_reason == running.finish_reason
        assert ours[name].logprobs == pytest.approx(running.logprobs, abs=1e-5)
    assert overlapped.stats().num_generated_tokens == plain.stats().num_generated_tokens
    assert (plain.stats().num_preemptions > 0) == (tokens == 28), "the test means what its name says"
    pool = overlapped.scheduler.pool
    assert pool.num_free == pool.num_blocks, "nothing leaks"


def test_aborted_in_flight(model: CausalLM) -> None:
    """The others go on, the aborted ones keep what they had, all blocks come back."""
    config = EngineConfig(cache_tokens=400, **CONFIG)
    alone, engine = run(Engine(model, config), requests_of(5)), OverlapEngine(model, config)
    found = run(engine, requests_of(5), aborted=("1", "2"))
    for name, running in found.items():
        expected = list(alone[name].generated)
        if running.finish_reason == "abort":
            assert list(running.generated) == expected[: running.num_generated]
        else:
            assert list(running.generated) == expected
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_the_next_step_is_scheduled_while_the_last_one_runs(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of `step` plans and launches although the first step has not come back."""
    engine = OverlapEngine(model, EngineConfig(cache_tokens=400, **CONFIG))
    gate, real, planned = threading.Event(), engine.runner.run, threading.Event()

    def slow(*arguments: object) -> torch.Tensor:
        assert gate.wait(10)
        return real(*arguments)

    monkeypatch.setattr(engine.runner, "run", slow)
    step = engine.scheduler.step

    def watched() -> object:
        plan = step()
        if engine.stats().num_steps == 0 and not gate.is_set() and len(launched) == 1:
            planned.set()
            gate.set()
        launched.append(plan)
        return plan

    launched: list[object] = []
    monkeypatch.setattr(engine.scheduler, "step", watched)
    engine.add(Request("a", (1, 2, 3), max_tokens=4))
    assert engine.step() == [], "launched, nothing to tell yet"
    assert [event.token is not None for event in engine.step()] == [True]
    assert planned.is_set()


@pytest.mark.parametrize("bad", [1, 3])
def test_a_step_that_fails_ends_its_requests_alone(model: CausalLM, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OverlapEngine(model, EngineConfig(cache_tokens=400, **CONFIG))
    real, calls = engine.runner.run, []

    def failing(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == bad:
            raise RuntimeError("the device is gone")
        return real(*arguments)

    monkeypatch.setattr(engine.runner, "run", failing)
    first = engine.add(Request("a", (1, 2, 3), max_tokens=9))
    while engine.has_work:
        engine.step()
        engine.audit()
    assert first.finish_reason == "error" and all(token >= 0 for token in first.tokens)
    again = run(engine, [Request("b", (1, 2, 3), max_tokens=4)])["b"]
    expected = run(Engine(model, EngineConfig(cache_tokens=400, **CONFIG)), [Request("b", (1, 2, 3), max_tokens=4)])
    assert list(again.generated) == list(expected["b"].generated)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_a_row_that_is_not_finite_fails_alone() -> None:
    model = tiny_model(3)
    with torch.no_grad():
        model.trunk.embedding.weight[50] = float("nan")
    engine = OverlapEngine(model, EngineConfig(cache_tokens=400, **CONFIG))
    found = run(engine, [Request("a", (1, 50), max_tokens=5), Request("b", (1, 2), max_tokens=5)])
    assert found["a"].finish_reason == "error"
    assert found["b"].finish_reason == "length"


def test_changed_weights_count_from_the_next_step(model: CausalLM) -> None:
    engine = OverlapEngine(model, EngineConfig(cache_tokens=400, **CONFIG))
    running = engine.add(Request("a", (1, 2, 3), max_tokens=6))
    engine.step()
    engine.step()
    engine.reset_prefix_cache()
    engine.audit()
    while engine.has_work:
        engine.step()
    expected = run(Engine(model, EngineConfig(cache_tokens=400, **CONFIG)), [Request("a", (1, 2, 3), max_tokens=6)])
    assert list(running.generated) == list(expected["a"].generated)


def test_llm_with_overlap_gives_the_same_texts(model: CausalLM, tokenizer: Tokenizer) -> None:
    model = tiny_model(1, vocab_size=tokenizer.vocab_size)
    texts = []
    for overlap in (False, True):
        llm = LLM.from_model(model, tokenizer, config=EngineConfig(overlap=overlap, cache_tokens=600))
        params = SamplingParams(max_tokens=12, temperature=0.8, seed=3, stop=("a",))
        requests = [GenerateRequest(text, params) for text in ("Hello", "the answer", "我是")]
        texts.append([completion.text for completion in llm.generate_all(requests)])
        assert not llm.driver.has_work
    assert texts[0] == texts[1]
