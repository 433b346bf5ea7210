"""Forms of preference sets: there and back is the same pair, what cannot be said is named, training reads them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.data.chats import read_preferences
from puyu.data.check import check, convert
from puyu.data.preferences import PREFERENCE_FORMS, form_named, form_of, is_preference, preference_of
from puyu.errors import ConfigError, InputError
from puyu.files import read_jsonl
from puyu.types import Conversation, Message, Part, Preference, ToolCall, ToolSpec
from tests.conftest import ROOT, puyu
from tests.data.test_formats import calls, messages, metadata, tools, turns, words, write

tricky = st.sampled_from(["\n\nHuman: x", "\n\nAssistant:", "\n", " a", "Human:", "\n\n"])
texts = tricky | words | st.just("")
answers = st.builds(Message, st.just("assistant"), texts) | st.builds(
    Message, st.just("assistant"), st.just(""), st.lists(calls, min_size=1, max_size=2).map(tuple)
)
plain = st.builds(Message, st.sampled_from(["user", "assistant", "user"]), texts)
asked = st.lists(messages, max_size=4) | st.lists(plain, min_size=1, max_size=3) | st.just([Message("user", "Hi")])
pairs = st.builds(
    Preference,
    st.builds(Conversation, asked.map(tuple), st.just(()) | tools, metadata),
    answers,
    answers | st.builds(Message, st.sampled_from(["user", "assistant"]), texts),
    st.sampled_from(["default", "harmless", ""]),
    st.sampled_from([0.0, 0.0, 1.0, 0.25]),
)


@given(pairs, st.sampled_from(PREFERENCE_FORMS))
def test_there_and_back_is_the_same_or_refused(pair: Preference, form: Any) -> None:
    try:
        record = form.write(pair)
    except InputError as error:
        assert "cannot express" in error.message
        return
    record = json.loads(json.dumps(record))
    assert is_preference(record) and form_of(record) is form
    assert form.read(record) == pair == preference_of(record)


@given(pairs)
def test_only_the_general_form_refuses_nothing_that_is_a_pair(pair: Preference) -> None:
    is_pair = pair.prompt.messages and pair.domain and pair.rejected.role == "assistant"
    for name in ("trl", "trl-implicit", "openai"):
        if is_pair:
            assert form_named(name).write(pair)
        else:
            with pytest.raises(InputError, match="cannot express"):
                form_named(name).write(pair)


USER, GOOD, BAD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, "No"
BAD_TURN = {"role": "assistant", "content": BAD}
FOUND: list[tuple[str, Mapping[str, Any]]] = [
    ("trl-text", {"prompt": "Hi", "chosen": "Hello", "rejected": BAD, "score_chosen": 2.0}),
    ("trl", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD_TURN]}),
    ("trl", {"prompt": [USER], "chosen": GOOD, "rejected": BAD}),
    ("trl-implicit", {"chosen": [USER, GOOD], "rejected": [USER, BAD_TURN]}),
    (  # UltraFeedback: the question, and both dialogues
        "trl",
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD_TURN], "messages": [USER, GOOD], "score": 8.5},
    ),
    ("hh", {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": BAD}),
    ("alpaca", {"instruction": "Hi", "output": ["Hello", BAD]}),
    (
        "openai",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD_TURN],
        },
    ),
]
PAIR = Preference(Conversation((Message("user", "Hi"),)), Message("assistant", "Hello"), Message("assistant", "No"))


@pytest.mark.parametrize(("name", "record"), FOUND)
def test_forms_as_they_are_found(name: str, record: Mapping[str, Any]) -> None:
    assert form_of(record).name == name and preference_of(record) == PAIR
    assert preference_of({**record, "domain": "harmless"}).domain == "harmless"


def test_dialogues_tools_and_history() -> None:
    said = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman:d\n\nAssistant: "
    pair = preference_of({"chosen": said + "e", "rejected": said})
    assert [message.text for message in pair.prompt.messages] == ["a\n\nb", "c", "d"]
    assert (pair.chosen.text, pair.rejected.text) == ("e", "")
    record = {"instruction": "x", "input": "y", "system": "s", "history": [["a", "b"]], "chosen": "1", "rejected": "2"}
    prompt = preference_of(record).prompt.messages
    assert [(m.role, m.text) for m in prompt[:1] + prompt[3:]] == [("system", "s"), ("user", "x\ny")]
    offered = '[{"name": "add", "parameters": {}}]'
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}
    shared = {"conversations": [{"from": "human", "value": "2+2?"}], "tools": offered, "system": "s"}
    pair = preference_of({**shared, "chosen": call, "rejected": {"from": "gpt", "value": "4"}})
    assert pair.chosen.tool_calls[0].parsed() == {"a": 2} and pair.prompt.tools[0].name == "add"
    assert [message.role for message in pair.prompt.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("record", "words_of_it"),
    [
        ({"prompt": "q", "chosen": "a"}, "needs the field 'rejected'"),
        ({"input": {}, "preferred_output": []}, "needs the field 'non_preferred_output'"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, GOOD]}, "differ before their last turn"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "'prompt' is not what stands before"),
        ({"prompt": [USER], "chosen": [], "rejected": [GOOD]}, "'chosen' must hold exactly one message.*none"),
        ({"chosen": GOOD, "rejected": GOOD}, "no turn before the answers"),
        ({"chosen": "Hello", "rejected": "No"}, "'chosen' must begin with two line ends"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "no turn before"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "the turn of the user"),
        ({"conversations": [], "chosen": "a", "rejected": "b"}, "'chosen' must be one turn"),
        ({"instruction": "a", "output": ["b"]}, "two answers, the better first, not 1"),
        ({"instruction": "a", "chosen": "b", "rejected": 3}, "'rejected' must be text, not int"),
        ({"input": "x", "preferred_output": [GOOD], "non_preferred_output": [GOOD]}, "'input' must be an object"),
        (
            {"input": {"messages": [USER]}, "preferred_output": [GOOD, GOOD], "non_preferred_output": [GOOD]},
            "'preferred_output' must hold exactly one message, not 2",
        ),
    ],
)
def test_what_is_wrong_is_named(record: Mapping[str, Any], words_of_it: str) -> None:
    with pytest.raises(InputError, match=words_of_it):
        preference_of(record)


CALL = Message("assistant", "", (ToolCall("add", "{}"),))
PICTURE = Message("user", (Part("image", "a.png"),))


@pytest.mark.parametrize(
    ("form", "change", "words_of_it"),
    [
        (
            "trl-text",
            {"prompt": Conversation((Message("system", "s"), Message("user", "q")))},
            "a prompt of the turns system, user",
        ),
        ("trl-text", {"chosen": CALL}, "calls of tools"),
        ("hh", {"prompt": Conversation((Message("system", "s"),))}, "a prompt of the turns system"),
        ("hh", {"chosen": Message("assistant", "a\n\nHuman: b")}, "a text that begins a turn"),
        ("hh", {"prompt": Conversation((Message("user", "q"),), (ToolSpec("add", ""),))}, "tools"),
        ("alpaca", {"chosen": CALL}, "calls of tools"),
        ("alpaca", {"prompt": Conversation((PICTURE,))}, "pictures"),
        ("sharegpt", {"prompt": Conversation((PICTURE,))}, "pictures"),
        ("sharegpt", {"rejected": Message("assistant", "a", CALL.tool_calls)}, "a call beside a text"),
        ("openai", {"rejected": Message("user", "a")}, "answers of others"),
        ("trl", {"prompt": Conversation(())}, "a pair without a prompt"),
    ],
)
def test_what_a_form_cannot_say(form: str, change: dict[str, Any], words_of_it: str) -> None:
    values = {"prompt": PAIR.prompt, "chosen": PAIR.chosen, "rejected": PAIR.rejected} | change
    with pytest.raises(InputError, match=f"form '{form}' cannot express {words_of_it}"):
        form_named(form).write(Preference(**values))


def test_names_of_forms() -> None:
    assert form_named("xtuner") is form_named("trl")
    with pytest.raises(ConfigError, match="'text' for preference pairs"):
        form_named("text")


def test_every_form_trains(tmp_path: Path) -> None:
    """What `puyu reward` reads: all forms in one file."""
    found, torn = read_preferences(write(tmp_path / "p.jsonl", *(record for _, record in FOUND)))
    assert found == [PAIR] * len(FOUND) and not torn


@pytest.mark.parametrize("name", [form.name for form in PREFERENCE_FORMS])
def test_the_sample_is_the_same_in_every_form(tmp_path: Path, name: str) -> None:
    """The pairs of one question, of several turns too where the form has them; those with tools where it has these."""
    kinds = {"trl-text": ({"user"},), "hh": ({"user", "assistant"},), "alpaca": ({"user", "assistant"},)}
    (allowed,) = kinds.get(name, ({"user", "assistant", *(() if name == "sharegpt" else ("tool", "system"))},))
    rows = [
        row
        for row in read_jsonl(ROOT / "samples" / "world" / "preference.jsonl.gz")
        if isinstance(row["prompt"], str) or {turn["role"] for turn in row["prompt"]} <= allowed
        if allowed > {"user"} or isinstance(row["prompt"], str) or len(row["prompt"]) == 1
        if "tool" in allowed or not row.get("tools")
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    expected = read_preferences(source)[0]
    assert convert(source, tmp_path / "b.jsonl", to=name) == len(expected) > 100
    assert read_preferences(tmp_path / "b.jsonl")[0] == expected
    assert {form_of(row).name for row in read_jsonl(tmp_path / "b.jsonl")} == {name}


def test_convert_and_its_errors(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", FOUND[0][1], FOUND[3][1])
    for suffix in (".csv", ".json", ".jsonl.zst"):
        middle = tmp_path / f"b{suffix}"
        assert convert(source, middle, to="alpaca") == 2
        assert convert(middle, tmp_path / "c.jsonl", to="trl") == 2
        assert read_preferences(tmp_path / "c.jsonl")[0] == [PAIR, PAIR]
    long = FOUND[3][1] | {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD_TURN]}
    with pytest.raises(
        InputError, match="line 2.*'trl-text' cannot express a prompt of the turns user, assistant, user"
    ):
        convert(write(tmp_path / "d.jsonl", FOUND[0][1], long), tmp_path / "e.jsonl", to="trl-text")
    with pytest.raises(InputError, match="line 2: a preference needs the field"):
        convert(write(tmp_path / "d.jsonl", FOUND[0][1], turns(("user", "a"))), tmp_path / "e.jsonl", to="trl")
    with pytest.raises(InputError, match="line 2: a preference pair among conversations"):
        both = write(tmp_path / "d.jsonl", turns(("user", "a"), ("assistant", "b")), FOUND[0][1])
        convert(both, tmp_path / "e.jsonl", to="sharegpt")
    with pytest.raises(ConfigError, match="'hh' is a form of preference pairs"):
        convert(write(tmp_path / "d.jsonl", turns(("user", "a"))), tmp_path / "e.jsonl", to="hh")
    assert not (tmp_path / "e.jsonl").exists()


def test_pairs_are_checked_in_their_form(tmp_path: Path) -> None:
    lost = {"prompt": "Hi", "chosen": "a\ufffd", "rejected": ""}
    torn = {"prompt": [USER, GOOD], "chosen": [{"role": "assistant", "content": "", "tool_calls": []}], "rejected": BAD}
    path = write(
        tmp_path / "p.jsonl", *(record for _, record in FOUND[:6]), lost, torn, {"chosen": "x", "rejected": "y"}
    )
    report = check(path)
    assert report.forms == {"trl-text pairs": 2, "trl pairs": 4, "trl-implicit pairs": 1, "hh pairs": 1}
    found = [(problem.line, problem.level, problem.text.partition(":")[0]) for problem in report.problems]
    assert found == [
        (7, "warning", "chosen"),
        (7, "warning", "rejected"),
        (8, "warning", "the prompt ends with a turn of the assistant"),
        (8, "warning", "chosen"),
        (9, "error", "field 'chosen' must begin with two line ends and 'Human"),
    ]
    assert check(path, form="openai").errors == 9 and check(path, form="text").errors == 9


def test_the_commands(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", FOUND[4][1])
    assert "1 records, hh" in puyu("data", "convert", source, tmp_path / "b.jsonl", "--to", "hh").stderr
    assert "(hh pairs 1)" in puyu("data", "check", tmp_path / "b.jsonl", "--form", "hh").stdout


@pytest.mark.parametrize("margin", ["2", True, -1, float("inf")])
def test_a_margin_is_a_number_from_zero(margin: Any) -> None:
    with pytest.raises(InputError, match="'margin' must be a number from 0"):
        preference_of({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": margin})
