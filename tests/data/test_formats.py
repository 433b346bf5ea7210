"""Forms of fine-tuning sets: there and back is the same, what cannot be said is named, every finding has its line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.check import check, convert, lines_of
from puyu.data.formats import FORMS, form_named, form_of
from puyu.errors import ConfigError, InputError
from puyu.types import Conversation, Message, Part, ToolCall, ToolSpec
from tests.conftest import puyu

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
texts = st.just("") | words
metadata = st.dictionaries(st.sampled_from(["source", "license"]), words, max_size=2)
calls = st.builds(ToolCall, words, st.just('{"a": 1}') | texts, texts)
messages = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts) | st.builds(
    Message, st.just("assistant"), texts, st.lists(calls, min_size=1, max_size=2).map(tuple)
)
tools = st.lists(st.builds(ToolSpec, words, texts), max_size=2).map(tuple)
anything = st.builds(Conversation, st.lists(messages, max_size=5).map(tuple), tools, metadata)


@given(
    anything | st.builds(Conversation, st.lists(messages, max_size=1).map(tuple), tools, metadata),
    st.sampled_from(FORMS),
)
def test_there_and_back_is_the_same_or_refused(conversation: Conversation, form: Any) -> None:
    try:
        record = form.write(conversation)
    except InputError as error:
        assert "cannot express" in error.message
        return
    record = json.loads(json.dumps(record))
    assert form_of(record) is form and form.read(record) == conversation


PAIRS: list[tuple[str, Mapping[str, Any], list[tuple[str, str]]]] = [
    ("openai", {"messages": [{"role": "environment", "content": "4", "name": "calc"}]}, [("tool", "4")]),
    (
        "sharegpt",
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes")],
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add.\n1 2"), ("assistant", "3")],
    ),
    (
        "xtuner",
        {"conversation": [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    ("xtuner", {"conversation": [{"input": "", "output": "text alone"}]}, [("assistant", "text alone")]),
    ("text", {"text": "Once upon a time"}, [("assistant", "Once upon a time")]),
]


@pytest.mark.parametrize(("name", "record", "expected"), PAIRS)
def test_forms_as_they_are_found(name: str, record: Mapping[str, Any], expected: list[tuple[str, str]]) -> None:
    form = form_of(record)
    assert form.name == name == form_named(name).name
    assert [(message.role, message.content) for message in form.read(record).messages] == expected


def test_calls_in_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    offered = '[{"name": "add", "description": "adds", "parameters": {}}]'
    found = form_named("sharegpt").read({"conversations": turns, "tools": offered})
    assert found.tools[0].name == "add"
    assert found.messages[1].tool_calls[0].parsed() == {"a": 2, "b": 2} and found.messages[2].role == "tool"


@pytest.mark.parametrize(
    ("record", "words_of_it"),
    [
        ({"conversations": [{"from": "nobody", "value": "x"}]}, r"conversations\[0\]: unknown speaker 'nobody'"),
        ({"conversations": "x"}, "'conversations' must be a list"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "'value' must be text"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "not JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "name and arguments"),
        ({"conversations": [], "tools": "{"}, "tools: not JSON"),
        ({"conversations": [], "tools": [3]}, "'tools' must be a list"),
        ({"instruction": None, "output": "x"}, "'instruction' must be text"),
        ({"instruction": "a", "output": "x", "history": [["a"]]}, "history"),
        ({"conversation": [{"input": "a", "output": "b", "output_with_loss": "no"}]}, "output_with_loss"),
        ({"conversation": [{"input": "a", "output": "b"}, {"system": "s", "input": "", "output": ""}]}, "first turn"),
        ({"text": "x", "metadata": "web"}, "'metadata' must be an object"),
        ({"messages": [], "metadata": [1]}, "'metadata' must be an object"),
        ({"messages": [], "tools": "[]"}, "'tools' must be a list of objects"),
        ({"messages": [], "tools": [{"function": 3}]}, "a tool needs a name"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "'tool_calls' must be a list of objects"),
        ({"body": "x"}, "no known form has the fields body"),
    ],
)
def test_what_is_wrong_is_named(record: Mapping[str, Any], words_of_it: str) -> None:
    with pytest.raises(InputError, match=words_of_it):
        form_of(record).read(record)


def test_pictures_have_no_place_in_most_forms() -> None:
    picture = Conversation((Message("user", (Part("image", "a.png"),)), Message("assistant", "A cat.")))
    assert form_named("openai").read(form_named("openai").write(picture)) == picture
    for name in ("sharegpt", "alpaca", "xtuner"):
        with pytest.raises(InputError, match="pictures"):
            form_named(name).write(picture)
    with pytest.raises(ConfigError, match="one of: openai"):
        form_named("nothing")


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def turns(*rows: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in rows]}


def test_every_finding_has_its_line(tmp_path: Path) -> None:
    good = turns(("user", "Hi"), ("assistant", "Hello"))
    calls = turns(("user", "2+2?"), ("assistant", ""))
    calls["messages"][1]["tool_calls"] = [{"function": {"name": "add", "arguments": "{"}}]
    calls["tools"] = [{"name": "sub"}]
    path = write(
        tmp_path / "a.jsonl",
        *(good, b'{"messages": [', turns(("user", "Hi")), good, turns(("robot", "x")), [1]),
        turns(("user", "a"), ("user", "<|im_end|>"), ("assistant", "")),
        turns(("user", "a"), ("assistant", "b\ufffd"), ("system", "c")),
        *(turns(("tool", "4"), ("assistant", "b")), calls, {"body": 1}),
    )
    report = check(path)
    found = [(problem.line, problem.level, problem.text) for problem in report.problems]
    assert [(line, level) for line, level, _ in found if level == "error"] == [
        (line, "error") for line in (2, 3, 5, 6, 10, 11)
    ]
    expected = {
        2: "", 3: "nothing to learn", 4: "same as line 1", 5: "unknown role", 6: "must be an object", 9: "to no call",
        10: "not JSON", 11: "no known form",
    }  # fmt: skip
    for line, text in expected.items():
        assert any(text in finding for at, _, finding in found if at == line), (line, text)
    assert sorted(text.partition(": ")[2][:9] for line, _, text in found if line == 7) == [
        "<|im_end|",
        "empty",
        "two turns",
    ]
    assert len([line for line, _, _ in found if line == 8]) == 3
    assert any("not on offer" in text for _, _, text in found)
    assert report.records == 11 and report.errors == 6
    assert lines_of(report, limit=2)[-2].startswith("  and ") and "6 errors" in lines_of(report)[-1]


def test_preferences_are_checked(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    path = write(tmp_path / "p.jsonl", good, good | {"rejected": "Hello"}, good | {"prompt": 3})
    report = check(path)
    assert [(problem.line, problem.level) for problem in report.problems] == [(2, "error"), (3, "error")]
    assert report.forms == {"trl-text pairs": 2}


def test_csv_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('Prompt,Response,system\n"Say\nhi","Hi, ""you""",Be kind\nshort\n', encoding="utf-8-sig")
    report = check(path)
    assert report.forms == {"alpaca": 1} and [(p.line, p.level) for p in report.problems] == [(4, "error")]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="name two of them"):
        check(path)
    (tmp_path / "a.json").write_text('[{"text": "one"}, 3]')
    report = check(tmp_path / "a.json")
    assert report.forms == {"text": 1} and [p.line for p in report.problems] == [2]
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="list of records"):
        check(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv"])
def test_one_form_as_another_and_back(tmp_path: Path, suffix: str) -> None:
    rows = [{"instruction": f"ask {n}", "input": "", "output": f'say "{n}"\n'} for n in range(5)]
    source = write(tmp_path / "a.jsonl", *rows)
    middle, back = tmp_path / f"b{suffix}", tmp_path / "c.jsonl"
    assert convert(source, middle, to="alpaca" if suffix == ".csv" else "sharegpt") == 5
    assert convert(middle, back, to="alpaca") == 5
    assert [json.loads(line) for line in back.read_text().splitlines()] == rows


def test_what_cannot_be_said_stops_before_anything_is_written(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", turns(("user", "a"), ("assistant", "b")), turns(("assistant", "b"), ("user", "a"))
    )
    with pytest.raises(InputError, match="line 2.*cannot express turns in the order assistant, user"):
        convert(source, tmp_path / "b.jsonl", to="alpaca")
    long = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    with pytest.raises(InputError, match="no place for history"):
        convert(write(tmp_path / "c.jsonl", long), tmp_path / "b.csv", to="alpaca")
    with pytest.raises(InputError, match=r"line 1 \(byte 0\)"):
        convert(write(tmp_path / "d.jsonl", b"{"), tmp_path / "b.jsonl", to="openai")
    assert not (tmp_path / "b.jsonl").exists() and not (tmp_path / "b.csv").exists()


def test_the_commands(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    done = puyu("data", "convert", source, tmp_path / "b.json", "--to", "sharegpt")
    assert "1 records" in done.stderr + done.stdout
    assert puyu("data", "check", tmp_path / "b.json").stdout.splitlines()[-1] == "  nothing is wrong"
    write(source, {"instruction": 3})
    done = puyu("data", "check", source, check=False)
    assert done.returncode == 1 and "line 1: error" in done.stdout


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_a_turn_may_be_left_out_of_the_loss(flag: dict[str, Any]) -> None:
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    record = {"messages": [asked, {**said, **flag}, asked, {**said, "weight": 1}]}
    found = form_named("openai").read(record)
    assert [message.learned for message in found.messages] == [True, False, True, True]
    written = form_named("openai").write(found)
    assert [message.get("weight") for message in written["messages"]] == [None, 0, None, None]
    assert form_named("openai").read(written) == found
    in_xtuner = form_named("xtuner").write(found)
    assert [turn.get("output_with_loss") for turn in in_xtuner["conversation"]] == [False, None]
    assert form_named("xtuner").read(in_xtuner) == found
    for form in ("sharegpt", "alpaca"):
        with pytest.raises(InputError, match="turns that are not learned"):
            form_named(form).write(found)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "assistant", "content": "x", "weight": 0.5}, r"messages\[1\]\.weight must be true or false"),
        ({"role": "user", "content": "x", "loss": True}, "only what the assistant says is learned"),
    ],
)
def test_a_wrong_mark_is_named(message: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        form_named("openai").read({"messages": [{"role": "assistant", "content": "y"}, message]})
    quiet = {"role": "user", "content": "x", "loss": False}
    assert form_named("openai").read({"messages": [quiet]}).messages[0].learned
