"""Judged answers: every way to write one is the same answer; what is wrong is named by its field."""

import json

import pytest

from puyu.data.chats import read_judged
from puyu.data.check import check
from puyu.data.judged import is_judged, judged_of
from puyu.errors import InputError

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
WAYS = {
    "trl": {"prompt": [ASKED], "completion": [SAID], "label": True},
    "trl text": {"prompt": "Hi", "completion": "Hello!", "label": True},
    "openai": {"messages": [ASKED, SAID], "label": True},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
        "kto_tag": True,
    },
    "alpaca": {"instruction": "Hi", "output": "Hello!", "kto_tag": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_same_answer(way):
    assert judged_of(WAYS[way]) == judged_of(WAYS["trl"]) and is_judged(WAYS[way])
    [one] = judged_of({**WAYS[way], **dict.fromkeys(WAYS[way].keys() & {"label", "kto_tag"}, False)})
    assert not one.good and one.answer.text == "Hello!"


def test_a_pair_is_two_answers():
    good, bad = judged_of({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})
    assert (good.answer.text, good.good) == ("Hello!", True) and (bad.answer.text, bad.good) == ("No.", False)
    assert good.prompt == bad.prompt and not is_judged({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "Hi", "completion": "Hello!"}, "'label'"),
        ({"prompt": "Hi", "completion": "Hello!", "label": "yes"}, "'label' must be true"),
        ({"prompt": "Hi", "completion": 3, "label": True}, "'completion'"),
        ({"completion": "Hello!", "label": True}, "'prompt'"),
        ({"messages": [ASKED], "label": True}, "last turn is of the user"),
        ({"messages": [SAID], "label": True}, "a prompt before it"),
        ({"messages": [], "label": True}, "there is none"),
    ],
)
def test_what_is_wrong_is_named(record, what):
    with pytest.raises(InputError, match=what):
        judged_of(record)


def test_files_are_checked_and_read(tmp_path):
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in WAYS.values()))
    report = check(path)
    assert report.errors == 0 and report.forms["judged answers"] == len(WAYS)
    found, torn = read_judged(path)
    assert len(found) == len(WAYS) and not torn
    path.write_text(json.dumps({"prompt": "Hi", "completion": "x", "label": 2}) + "\n")
    assert [problem.line for problem in check(path).problems] == [1]
    with pytest.raises(InputError, match="line 1"):
        read_judged(path)


def test_json_and_csv_are_read_like_jsonl(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([WAYS["trl"], WAYS["openai"]]))
    assert len(read_judged(tmp_path / "a.json")[0]) == 2
    from puyu.data.chats import read_conversations

    (tmp_path / "a.csv").write_text("question,answer\nHi,Hello!\n")
    [talk], _ = read_conversations(tmp_path / "a.csv")
    assert [message.text for message in talk.messages] == ["Hi", "Hello!"]
