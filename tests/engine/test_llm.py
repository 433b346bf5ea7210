"""`LLM` end to end on tiny real models: chat, streams, scores, shared weights, folders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puyu.engine.core import EngineConfig
from puyu.engine.llm import LLM
from puyu.errors import CheckpointError, InputError, RequestError
from puyu.model.checkpoint import save_model
from puyu.model.heads import CausalLM
from puyu.model.packed import PackedPlan
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import GenerateRequest, LanguageModel, Message, SamplingParams
from tests.engine.conftest import tiny_model

Build = Callable[[Sequence[int]], CausalLM]
SMALL = EngineConfig(cache_tokens=2048)


@pytest.fixture(scope="module")
def llm(tokenizer: Tokenizer) -> Iterator[LLM]:
    with LLM.from_model(tiny_model(2, vocab_size=tokenizer.vocab_size), tokenizer, config=SMALL) as llm:
        yield llm


def said(tokenizer: Tokenizer, script_model: Build, text: str, *, markers: bool = False) -> LLM:
    """A model that answers any chat with `text` and <|im_end|>."""
    start = tokenizer.encode("assistant\n")[-1]
    script = [start, *tokenizer.encode(text, special=markers), tokenizer.im_end_id]
    return LLM.from_model(script_model(script), tokenizer, config=SMALL)


def test_chat_stops_at_the_end_of_the_turn(tokenizer: Tokenizer, script_model: Build) -> None:
    completion = said(tokenizer, script_model, "我是浦语").chat("Who are you?")
    assert completion.text == "我是浦语" and completion.finish_reason == "stop"
    assert completion.token_ids[-1] == tokenizer.im_end_id and completion.raw_text == "我是浦语<|im_end|>"
    assert completion.usage.completion_tokens == len(completion.token_ids)


def test_stop_strings_cross_tokens_and_the_rest_is_not_generated(tokenizer: Tokenizer, script_model: Build) -> None:
    llm = said(tokenizer, script_model, "abcdefgh")
    completion = llm.chat([{"role": "user", "content": "?"}], stop=("de",), max_tokens=50)
    assert (completion.text, completion.finish_reason) == ("abc", "stop")
    assert tokenizer.decode(completion.token_ids) == "abcde"
    assert llm.stats().num_free_blocks == llm.stats().num_blocks
    assert llm.chat("?", stop=("de",), max_tokens=5).finish_reason == "stop", "found in the very last token"
    assert "".join(delta.text for delta in llm.stream_chat("?", stop=("de",))) == "abc"


def test_a_tool_call_comes_out_as_one(tokenizer: Tokenizer, script_model: Build) -> None:
    text = '<|action_start|><|plugin|>{"name":"f","parameters":{}}<|action_end|>'
    llm = said(tokenizer, script_model, text, markers=True)
    completion = llm.chat("?")
    assert completion.finish_reason == "tool_calls" and completion.text == ""
    assert [(call.name, call.parsed()) for call in completion.message.tool_calls] == [("f", {})]
    deltas = list(llm.stream_chat("?"))
    assert deltas[-1].tool_calls == completion.message.tool_calls and deltas[-1].finish_reason == "tool_calls"


PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.5, top_k=50, seed=2, stop=("e", "1")),
    SamplingParams(max_tokens=9, temperature=1.0, top_p=0.8, seed=3, logprobs=True),
]


@pytest.mark.parametrize("prompt", ["Hello", (Message("user", "你好"),)])
@pytest.mark.parametrize("params", PARAMS)
def test_stream_generate_and_blocking_agree(
    llm: LLM, prompt: str | tuple[Message, ...], params: SamplingParams
) -> None:
    request = GenerateRequest(prompt, params)
    completion = llm.generate_all([request])[0]
    assert isinstance(llm, LanguageModel)

    async def both() -> tuple[object, list[object]]:
        return await llm.generate(request), [delta async for delta in llm.stream(request)]

    generated, deltas = asyncio.run(both())
    # usage differs: the second run finds the prompt in the prefix cache
    assert replace(generated, usage=completion.usage, logprobs=()) == replace(completion, logprobs=())
    assert generated.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
    assert len(completion.logprobs) == (len(completion.token_ids) if params.logprobs else 0)
    assert "".join(delta.text for delta in deltas) == completion.text
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == completion.finish_reason
    assert deltas[-1].usage.completion_tokens == len(completion.token_ids)


def test_leaving_a_stream_early_gives_the_blocks_back(llm: LLM) -> None:
    stream = llm.stream_chat("Hi", max_tokens=60, ignore_eos=True)
    next(stream)
    stream.close()
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_one_bad_request_of_many_leaves_no_trace(llm: LLM) -> None:
    with pytest.raises(RequestError, match="top_p"):
        llm.generate_all([GenerateRequest("a"), GenerateRequest("b", SamplingParams(top_p=2.0))])
    assert llm.complete("Hello", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_max_tokens_is_capped_by_the_context(llm: LLM) -> None:
    completion = llm.complete("Hello", max_tokens=10_000, ignore_eos=True)
    assert completion.finish_reason == "length"
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 128


def test_a_vocabulary_padded_beyond_the_tokenizer_gives_only_known_ids(tokenizer: Tokenizer) -> None:
    model = tiny_model(4, vocab_size=tokenizer.vocab_size + 40)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] *= 30  # what is no token looks best
    with LLM.from_model(model, tokenizer, config=SMALL) as llm:
        for temperature in (0.0, 1.0):
            completion = llm.complete("Hello", max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
            assert completion.finish_reason == "length"
            assert max(completion.token_ids) < tokenizer.vocab_size


# ---- scores ----


def direct(llm: LLM, ids: list[int], num_scored: int) -> tuple[float, bool]:
    with torch.no_grad():
        rows = llm.model(torch.tensor(ids), torch.arange(len(ids)), PackedPlan.build((0,), len(ids)))
    picked = rows.log_softmax(-1)[-num_scored - 1 : -1]
    targets = torch.tensor(ids[-num_scored:])
    return float(picked.gather(-1, targets[:, None]).sum()), bool((picked.argmax(-1) == targets).all())


PAIRS = [
    ("Hello", " world"),
    ("", "Hello"),
    ("Hello ", "world"),
    ("我是", "浦语"),
    ("The answer is", " 84."),
    ("x" * 30, "语"),
]


def test_scores_equal_the_direct_computation(llm: LLM, tokenizer: Tokenizer) -> None:
    for (context, continuation), scored in zip(PAIRS, llm.score_all(PAIRS), strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        num_scored = len(whole) - 1 - len(tokenizer.encode(context.rstrip()))
        logprob, greedy = direct(llm, whole, num_scored)
        assert scored.logprob == pytest.approx(logprob, abs=1e-5 * num_scored)
        assert (scored.is_greedy, scored.num_tokens) == (greedy, num_scored)
        assert scored.num_bytes == len(continuation.encode())
    assert asyncio.run(llm.score(PAIRS)) == llm.score_all(PAIRS)
    assert llm.score_all([]) == []


def test_what_the_model_would_say_is_greedy_and_costs_what_it_says(tokenizer: Tokenizer, script_model: Build) -> None:
    llm = LLM.from_model(script_model(tokenizer.encode("Hello world")), tokenizer, config=SMALL)
    length = len(tokenizer.encode(" world"))
    completion = llm.complete("Hello", max_tokens=length, logprobs=True)
    assert completion.text == " world"
    said, other = llm.score_all([("Hello", " world"), ("Hello", " answer")])
    assert said.is_greedy and not other.is_greedy
    assert said.logprob == pytest.approx(sum(completion.logprobs), abs=1e-5 * length)


def test_a_long_context_is_cut_from_the_left(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    context = "语" * 100
    scored = llm.score_all([(context, "Hello")])[0]
    assert "1 of 1 contexts were cut" in caplog.text
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(context + "Hello")][-129:]
    assert scored.logprob == pytest.approx(direct(llm, ids, scored.num_tokens)[0], abs=1e-4)
    for pair, field in ((("a", ""), "continuation"), (("a", "语" * 100), "continuation")):
        with pytest.raises(RequestError) as caught:
            llm.score_all([pair])
        assert caught.value.param == field


# ---- weights ----


def test_weights_are_shared_and_training_can_go_on(tokenizer: Tokenizer) -> None:
    model = tiny_model(5, vocab_size=tokenizer.vocab_size)
    llm = LLM.from_model(model, tokenizer, config=SMALL)
    assert llm.model is model
    before = llm.complete("The answer is 84.", max_tokens=12, ignore_eos=True)
    tokens = torch.tensor(before.token_ids)
    loss = model(tokens, torch.arange(12), PackedPlan.build((0,), 12)).logsumexp(-1).sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-1.0)
    llm.reset_prefix_cache()
    after = llm.complete("The answer is 84.", max_tokens=12, ignore_eos=True)
    fresh = LLM.from_model(model, tokenizer, config=SMALL).complete("The answer is 84.", max_tokens=12, ignore_eos=True)
    assert after == fresh and after.token_ids != before.token_ids


def test_a_folder_answers_like_the_model_in_memory(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(llm.model, tmp_path)
    tokenizer.save(tmp_path)
    loaded = LLM(tmp_path, device="cpu", dtype="float32", config=SMALL)
    assert loaded.complete("Hello").token_ids == llm.complete("Hello").token_ids
    assert loaded.name == tmp_path.name


def test_slips_of_the_caller_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"no sampling parameter is called 'temprature'\n.*'temperature'"):
        llm.chat("Hi", temprature=1)
    for call in (lambda: llm.embed("one text"), lambda: llm.batch("one text")):
        with pytest.raises(RequestError, match=r"must be a list of texts, not one text\n.*\[text\]"):
            call()


def test_what_cannot_be_loaded_is_named(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        LLM(tmp_path / "nothing")
    with pytest.raises(InputError, match="tokenizer.json"):
        LLM(tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="the tokenizer has"):
        LLM.from_model(tiny_model(0), tokenizer)
    save_model(llm.model, tmp_path)
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}))
    with pytest.raises(CheckpointError, match="mystery"):
        LLM(tmp_path, device="cpu")


def test_a_batch_is_its_single_answers_and_tells_its_progress(llm: LLM) -> None:
    chats = ["Hello", [{"role": "user", "content": "你好"}], (Message("user", "84"),)]
    told: list[tuple[int, int]] = []
    found = llm.batch(chats, max_tokens=5, ignore_eos=True, progress=lambda done, total: told.append((done, total)))
    assert [one.token_ids for one in found] == [
        llm.chat(chat, max_tokens=5, ignore_eos=True).token_ids for chat in chats
    ]
    assert told == [(1, 3), (2, 3), (3, 3)]
    texts = ["Hello", "the answer"]
    plain = llm.batch(texts, plain=True, max_tokens=5, ignore_eos=True)
    assert [one.token_ids for one in plain] == [
        llm.complete(text, max_tokens=5, ignore_eos=True).token_ids for text in texts
    ]
    assert llm.batch([]) == []
    with pytest.raises(RequestError, match="top_p"):
        llm.batch(texts, top_p=2.0)
    assert not llm.driver.has_work


def test_plain_text_streams(llm: LLM) -> None:
    whole = llm.complete("Hello", max_tokens=9, ignore_eos=True)
    deltas = list(llm.stream_text("Hello", max_tokens=9, ignore_eos=True))
    assert "".join(delta.text for delta in deltas) == whole.text and deltas[-1].finish_reason == "length"


def test_beams_and_several_answers_also_through_the_event_loop(llm: LLM) -> None:
    requests = [
        GenerateRequest("Hello", SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=1, ignore_eos=True)),
        GenerateRequest("Hello", SamplingParams(max_tokens=6, n=2, beam_width=3, ignore_eos=True)),
    ]
    expected = llm.generate_all(requests)

    async def run() -> list[list[str]]:
        found = await asyncio.gather(*(llm.generate(request) for request in requests))
        streamed = [[delta async for delta in llm.stream(request)] for request in requests]
        for answer, deltas in zip(found, streamed, strict=True):
            for index, choice in enumerate(answer.choices):
                assert "".join(delta.text for delta in deltas if delta.index == index) == choice.text
        return [[choice.raw_text for choice in answer.choices] for answer in found]

    assert asyncio.run(run()) == [[choice.raw_text for choice in answer.choices] for answer in expected]
