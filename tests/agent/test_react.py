"""The text form of ReAct: what counts as an action, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puyu.agent.react import Turn, read_turn
from puyu.types import ToolCall


def call(name: str, arguments: str) -> tuple[ToolCall, ...]:
    return (ToolCall(name, arguments, "call_0_0"),)


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("Thought: x\nAction: t\nAction Input: {}", Turn("x", call("t", "{}"))),
        ("plain first\nAction: `t`\nAction Input: {}\n", Turn("plain first", call("t", "{}"))),
        ("action: t\naction input: {}", Turn("", call("t", "{}"))),
        ("Action：t\nAction Input：{}", Turn("", call("t", "{}"))),
        ("Action: t", Turn("", call("t", "{}"))),
        ('Action: t\nAction Input: ```json\n{"a": 1}\n```', Turn("", call("t", '{"a": 1}'))),
        (
            'Action: t\nAction Input: {"a":\n 1}\nObservation: made up\nFinal Answer: 3',
            Turn("", call("t", '{"a":\n 1}')),
        ),
        ("Final Answer: 42", Turn("42", final=True)),
        ("Thought: I know\nFinal Answer: two\nlines", Turn("two\nlines", final=True)),
        ("Final Answer: 1\nAction: t\nAction Input: {}", Turn("1", final=True)),
        ("The words Action: t stand in a line", Turn("The words Action: t stand in a line")),
        ("```\nAction: t\nAction Input: {}\n```", Turn("```\nAction: t\nAction Input: {}\n```")),
        ("", Turn("")),
    ],
)
def test_turns(text: str, turn: Turn) -> None:
    assert read_turn(text) == turn


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:", "\n", "```", "{", "x"]
        )
    )
)
def test_any_text_is_read(pieces: list[str]) -> None:
    turn = read_turn("".join(pieces))
    assert not (turn.final and turn.calls)
    assert all(item.name for item in turn.calls)
