"""JSONL -> conversations and preferences: torn lines counted, bad records named."""

import json

import pytest

from puyu.data.chats import read_conversations, read_preferences
from puyu.errors import InputError
from puyu.types import Message

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_conversations_with_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "environment", "content": "2", "name": "add"},
        {"role": "assistant", "content": "2"},
    ]
    records, torn = read_conversations(write(tmp_path / "a.jsonl", CHAT, {"messages": turns, "tools": [tool]}))
    assert not torn and [len(record.messages) for record in records] == [2, 4]
    assert records[1].messages[1].tool_calls[0].parsed() == {"a": 1}
    assert records[1].messages[2].role == "tool" and records[1].tools[0].name == "add"


def test_torn_lines_are_counted_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, '{"messages": [{"ro', CHAT)
    records, torn = read_conversations(path)
    assert len(records) == 2
    assert [(bad.path, bad.line) for bad in torn] == [(str(path), 2)]
    assert torn[0].offset == len(json.dumps(CHAT)) + 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"body": "x"}, "no known form has the fields body"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        (["x"], "must be a JSON object, not list"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, record, words):
    path = write(tmp_path / "a.jsonl", CHAT, record)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: .*" + words):
        read_conversations(path)


def test_a_file_without_records_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl holds no record \(1 torn lines\)"):
        read_conversations(write(tmp_path / "a.jsonl", "{"))
    with pytest.raises(InputError, match="no such file"):
        read_conversations(tmp_path / "b.jsonl")


def test_preferences_in_all_their_forms(tmp_path):
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "good"}
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user], "chosen": [answer], "rejected": {"content": "bad"}, "domain": "helpful"},
    )
    records, _ = read_preferences(path)
    for record in records:
        assert record.prompt.messages == (Message("user", "q"),)
        assert (record.chosen, record.rejected) == (Message("assistant", "good"), Message("assistant", "bad"))
    assert [record.domain for record in records] == ["default", "helpful"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "'chosen' must be text"),
        ({"rejected": []}, "'rejected' must hold exactly one message"),
        ({"chosen": {"role": "user", "content": "x"}}, "'chosen' must be text or an assistant message"),
        ({"prompt": 3}, "'prompt' must be text"),
    ],
)
def test_a_bad_preference_is_named(tmp_path, change, words):
    path = write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"} | change)
    with pytest.raises(InputError, match=r"line 1: .*" + words):
        read_preferences(path)
    with pytest.raises(InputError, match="needs the field 'rejected'"):
        read_preferences(write(path, {"prompt": "q", "chosen": "a"}))
