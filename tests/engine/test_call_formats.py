"""Formats of tool calls: which one a tokenizer speaks, the grammar that forces it, the prompt that explains it."""

from __future__ import annotations

import json

import pytest

from puyu.engine.calls import CallFormat, pick_format, react_messages
from puyu.engine.constrain import Compiler
from puyu.errors import ConfigError, RequestError
from puyu.tokenizer.template import CHAT_TEMPLATE
from puyu.tokenizer.tokenizer import Tokenizer, hf_config
from puyu.types import Guide, Message, ToolCall, ToolSpec
from tests.engine.call_texts import BETWEEN, FORMATS, TOKENIZER, WRITTEN, read, write

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
REFERS = {"$ref": "#/$defs/Where", "$defs": {"Where": {**PARAMETERS, "dependentSchemas": {"city": {}}}}}
TOOLS = (
    ToolSpec("weather", "", PARAMETERS),
    ToolSpec('wet"ü', "", REFERS),
    ToolSpec("wea", ""),
    ToolSpec("any", "", {}),
)
STOPS = frozenset(TOKENIZER.stop_ids)
COMPILER = Compiler(TOKENIZER)


def allows(format: CallFormat, text: str, *, several: bool = False) -> bool:
    """Whether a grammar lets a model write the text; after it, and nowhere before, the model may stop."""
    guide = Guide("grammar", format.grammar(TOOLS, several=several))
    matcher = COMPILER.compile(guide, stop_ids=STOPS).deep_copy()
    for id in TOKENIZER.encode(text, special=format.name == "internlm2"):
        may_end = matcher.is_accepting()
        if not matcher.consume_token(id):
            return False
        assert several or not may_end
    bits = matcher.compute_bitmask()
    return matcher.is_accepting() and all(bits[id // 8] >> (id % 8) & 1 for id in STOPS)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_grammar_forces_calls(name: str) -> None:
    format = FORMATS[name]
    good = [
        ToolCall("weather", '{"city": "Oslo", "days": 3}'),
        ToolCall("weather", '{"city":"{\\"}"}'),
        ToolCall('wet"ü', '{\n  "city": "浦"\n}'),
        ToolCall("wea", '{"any": [{}]}'),
        ToolCall("wea", "{}"),
    ]
    bad = [
        ToolCall("other", "{}"),
        ToolCall("weathe", "{}"),
        ToolCall("weather", "{}"),
        ToolCall("weather", '{"city": 3}'),
        ToolCall("weather", '{"city": "Oslo", "days": "3"}'),
        ToolCall("weather", '{"city": "Oslo", "more": 3}'),
        ToolCall('wet"ü', '{"city": 3}'),
        ToolCall("wea", "3"),
        ToolCall("any", "3"),
        ToolCall("wea", '{"a":' + 100 * " " + "1}"),
    ]
    for call in good:
        text = write(name, call)
        assert allows(format, text), text
        assert allows(format, text, several=True), text
        assert read(name, text) == ("", (call,))
        assert not allows(format, text + BETWEEN[name] + text)
        assert allows(format, text + BETWEEN[name] + text, several=True)
        assert not allows(format, text + "x", several=True) and not allows(format, "x" + text)
    for call in bad:
        assert not allows(format, write(name, call), several=True), call


def with_template(template: str | None, *special: str) -> Tokenizer:
    """The same words with another template, and these special tokens in the place of words nobody needs."""
    text = TOKENIZER.json_text
    for old, new in zip(("<|reward|>", "<|interpreter|>"), special, strict=False):
        text = text.replace(old, new)
    return Tokenizer(text, {**hf_config(""), "chat_template": template})


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_tokens_are_forced_as_tokens(special: bool) -> None:
    """Qwen's tags are added tokens that are not special."""
    data = json.loads(with_template("<tool_call>", "<tool_call>", "</tool_call>").json_text)
    for token in data["added_tokens"]:
        token["special"] = special or not token["content"].endswith("tool_call>")
    tokenizer = Tokenizer(json.dumps(data), {**hf_config(""), "chat_template": "<tool_call>"})
    format = pick_format(tokenizer)
    assert format.markers == ({"<tool_call>", "</tool_call>"} if special else set())
    for several in (False, True):
        guide = Guide("grammar", format.grammar(TOOLS, several=several))
        matcher = Compiler(tokenizer).compile(guide, stop_ids=STOPS).deep_copy()
        ids = tokenizer.encode(write("hermes", ToolCall("wea", "{}")), special=True)
        assert ids[0] == tokenizer.token_id("<tool_call>") and ids[-1] == tokenizer.token_id("</tool_call>")
        assert not matcher.deep_copy().consume_token(TOKENIZER.encode("<")[0])
        assert all(matcher.consume_token(id) for id in ids) and matcher.is_accepting()


def test_llama3_may_be_forced_with_its_tag() -> None:
    tokenizer = with_template("<|python_tag|>", "<|python_tag|>")
    format = pick_format(tokenizer)
    guide = Guide("grammar", format.grammar(TOOLS, several=False))
    for text in ('<|python_tag|>{"name": "wea", "parameters": {}}', '{"name": "wea", "parameters": {}}'):
        matcher = Compiler(tokenizer).compile(guide, stop_ids=STOPS).deep_copy()
        assert all(matcher.consume_token(id) for id in tokenizer.encode(text, special=True)) and matcher.is_accepting()


def test_a_grammar_that_cannot_be() -> None:
    with pytest.raises(RequestError, match="no tool"):
        FORMATS["hermes"].grammar((), several=True)
    with pytest.raises(RequestError, match="cannot be made") as caught:
        FORMATS["none"].grammar(TOOLS, several=True)
    assert caught.value.param == "tool_choice"
    with pytest.raises(RequestError, match="'f' are not JSON"):
        FORMATS["hermes"].grammar((ToolSpec("f", "", {"a": object()}),), several=True)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHAT_TEMPLATE, "internlm2"),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
        ('{{ tools }} "parameters" <|eot_id|>', "llama3"),
        ('{{ tools }} "parameters"', "none"),
        ("{{ messages }} tool", "react"),
    ],
)
def test_the_template_shows_the_format(template: str, wanted: str) -> None:
    assert pick_format(with_template(template)).name == wanted
    assert pick_format(with_template(template), "react").name == "react"


def test_a_format_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="known: auto, internlm2, hermes"):
        pick_format(TOKENIZER, "xml")
    with pytest.raises(ConfigError, match="no token"):
        pick_format(Tokenizer(TOKENIZER.json_text.replace("<|plugin|>", "<|x|>"), hf_config("")), "internlm2")


def test_react_prompts_a_template_without_tools() -> None:
    history = (
        Message("system", "Be kind."),
        Message("user", "1+1 and 2+2?"),
        Message("assistant", "I add.", tool_calls=(ToolCall("add", '{"a": 1}', "c0"), ToolCall("add", "", "c1"))),
        Message("tool", "2", tool_call_id="c0"),
        Message("tool", "4", tool_call_id="c1"),
        Message("user", "Well?"),
        Message("assistant", "2 and 4."),
    )
    messages, tools = FORMATS["react"].prompt(history, (ToolSpec("add", "Adds."),))
    assert tools == () and messages == react_messages(history, (ToolSpec("add", "Adds."),))
    assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0].text.startswith("Be kind.\n\n") and '"description": "Adds."' in messages[0].text
    written = 'Thought: I add.\nAction: add\nAction Input: {"a": 1}\nAction: add\nAction Input: {}'
    assert messages[2] == Message("assistant", written)
    assert messages[3] == Message("user", "Observation: 2\nObservation: 4\nWell?")
    assert read("react", messages[2].text) == ("I add.", tuple(ToolCall("add", a) for a in ('{"a": 1}', "{}")))
    assert read("react", messages[4].text) == ("2 and 4.", ())


def test_other_prompts_are_left_alone() -> None:
    history = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert react_messages(history, ()) == history
    assert react_messages(history, TOOLS)[0].role == "system"
    assert FORMATS["hermes"].prompt(history, TOOLS) == (history, TOOLS)
