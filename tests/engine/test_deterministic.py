"""Deterministic mode: what a request gets, to the bit, is what it gets alone, whatever the schedule.

PUYU_SCHEDULES=1000 runs more of them; bench/engine_deterministic.py does.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.request import Request, Running
from puyu.engine.speculate import LookupDrafter, ModelDrafter
from puyu.model.heads import CausalLM
from puyu.model.linear import QuantFormat, QuantLinear
from puyu.model.quant_modules import make_quantized
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.test_core import run_audited

SCHEDULES = int(os.environ.get("PUYU_SCHEDULES", "60"))
KINDS = [("float32", True), ("float32", False), ("bfloat16", True), ("int8", False)]
"""Weights, and whether the native step is used."""
PARAMS = [
    SamplingParams(logprobs=True),
    SamplingParams(temperature=1.0, seed=1, logprobs=True, top_logprobs=3),
    SamplingParams(temperature=0.8, seed=2, top_k=20, top_p=0.9, logprobs=True),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.3, logprobs=True),
    SamplingParams(temperature=1.3, seed=4, min_p=0.02, prompt_logprobs=True, logprobs=True),
    SamplingParams(prompt_logprobs=True, logprobs=True, logit_bias={5: 1.0}),
]


@cache
def model_of(weights: str) -> CausalLM:
    if weights == "int8":
        model = tiny_model(6)
        make_quantized(model, QuantFormat(8))
        generator = torch.Generator().manual_seed(0)
        for child in model.modules():
            if isinstance(child, QuantLinear):
                child.codes.copy_(torch.randint(-127, 127, child.codes.shape, generator=generator, dtype=torch.int8))
                child.scales.fill_(1 / 512)
        return model
    return tiny_model(6).to(getattr(torch, weights))


def subject(number: int) -> Request:
    """One of some requests whose lone results are known; half begin alike, some repeat themselves."""
    rng = random.Random(number)
    common = [rng.randrange(97) for _ in range(3)] * 2 if number % 3 == 0 else list(range(20, 31))
    prompt = common + [rng.randrange(97) for _ in range(rng.randrange(8))] if number % 2 else common[: 1 + number]
    ends = frozenset(rng.sample(range(97), 3))
    pool: Any = "last" if number == 11 else ""
    count = 0 if pool else rng.randrange(4, 14)
    return Request(f"s{number}", tuple(prompt), count, PARAMS[number % len(PARAMS)], stop_ids=ends, pool=pool)


def engine_of(weights: str, native: bool, config: EngineConfig, rng: random.Random | None = None) -> Engine:
    model, drafter = model_of(weights), None
    if rng is not None and config.draft_tokens:
        drafter = rng.choice([LookupDrafter(shortest=1), ModelDrafter(model)])
    engine = Engine(model, config, drafter=drafter)
    if native:
        assert engine.runner.native is not None
    engine.runner.native = engine.runner.native if native else None
    return engine


@cache
def lone(weights: str, native: bool, number: int) -> tuple[Any, ...]:
    engine = engine_of(weights, native, EngineConfig(cache_tokens=512, deterministic=True))
    running = engine.add(subject(number))
    run_audited(engine)
    return told(running)


def told(running: Running) -> tuple[Any, ...]:
    """Everything that a request gets."""
    lists = running.tokens, running.logprobs, running.top_logprobs, running.prompt_logprobs, running.pooled
    return (*map(tuple, lists), running.finish_reason)


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_request_gets_what_it_gets_alone(seed: int) -> None:
    rng = random.Random(seed)
    weights, native = KINDS[seed % len(KINDS)]
    config = EngineConfig(
        cache_tokens=rng.choice([40, 60, 90, 200, 2000]),
        block_size=rng.choice([2, 4, 8]),
        max_running=rng.choice([2, 4, 8, 16]),
        max_step_tokens=rng.choice([16, 17, 20, 40, 200]),
        prefix_cache=rng.random() < 0.7,
        draft_tokens=rng.choice([0, 0, 1, 3, 5]),
        deterministic=True,
    )
    engine = engine_of(weights, native, config, rng)
    waiting = [(rng.randrange(12), request) for request in drawn(rng)]
    runs: dict[Running, int] = {}
    for step in range(10_000):
        for at, request in [item for item in waiting if item[0] == step]:
            waiting.remove((at, request))
            number = int(request.id.partition("-")[0][1:]) if request.id[0] == "s" else -1
            runs[engine.add(request)] = number
        disturb(engine, rng)
        engine.step()
        engine.audit()
        if not waiting and not engine.has_work:
            break
    for running, number in runs.items():
        if number >= 0:
            assert told(running) == lone(weights, native, number), f"{running.request.id}: {config}"


def drawn(rng: random.Random) -> list[Request]:
    """Subjects, some twice, with priorities; and others that come, go and are aborted."""
    numbers = rng.sample(range(12), rng.randrange(2, 5))
    requests = [subject(number) for number in numbers + numbers[:1]]
    made = [
        replace(request, id=f"{request.id}-{index}", priority=rng.choice([0, 0, 2]))
        for index, request in enumerate(requests)
    ]
    if not made[-1].params.prompt_logprobs and not made[-1].pool:
        made[-1] = replace(made[-1], leader=made[0].id)
    for index in range(rng.randrange(4)):
        prompt = (*range(20, 31), *(rng.randrange(97) for _ in range(5)))[: rng.randrange(1, 16)]
        params = SamplingParams(temperature=1.0, prompt_logprobs=rng.random() < 0.3)
        made.append(Request(f"o{index}", prompt, rng.randrange(1, 12), params, priority=rng.choice([0, 1, 3])))
    if rng.random() < 0.4:
        made.append(Request("pool", tuple(range(20, 34)), 0, pool=rng.choice(["last", "mean"])))
    return made


def disturb(engine: Engine, rng: random.Random) -> None:
    """Abort one of the others, forget the cache, or fall asleep for a moment."""
    chance = rng.random()
    others = [run for run in (*engine.scheduler.running, *engine.scheduler.waiting) if run.request.id[0] == "o"]
    if chance < 0.06 and others:
        engine.finish(rng.choice(others).request.id)
    elif chance < 0.08:
        engine.reset_prefix_cache()
    elif chance < 0.1:
        engine.sleep()
        assert engine.step() == []
        engine.wake()


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_keys_of_embeddings_are_not_those_of_native_decoding(pool: Any) -> None:
    engine = engine_of("float32", True, EngineConfig(cache_tokens=512, block_size=2, deterministic=True))
    for number in range(11):
        embedded = engine.add(Request("pool", subject(number).prompt_ids, 0, pool=pool))
        run_audited(engine)
        running = engine.add(subject(number))
        run_audited(engine)
        assert embedded.finish_reason == "stop" and told(running) == lone("float32", True, number)


def test_the_schedules_hold_what_they_promise() -> None:
    """Preemptions, prefix hits, chunks and accepted drafts all occur among the first of them."""
    counts = {"preemptions": 0, "cached": 0, "accepted": 0}
    for seed in range(4):
        rng = random.Random(100 + seed)
        config = EngineConfig(cache_tokens=48, block_size=2, max_running=8, draft_tokens=4, deterministic=True)
        engine = engine_of("float32", True, config, rng)
        for number in range(11):
            engine.add(subject(number))
        run_audited(engine)
        stats = engine.stats()
        counts["preemptions"] += stats.num_preemptions
        counts["cached"] += stats.num_cached_tokens
        counts["accepted"] += stats.num_accepted
    assert all(counts.values()), counts


def test_without_the_mode_the_last_bits_do_differ() -> None:
    """The test above can fail: with batched sums, some logprob differs in its last bit."""
    differs = False
    for seed in range(6):
        config = EngineConfig(cache_tokens=2000, max_step_tokens=17, max_running=8)
        runs = []
        for together in (False, True):
            engine = engine_of("float32", False, config)
            runs.append(engine.add(replace(subject(5), id="x")))
            for index in range(5 if together else 0):
                engine.add(Request(f"o{index}", tuple(range(seed, seed + 3 + 7 * index)), 9))
            run_audited(engine)
        differs = differs or told(runs[0]) != told(runs[1])
    assert differs
