"""The runner and the verb: counted statuses, resume after a kill, equal bytes, the table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from puyu.errors import ConfigError, PuyuError, RequestError
from puyu.eval.compare import compare, to_text
from puyu.eval.run import EvalConfig, run
from puyu.eval.runner import Limits, evaluate, fingerprint, identify
from puyu.eval.sample import EvalLog, Status
from puyu.eval.statistics import wilson
from puyu.eval.task import rescore
from puyu.eval.tasks import TaskRow, build_task
from puyu.types import GenerateRequest, Message


def questions(folder: Path, count: int = 12) -> Path:
    path = folder / "arithmetic.jsonl"
    rows = [
        {"id": f"q{i}", "question": f"What is {i}+1?", "language": "en" if i % 2 else "zh", "answer": i + 1}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def operand(request: GenerateRequest) -> int:
    message = request.prompt[-1]
    assert isinstance(message, Message)
    return int(message.text.removeprefix("What is ").split("+")[0])


def adder(request: GenerateRequest) -> str:
    return f"It is {operand(request) + 1}."


def evaluate_it(folder: Path, model: Any, **limits: Any) -> EvalLog:
    task = build_task(TaskRow(kind="arithmetic", path=questions(folder)), seed=0)
    work = evaluate(task, model, name="m", identity=identify(task, ""), folder=folder / "out", limits=Limits(**limits))
    return asyncio.run(work)


def test_every_sample_ends_in_one_counted_status(tmp_path: Path, fake_model: Any) -> None:
    def answer(request: GenerateRequest) -> str:
        if operand(request) == 3:
            raise RequestError("too long")
        return "no idea" if operand(request) == 5 else adder(request)

    class Slow(fake_model):  # type: ignore[misc]
        async def generate(self, request: GenerateRequest) -> Any:
            if operand(request) == 7:
                await asyncio.sleep(60)
            return await super().generate(request)

    log = evaluate_it(tmp_path, Slow(answer), seconds=0.05)
    assert log.counts == {"ok": 9, "model_error": 1, "extraction_failed": 1, "timeout": 1}
    by_id = {row.sample.id: row for row in log.samples}
    assert by_id["q3"].error == "RequestError: too long"
    assert by_id["q5"].status is Status.EXTRACTION_FAILED
    assert by_id["q7"].status is Status.TIMEOUT
    found = log.metrics["acc"]
    assert (found.value, found.n) == (9 / 12, 12)  # the denominator is fixed: what failed is not right
    assert (found.low, found.high) == wilson(9, 12)
    assert {group: metrics["acc"].n for group, metrics in log.groups.items()} == {"en": 6, "zh": 6}


def test_the_bound_on_concurrency_is_reached_and_kept(tmp_path: Path, fake_model: Any) -> None:
    flying, most = 0, 0

    class Counting(fake_model):  # type: ignore[misc]
        async def generate(self, request: GenerateRequest) -> Any:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0.001)
            flying -= 1
            return await super().generate(request)

    evaluate_it(tmp_path, Counting(adder), concurrency=5)
    assert most == 5


class Killed(BaseException):
    """Stands for a kill: no handler of the package may catch it."""


def test_a_killed_run_asks_only_for_the_rest(tmp_path: Path, fake_model: Any) -> None:
    def dies(request: GenerateRequest) -> str:
        if operand(request) == 7:
            raise Killed
        return adder(request)

    first = fake_model(dies)
    with pytest.raises(Killed):
        evaluate_it(tmp_path, first, concurrency=1)
    partial = tmp_path / "out" / "arithmetic" / "m.partial.jsonl"
    with open(partial, "a") as stream:
        stream.write('{"sample": {"id": "q7"')  # and the kill tore a line
    second = fake_model(adder)
    log = evaluate_it(tmp_path, second, concurrency=1)
    assert [operand(request) for request in second.asked] == [7, 8, 9, 10, 11]
    assert log.counts["ok"] == 12
    assert not partial.exists()
    whole = evaluate_it(tmp_path_sibling(tmp_path), fake_model(adder))
    assert log == whole
    third = fake_model(adder)
    assert evaluate_it(tmp_path, third) == log
    assert third.asked == []


def tmp_path_sibling(folder: Path) -> Path:
    other = folder / "other"
    other.mkdir()
    return other


def test_order_and_concurrency_do_not_change_a_byte(tmp_path: Path, fake_model: Any) -> None:
    class Shuffling(fake_model):  # type: ignore[misc]
        async def generate(self, request: GenerateRequest) -> Any:
            await asyncio.sleep((operand(request) * 7 % 5) / 1000)
            return await super().generate(request)

    results = []
    for name, model, width in (("a", fake_model(adder), 1), ("b", Shuffling(adder), 6)):
        folder = tmp_path / name
        folder.mkdir()
        evaluate_it(folder, model, concurrency=width)
        results.append((folder / "out" / "arithmetic" / "m.json").read_bytes())
    assert results[0] == results[1]


def test_a_log_survives_json_and_can_be_judged_again(tmp_path: Path, fake_model: Any) -> None:
    log = evaluate_it(tmp_path, fake_model(adder))
    assert EvalLog.from_json(json.loads(json.dumps(log.to_json()))) == log
    task = build_task(TaskRow(kind="arithmetic", path=tmp_path / "arithmetic.jsonl"), seed=0)
    assert rescore(task, log) == log


def test_other_weights_or_other_samples_are_another_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"one")
    first = fingerprint(checkpoint)
    (checkpoint / "lineage.json").write_text("{}")
    assert fingerprint(checkpoint) == first
    (checkpoint / "model.safetensors").write_bytes(b"two")
    assert fingerprint(checkpoint) != first
    row = TaskRow(kind="arithmetic", path=questions(tmp_path))
    marks = {identify(build_task(row, seed=seed), first) for seed in (0, 1)}
    questions(tmp_path, 11)
    marks.add(identify(build_task(row, seed=0), first))
    assert len(marks) == 3


def test_a_model_that_never_answers_is_an_error_and_leaves_no_result(tmp_path: Path, fake_model: Any) -> None:
    def refuses(request: GenerateRequest) -> str:
        raise OSError("connection refused")

    with pytest.raises(PuyuError, match="connection refused"):
        evaluate_it(tmp_path, fake_model(refuses))
    assert evaluate_it(tmp_path, fake_model(adder)).counts["ok"] == 12


def test_our_own_bugs_are_raised_not_counted(tmp_path: Path, fake_model: Any) -> None:
    def buggy(request: GenerateRequest) -> str:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        evaluate_it(tmp_path, fake_model(buggy))


def opener(models: dict[str, Any], opened: list[str]) -> Callable[[str, Path], Any]:
    @contextmanager
    def open_model(name: str, path: Path) -> Iterator[Any]:
        opened.append(name)
        yield models[name]

    return open_model


def config_of(folder: Path) -> EvalConfig:
    for name in ("base", "sft"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_text(name)
    text = folder / "text.jsonl"
    text.write_text('{"id": "t1", "text": "hello there"}\n{"id": "t2", "text": "again and again and again"}\n')
    rows = [TaskRow(kind="arithmetic", path=questions(folder, 40)), TaskRow(kind="perplexity", path=text)]
    return EvalConfig(models={name: folder / name for name in ("base", "sft")}, tasks=rows)


def test_the_verb_writes_logs_table_and_numbers(tmp_path: Path, fake_model: Any) -> None:
    models = {
        "base": fake_model(lambda r: "It is 8." if operand(r) % 4 else adder(r), lambda c, t: -2.0 * len(t)),
        "sft": fake_model(adder, lambda c, t: -1.0 * len(t)),
    }
    opened: list[str] = []
    config = config_of(tmp_path)
    numbers = run(config, out=tmp_path / "eval", open_model=opener(models, opened))
    assert opened == ["base", "sft"]
    assert numbers["samples"] == 2 * 42 == sum(numbers["statuses"].values())
    assert numbers["results"]["sft"]["arithmetic.acc"]["value"] == 1.0
    assert numbers["results"]["sft"]["perplexity.bpb"]["value"] == pytest.approx(1.4427, abs=1e-4)
    json.dumps(numbers, allow_nan=False)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    line = summary["lines"][0]
    assert (summary["models"], line["task"], line["metric"]) == (["base", "sft"], "arithmetic", "acc")
    (difference,) = line["differences"]
    assert (difference["a"], difference["b"], difference["n"]) == ("base", "sft", 40)
    by_model = [line["results"][name]["value"] for name in ("base", "sft")]
    assert difference["value"] == pytest.approx(by_model[1] - by_model[0])
    assert difference["low"] > 0 and difference["boot_low"] > 0
    table = (tmp_path / "eval" / "table.txt").read_text()
    assert "sft - base" in table and "*" in table.splitlines()[2]

    before = {path: path.read_bytes() for path in (tmp_path / "eval").rglob("*.*")}
    opened.clear()
    assert run(config, out=tmp_path / "eval", open_model=opener(models, opened)) == numbers
    assert opened == []  # everything was there: no model is opened
    assert {path: path.read_bytes() for path in (tmp_path / "eval").rglob("*.*")} == before


def test_swapped_weights_are_asked_again(tmp_path: Path, fake_model: Any) -> None:
    models = {"base": fake_model(adder), "sft": fake_model(adder)}
    opened: list[str] = []
    config = config_of(tmp_path)
    run(config, out=tmp_path / "eval", open_model=opener(models, opened))
    (tmp_path / "sft" / "model.safetensors").write_text("other weights")
    opened.clear()
    run(config, out=tmp_path / "eval", open_model=opener(models, opened))
    assert opened == ["sft"]


def test_logs_of_different_samples_are_not_compared(tmp_path: Path, fake_model: Any) -> None:
    log = evaluate_it(tmp_path, fake_model(adder))
    task = build_task(TaskRow(kind="arithmetic", path=tmp_path / "arithmetic.jsonl"), seed=0)
    short = EvalLog.from_json(log.to_json() | {"model": "other", "samples": log.to_json()["samples"][:5]})
    (line, *_) = compare([log, short], {"arithmetic": task.metrics})
    assert line.pairs == ()
    assert to_text([line]).splitlines()[2].endswith("-")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"models": {}}, "needs `models`"), ({"models": {"a/b": "x"}}, "cannot be the name"), ({"tasks": []}, "`tasks`")],
)
def test_a_config_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = config_of(tmp_path).model_copy(update=change)
    with pytest.raises(ConfigError, match=message):
        run(config, out=tmp_path / "eval", open_model=opener({}, []))


def test_two_tasks_need_two_names(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="two tasks have the name 'arithmetic'"):
        run(
            config.model_copy(update={"tasks": [config.tasks[0], config.tasks[0]]}),
            out=tmp_path / "eval",
            open_model=opener({}, []),
        )
