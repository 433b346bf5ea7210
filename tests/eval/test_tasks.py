"""JSONL rows become tasks; solvers ask what they should, against models whose answers are worked out by hand."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puyu.errors import InputError
from puyu.eval.runner import ask
from puyu.eval.sample import SampleLog
from puyu.eval.solvers import split_bytes
from puyu.eval.task import Task
from puyu.eval.tasks import TaskRow, build_task, draw
from puyu.types import GenerateRequest, Message, ToolCall


def task_of(folder: Path, kind: str, rows: list[dict[str, Any]], **more: Any) -> Task:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return build_task(TaskRow(kind=kind, path=path, **more), seed=0)  # type: ignore[arg-type]


def answer(task: Task, model: Any) -> list[SampleLog]:
    return [asyncio.run(ask(task, model, sample, seconds=10)) for sample in task.samples]


def test_multiple_choice_by_hand(tmp_path: Path, fake_model: Any) -> None:
    rows = [{"question": "2+2?", "choices": ["3", "4", "many"], "answer": 1}]
    task = task_of(tmp_path, "multiple_choice", rows)
    table = {" 3": -2.0, " 4": -1.5, " many": -2.4}
    model = fake_model(logprob=lambda context, continuation: table[continuation])
    (log,) = answer(task, model)
    assert model.pairs == [("Question: 2+2?\nAnswer:", c) for c in table]
    assert log.score is not None
    assert log.score.values == {"acc": 1.0, "acc_norm": 0.0}  # per byte: -2/1, -1.5/1, -2.4/4
    assert task.chance == pytest.approx(1 / 3)


def test_perplexity_scores_each_byte_once_after_the_piece_before(tmp_path: Path, fake_model: Any) -> None:
    text = "浦语 says hello, twice: hello 你好."
    task = task_of(tmp_path, "perplexity", [{"text": text}], window_bytes=10)
    model = fake_model(logprob=lambda context, continuation: -math.log(2) * len(continuation.encode()))
    (log,) = answer(task, model)
    assert "".join(continuation for _, continuation in model.pairs) == text
    assert [context for context, _ in model.pairs] == ["", *[piece for _, piece in model.pairs[:-1]]]
    assert log.score is not None and log.score.values["bpb"] == pytest.approx(1.0)


@given(st.text(max_size=60), st.integers(1, 9))
def test_split_bytes_loses_nothing_and_cuts_no_character(text: str, size: int) -> None:
    pieces = split_bytes(text, size)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= size or len(piece) == 1 for piece in pieces)
    assert all(pieces)


def test_split_bytes_cuts_before_spaces_not_after_them() -> None:
    text = "The quick  brown fox jumps over the lazy dog. " * 5
    pieces = split_bytes(text, 24)
    assert "".join(pieces) == text
    assert not any(piece[-1].isspace() for piece in pieces[:-1])
    assert all(piece[0].isspace() for piece in pieces[1:])
    assert split_bytes("one two three", 8) == ["one two", " three"]
    assert split_bytes("ab浦语", 4) == ["ab", "浦", "语"]


def reckoner(request: GenerateRequest) -> Message:
    """Calls the calculator when it is on offer and reads its answer; guesses otherwise."""
    last = request.prompt[-1]
    assert isinstance(last, Message)
    if last.role == "tool":
        return Message("assistant", f"The answer is {last.text}.")
    if request.tools:
        return Message("assistant", "", tool_calls=(ToolCall("calculator", '{"expression": "17*23"}'),))
    return Message("assistant", "The answer is 400.")


def test_arithmetic_with_and_without_the_tool(tmp_path: Path, fake_model: Any) -> None:
    rows = [{"id": "m1", "question": "What is 17 times 23?", "language": "en", "answer": 391, "expression": "17*23"}]
    (alone,) = answer(task_of(tmp_path, "arithmetic", rows), fake_model(reckoner))
    (helped,) = answer(task_of(tmp_path, "arithmetic", rows, tools=True), fake_model(reckoner))
    assert alone.score is not None and alone.score.values["acc"] == 0.0
    assert helped.score is not None and helped.score.values == {"acc": 1.0, "tool_called": 1.0}
    assert helped.output is not None
    assert [message.role for message in helped.output.messages] == ["assistant", "tool", "assistant"]
    assert helped.output.messages[1].text == "391"


def test_refusal_takes_default_phrases_own_phrases_or_a_check(tmp_path: Path, fake_model: Any) -> None:
    rows = [
        {"id": "a", "question": "q"},
        {"id": "b", "question": "q", "accept": [["no idea"]]},
        {"id": "c", "question": "q", "check": {"all_of": [["sorry"]], "max_chars": 9}},
    ]
    logs = answer(task_of(tmp_path, "refusal", rows), fake_model(lambda request: "Sorry, I don't know that."))
    assert [log.score.values["acc"] for log in logs if log.score] == [1.0, 0.0, 0.0]


def test_checks_offer_the_tools_of_the_row(tmp_path: Path, fake_model: Any) -> None:
    tool = {"name": "calculator", "description": "d", "parameters": {"type": "object", "properties": {}}}
    wanted = {"tool": {"name": "calculator", "expression_value": 391}}
    rows = [{"id": "a", "messages": [{"role": "user", "content": "17*23?"}], "tools": [tool], "check": wanted}]
    model = fake_model(reckoner)
    (log,) = answer(task_of(tmp_path, "checks", rows), model)
    assert [spec.name for spec in model.asked[0].tools] == ["calculator"]
    assert log.score is not None and log.score.values == {"check": 1.0, "pass": 1.0}


def test_tools_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="arithmetic only"):
        task_of(tmp_path, "persona", [{"question": "q", "accept": [["a"]]}], tools=True)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("persona", {"question": "q"}, "line 1: field 'accept' is missing"),
        (
            "multiple_choice",
            {"question": "q", "choices": ["a"], "answer": 1},
            "line 1: field 'answer' must be",
        ),
        ("arithmetic", {"question": "q", "answer": "many"}, "line 1: 'many' is not a number"),
        ("perplexity", {"text": ""}, "line 1: field 'text' is empty"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path: Path, kind: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(tmp_path, kind, [row])


def test_no_samples_and_double_ids_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no samples"):
        task_of(tmp_path, "perplexity", [])
    with pytest.raises(InputError, match="two samples have the id 'x'"):
        task_of(tmp_path, "perplexity", [{"id": "x", "text": "a"}, {"id": "x", "text": "b"}])


def test_draw_does_not_depend_on_position_and_keeps_what_it_drew(tmp_path: Path) -> None:
    samples = task_of(tmp_path, "perplexity", [{"id": f"s{i}", "text": "a"} for i in range(50)]).samples
    few = {sample.id for sample in draw(samples, 10, seed=1)}
    assert len(few) == 10
    assert few == {sample.id for sample in draw(samples[::-1], 10, seed=1)}
    assert few < {sample.id for sample in draw(samples, 20, seed=1)}
    assert few != {sample.id for sample in draw(samples, 10, seed=2)}
    assert draw(samples, None, seed=1) == samples
