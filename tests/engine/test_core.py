"""The engine against a naive loop of full forwards: same tokens, same log-probabilities, whatever the schedule."""

from __future__ import annotations

import logging
import random
from functools import cache

import pytest
import torch

from puyu.configure import build
from puyu.engine.core import Engine, EngineConfig
from puyu.engine.request import Request, Running
from puyu.errors import ConfigError
from puyu.model.heads import CausalLM
from puyu.model.packed import PackedPlan
from puyu.types import SamplingParams
from tests.engine.conftest import tiny_model

SIZES = {
    "roomy": EngineConfig(cache_tokens=4096),
    "chunks": EngineConfig(cache_tokens=4096, max_step_tokens=8, max_running=8),
    "tiny pool": EngineConfig(cache_tokens=60, block_size=4, max_running=8),
    "tiny pool, no sharing": EngineConfig(cache_tokens=60, block_size=4, max_running=8, prefix_cache=False),
}


def naive(model: CausalLM, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
    """Greedy, one full forward for each token."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            plan = PackedPlan.build((0,), len(ids))
            row = model(torch.tensor(ids), torch.arange(len(ids)), plan)[-1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row[ids[-1]]))
    return ids[len(prompt) :], logprobs


@cache
def traffic(seed: int) -> tuple[Request, ...]:
    """Random prompts, half of them with a common beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(97) for _ in range(12)]
    requests = []
    for index in range(10):
        own = [rng.randrange(97) for _ in range(rng.randrange(1, 25))]
        prompt = common + own if index % 2 else own
        requests.append(Request(str(index), tuple(prompt), rng.randrange(1, 20), SamplingParams(logprobs=True)))
    return tuple(requests)


@cache
def expected(model_seed: int, seed: int) -> list[tuple[list[int], list[float]]]:
    model = tiny_model(model_seed)
    return [naive(model, request.prompt_ids, request.max_tokens) for request in traffic(seed)]


def run_audited(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.audit()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_and_logprobs_equal_the_naive_loop(size: str, seed: int, native: bool) -> None:
    engine = Engine(tiny_model(seed), SIZES[size])
    assert engine.runner.native is not None
    if not native:
        engine.runner.native = None
    runs = [engine.add(request) for request in traffic(seed)]
    run_audited(engine)
    for running, (ids, logprobs) in zip(runs, expected(seed, seed), strict=True):
        assert list(running.generated) == ids
        assert running.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert running.finish_reason == "length"
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_generated_tokens == sum(request.max_tokens for request in traffic(seed))
    if size.startswith("tiny"):
        assert stats.num_preemptions > 0, "this size must force preemption"


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(model: CausalLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=5)
    alone = Engine(model, SIZES["roomy"]).add(Request("a", (3, 4, 5), 20, params))
    engine = Engine(model, SIZES["roomy"])
    alone = engine.add(Request("a", (3, 4, 5), 20, params))
    run_audited(engine)
    crowded = Engine(model, SIZES["tiny pool"])
    others = [crowded.add(Request(f"o{i}", (9, i), 15, SamplingParams(temperature=2.0))) for i in range(4)]
    again = crowded.add(Request("a", (3, 4, 5), 20, params))
    run_audited(crowded)
    assert again.generated == alone.generated and again.num_preemptions + sum(o.num_preemptions for o in others) > 0
    other = engine.add(Request("b", (3, 4, 5), 20, SamplingParams(temperature=1.0, top_p=0.95, seed=6)))
    run_audited(engine)
    assert other.generated != alone.generated


def test_a_cached_prefix_changes_nothing(model: CausalLM) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=512, block_size=4))
    request = Request("a", tuple(range(10, 30)), 6, SamplingParams(logprobs=True))
    first = engine.add(request)
    run_audited(engine)
    second = engine.add(request)
    run_audited(engine)
    assert (first.num_cached, second.num_cached) == (0, 16)
    assert second.generated == first.generated
    assert second.logprobs == pytest.approx(first.logprobs, abs=1e-5)
    assert second.usage.cached_tokens == 16 and engine.stats().num_cached_tokens == 16


def test_stop_ids_end_a_request_and_are_kept(model: CausalLM) -> None:
    ids, _ = naive(model, (1, 2, 3), 12)
    stop = ids[4]
    engine = Engine(model, SIZES["roomy"])
    running = engine.add(Request("a", (1, 2, 3), 12, stop_ids=frozenset({stop})))
    run_audited(engine)
    assert list(running.generated) == ids[: ids.index(stop) + 1] and running.finish_reason == "stop"


def poisoned() -> CausalLM:
    """Token 50 has an embedding that is not a number, and is never generated."""
    model = tiny_model(3)
    with torch.no_grad():
        model.trunk.embedding.weight[50] = float("nan")
        model.head.weight[50] = 0.0
    return model


@pytest.mark.parametrize("size", SIZES)
def test_a_nan_row_fails_that_request_alone(size: str) -> None:
    engine = Engine(poisoned(), SIZES[size])
    good = [Request(str(i), tuple(range(i, i + 9)), 8) for i in range(4)]
    runs = [engine.add(request) for request in good[:2]]
    bad = [engine.add(Request(f"bad{i}", (*range(20), 50, *range(i + 1)), 8)) for i in range(2)]
    runs += [engine.add(request) for request in good[2:]]
    run_audited(engine)
    assert [running.finish_reason for running in bad] == ["error", "error"]
    for running in runs:
        assert running.finish_reason == "length"
        assert list(running.generated) == naive(engine.model, running.request.prompt_ids, 8)[0]
    after = engine.add(Request("after", tuple(range(12)), 8))
    run_audited(engine)
    assert list(after.generated) == naive(engine.model, tuple(range(12)), 8)[0], "no block of a failed one is used"
    assert engine.stats().num_failed == 2


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    model: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(model, SIZES["roomy"])
    with caplog.at_level(logging.ERROR, "puyu"):
        bad = engine.add(Request("bad", (1, 10_000), 4))  # no such token: the embedding raises
        run_audited(engine)
    assert bad.finish_reason == "error" and "step of 1 requests failed" in caplog.text
    good = engine.add(Request("good", (1, 2), 4))
    run_audited(engine)
    assert list(good.generated) == naive(model, (1, 2), 4)[0]


def test_abort_at_any_moment_gives_the_blocks_back(model: CausalLM) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=4096, max_running=2, prefix_cache=False))
    runs: list[Running] = [engine.add(Request(str(i), tuple(range(1, 40)), 8)) for i in range(3)]
    engine.step()
    for running in runs:  # two run, one waits
        assert engine.finish(running.request.id) is running
        assert engine.finish(running.request.id) is None, "twice is once"
        engine.audit()
    assert not engine.has_work and engine.stats().num_free_blocks == engine.stats().num_blocks
    assert {running.finish_reason for running in runs} == {"abort"}


def test_new_weights_need_a_reset_of_the_prefix_cache() -> None:
    model = tiny_model(4)
    engine = Engine(model, EngineConfig(cache_tokens=512, block_size=4))
    prompt = tuple(range(30))
    engine.add(Request("a", prompt, 8))
    run_audited(engine)
    half_way = engine.add(Request("b", prompt, 12))
    for _ in range(4):
        engine.step()
    written = list(half_way.generated)
    with torch.no_grad():
        model.trunk.layers[0].attention.qkv.weight.mul_(-1.0)
    engine.reset_prefix_cache()
    engine.audit()
    fresh = engine.add(Request("c", prompt, 8))
    run_audited(engine)
    assert fresh.num_cached == 0 and list(fresh.generated) == naive(model, prompt, 8)[0]
    rest = naive(model, (*prompt, *written), 12 - len(written))[0]
    assert list(half_way.generated) == written + rest, "a request under way goes on with the new weights alone"


def test_sizes_are_checked(model: CausalLM) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        build(EngineConfig, {"block_size": 0})
    assert Engine(model, EngineConfig(cache_tokens=40)).context == 48, "never more than the cache can hold"
    assert Engine(model).context == 128
