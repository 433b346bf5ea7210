"""The official `openai` client talks to the server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

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
