"""Validation by field; text, stops and tool calls read from ids token by token."""

from __future__ import annotations

import random
from typing import Any

import pytest

from puyu.engine.front import Front, as_messages
from puyu.engine.reader import Reader
from puyu.engine.request import Request, Running
from puyu.errors import RequestError
from puyu.tokenizer.chat import render, render_prompt
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.types import Conversation, GenerateRequest, Guide, Message, Part, SamplingParams, ToolCall

BAD_PARAMS: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("seed", 0.5),
    ("stop", ("",)),
    ("stop", ("a",) * 17),
    ("stop", ["a"]),
    ("stop_token_ids", (10**6,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", 2),
    ("min_p", 1.5),
    ("min_tokens", 300),
    ("repetition_penalty", 0),
    ("presence_penalty", float("nan")),
    ("frequency_penalty", "1"),
    ("logit_bias", {10**6: 1.0}),
    ("logit_bias", {5: float("inf")}),
    ("bad_words", ("",)),
    ("n", 0),
    ("n", 1000),
    ("best_of", -1),
    ("beam_width", 99),
    ("top_logprobs", 51),
    ("guide", "yes|no"),
    ("guide", Guide("xml", "<a/>")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("field", "value"), BAD_PARAMS)
def test_a_bad_parameter_is_named(tokenizer: Tokenizer, field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        Front(tokenizer, context=64).prepare(GenerateRequest("Hello", SamplingParams(**{field: value})))
    assert caught.value.param == field


def test_a_bad_prompt_is_named(tokenizer: Tokenizer) -> None:
    front = Front(tokenizer, context=16)
    cases: list[tuple[str | tuple[Message, ...], str]] = [
        ("long " * 40, "prompt"),
        ((), "messages"),
        ((Message("user", "long " * 40),), "messages"),
        ((Message("user", "a"), Message("user", (Part("image", "x.png"),))), "messages[1].content"),
    ]
    for prompt, field in cases:
        with pytest.raises(RequestError) as caught:
            front.prepare(GenerateRequest(prompt))
        assert caught.value.param == field
    with pytest.raises(RequestError, match="unknown role"):
        as_messages([{"role": "wizard", "content": "hi"}])


def test_bad_limits_and_combinations_are_named(tokenizer: Tokenizer) -> None:
    front = Front(tokenizer, context=64)
    cases = [
        (GenerateRequest("a", timeout=0.0), "timeout"),
        (GenerateRequest("a", queue_timeout=float("nan")), "queue_timeout"),
        (GenerateRequest("a", priority=1.5), "priority"),  # type: ignore[arg-type]
        (GenerateRequest("a", adapter="poet"), "adapter"),
        (GenerateRequest("a", SamplingParams(n=3, best_of=2)), "best_of"),
        (GenerateRequest("a", SamplingParams(beam_width=2, n=3)), "n"),
        (GenerateRequest("a", SamplingParams(beam_width=2, temperature=1.0)), "beam_width"),
        (GenerateRequest("a", SamplingParams(beam_width=2, stop=("x",))), "beam_width"),
    ]
    for request, field in cases:
        with pytest.raises(RequestError) as caught:
            front.prepare(request)
        assert caught.value.param == field


def test_several_answers_have_seeds_of_their_own_and_one_leader(tokenizer: Tokenizer) -> None:
    first, *others = Front(tokenizer, context=64).prepare(GenerateRequest("a", SamplingParams(n=2, best_of=4, seed=5)))
    assert first.params.seed == 5 and not first.leader and first.params.logprobs
    assert len({request.params.seed for request in (first, *others)}) == 4 == len({r.id for r in (first, *others)})
    assert {request.leader for request in others} == {first.id}


def test_prompts_become_ids(tokenizer: Tokenizer) -> None:
    front = Front(tokenizer, context=200)
    (text,) = front.prepare(GenerateRequest("Hi <|im_end|>", SamplingParams(max_tokens=500)))
    assert text.prompt_ids[0] == tokenizer.bos_id
    assert tokenizer.im_end_id not in text.prompt_ids, "text cannot forge a marker"
    assert text.max_tokens == 200 - len(text.prompt_ids)
    assert text.stop_ids == set(tokenizer.stop_ids)
    (chat,) = front.prepare(GenerateRequest(as_messages("Hi"), SamplingParams(ignore_eos=True, stop_token_ids=(7,))))
    assert list(chat.prompt_ids) == render_prompt([Message("user", "Hi")], (), tokenizer)
    assert chat.stop_ids == {7} and chat.id != text.id


def read(
    tokenizer: Tokenizer, ids: list[int], *, stop: tuple[str, ...] = (), chat: bool = True
) -> tuple[list[str], Reader]:
    request = Request("r", (1,), 999, SamplingParams(stop=stop), frozenset(tokenizer.stop_ids))
    front = Front(tokenizer, context=1000)
    prompt = (Message("user", "?"),) if chat else "?"
    reader = front.reader(GenerateRequest(prompt), request)
    pieces = []
    for id in ids:
        pieces.append(reader.push(id).text)
        if reader.stopped:
            break
    return [*pieces, reader.close().text], reader


def written(ids: list[int]) -> Running:
    """A request that has given these ids."""
    running = Running(Request("r", (1,), 999), 0)
    running.tokens += ids
    return running


def test_no_character_is_ever_torn(tokenizer: Tokenizer) -> None:
    text = "一个模型 🎉 naïve 浦语"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "the test needs characters of several tokens"
    for end in range(len(ids) + 1):
        pieces, reader = read(tokenizer, ids[:end])
        shown = "".join(pieces)
        assert "\ufffd" not in shown and text.startswith(shown) and reader.text == shown
    assert shown == text


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_cut_as_if_the_whole_text_were_known(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(["ab", "a", "b", "aab", "语", "\n", "<"]) for _ in range(30))
    stops = tuple("".join(rng.choice("ab语\n") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(4)))
    ids = [id for char in text for id in tokenizer.encode(char)]
    pieces, reader = read(tokenizer, ids, stop=stops)
    # naive twin: the stop string that is complete first (the earliest beginning among those) cuts the text
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(begin for end, begin in ends if end == min(ends)[0])] if ends else text
    assert "".join(pieces) == reader.text == expected
    assert reader.stopped == bool(ends)
    for count in range(len(pieces)):
        assert expected.startswith("".join(pieces[:count])), "nothing is shown that is taken back later"


def test_text_is_held_back_only_while_it_may_become_a_stop(tokenizer: Tokenizer) -> None:
    ids = [id for char in "xyEND" for id in tokenizer.encode(char)]
    pieces, _ = read(tokenizer, ids[:4], stop=("END",))
    assert pieces == ["x", "y", "", "", "EN"]


def test_tool_calls_are_read_and_their_text_is_not_shown(tokenizer: Tokenizer) -> None:
    calls = (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"))
    turn = Message("assistant", "Let me see: 浦", tool_calls=calls)
    rendered = render(Conversation((Message("user", "?"), turn)), tokenizer)
    ids = [id for id, loss in zip(rendered.ids, rendered.loss, strict=True) if loss]
    pieces, reader = read(tokenizer, ids)
    completion = reader.completion(written(ids), reason="stop")
    assert "".join(pieces) == completion.text == "Let me see: 浦"
    assert completion.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in completion.message.tool_calls] == [("f", '{"a": 1}'), ("g", "{}")]
    assert len({call.id for call in completion.message.tool_calls}) == 2
    assert "<|action_start|><|plugin|>" in completion.raw_text and completion.raw_text.endswith("<|im_end|>")
    again = reader.completion(written(ids), reason="stop")
    assert again.message == completion.message, "ids of calls are the same in every run"
    cut = reader.completion(written(ids[:-8]), reason="length")
    assert cut.finish_reason == "length"
    _, plain = read(tokenizer, ids, chat=False)
    assert "parameters" in plain.text and not plain.completion(written(ids), reason="stop").message.tool_calls
