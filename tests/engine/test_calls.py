"""Tool calls: what is read never depends on the pieces, and calls come back as they were written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from puyu.agent.react import read_turn
from puyu.engine.calls import join_calls
from puyu.tokenizer.chat import parse, render
from puyu.tokenizer.tokenizer import StreamDecoder
from puyu.types import CallPart, Conversation, Message, ToolCall
from tests.engine.call_texts import BETWEEN, FORMATS, TOKENIZER, WRITTEN, Read, feed, joined, read, write

LABELS = ("action input", "final answer", "observation", "thought")

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"),
    *("<|python_tag|>", "<", "<|", "</tool", "<tool", "{", "}", "[", "]", '"', "\\", '\\"', "\\ud83d", "\n", " ", "\t"),
    *('"name"', '"arguments"', '"parameters"', '"type"', '"f"', ": ", ", ", "1", "null", ";", '"{\\"a\\": 1}"'),
    *("```", "```json\n", "`", "Thought: ", "Action: f", "Action: ", "Action Input: ", "Final Answer: "),
    *("Observation: 3", "Action", "action input ：", "x", "浦", "\nAction: f\nAction Input: ", '{"a": 1}'),
    *(
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "g", "parameters": {}}',
        '{"arguments": {"b": [2]}, "name": "h"}',
    ),
]

texts = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["</tool_call>", '"}', "a\\", "```", "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    st.dictionaries(st.text(), values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 2]),
)
calls = st.builds(ToolCall, st.from_regex(r"[A-Za-z_][\w.-]{0,8}", fullmatch=True), objects)
words = st.text("ab<{浦 \n:", max_size=12).map(lambda text: text.strip())


@pytest.mark.parametrize("name", FORMATS)
@given(text=texts, places=st.lists(st.integers(0, 400), max_size=8), several=st.booleans())
@example("Action: ```json\n ]x\nAction: f", [], True)
@settings(max_examples=150, deadline=None)
def test_the_pieces_do_not_matter(name: str, text: str, places: list[int], several: bool) -> None:
    whole = read(name, text, several=several)
    assert read(name, text, places, several=several) == whole
    assert read(name, text, range(len(text)), several=several) == whole


@pytest.mark.parametrize("name", ["hermes", "hermes-marked", "llama3", "none"])
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_no_text_is_lost_where_there_is_no_call(name: str, text: str) -> None:
    content, found = read(name, text)
    assert content == text if not found else len(content) < len(text)


@pytest.mark.parametrize("name", WRITTEN)
@given(before=words, wanted=st.lists(calls, min_size=1, max_size=3), after=words, places=st.lists(st.integers(0, 400)))
@settings(max_examples=100, deadline=None)
def test_calls_come_back_as_they_were_written(
    name: str, before: str, wanted: list[ToolCall], after: str, places: list[int]
) -> None:
    assume(not any(marker in call.arguments for marker in FORMATS[name].markers for call in wanted))
    before = "" if name == "llama3" else before
    written = BETWEEN[name].join(write(name, call) for call in wanted)
    text = before + ("\n" if before else "") + written + ("\n" + after if after else "")
    kept = (before + "\n" if before and name == "internlm2" else before) + ("\n" + after if after else "")
    assume(name != "llama3" or not after.startswith("{"))  # which may become another call
    assert read(name, text, places) == (kept, tuple(wanted))


@pytest.mark.parametrize("name", WRITTEN)
@given(call=calls)
@settings(max_examples=50, deadline=None)
def test_arguments_are_given_as_soon_as_they_are_written(name: str, call: ToolCall) -> None:
    before = write(name, replace(call, arguments="\0")).partition("\0")[0]
    reader = FORMATS[name].reader()
    assert joined(feed(reader, FORMATS[name], before)) == ("", (ToolCall(call.name, ""),))
    given = ""
    for end in range(1, len(call.arguments) + 1):
        parts = reader.push(call.arguments[end - 1])
        given += "".join(part.arguments for part in parts if isinstance(part, CallPart))
        missing = call.arguments[len(given) : end]
        is_label = any(label.startswith(missing.strip(" ").lower()) for label in LABELS)
        assert given + missing == call.arguments[:end]
        assert not missing or (name == "react" and is_label)
    assert given == call.arguments


@given(text=st.text("<tool_cal> \nx浦", max_size=30))
@example("a <tool_call <tool_cal")
@settings(max_examples=200, deadline=None)
def test_text_is_held_back_only_while_it_may_become_a_call(text: str) -> None:
    if "<tool_call>" in text:
        return
    reader, shown = FORMATS["hermes"].reader(), ""
    for at, char in enumerate(text):
        shown += "".join(map(str, reader.push(char)))
        held = text[len(shown) : at + 1]
        assert text.startswith(shown) and "<tool_call>".startswith(held.lstrip(" \n"))
    assert shown + "".join(map(str, reader.close())) == text


@pytest.mark.parametrize("name", ["internlm2", "hermes"])
def test_the_name_comes_before_the_arguments(name: str) -> None:
    reader = FORMATS[name].reader()
    for marker in WRITTEN[name].partition("\n")[0].replace("><", ">\0<").split("\0"):
        assert reader.marker(marker) == []
    assert reader.push('\n{"name": "f') == []
    assert reader.push('", "') == [CallPart(0, name="f")]
    key = "parameters" if name == "internlm2" else "arguments"
    assert reader.push(key + '": {"a": [1') == [CallPart(0, '{"a": [1')]
    assert reader.push("]}}") == [CallPart(0, "]}")]


A1 = '{"a": 1}'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ToolCall("f", A1)),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ToolCall("f", A1)),
        ('<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>', ToolCall("f", A1)),
        ('<tool_call>{"name": "f", "arguments": "hello"}</tool_call>', ToolCall("f", '"hello"')),
        (
            '<tool_call>{"id": 3, "name": "f", "x": {"name": "g"}, "arguments": {"a": 1} }</tool_call>',
            ToolCall("f", A1),
        ),
        ('<tool_call>{"name": "f"}</tool_call>', ToolCall("f", "{}")),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', ToolCall("f", "null")),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', ToolCall("f", A1)),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>', ToolCall("f", A1)),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_ca', ToolCall("f", A1)),
        ('<tool_call>{"name": "f", "arguments": {"a": [1', ToolCall("f", '{"a": [1')),
        ('<tool_call>{"name": "f", "arguments": {"a": "1</tool_call>', ToolCall("f", '{"a": "1</tool_call>')),
        ('<tool_call>{"name": "f", "arguments": {"a": "1\n</tool_call>', ToolCall("f", '{"a": "1\n')),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', ToolCall("f", '{"a": 1')),
        ('<tool_call>{"name": "f", "arguments": x{"a": 1}}</tool_call>', ToolCall("f", 'x{"a": 1}')),
        (
            '<tool_call>{"name": "f", "arguments": ["\n", "</tool_call>"]}</tool_call>',
            ToolCall("f", '["\n", "</tool_call>"]'),
        ),
        ('<tool_call>{"name": "f", "argum', ToolCall("f", '{"name": "f", "argum')),
        ('<tool_call>{"name": "f\\ud83d", "arguments": {}}</tool_call>', ToolCall("f?", "{}")),
    ],
)
def test_hermes_in_other_shapes(text: str, wanted: ToolCall) -> None:
    for places in ((), range(len(text))):
        assert read("hermes", "Hi. \n" + text, places) == ("Hi.", (wanted,))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>hello</tool_call>",
        "a\n<tool_call>\n\n[1]</tool_call> b \n",
        '<tool_call>{"x": 1}</tool_call>',
        '<tool_call>{"x": 1',
        '<tool_call>{"name": 3, "arguments": {}</tool_call>',
        "<tool_call> ",
        "</tool_call>",
        " <tool_",
        " \n ",
    ],
)
@pytest.mark.parametrize("name", ["hermes", "hermes-marked"])
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    assert read(name, text) == (text, ())


def test_a_call_may_follow_a_broken_one() -> None:
    whole = write("hermes", ToolCall("f", A1))
    assert read("hermes", "<tool_call>" + whole) == ("<tool_call>", (ToolCall("f", A1),))
    unclosed = whole.removesuffix("</tool_call>")
    assert read("hermes", "a \n" + unclosed + " Done.") == ("a\n Done.", (ToolCall("f", A1),))
    assert read("hermes", whole + "\n \n") == ("", (ToolCall("f", A1),))
    assert read("hermes", unclosed + whole + "\nDone.\n") == ("\nDone.\n", (ToolCall("f", A1),) * 2)


def test_only_the_first_call_where_one_is_wanted() -> None:
    first, second = ToolCall("f", A1), ToolCall("g", "{}")
    for name in WRITTEN:
        text = BETWEEN[name].join([write(name, first), write(name, second)]) + "more"
        assert read(name, text, range(len(text)), several=False) == ("", (first,)), name
    reader = FORMATS["hermes"].reader(several=False)
    reader.push(write("hermes", first)[:-1])
    assert not reader.is_over and reader.num_calls == 1
    reader.push(">")
    assert reader.is_over
    assert reader.push("x") == reader.marker("<tool_call>") == reader.close() == []


@pytest.mark.parametrize(
    ("text", "content", "wanted"),
    [
        ('{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}', "", ("f", "g")),
        (' <|python_tag|>{"type": "function", "name": "f", "parameters": {}};\n', "", ("f",)),
        ('<|python_tag|>{"name": "f"}', "", ("f",)),
        ('{"name": "f"}', '{"name": "f"}', ()),
        ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', ()),
        ('{"answer": {"name": "f", "parameters": {}}}', '{"answer": {"name": "f", "parameters": {}}}', ()),
        ('Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', ()),
        ('{"name": "f", "parameters": {}}; and {}', "; and {}", ("f",)),
        ('{"name": "f", "para', '{"name": "f", "para', ()),
        ("", "", ()),
    ],
)
def test_llama3(text: str, content: str, wanted: tuple[str, ...]) -> None:
    for name in ("llama3", "llama3-marked"):
        shown, calls = read(name, text)
        assert (shown, tuple(call.name for call in calls)) == (content, wanted)


def test_llama3_shows_other_json_at_once() -> None:
    reader = FORMATS["llama3"].reader()
    assert reader.push('{"answer') == []
    assert reader.push('": 4') == ['{"answer": 4']


def test_llama3_code_is_text_without_its_marker() -> None:
    assert read("llama3-marked", "<|python_tag|>print(1)") == ("print(1)", ())
    assert read("llama3", "<|python_tag|>print(1)") == ("<|python_tag|>print(1)", ())


REACT = [
    'Thought: I add.\nAction: calculator\nAction Input: {"a": 1}\n',
    'I add.\nACTION: `calculator`\naction input： {"a": "Action: x"}\nObservation: 2\nThought: so',
    "Thought: a\nb\nAction: f\nAction Input: ```json\n{\n}\n```",
    "Thought: a\nAction:\nf\nAction Input: 1 + 1\n",
    "Action: f\nAction Input: [1,\n 2]\nObservation: 3",
    "Action: f\nObservation: 3",
    "Action: f",
    "Thought: ```\nAction: g\n```\nAction: f\nAction Input: {}",
    "Final Answer: It is\n84.\nObservation: 3",
    "Just text, no Action: f",
]


@pytest.mark.parametrize("text", REACT)
def test_react_is_what_the_agent_reads(text: str) -> None:
    turn = read_turn(text)
    for places in ((), range(len(text))):
        content, calls = read("react", text, places)
        assert content.strip() == turn.text
        assert calls == tuple(replace(call, id="") for call in turn.calls)


def test_react_ends_at_an_observation() -> None:
    reader = FORMATS["react"].reader()
    assert reader.push("Action: f\nAction Input: x\nObserv") == [CallPart(0, name="f")]
    assert reader.push("ation:") == [CallPart(0, "x")] and reader.is_over
    reader = FORMATS["react"].reader()
    reader.push('Action: f\nAction Input: {"a": "```"}\nObservation:')
    assert reader.is_over
    assert FORMATS["react"].stops == ("Observation:",)


def test_react_keeps_text_that_is_no_action() -> None:
    assert read("react", "Thought: a\nAction: \nFinal Answer: b") == ("a\nAction: \nb", ())
    assert read("react", "Action: f\nfoo \n") == ("foo \n", (ToolCall("f", "{}"),))
    assert read("react", "Final Answer: a\nAction: f\nAction Input: {}\n") == ("a\nAction: f\nAction Input: {}\n", ())
    assert read("react", "Action Input: 3") == ("Action Input: 3", ())
    assert read("react", 'Action: f\nAction Input: {"a": 1\nThought: b')[1] == (ToolCall("f", '{"a": 1\n'),)


def by_ids(ids: Sequence[int]) -> Read:
    """As the engine reads: ids through a decoder, special tokens to the reader where it wants them."""
    format, decoder = FORMATS["internlm2"], StreamDecoder(TOKENIZER, skip_special=True)
    names = {TOKENIZER.token_id(name): name for name in format.markers}
    reader, pieces = format.reader(), []
    for id in ids:
        pieces += reader.marker(names[id]) if id in names else reader.push(decoder.push(id))
    return joined(pieces + reader.push(decoder.flush()) + reader.close())


@given(content=st.text(max_size=20), wanted=st.lists(calls, max_size=3))
@settings(max_examples=100, deadline=None)
def test_internlm2_is_what_parse_reads(content: str, wanted: list[ToolCall]) -> None:
    message = Message("assistant", content, tool_calls=tuple(wanted))
    rendered = render(Conversation((Message("user", ""), message)), TOKENIZER)
    ids = [id for id, loss in zip(rendered.ids, rendered.loss, strict=True) if loss][:-1]
    assert parse(ids, TOKENIZER) == message
    assert by_ids(ids) == (content, message.tool_calls)


@pytest.mark.parametrize(
    "text",
    [
        "<|action_start|><|interpreter|>\n```python\nprint(1)\n```\n<|action_end|>Done.",
        "<|action_start|><|interpreter|>\n{1}\n<|action_end|>",
        "<|action_start|><|interpreter|>",
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": [1',
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": 1',
        '<|action_start|><|plugin|>\n{"name": "f", "param',
        '<|action_start|><|plugin|>\n{"name": "f"}<|action_end|>',
        '<|action_start|><|plugin|>\n{"parameters": {"a": 1}}<|action_end|>',
        '<|action_start|><|plugin|>\n{"parameters": {"a": 1}, "name": "f"}<|action_end|>',
        '<|action_start|>{"name": "f", "arguments": {}}<|action_end|>',
        "<|action_start|><|plugin|>\nhello {}\n<|action_end|>",
        "<|action_start|><|plugin|><|action_end|>a",
        "a<|action_start|><|action_end|><|action_end|><|plugin|>b",
        '<|action_start|><|plugin|><|action_start|>{"name": "f", "parameters": {}}<|action_end|>',
    ],
)
def test_internlm2_in_other_shapes_is_what_parse_reads(text: str) -> None:
    ids = TOKENIZER.encode(text, special=True)
    wanted = parse(ids, TOKENIZER)
    assert by_ids(ids) == (wanted.text, wanted.tool_calls)


@given(call=calls, place=st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_internlm2_cut_anywhere_is_still_the_call(call: ToolCall, place: int) -> None:
    ids = TOKENIZER.encode("Hi.<|action_start|><|plugin|>", special=True)
    ids += TOKENIZER.encode(
        write("internlm2", call).removeprefix("<|action_start|><|plugin|>").removesuffix("<|action_end|>")
    )
    ids = ids[: 5 + place % (len(ids) - 5)]
    wanted = parse(ids, TOKENIZER)
    content, (found,) = by_ids(ids)
    given = wanted.tool_calls[0]
    assert (content, found.name) == (wanted.text, given.name)
    assert given.arguments in found.arguments


def test_parts_of_calls_are_joined() -> None:
    parts = [CallPart(0, name="f", id="a"), CallPart(0, "{"), CallPart(0, "}"), CallPart(1, name="g", id="b")]
    assert join_calls(parts) == (ToolCall("f", "{}", "a"), ToolCall("g", "", "b"))
