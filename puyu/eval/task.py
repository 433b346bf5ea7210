"""A task reads as a sentence: these samples, asked this way, judged that way, reported by these metrics.

Solver and scorer are functions behind one-call protocols. The solver may call the model; the scorer may not,
so a log can be judged again later without asking anything.

    Task("persona", samples, solver=generate(params), scorer=keywords, metrics=(Metric("acc"),))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from puyu.errors import InputError
from puyu.eval.sample import EvalLog, Output, Sample, SampleLog, Score, Status
from puyu.eval.statistics import Estimate, estimate
from puyu.types import LanguageModel


class Solver(Protocol):
    """Asks the model one sample."""

    async def __call__(self, sample: Sample, model: LanguageModel) -> Output: ...


class Scorer(Protocol):
    """Judges one output; pure. `answer=None` in the score says that no answer could be read."""

    def __call__(self, sample: Sample, output: Output) -> Score: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One reported number: the mean of `Score.values[name]`.

    `missing` is the value of a sample that has no score (model error, timeout, nothing extracted): 0 keeps the
    denominator of an accuracy fixed; None leaves the sample out of the mean, and the estimate's n shows it.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    missing: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """Samples, a way to ask, a way to judge, and the metrics to report."""

    name: str
    samples: tuple[Sample, ...]
    solver: Solver
    scorer: Scorer
    metrics: tuple[Metric, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How solver and scorer were set, as JSON: part of a run's identity."""

    def __post_init__(self) -> None:
        if not self.samples:
            raise InputError(f"task {self.name!r} has no samples")
        seen: set[str] = set()
        for sample in self.samples:
            if sample.id in seen:
                raise InputError(f"task {self.name!r}: two samples have the id {sample.id!r}")
            seen.add(sample.id)

    @property
    def chance(self) -> float | None:
        """The expected accuracy of blind guessing: the mean of 1 / number of choices."""
        if not all(sample.choices for sample in self.samples):
            return None
        return sum(1 / len(sample.choices) for sample in self.samples) / len(self.samples)


def judge(task: Task, sample: Sample, output: Output) -> SampleLog:
    """Score one output; no answer in the score means that extraction failed."""
    score = task.scorer(sample, output)
    status = Status.OK if score.answer is not None else Status.EXTRACTION_FAILED
    return SampleLog(sample, status, output, score)


def reduce(task: Task, *, model: str, identity: str, logs: Sequence[SampleLog]) -> EvalLog:
    """All samples -> estimates, overall and by language. The status counts add up to the samples, or it is a bug."""
    counts = {str(status): sum(log.status is status for log in logs) for status in Status}
    assert sum(counts.values()) == len(task.samples), f"{task.name}: {counts} for {len(task.samples)} samples"
    assert [log.sample.id for log in logs] == [sample.id for sample in task.samples]
    languages = sorted({log.sample.language for log in logs} - {""})
    groups = {name: estimates(task.metrics, [log for log in logs if log.sample.language == name]) for name in languages}
    return EvalLog(
        task=task.name,
        model=model,
        identity=identity,
        metrics=estimates(task.metrics, logs),
        groups=groups if len(groups) > 1 else {},
        counts=counts,
        samples=tuple(logs),
        chance=task.chance,
    )


def rescore(task: Task, log: EvalLog) -> EvalLog:
    """Judge every logged output again, with no call of the model."""
    logs = [judge(task, row.sample, row.output) if row.output is not None else row for row in log.samples]
    return reduce(task, model=log.model, identity=log.identity, logs=logs)


def estimates(metrics: Sequence[Metric], logs: Sequence[SampleLog]) -> dict[str, Estimate]:
    """Each metric over these samples; a metric that none of them has is left out."""
    found = {}
    for metric in metrics:
        rows = [(log, value) for log in logs if (value := metric_value(log, metric)) is not None]
        if rows:
            found[metric.name] = estimate([value for _, value in rows], weights_of(rows), clusters_of(rows))
    return found


def metric_value(log: SampleLog, metric: Metric) -> float | None:
    """A sample's value of a metric; the metric's `missing` where the sample has none."""
    if log.score is None or metric.name not in log.score.values:
        return metric.missing
    return log.score.values[metric.name]


def weights_of(rows: Sequence[tuple[SampleLog, float]]) -> list[float] | None:
    """The weights of the samples, or None when all are 1."""
    weights = [log.score.weight if log.score else 1.0 for log, _ in rows]
    return weights if any(weight != 1.0 for weight in weights) else None


def clusters_of(rows: Sequence[tuple[SampleLog, float]]) -> list[str] | None:
    """The clusters of the samples (a sample without one is its own), or None when there are none."""
    if not any(log.sample.cluster for log, _ in rows):
        return None
    return [log.sample.cluster or f"\0{log.sample.id}" for log, _ in rows]
