"""Messages in OpenAI's form, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.errors import InputError
from puyu.types import Conversation, Message, Part, ToolCall, ToolSpec

calls = st.builds(ToolCall, st.text(min_size=1), st.text(), st.text())
parts = st.lists(st.builds(Part, st.sampled_from(["text", "image", "audio"]), st.text()), max_size=3).map(tuple)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.text() | parts,
    tool_calls=st.lists(calls, max_size=2).map(tuple),
    tool_call_id=st.text(),
    name=st.text(),
)


@given(messages)
def test_message_round_trip(message):
    assert Message.from_openai(message.to_openai()) == message


def test_environment_is_the_tool_role_and_arguments_may_be_an_object():
    value = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    assert Message.from_openai(value).tool_calls[0].parsed() == {"x": 1}
    assert Message.from_openai({"role": "environment", "content": "4"}).role == "tool"


def test_text_leaves_pictures_out():
    message = Message("user", (Part("text", "a"), Part("image", "u"), Part("text", "b")))
    assert message.text == "ab"


@pytest.mark.parametrize("arguments", ["{", "[1]", "3"])
def test_bad_arguments_name_the_tool(arguments):
    with pytest.raises(InputError, match="'f'"):
        ToolCall("f", arguments).parsed()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"role": "bot"}, "unknown role 'bot'"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": [{"type": "video"}]}, "content part"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool call"),
    ],
)
def test_bad_messages_say_what_is_wrong(value, named):
    with pytest.raises(InputError, match=named):
        Message.from_openai(value)


def test_conversation_round_trip():
    spec = ToolSpec("f", "does", {"type": "object", "properties": {"x": {"type": "number"}}})
    conversation = Conversation((Message("user", "q"), Message("assistant", "a")), (spec,), {"source": "s"})
    assert Conversation.from_openai(conversation.to_openai()) == conversation
    with pytest.raises(InputError, match="messages"):
        Conversation.from_openai({})
