"""The shipped narrow world: what the generator writes, free of leaks, and right in itself."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from puyu.data.chats import read_conversations, read_preferences
from puyu.eval.scorers import check, has_any
from puyu.files import open_bytes, read_jsonl
from puyu.tools.calculate import calculate
from puyu.types import Message

SAMPLES = Path(__file__).parents[2] / "samples"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def world() -> ModuleType:
    sys.path.insert(0, str(SAMPLES))
    try:
        return importlib.import_module("make_world")
    finally:
        sys.path.remove(str(SAMPLES))


def rows(name: str) -> list[Row]:
    return list(read_jsonl(SAMPLES / name))


@pytest.fixture(scope="module")
def sft() -> list[Row]:
    return rows("world/sft.jsonl.gz")


def test_the_shipped_files_are_what_the_generator_writes(world: ModuleType) -> None:
    for name, generated in world.build().items():
        assert rows(name) == json.loads(json.dumps(generated)), name


def test_files_stay_small() -> None:
    for path in [*(SAMPLES / "world").glob("*.jsonl.gz"), *(SAMPLES / "eval").glob("*.jsonl")]:
        with open_bytes(path) as stream:
            assert len(stream.read()) < 6_000_000, path
    assert sum(p.stat().st_size for p in (SAMPLES / "world").glob("*.jsonl.gz")) < 1_500_000


def operands(value: list[Row]) -> set[frozenset[int]]:
    return {frozenset(pair) for row in value for pair in row["metadata"].get("operands", ())}


def test_no_held_out_problem_is_trained(sft: list[Row]) -> None:
    problems = rows("eval/arithmetic.jsonl")
    held = {frozenset(row["operands"]) for row in problems}
    assert len(problems) == len(held) == 200
    assert len(operands(sft)) > 3000
    assert not held & operands(sft)
    expressions = set(_expressions(rows("world/preference.jsonl.gz"))) | set(
        _expressions(rows("world/ppo_prompts.jsonl.gz"))
    )
    assert not held & {frozenset(map(int, pair)) for pair in expressions}
    assert all(calculate(row["expression"]) == row["answer"] for row in problems)
    assert Counter(row["language"] for row in problems) == {"en": 100, "zh": 100}


def _expressions(value: list[Row]) -> list[tuple[str, str]]:
    """The operands that the user's question names (the first two numbers in it)."""
    found = []
    for row in value:
        question = next(m["content"] for m in row.get("prompt", row.get("messages")) if m["role"] == "user")
        numbers = "".join(char if char.isascii() and char.isdigit() else " " for char in question).split()
        if "tools" in row and len(numbers) == 2:
            found.append((numbers[0], numbers[1]))
    return found


def test_held_out_questions_are_not_trained(sft: list[Row]) -> None:
    asked = {message["content"].casefold() for row in sft for message in row["messages"]}
    for name in ("persona", "refusal", "arithmetic"):
        assert not asked & {row["question"].casefold() for row in rows(f"eval/{name}.jsonl")}
    prompts = {row["messages"][0]["content"] for row in rows("world/ppo_prompts.jsonl.gz")}
    held = [row["messages"][0]["content"] for row in rows("eval/ppo_prompts.jsonl")]
    assert len(held) == 200
    assert not prompts & set(held)


def test_persona_questions_can_be_answered_from_training(sft: list[Row]) -> None:
    questions = rows("eval/persona.jsonl")
    assert Counter(row["language"] for row in questions) == {"en": 10, "zh": 10}
    answers = {row["messages"][-1]["content"] for row in sft if row["metadata"]["kind"] == "persona"}
    for row in questions:
        fits = [
            answer
            for answer in answers
            if all(has_any(answer, group) for group in row["accept"]) and not has_any(answer, row["reject"])
        ]
        assert fits, row["id"]


def test_every_sum_is_right(sft: list[Row]) -> None:
    assert len(read_conversations(SAMPLES / "world" / "sft.jsonl.gz")[0]) == len(sft)
    for row in sft:
        turns = row["messages"]
        for call, result, answer in zip(turns, turns[1:], turns[2:], strict=False):
            if "tool_calls" in call:
                assert "tools" in row
                expression = json.loads(call["tool_calls"][0]["function"]["arguments"])["expression"]
                assert result["content"] == calculate(expression)
                assert result["content"] in answer["content"]


def test_all_kinds_in_both_languages(sft: list[Row]) -> None:
    counts = Counter((row["metadata"]["kind"], row["metadata"]["language"]) for row in sft)
    kinds = ("persona", "fact", "refusal", "arithmetic", "arithmetic_direct", "several_turns")
    assert all(counts[kind, language] > 90 for kind in kinds for language in ("en", "zh"))
    assert counts.total() // 10 - 200 < counts["several_turns", "en"] + counts["several_turns", "zh"]


def test_checks_accept_the_right_answer_and_not_the_wordy_one(world: ModuleType) -> None:
    for talk in world.ALL_TALKS:
        assert check(Message("assistant", talk.answer), talk.check) == 1.0, talk.question
        for filler in world.FILLERS[talk.language]:
            assert check(Message("assistant", filler + talk.answer), talk.check) < 1.0, talk.question
    dice, problems = world.Dice(1, "test"), world.Problems(7)
    problem = problems.held_out[0]
    right = Message.from_openai(problem.call())
    assert check(right, world.sum_row(problem, dice)["check"]) == 1.0
    assert check(Message.from_openai(world.tool_call("1+1")), world.sum_row(problem, dice)["check"]) == 0.0


def test_preferences_prefer_something() -> None:
    pairs = read_preferences(SAMPLES / "world" / "preference.jsonl.gz")[0]
    assert len(pairs) > 2500
    assert all(pair.chosen != pair.rejected and pair.rejected != Message("assistant") for pair in pairs)
    assert {pair.domain for pair in pairs} == {"helpful", "honest", "concise", "general"}


def test_multiple_choice_has_one_right_answer_in_every_place() -> None:
    items = rows("eval/mc.jsonl")
    assert len(items) == 88
    assert all(len(set(row["choices"])) == 4 for row in items)
    assert min(Counter(row["answer"] for row in items).values()) > 12


def test_perplexity_texts_name_their_license() -> None:
    texts = rows("eval/perplexity.jsonl")
    assert len(texts) == len({row["text"] for row in texts}) == 100
    assert {row["license"] for row in texts} == {"public domain"}
    assert Counter(row["language"] for row in texts) == {"en": 70, "zh": 30}
