"""Several answers to a prompt, prompt log-probabilities, and what belongs to one request alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.request import Request
from puyu.engine.score import Pair, logprobs_of
from puyu.errors import RequestError
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.test_core import SIZES, run_audited

WARM = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> Iterator[LLM]:
    config = EngineConfig(cache_tokens=2048, block_size=4)
    with LLM.from_model(tiny_model(2, vocab_size=tokenizer.vocab_size), tokenizer, config=config) as llm:
        yield llm


def test_n_answers_differ_and_the_first_is_that_of_the_seed(llm: LLM) -> None:
    alone = llm.complete("Hello world", params=WARM)
    several = llm.complete("Hello world", params=replace(WARM, n=4))
    assert several.token_ids == alone.token_ids and len(several.choices) == 4
    assert len({answer.token_ids for answer in several.choices}) == 4
    assert several.usage.completion_tokens == 48 and several.usage.prompt_tokens == alone.usage.prompt_tokens
    again = llm.complete("Hello world", params=replace(WARM, n=4))
    assert [a.token_ids for a in again.choices] == [a.token_ids for a in several.choices]
    assert all(not answer.logprobs for answer in several.choices)


def test_the_prompt_of_several_answers_is_computed_once(tokenizer: Tokenizer) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    with LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=4096, block_size=4)) as llm:
        prompt = "Hello world, " * 8
        count = len(llm.prompt_ids(GenerateRequest(prompt)))
        llm.complete(prompt, params=replace(WARM, n=6, max_tokens=2))
        assert llm.stats().num_computed_tokens < 2 * count + 6 * 6


def test_best_of_gives_the_likeliest(llm: LLM) -> None:
    all_six = llm.complete("Hello", params=replace(WARM, n=6, logprobs=True))
    best = llm.complete("Hello", params=replace(WARM, n=2, best_of=6, prompt_logprobs=True))
    ranked = sorted(all_six.choices, key=lambda answer: -sum(answer.logprobs) / len(answer.logprobs))
    assert [answer.token_ids for answer in best.choices] == [answer.token_ids for answer in ranked[:2]]
    assert best.usage.completion_tokens == 72, "what was sampled counts, given or not"
    assert len(best.prompt_logprobs) == best.usage.prompt_tokens and not best.logprobs


def test_streams_of_several_answers_are_those_answers(llm: LLM) -> None:
    for params in (replace(WARM, n=3), replace(WARM, n=2, best_of=4)):
        whole = llm.complete("Hello", params=params)
        deltas = list(llm.stream_text("Hello", params=params))
        for index, answer in enumerate(whole.choices):
            assert "".join(delta.text for delta in deltas if delta.index == index) == answer.text
        ends = [delta for delta in deltas if delta.finish_reason]
        assert [delta.index for delta in ends] == list(range(len(whole.choices)))
        assert ends[-1].usage is not None and ends[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_top_logprobs_hold_the_chosen_token_when_greedy(llm: LLM) -> None:
    answer = llm.complete("Hello", max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3)
    assert [len(row) for row in answer.top_logprobs] == [3] * 6
    for token, logprob, row in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert row[0] == (token, pytest.approx(logprob, abs=1e-6))
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_prompt_logprobs_equal_a_full_forward(size: str, native: bool) -> None:
    model = tiny_model(1)
    engine = Engine(model, SIZES[size])
    if not native:
        engine.runner.native = None
    params = SamplingParams(prompt_logprobs=True)
    prompts = [tuple((7 * i + j * j) % 97 for j in range(3 + 7 * i)) for i in range(4)] + [(5,)]
    plain = [engine.add(Request(f"p{i}", prompt, 9)) for i, prompt in enumerate(prompts)]
    runs = [engine.add(Request(str(i), prompt, 8, params)) for i, prompt in enumerate(prompts)]
    run_audited(engine)
    later = [engine.add(Request(f"l{i}", prompt, 1, params)) for i, prompt in enumerate(prompts)]
    run_audited(engine)
    for prompt, *same in zip(prompts, runs, later, strict=True):
        expected = [] if len(prompt) == 1 else logprobs_of(model, [Pair(list(prompt), len(prompt) - 1)])[0][0].tolist()
        for running in same:
            assert running.prompt_logprobs[0] is None
            assert running.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert all(running.finish_reason == "length" for running in plain)


def test_many_prompts_to_score_keep_the_logits_of_a_step_small() -> None:
    engine = Engine(tiny_model(1), EngineConfig(cache_tokens=4096, max_step_tokens=1024))
    params = SamplingParams(prompt_logprobs=True)
    for index in range(8):
        engine.add(Request(str(index), tuple(range(90)), 1, params))
    while engine.has_work:
        before = engine.stats().num_computed_tokens
        engine.step()
        engine.audit()
        assert engine.stats().num_computed_tokens - before <= 256 + 8


# ---- time ----


def test_deadlines_end_requests_that_wait_or_run() -> None:
    engine = Engine(tiny_model(0), EngineConfig(cache_tokens=256, max_running=1))
    slow = engine.add(Request("slow", (1, 2), 50, deadline=10.0))
    waits = engine.add(Request("waits", (3, 4), 5, queue_deadline=5.0))
    patient = engine.add(Request("patient", (5, 6), 5))
    for now in (1.0, 2.0, 3.0):
        assert engine.step(now)[-1].running is slow
    events = engine.step(5.0)
    engine.audit()
    assert (waits.finish_reason, waits.num_generated) == ("timeout", 0) and events[0].running is waits
    engine.step(10.0)
    engine.audit()
    assert (slow.finish_reason, slow.num_generated) == ("timeout", 4), "what is there by then is kept"
    while engine.has_work:
        engine.step(math.inf if patient.status.value == "finished" else 11.0)
        engine.audit()
    assert patient.finish_reason == "length" and engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_request_that_has_begun_is_not_late_for_the_queue() -> None:
    engine = Engine(tiny_model(0), EngineConfig(cache_tokens=24, block_size=4))
    old = engine.add(Request("old", (1, 2, 3), 15))
    new = engine.add(Request("new", (4, 5, 6), 15, queue_deadline=5.0))
    engine.step(1.0)
    while engine.has_work:
        engine.step(9.0)
        engine.audit()
    assert new.num_preemptions > 0 and old.finish_reason == new.finish_reason == "length"


def test_a_timeout_is_told_with_what_there_is(llm: LLM) -> None:
    (answer,) = llm.generate_all([GenerateRequest("Hello", replace(WARM, max_tokens=100), timeout=0.02)])
    assert answer.finish_reason in ("timeout", "length")
    (answer,) = llm.generate_all([GenerateRequest("Hello", replace(WARM, n=2), timeout=1e-6)])
    assert [one.finish_reason for one in answer.choices] == ["timeout", "timeout"]
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_an_abort_takes_effect_before_the_next_step(llm: LLM) -> None:
    driver, got = llm.driver, []
    request_id = driver.submit(GenerateRequest("Hello", replace(WARM, n=3, max_tokens=50)), done=got.append)
    driver.pump()
    driver.pump()
    before = llm.stats().num_generated_tokens
    driver.abort(request_id)
    driver.pump()
    assert [answer.finish_reason for answer in got[0].choices] == ["abort"] * 3
    assert llm.stats().num_generated_tokens == before and not driver.has_work
    driver.engine.audit()


def test_a_higher_priority_overtakes(llm: LLM, tokenizer: Tokenizer) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    with LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=512, max_running=1)) as narrow:
        order: list[int] = []
        for priority in (0, 0, 5):
            request = GenerateRequest(f"Hello {priority}", replace(WARM, max_tokens=5), priority=priority)
            narrow.driver.submit(request, done=lambda _, priority=priority: order.append(priority))
        while narrow.driver.pump():
            narrow.driver.engine.audit()
    assert order == [5, 0, 0]


def test_all_together_in_one_plan(llm: LLM) -> None:
    """Chunks of prompts ride with decodes in one forward."""
    engine = Engine(tiny_model(0), EngineConfig(cache_tokens=1024, max_step_tokens=16, max_running=8))
    first = engine.add(Request("a", (1, 2, 3), 30))
    engine.step()
    long = engine.add(Request("b", tuple(range(60)), 5))
    mixed = 0
    while engine.has_work:
        before = (first.num_generated, long.num_computed)
        engine.step()
        engine.audit()
        mixed += first.num_generated > before[0] and 1 < long.num_computed - before[1] <= 15
    assert mixed >= 4


def test_shares_of_prompt_are_exact_in_float64() -> None:
    model = tiny_model(3).double()
    engine = Engine(model, EngineConfig(cache_tokens=512, max_step_tokens=7, max_running=4))
    prompt = tuple(range(40, 62))
    running = engine.add(Request("a", prompt, 2, SamplingParams(prompt_logprobs=True, logprobs=True)))
    run_audited(engine)
    whole = [*prompt, *running.generated]
    expected = logprobs_of(model, [Pair(whole, len(whole) - 1)])[0][0]
    found = torch.tensor([*running.prompt_logprobs[1:], *running.logprobs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_can_never_fit_is_refused_and_what_just_fits_is_not(tokenizer: Tokenizer) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size)
    with LLM.from_model(model, tokenizer, config=EngineConfig(cache_tokens=24, block_size=4)) as llm:
        assert llm.driver.engine.context == 24
        ids = llm.driver.front.text_ids("a")
        fitting = "a" * next(n for n in range(1, 60) if len(llm.driver.front.text_ids("a" * n)) == 23)
        assert len(ids) < 23
        answer = llm.complete(fitting, max_tokens=50, ignore_eos=True)
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 1)
        with pytest.raises(RequestError) as caught:
            llm.complete(fitting + "a", max_tokens=1)
        assert caught.value.param == "prompt" and not llm.driver.has_work
        beams = llm.complete("a", max_tokens=50, beam_width=3, n=3, ignore_eos=True)
        assert {len(one.token_ids) + len(ids) for one in beams.choices} == {24}
