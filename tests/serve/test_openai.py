"""The official `openai` client talks to the server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from puyu.engine.llm import LLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.tools.calculate import calculator
from tests.serve.conftest import CALL, NAME

TOOLS = [calculator.spec.to_openai()]
WHO = [{"role": "user", "content": "Who are you?"}]
SUM = [{"role": "user", "content": "12*7?"}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=WHO, temperature=0, seed=1)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == NAME
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "I am 浦语.", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_limits_stops_and_logprobs(client: openai.OpenAI) -> None:
    cut = client.chat.completions.create(model=NAME, messages=WHO, max_completion_tokens=4).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("I am", "length")
    stopped = client.chat.completions.create(model=NAME, messages=WHO, stop=["am"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("I ", "stop")
    known = client.chat.completions.create(model=NAME, messages=WHO, logprobs=True, max_tokens=3).choices[0]
    assert known.logprobs is not None and known.logprobs.content is not None
    assert "".join(row.token for row in known.logprobs.content) == "I a"
    assert all(-0.5 < row.logprob <= 0 for row in known.logprobs.content)


def test_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=NAME, messages=WHO, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "I am 浦语."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert sum(c.choices[0].finish_reason is not None for c in chunks if c.choices) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    whole = client.chat.completions.create(model=NAME, messages=WHO).usage
    assert whole is not None and chunks[-1].usage.completion_tokens == whole.completion_tokens
    assert len({c.id for c in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)


def test_stream_without_usage(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=NAME, messages=WHO, stream=True))
    assert all(c.choices and c.usage is None for c in chunks)


def test_tool_call_and_its_answer(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=NAME, messages=SUM, tools=TOOLS, tool_choice="auto").choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    (call,) = first.message.tool_calls or []
    assert (call.type, call.function.name, call.function.arguments) == ("function", CALL.name, CALL.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": calculator.call(json.loads(call.function.arguments))}
    messages = [*SUM, first.message.model_dump(exclude_none=True), result]
    last = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS).choices[0]
    assert (last.message.content, last.finish_reason, last.message.tool_calls) == ("It is 84.", "stop", None)


def test_streamed_tool_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=NAME, messages=SUM, tools=TOOLS) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    (call,) = final.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == (CALL.name, CALL.arguments)
    whole = client.chat.completions.create(model=NAME, messages=SUM, tools=TOOLS).choices[0].message.tool_calls or []
    assert call.id == whole[0].id != ""


SHOUT = {
    "type": "function",
    "function": {
        "name": "shout",
        "parameters": {
            "type": "object",
            "properties": {"loud": {"type": "boolean"}, "word": {"enum": ["hey", "ho"]}},
            "required": ["loud", "word"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("seed", range(4))
def test_forced_calls_fit_the_schema_streamed_or_not(client: openai.OpenAI, seed: int) -> None:
    wanted = {
        "model": NAME,
        "messages": WHO,
        "tools": [*TOOLS, SHOUT],
        "temperature": 1.5,
        "seed": seed,
        "max_tokens": 200,
    }
    named = {"type": "function", "function": {"name": "shout"}}
    answer = client.chat.completions.create(**wanted, tool_choice=named).choices[0]
    (call,) = answer.message.tool_calls or []
    found = json.loads(call.function.arguments)
    assert call.function.name == "shout" and found["word"] in ("hey", "ho") and isinstance(found["loud"], bool)
    assert answer.finish_reason == "tool_calls"
    with client.chat.completions.stream(**wanted, tool_choice=named) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.id, streamed.function.arguments) == (call.id, call.function.arguments)
    assert kinds.count("tool_calls.function.arguments.delta") > 3, "the arguments come piece by piece"
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice, parallel in (("required", False), (only, True)):
        calls = client.chat.completions.create(
            **wanted, tool_choice=choice, parallel_tool_calls=parallel
        ).choices[0].message.tool_calls or []  # fmt: skip
        assert calls and (parallel or len(calls) == 1)
        assert all(call.function.name == "shout" or choice == "required" for call in calls)


def test_a_tool_whose_schema_cannot_be_followed_is_named(client: openai.OpenAI) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"multipleOf": 1.23456789}}}}
    tools = [{"type": "function", "function": function}]
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=WHO, tools=tools, tool_choice="required")
    assert bad.value.param == "tools" and "multipleOf" in str(bad.value)


def test_a_form_and_a_forced_call_exclude_each_other(client: openai.OpenAI) -> None:
    form = {"type": "json_object"}
    with pytest.raises(openai.BadRequestError) as both:
        client.chat.completions.create(
            model=NAME, messages=WHO, tools=TOOLS, tool_choice="required", response_format=form
        )
    assert both.value.param == "tool_choice"


def test_with_tools_and_a_form_the_answer_is_a_call_or_has_the_form(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "color", "schema": {"enum": ["red", "blue"]}}}
    wanted = {"model": NAME, "tools": TOOLS, "response_format": form, "max_tokens": 120}
    called = client.chat.completions.create(messages=SUM, **wanted).choices[0]
    (call,) = called.message.tool_calls or []
    assert json.loads(call.function.arguments) == json.loads(CALL.arguments)
    never = {str(tokenizer.action_start_id): -100.0}
    formed = client.chat.completions.create(messages=WHO, logit_bias=never, **wanted).choices[0]
    assert formed.finish_reason == "stop" and json.loads(formed.message.content or "") in ("red", "blue")


def test_tool_choice_none_offers_no_tools(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=NAME, messages=SUM, max_tokens=4)
    none = client.chat.completions.create(model=NAME, messages=SUM, tools=TOOLS, tool_choice="none", max_tokens=4)
    assert none.usage is not None and plain.usage is not None
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


def test_completions(client: openai.OpenAI) -> None:
    one = client.completions.create(model=NAME, prompt="one two", max_tokens=5, temperature=0)
    assert one.choices[0].finish_reason == "length" and one.usage is not None and one.usage.completion_tokens == 5
    two = client.completions.create(model=NAME, prompt=["one two", "I am"], max_tokens=5, temperature=0, logprobs=1)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text
    assert two.choices[0].logprobs is not None and len(two.choices[0].logprobs.tokens or []) == 5
    streamed = client.completions.create(model=NAME, prompt="one two", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_errors_are_of_the_right_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=WHO, max_tokens=-1)
    assert bad.value.param == "max_tokens" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=NAME, messages=WHO, extra_body={"temprature": 1})
    assert unknown.value.param == "temprature" and "did you mean 'temperature'" in str(unknown.value)
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-99", messages=WHO)
    assert missing.value.code == "model_not_found" and NAME in str(missing.value)
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "word " * 2000}], stream=True)
    assert long.value.param == "messages"


def test_several_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=WHO, n=3, temperature=1.0, seed=5, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = client.chat.completions.create(
        model=NAME, messages=WHO, n=3, temperature=1.0, seed=5, max_tokens=6, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, usage = ["", "", ""], None
    for chunk in again:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]
    assert usage is not None and answer.usage is not None
    assert usage.completion_tokens == answer.usage.completion_tokens and usage.prompt_tokens > 0


def test_log_probabilities_with_alternatives_streamed_or_not(client: openai.OpenAI) -> None:
    wanted = {"model": NAME, "messages": WHO, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    whole = client.chat.completions.create(**wanted).choices[0].logprobs
    assert whole is not None and whole.content is not None and len(whole.content) == 5
    for row in whole.content:
        assert len(row.top_logprobs) == 3 and row.top_logprobs[0].logprob == row.logprob
        assert row.top_logprobs[0].token == row.token and bytes(row.bytes or ()).decode("utf-8", "replace") == row.token
    rows = []
    for chunk in client.chat.completions.create(**wanted, stream=True):
        for choice in chunk.choices:
            rows += (choice.logprobs.content or []) if choice.logprobs else []
    assert [row.token for row in rows] == [row.token for row in whole.content]
    assert [row.logprob for row in rows] == pytest.approx([row.logprob for row in whole.content], abs=1e-4)


def test_structured_output_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model=NAME, messages=WHO, temperature=1.5, seed=seed, max_tokens=80, response_format=form
        )
        found = json.loads(answer.choices[0].message.content or "")
        assert found["color"] in ("red", "blue") and 0 <= found["count"] <= 9 and len(found) == 2
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    chosen = client.chat.completions.create(model=NAME, messages=WHO, extra_body=extra).choices[0].message.content
    assert chosen in ("yes", "no")


def test_completions_of_several_prompts_in_one_stream(client: openai.OpenAI) -> None:
    wanted = {"model": NAME, "prompt": ["one two", "I am"], "n": 2, "max_tokens": 5, "temperature": 1.0, "seed": 1}
    whole = client.completions.create(**wanted)
    texts = [""] * 4
    for chunk in client.completions.create(**wanted, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) > 1
    assert whole.usage is not None and whole.usage.completion_tokens == 20


def test_echo_gives_likelihoods_of_the_prompt(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model=NAME, prompt="one two three", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "one two three" and choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == "one two three"
    assert sum(choice.logprobs.token_logprobs or []) == pytest.approx(llm.score_all([("", "one two three")])[0].logprob)
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    longer = client.completions.create(model=NAME, prompt="one two", max_tokens=3, echo=True, n=2).choices
    assert all(choice.text.startswith("one two") and len(choice.text) > 7 for choice in longer)
    best = client.completions.create(model=NAME, prompt="one", max_tokens=4, n=1, best_of=4, temperature=1.0, seed=2)
    assert len(best.choices) == 1


def test_embeddings(client: openai.OpenAI, llm: LLM) -> None:
    texts = ["one two", "three", "浦语"]
    plain = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    packed = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64 and unpacks it
    expected = llm.embed(texts)
    for index in range(3):
        assert plain.data[index].embedding == pytest.approx(expected[index], abs=1e-5)
        assert packed.data[index].embedding == pytest.approx(expected[index], abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 3
    ids = llm.driver.front.text_ids("three")
    again = client.embeddings.create(model=NAME, input=[ids]).data[0].embedding
    assert again == pytest.approx(expected[1], abs=1e-5)


def test_one_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-99")


def test_the_code_of_a_long_prompt(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "word " * 2000}])
    assert long.value.code == "context_length_exceeded"


# -- the responses API ------------------------------------------------------------------------------------------


FLAT = [{"type": "function", **TOOLS[0]["function"]}]


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=NAME, input="Who are you?")
    assert (answer.status, answer.output_text, answer.store) == ("completed", "I am 浦语.", False)
    assert answer.usage is not None and answer.usage.total_tokens > 10
    listed = client.responses.create(
        model=NAME, input=[{"role": "user", "content": "Who are you?"}], max_output_tokens=4
    )
    assert (listed.status, listed.output_text) == ("incomplete", "I am")
    assert listed.incomplete_details is not None and listed.incomplete_details.reason == "max_output_tokens"
    form = {"type": "json_schema", "name": "color", "schema": {"enum": ["red", "blue"]}}
    formed = client.responses.create(model=NAME, input="Who are you?", text={"format": form})
    assert json.loads(formed.output_text) in ("red", "blue")


def test_a_tool_call_and_its_answer_by_responses(client: openai.OpenAI) -> None:
    first = client.responses.create(model=NAME, input="12*7?", tools=FLAT)
    (call,) = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", CALL.name, CALL.arguments)
    items = [
        {"role": "user", "content": "12*7?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "84"},
    ]
    last = client.responses.create(model=NAME, input=items, tools=FLAT)
    assert last.output_text == "It is 84."


def test_tool_choice_by_responses(client: openai.OpenAI) -> None:
    flat = {"type": "function", **SHOUT["function"]}
    named = {"type": "function", "name": "shout"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    for choice in (named, allowed):
        answer = client.responses.create(
            model=NAME, input="Who are you?", tools=[*FLAT, flat], tool_choice=choice, max_output_tokens=200
        )
        assert {call.name for call in answer.output} == {"shout"}


def test_streamed_responses(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=NAME, input="Who are you?", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text == "I am 浦语."
    with client.responses.stream(model=NAME, input="12*7?", tools=FLAT) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in seen
    (call,) = final.output
    assert (call.name, call.arguments) == (CALL.name, CALL.arguments)
    cut = list(client.responses.create(model=NAME, input="Who are you?", stream=True, max_output_tokens=2))
    assert cut[-1].type == "response.incomplete"
