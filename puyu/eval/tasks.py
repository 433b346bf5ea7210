"""The kinds of task, one row each: how a JSONL row becomes a Sample, how to ask, how to judge, what to report.

    perplexity       {"text"}                                   bits per byte
    multiple_choice  {"question", "choices", "answer": index}   likelihood; acc, acc_norm (per byte)
    persona          {"question", "accept": [[any of], ...], "reject": [...]}      generation; keyword groups
    arithmetic       {"question", "answer"}                     generation, with or without the calculator
    refusal          like persona; without "accept", any phrase of scorers.REFUSALS; or {"check"}
    checks           {"messages", "tools"?, "check"}            generation; fraction of conditions met

All rows may have "id", "language", "cluster". A row that lacks a field is an error that names file, line and field:
the denominator of a result is fixed by the file, so nothing is skipped.

    task = build_task(TaskRow(kind="persona", path=Path("samples/eval/persona.jsonl")), seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puyu.configure import Config, dump
from puyu.documents.contamination import item_id
from puyu.errors import InputError
from puyu.eval import scorers, solvers
from puyu.eval.sample import Output, Sample, Score
from puyu.eval.task import Metric, Scorer, Solver, Task
from puyu.files import hash_json, read_jsonl_lines
from puyu.tools.calculate import calculator
from puyu.types import Message, SamplingParams, ToolSpec

Kind = Literal["perplexity", "multiple_choice", "persona", "arithmetic", "refusal", "checks"]


class TaskRow(Config):
    """One task of an evaluation."""

    kind: Kind
    """What is asked and how it is judged."""
    path: Path
    """JSONL file of the samples."""
    name: str = ""
    """Name in logs and tables; the kind (with `_tools` when tools are on) when empty."""
    limit: int | None = None
    """Ask this many samples, drawn by a hash of seed and id (growing it keeps those already drawn); all when null."""
    tools: bool = False
    """Let an agent call the calculator (arithmetic)."""
    max_tokens: int = 64
    """Longest answer, in tokens, of one generation."""
    window_bytes: int = 512
    """Longest piece of text scored at once, in bytes (perplexity); context and piece must fit the model."""

    @property
    def title(self) -> str:
        """The name that logs and tables use."""
        return self.name or self.kind + ("_tools" if self.tools else "")


@dataclass(frozen=True, slots=True)
class KindRow:
    """How one kind works."""

    read: Callable[[Mapping[str, Any]], Sample]
    solver: Callable[[TaskRow, int], Solver]
    scorer: Scorer
    metrics: tuple[Metric, ...]


def build_task(row: TaskRow, *, seed: int) -> Task:
    """Read the samples and put the task together."""
    kind = KINDS[row.kind]
    if row.tools and row.kind != "arithmetic":
        raise InputError(f"task {row.title!r}: tools are for arithmetic only", remedy="remove `tools: true`")
    metrics = tuple(m for m in kind.metrics if row.tools or m.name != "tool_called")
    settings = dump(row) | {"path": row.path.name, "seed": seed}
    samples = draw(read_samples(row.path, kind.read), row.limit, seed=seed)
    return Task(row.title, samples, kind.solver(row, seed), kind.scorer, metrics, settings)


def read_samples(path: Path, read: Callable[[Mapping[str, Any]], Sample]) -> tuple[Sample, ...]:
    """Every line of a file as a sample; an unreadable one is an error with file, line and field."""
    samples = []
    for line, value in read_jsonl_lines(path):
        try:
            samples.append(read({**value, "id": item_id(value, line)}))
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error.message}", remedy=error.remedy) from error
        except (KeyError, TypeError, ValueError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}, line {line}: {what}", remedy="see docs/eval.md for the fields") from error
    return tuple(samples)


def draw(samples: tuple[Sample, ...], limit: int | None, *, seed: int) -> tuple[Sample, ...]:
    """`limit` samples by the rank of hash(seed, id), in the file's order: no position and no RNG state decides."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = sorted(samples, key=lambda sample: hash_json([seed, sample.id]))[:limit]
    ids = {sample.id for sample in chosen}
    return tuple(sample for sample in samples if sample.id in ids)


def _common(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": str(row["id"]), "language": row.get("language", ""), "cluster": str(row.get("cluster", ""))}


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in row:
        return tuple(Message.from_openai(message) for message in row["messages"])
    return (Message("user", str(row["question"])),)


def _read_text(row: Mapping[str, Any]) -> Sample:
    if not row["text"]:
        raise ValueError("field 'text' is empty")
    return Sample(prompt=row["text"], **_common(row))


def _read_choice(row: Mapping[str, Any]) -> Sample:
    choices, answer = tuple(map(str, row["choices"])), row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"field 'answer' must be an index into the {len(choices)} choices, not {answer!r}")
    is_chinese = row.get("language") == "zh"
    frame = "问题：{}\n答案：" if is_chinese else "Question: {}\nAnswer:"
    return Sample(prompt=frame.format(row["question"]), choices=choices, target={"answer": answer}, **_common(row))


def _read_keywords(row: Mapping[str, Any]) -> Sample:
    target = {"accept": [list(_phrases(group)) for group in row["accept"]], "reject": list(row.get("reject", ()))}
    return Sample(prompt=_messages(row), target=target, **_common(row))


def _phrases(group: Any) -> list[str]:
    return [group] if isinstance(group, str) else list(group)


def _read_number(row: Mapping[str, Any]) -> Sample:
    scorers.decimal(row["answer"])
    return Sample(prompt=_messages(row), target={"answer": str(row["answer"])}, **_common(row))


def _read_check(row: Mapping[str, Any]) -> Sample:
    tools = tuple(ToolSpec.from_openai(tool) for tool in row.get("tools") or ())
    return Sample(prompt=_messages(row), target={"check": dict(row["check"])}, tools=tools, **_common(row))


def _read_refusal(row: Mapping[str, Any]) -> Sample:
    return _read_check(row) if "check" in row else _read_keywords({"accept": [list(scorers.REFUSALS)], **row})


def _score_refusal(sample: Sample, output: Output) -> Score:
    if "check" not in sample.target:
        return scorers.keywords(sample, output)
    judged = scorers.checks(sample, output)
    return Score({"acc": judged.values["pass"]}, judged.answer, judged.explanation)


def _params(row: TaskRow, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=row.max_tokens, temperature=0.0, seed=seed)


def _generate(row: TaskRow, seed: int) -> Solver:
    return solvers.generate(_params(row, seed))


def _arithmetic(row: TaskRow, seed: int) -> Solver:
    params = _params(row, seed)
    return solvers.agent([calculator], params=params) if row.tools else solvers.generate(params)


ACCURACY = Metric("acc", unit="share")

KINDS: Mapping[str, KindRow] = {
    "perplexity": KindRow(
        _read_text,
        lambda row, seed: solvers.rolling(window_bytes=row.window_bytes),
        scorers.bits_per_byte,
        (Metric("bpb", better="lower", unit="bits/byte", missing=None),),
    ),
    "multiple_choice": KindRow(
        _read_choice,
        lambda row, seed: solvers.likelihood(),
        scorers.choice,
        (ACCURACY, Metric("acc_norm", unit="share")),
    ),
    "persona": KindRow(_read_keywords, _generate, scorers.keywords, (ACCURACY,)),
    "arithmetic": KindRow(_read_number, _arithmetic, scorers.numeric, (ACCURACY, Metric("tool_called", unit="share"))),
    "refusal": KindRow(_read_refusal, _generate, _score_refusal, (ACCURACY,)),
    "checks": KindRow(
        _read_check, _generate, scorers.checks, (Metric("check", unit="share"), Metric("pass", unit="share"))
    ),
}
