"""Scores against what a careful reader would say."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from puyu.errors import InputError
from puyu.eval.sample import Output, Sample
from puyu.eval.scorers import bits_per_byte, check, choice, keywords, number, numeric, same_number, script
from puyu.types import Message, Scored, ToolCall


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 + 30 = 42", 42),
        ("The answer is 42.", 42),
        ("答案是42。", 42),
        ("12加30等于42", 42),
        ("结果为：４２", 42),
        ("12 + 30 = 42, which took me 3 steps", 42),
        ("It is 1,234,567.5 in all", "1234567.5"),
        ("7 - 12 = -5", -5),
        ("7 - 12 = −5", -5),
        ("3-5", 5),
        ("about .5", "0.5"),
        ("1.5e3", 1500),
        ("The answer is 4\nno, the answer is 6", 6),
        ("the 2nd of the 3rd", None),
        ("I do not know, sorry, ...", None),
        ("", None),
        ("42元", 42),
        ("1e99999999999 is big", None),
    ],
)
def test_number(text: str, value: object) -> None:
    assert number(text) == (None if value is None else Decimal(str(value)))


def test_same_number_allows_a_rounded_quotient_and_nothing_more() -> None:
    assert same_number(Decimal("0.333333333333"), Decimal(1) / Decimal(3))
    assert not same_number(Decimal("0.3333"), Decimal(1) / Decimal(3))
    assert same_number(Decimal("42.0"), Decimal("42"))
    assert not same_number(Decimal("NaN"), Decimal("NaN"))


def say(text: str = "", *calls: ToolCall) -> Message:
    return Message("assistant", text, tool_calls=calls)


def calc(expression: str, name: str = "calculator") -> ToolCall:
    return ToolCall(name, f'{{"expression": "{expression}"}}')


def test_check_gives_the_fraction_of_conditions() -> None:
    wanted = {"all_of": [["Puyu", "浦语"], ["small"]], "none_of": ["GPT", "Claude"], "max_chars": 40, "language": "en"}
    assert check(say("I am puyu, a small model."), wanted) == 1.0
    assert check(say("I am puyu, a model."), wanted) == 4 / 5
    assert check(say("I am GPT, a small model."), wanted) == 3 / 5
    assert check(say("我是浦语，一个 small 模型"), wanted) == 4 / 5
    assert check(say("I am puyu, a small model. " * 3), wanted) == 4 / 5


def test_check_of_a_tool_call_looks_at_the_value_of_the_first() -> None:
    wanted = {"tool": {"name": "calculator", "expression_value": 84}}
    assert check(say("", calc("12 * 7")), wanted) == 1.0
    assert check(say("", calc("7*12")), wanted) == 1.0
    assert check(say("", calc("12 * 8")), wanted) == 0.0
    assert check(say("", calc("12 * 8"), calc("12 * 7")), wanted) == 0.0
    assert check(say("", calc("12 * 7", name="weather")), wanted) == 0.0
    assert check(say("84"), wanted) == 0.0
    assert check(say("", ToolCall("calculator", "not json")), wanted) == 0.0
    assert check(say("", calc("import os")), wanted) == 0.0
    assert check(say("", calc("0")), {"tool": {"name": "calculator"}}) == 1.0


def test_silence_earns_nothing() -> None:
    wanted = {"all_of": [["x"]], "none_of": ["y"], "max_chars": 9, "language": "en"}
    assert check(say(), wanted) == 0.0
    assert check(say(" \n"), wanted) == 0.0
    assert check(say("", calc("1+1")), wanted) == 0.0  # a call where none was asked for says nothing


def test_an_unknown_condition_is_an_error_that_names_the_known() -> None:
    with pytest.raises(InputError, match="max_chars"):
        check(say("x"), {"max_char": 4})
    with pytest.raises(InputError):
        check(say("x"), {})


def test_script() -> None:
    assert script("我是 Puyu，一个 InternLM 架构的模型") == "zh"
    assert script("The word 浦语 means Puyu") == "en"
    assert script("12 × 7 = 84") == ""


def test_keywords_need_every_group_and_no_rejected_phrase() -> None:
    sample = Sample("a", "q", {"accept": [["Puyu", "浦语"], ["don't know"]], "reject": ["GPT"]})

    def acc(text: str) -> float:
        return keywords(sample, Output((say(text),))).values["acc"]

    assert acc("I’m PUYU and I don’t know") == 1.0
    assert acc("浦语: I don't\nknow") == 1.0
    assert acc("I am Puyu") == 0.0
    assert acc("I am Puyu, I don't know, ask GPT") == 0.0
    assert keywords(sample, Output((say("  "),))).answer is None


def test_numeric_reads_the_final_turn_and_sees_the_call() -> None:
    sample = Sample("a", "q", {"answer": "42"})
    turns = (say("", calc("12+30")), Message("tool", "42", name="calculator"), say("It is 42."))
    assert numeric(sample, Output(turns)).values == {"acc": 1.0, "tool_called": 1.0}
    unfinished = numeric(sample, Output(turns[:2]))
    assert unfinished.answer is None and unfinished.values == {"acc": 0.0, "tool_called": 1.0}
    assert numeric(sample, Output((say("It is 41."),))).values == {"acc": 0.0, "tool_called": 0.0}


def test_choice_by_sum_and_by_byte() -> None:
    sample = Sample("a", "q", {"answer": 1}, choices=("no", "certainly", "又"))
    scored = tuple(Scored(logprob, 1, 1, False) for logprob in (-3.0, -4.0, -9.0))
    assert choice(sample, Output(scored=scored)).values == {"acc": 0.0, "acc_norm": 1.0}  # -3/2, -4/9, -9/3
    tie = tuple(Scored(-1.0, 1, 1, False) for _ in range(3))
    assert choice(sample, Output(scored=tie)).answer == "no"
    broken = (Scored(math.nan, 1, 1, False), *tie[1:])
    assert choice(sample, Output(scored=broken)).answer is None


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    text = "ab浦语"
    nats = -len(text.encode()) * math.log(256)
    found = bits_per_byte(Sample("a", text), Output(scored=(Scored(nats, 4, 8, False),)))
    assert found.values["bpb"] == pytest.approx(8.0)
    assert found.weight == 8.0
