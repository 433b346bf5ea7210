"""Drafts change the number of steps and never a token: against the same requests without drafts, in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from puyu.engine.core import Engine, EngineConfig
from puyu.engine.llm import LLM
from puyu.engine.request import Request, Running
from puyu.engine.speculate import LookupDrafter, ModelDrafter
from puyu.errors import CheckpointError
from puyu.model.checkpoint import save_model
from puyu.model.heads import CausalLM
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, from_merges
from puyu.types import GenerateRequest, SamplingParams
from tests.engine.conftest import tiny_model
from tests.engine.test_core import run_audited

SIZES = {
    "roomy": EngineConfig(cache_tokens=4096),
    "chunks": EngineConfig(cache_tokens=4096, max_step_tokens=10, max_running=8),
    "tiny pool": EngineConfig(cache_tokens=56, block_size=4, max_running=8),
    "no sharing": EngineConfig(cache_tokens=56, block_size=4, max_running=8, prefix_cache=False),
}
PARAMS = [
    SamplingParams(logprobs=True),
    SamplingParams(temperature=1.0, seed=1, logprobs=True, top_logprobs=2),
    SamplingParams(temperature=0.3, seed=2, top_k=5, repetition_penalty=1.2),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.5, logprobs=True),
    SamplingParams(temperature=0.5, seed=3, top_p=0.9, min_p=0.05, logit_bias={7: 3.0}),
    SamplingParams(min_tokens=10, prompt_logprobs=True, logprobs=True),
]


def requests(seed: int) -> list[Request]:
    """Prompts that repeat themselves; some have ends that occur."""
    rng = random.Random(seed)
    made = []
    for index in range(9):
        piece = [rng.randrange(97) for _ in range(rng.randrange(2, 6))]
        prompt = tuple(piece * rng.randrange(1, 6))
        ends = frozenset(rng.sample(range(97), 6)) if index % 3 == 0 else frozenset()
        made.append(Request(str(index), prompt, rng.randrange(12, 26), PARAMS[index % len(PARAMS)], stop_ids=ends))
    return made


def run(engine: Engine, wanted: Sequence[Request]) -> list[Running]:
    runs = [engine.add(request) for request in wanted]
    run_audited(engine)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return runs


def same(ours: Sequence[Running], plain: Sequence[Running]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert list(one.generated) == list(other.generated) and one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
        assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-9)
        ids = [[id for id, _ in row] for row in one.top_logprobs]
        assert ids == [[id for id, _ in row] for row in other.top_logprobs]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drafter", ["lookup", "small model", "same model"])
@pytest.mark.parametrize("seed", range(2))
def test_output_is_that_of_plain_decoding(size: str, drafter: str, seed: int) -> None:
    model = tiny_model(seed).double()
    plain = run(Engine(model, SIZES[size]), requests(seed))
    models = {"small model": tiny_model(9, num_layers=1, hidden_size=16), "same model": model}
    guess = LookupDrafter(shortest=1) if drafter == "lookup" else ModelDrafter(models[drafter])
    engine = Engine(model, SIZES[size].model_copy(update={"draft_tokens": 4}), drafter=guess)
    same(run(engine, requests(seed)), plain)
    stats = engine.stats()
    assert stats.num_drafted > 0 and stats.num_accepted <= stats.num_drafted
    assert "tiny" not in size or stats.num_preemptions > 0


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    model = tiny_model(0).double()
    config = EngineConfig(cache_tokens=4096, draft_tokens=4, prefix_cache=False)
    engine = Engine(model, config, drafter=ModelDrafter(model))
    wanted = [Request(str(i), tuple(range(i, i + 5)), 31) for i in range(3)]
    run(engine, wanted)
    stats = engine.stats()
    assert stats.num_accepted == stats.num_drafted > 60
    assert stats.num_steps == 1 + 6, "the prompt's step gives one token, each other one five"


def test_shared_and_recomputed_blocks_keep_the_guesses_good() -> None:
    model = tiny_model(0).double()
    config = EngineConfig(cache_tokens=4096, block_size=4, draft_tokens=4)
    engine = Engine(model, config, drafter=ModelDrafter(model))
    run(engine, [Request("a", tuple(range(20)), 11)])
    run(engine, [Request("b", (*range(20), 3), 11)])
    stats = engine.stats()
    assert stats.num_cached_tokens == 20 and stats.num_accepted == stats.num_drafted


def test_lookup_is_right_where_text_repeats() -> None:
    model = tiny_model(0)
    plain = run(Engine(model, SIZES["roomy"]), [Request("a", (1, 2), 120)])[0]
    assert len(set(plain.generated)) < 60, "a greedy random model falls into a loop"
    engine = Engine(model, EngineConfig(cache_tokens=4096, draft_tokens=6))
    run(engine, [Request("a", (1, 2), 120)])
    stats = engine.stats()
    assert stats.num_accepted > 20 and stats.num_steps < 110


def test_look_up_finds_the_longest_and_latest_match() -> None:
    drafter = LookupDrafter(longest=3, shortest=2)
    assert drafter.look_up([1, 2, 3, 9, 2, 3, 8, 2, 3], 2) == [8, 2]
    assert drafter.look_up([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], 2) == [9, 7], "the longer one wins"
    assert drafter.look_up([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]
    assert drafter.look_up([1, 2, 3], 4) == [] == drafter.look_up([1], 4)
    assert drafter.look_up([256, 1, 65536, 1, 256], 2) == [], "bytes of ids are not ids"


def test_a_stop_string_inside_accepted_drafts_cuts_there(tokenizer: Tokenizer) -> None:
    model = tiny_model(2, vocab_size=tokenizer.vocab_size).double()
    config = EngineConfig(cache_tokens=4096, max_running=64)
    params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=True, top_logprobs=1)
    with LLM.from_model(model, tokenizer, config=config) as llm:
        whole = llm.complete("Hello", params=params).text
        stops = sorted({whole[at : at + 2] for at in range(len(whole) - 1)})
        requests = [GenerateRequest("Hello", replace(params, stop=(stop,))) for stop in stops]
        expected = llm.generate_all(requests)
    with LLM.from_model(model, tokenizer, config=config) as llm:
        drafts = config.model_copy(update={"draft_tokens": 5})
        llm.driver.engine = Engine(model, drafts, num_ids=tokenizer.vocab_size, drafter=ModelDrafter(model))
        found = llm.generate_all(requests)
        assert llm.driver.engine.stats().num_accepted > 50
    assert len({len(one.token_ids) for one in expected}) > 10, "some stop at the first token of a step, some later"
    for ours, plain in zip(found, expected, strict=True):
        assert (ours.text, ours.token_ids, ours.finish_reason) == (plain.text, plain.token_ids, "stop")
        assert ours.usage.completion_tokens == len(ours.token_ids) == len(ours.logprobs) == len(ours.top_logprobs)


def test_drafting_that_fails_costs_nothing_but_speed() -> None:
    class Broken(LookupDrafter):
        def propose(self, wanted: object) -> list[list[int]]:
            raise RuntimeError("no idea")

    model = tiny_model(0)
    plain = run(Engine(model, SIZES["roomy"]), requests(0))
    engine = Engine(model, EngineConfig(cache_tokens=4096, draft_tokens=4), drafter=Broken())
    found = run(engine, requests(0))
    assert [list(one.generated) for one in found] == [list(one.generated) for one in plain]
    assert engine.stats().num_failed == 0


def saved(model: CausalLM, tokenizer: Tokenizer, folder: Path) -> Path:
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def test_a_draft_model_from_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = saved(tiny_model(2, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "target")
    small = saved(tiny_model(3, vocab_size=tokenizer.vocab_size, num_layers=1), tokenizer, tmp_path / "small")
    request = GenerateRequest("Hello", SamplingParams(max_tokens=30, ignore_eos=True))
    options = {"device": "cpu", "dtype": "float32", "config": EngineConfig(cache_tokens=1024)}
    with LLM(target, **options) as plain:  # type: ignore[arg-type]
        expected = plain.generate_all([request])[0]
    for draft in (small, target):
        with LLM(target, draft_model=draft, **options) as llm:  # type: ignore[arg-type]
            assert llm.generate_all([request])[0].token_ids == expected.token_ids
            assert llm.stats().num_drafted > 0
    assert llm.stats().num_accepted > 15
    other = from_merges([(b"a", b"b")], chat_template=CHAT_TEMPLATE)
    strange = saved(tiny_model(3, vocab_size=other.vocab_size), other, tmp_path / "strange")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        LLM(target, draft_model=strange, **options)  # type: ignore[arg-type]


def test_the_draft_models_cache_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puyu.engine.core._free_bytes", lambda device: 1 << 20)
    model, config = tiny_model(0), EngineConfig(draft_tokens=2, max_running=1000)
    alone = Engine(model, config).stats().num_blocks
    both = Engine(model, config, drafter=ModelDrafter(model)).stats().num_blocks
    assert alone // 2 == both
