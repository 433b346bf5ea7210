"""Beam search against transformers' generate on random LLaMA models, with ends that really occur."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from puyu.engine.beam import BeamSearch
from puyu.engine.core import Engine, EngineConfig
from puyu.engine.driver import Driver
from puyu.engine.llm import LLM
from puyu.model.checkpoint import save_model
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Completion, GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model


def family_model(seed: int, vocab: int) -> CausalLM:
    config = tiny_model(0).config
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads")}
    made = CausalLM(ModelConfig(family="llama", vocab_size=vocab, intermediate_size=48, max_positions=128, **shape))
    init_weights(made, seed=seed, std=0.2)
    return made.double()


def run(driver: Driver, request: GenerateRequest) -> Completion:
    got: list[Completion] = []
    driver.submit(request, done=got.append)
    while driver.pump():
        driver.engine.audit()
    driver.engine.audit()
    assert driver.stats().num_free_blocks == driver.stats().num_blocks
    return got[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("width", "penalty", "num_ends"), [(2, 1.0, 40), (3, 0.0, 15), (4, 2.0, 60), (3, -1.0, 25)])
def test_ids_and_scores_equal_transformers(
    seed: int, width: int, penalty: float, num_ends: int, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("llama")
    model = family_model(seed, tokenizer.vocab_size)
    save_model(model, folder)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ends = [*tokenizer.stop_ids, *range(5, 5 + num_ends)]
    params = SamplingParams(
        max_tokens=9, beam_width=width, n=width, length_penalty=penalty, stop_token_ids=tuple(range(5, 5 + num_ends))
    )
    driver = Driver(Engine(model, EngineConfig(cache_tokens=1024, block_size=4)), tokenizer)
    ours = run(driver, GenerateRequest("Hello", params))
    prompt = torch.tensor([driver.front.text_ids("Hello")])
    found = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        early_stopping=False,
        length_penalty=penalty,
        max_new_tokens=9,
        eos_token_id=ends,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    rows = [_until_end(row, ends) for row in found.sequences[:, prompt.shape[1] :].tolist()]
    assert [list(answer.token_ids) for answer in ours.choices] == rows
    scores = [sum(answer.logprobs) / len(answer.token_ids) ** penalty for answer in ours.choices]
    assert scores == pytest.approx(found.sequences_scores.tolist(), rel=1e-5), "theirs are sums in fp32"
    for answer in ours.choices:
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in ends else "length")


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    at = next((index for index, id in enumerate(row) if id in ends), len(row) - 1)
    return row[: at + 1]


def test_one_beam_is_greedy(tokenizer: Tokenizer) -> None:
    with LLM.from_model(family_model(1, tokenizer.vocab_size), tokenizer, config=EngineConfig(cache_tokens=512)) as llm:
        greedy = llm.complete("Hello", max_tokens=12, ignore_eos=True)
        assert llm.complete("Hello", max_tokens=12, ignore_eos=True, beam_width=1).token_ids == greedy.token_ids


def test_beams_run_beside_others_in_a_tiny_pool_and_can_be_stopped(tokenizer: Tokenizer) -> None:
    model = family_model(2, tokenizer.vocab_size)
    beams = GenerateRequest("Hello", SamplingParams(max_tokens=10, beam_width=3, n=3, ignore_eos=True))
    alone = run(Driver(Engine(model, EngineConfig(cache_tokens=1024)), tokenizer), beams)
    driver = Driver(Engine(model, EngineConfig(cache_tokens=40, block_size=4)), tokenizer)
    got: list[Completion] = []
    driver.submit(GenerateRequest("Hi", SamplingParams(max_tokens=20, ignore_eos=True)), done=lambda _: None)
    driver.submit(beams, done=got.append)
    while driver.pump():
        driver.engine.audit()
    assert [answer.token_ids for answer in got[0].choices] == [answer.token_ids for answer in alone.choices]
    request_id = driver.submit(beams, done=got.append)
    for _ in range(4):
        driver.pump()
    driver.abort(request_id)
    driver.pump()
    driver.engine.audit()
    assert {answer.finish_reason for answer in got[1].choices} == {"abort"} and not driver.has_work


def test_a_search_that_has_begun_is_not_late_for_the_queue(tokenizer: Tokenizer) -> None:
    driver = Driver(Engine(family_model(2, tokenizer.vocab_size), EngineConfig(cache_tokens=512)), tokenizer)
    params, got = SamplingParams(max_tokens=6, beam_width=2, ignore_eos=True), []
    driver.submit(GenerateRequest("Hello", params, queue_timeout=60.0), done=got.append)
    driver.pump()
    assert all(running.request.queue_deadline == float("inf") for running in driver.engine.scheduler.waiting)
    while driver.pump():
        continue
    assert got[0].finish_reason == "length"
    driver.submit(GenerateRequest("Hello", params, timeout=1e-6), done=got.append)
    while driver.pump():
        continue
    assert got[1].finish_reason == "timeout"


def test_a_search_ends_when_no_beam_can_improve() -> None:
    search = BeamSearch(SamplingParams(beam_width=1, max_tokens=9), stop_ids=frozenset({2}), max_tokens=9)
    search.advance([((2, -0.1), (3, -5.0))])
    assert not search.beams and search.best(1)[0].beam.ids == (2,)


def test_ends_that_are_not_among_the_best_take_no_beams_place() -> None:
    params = SamplingParams(beam_width=2, max_tokens=9)
    search = BeamSearch(params, stop_ids=frozenset({2, 3, 5, 6}), max_tokens=9)
    likeliest = ((2, -0.1), (7, -0.2), (3, -0.3), (5, -0.4), (6, -0.5), (8, -0.6), (9, -0.7))
    search.advance([likeliest[: search.num_candidates]])
    assert [beam.ids for beam in search.beams] == [(7,), (8,)]
    assert [item.beam.ids for item in search.finished] == [(2,)]
