"""The rows of an evaluation: what is asked (Sample), what came back (Output), how it ended (SampleLog, EvalLog).

Everything is frozen and survives `from_json(to_json(x)) == x`. No durations and no dates: the same seed and model
give the same bytes. This file knows neither tasks nor metrics nor files.

    >>> Score({"acc": 1.0}, answer="42").values["acc"]
    1.0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from puyu.eval.statistics import Estimate
from puyu.types import Message, Scored, ToolSpec


class Status(StrEnum):
    """How a sample ended. Every sample ends in exactly one, and the counts add up to the number of samples."""

    OK = "ok"
    """Asked and judged (right or wrong)."""
    MODEL_ERROR = "model_error"
    """The model refused or failed; `SampleLog.error` says how."""
    EXTRACTION_FAILED = "extraction_failed"
    """The model answered, but no answer could be read from it."""
    TIMEOUT = "timeout"
    """No answer within the time limit."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One item. `prompt` is messages (asked with the chat template) or plain text (scored as it is)."""

    id: str
    prompt: str | tuple[Message, ...]
    target: Mapping[str, Any] = field(default_factory=dict)
    """What the scorer needs: the answer, the keywords, the check."""
    choices: tuple[str, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    language: str = ""
    """Results are also given for each language."""
    cluster: str = ""
    """Samples that share a cluster (a passage, a template) are not independent; the standard error counts clusters."""

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"id": self.id, "prompt": _prompt_to_json(self.prompt), "target": dict(self.target)}
        if self.choices:
            value["choices"] = list(self.choices)
        if self.tools:
            value["tools"] = [tool.to_openai() for tool in self.tools]
        if self.language:
            value["language"] = self.language
        if self.cluster:
            value["cluster"] = self.cluster
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Sample:
        return Sample(
            id=value["id"],
            prompt=_prompt_from_json(value["prompt"]),
            target=dict(value["target"]),
            choices=tuple(value.get("choices", ())),
            tools=tuple(ToolSpec.from_openai(tool) for tool in value.get("tools", ())),
            language=value.get("language", ""),
            cluster=value.get("cluster", ""),
        )


def _prompt_to_json(prompt: str | tuple[Message, ...]) -> Any:
    return prompt if isinstance(prompt, str) else [message.to_openai() for message in prompt]


def _prompt_from_json(value: Any) -> str | tuple[Message, ...]:
    return value if isinstance(value, str) else tuple(Message.from_openai(message) for message in value)


@dataclass(frozen=True, slots=True)
class Output:
    """What came back: the turns that the model (and its tools) added, or the likelihoods that it gave."""

    messages: tuple[Message, ...] = ()
    scored: tuple[Scored, ...] = ()
    finish_reason: str = ""

    @property
    def answer(self) -> Message:
        """The last assistant turn; an empty one when there is none."""
        turns = [message for message in self.messages if message.role == "assistant"]
        return turns[-1] if turns else Message("assistant", "")

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {}
        if self.messages:
            value["messages"] = [message.to_openai() for message in self.messages]
        if self.scored:
            value["scored"] = [asdict(scored) for scored in self.scored]
        if self.finish_reason:
            value["finish_reason"] = self.finish_reason
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Output:
        return Output(
            messages=tuple(Message.from_openai(message) for message in value.get("messages", ())),
            scored=tuple(Scored(**scored) for scored in value.get("scored", ())),
            finish_reason=value.get("finish_reason", ""),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """A judgment. `values` by metric name; `answer` is what was read from the output, None when nothing could be."""

    values: Mapping[str, float]
    answer: str | None = ""
    explanation: str = ""
    weight: float = 1.0
    """The weight of this sample in every mean: bytes for bits per byte, else 1."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"values": dict(self.values)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Score:
        return Score(dict(value["values"]), value["answer"], value["explanation"], value["weight"])


@dataclass(frozen=True, slots=True)
class SampleLog:
    """One finished sample. `output` and `score` are None where there was none; `error` says why."""

    sample: Sample
    status: Status
    output: Output | None = None
    score: Score | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "sample": self.sample.to_json(),
            "status": str(self.status),
            "output": self.output.to_json() if self.output else None,
            "score": self.score.to_json() if self.score else None,
            "error": self.error,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> SampleLog:
        return SampleLog(
            sample=Sample.from_json(value["sample"]),
            status=Status(value["status"]),
            output=Output.from_json(value["output"]) if value["output"] is not None else None,
            score=Score.from_json(value["score"]) if value["score"] is not None else None,
            error=value["error"],
        )


@dataclass(frozen=True, slots=True)
class EvalLog:
    """One task on one model: estimates, the count of each status, and every sample in the task's order."""

    task: str
    model: str
    identity: str
    """Hash over the samples, the ways to ask and judge, the seed and the model's files."""
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Estimate]]
    """The same metrics for each language."""
    counts: Mapping[str, int]
    samples: tuple[SampleLog, ...]
    chance: float | None = None
    """What blind guessing would get, where that is known."""

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "model": self.model,
            "identity": self.identity,
            "metrics": {name: asdict(estimate) for name, estimate in self.metrics.items()},
            "groups": {
                group: {name: asdict(estimate) for name, estimate in metrics.items()}
                for group, metrics in self.groups.items()
            },
            "counts": dict(self.counts),
            "chance": self.chance,
            "samples": [log.to_json() for log in self.samples],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> EvalLog:
        return EvalLog(
            task=value["task"],
            model=value["model"],
            identity=value["identity"],
            metrics=_estimates(value["metrics"]),
            groups={group: _estimates(metrics) for group, metrics in value["groups"].items()},
            counts=dict(value["counts"]),
            chance=value["chance"],
            samples=tuple(SampleLog.from_json(log) for log in value["samples"]),
        )


def _estimates(value: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**estimate) for name, estimate in value.items()}
