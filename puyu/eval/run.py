"""The verb: several checkpoints, several tasks -> one log each, `summary.json` and a table.

The roof passes in how a checkpoint becomes a LanguageModel, so this room needs neither torch nor the engine. A model
is opened only when one of its logs is missing; one model is open at a time.

    run(EvalConfig(models={"sft": ...}, tasks=[...]), out=Path("runs/nano/eval"), open_model=open_model)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError
from puyu.eval.compare import Line, compare, to_json, to_text
from puyu.eval.runner import Limits, evaluate, fingerprint, finished, identify
from puyu.eval.sample import EvalLog, SampleLog
from puyu.eval.task import Task
from puyu.eval.tasks import TaskRow, build_task
from puyu.files import write_json, write_text
from puyu.log import Progress
from puyu.types import LanguageModel

OpenModel = Callable[[str, Path], AbstractContextManager[LanguageModel]]


class EvalConfig(Config):
    """What to evaluate, on what."""

    models: dict[str, Path] = Field(default_factory=dict)
    """Name in the tables -> checkpoint folder, in the order of the columns."""
    tasks: list[TaskRow] = Field(default_factory=list)
    """The tasks, in the order of the rows."""
    seed: int = 0
    """Seeds the draw of `limit` samples, the sampling of answers and the bootstrap."""
    concurrency: int = Field(16, ge=1)
    """Samples in flight at once."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that one sample may take before it is counted as `timeout`."""


@dataclass(frozen=True, slots=True)
class _Work:
    """A task on a model."""

    task: Task
    model: str
    identity: str


def run(config: EvalConfig, *, out: Path, open_model: OpenModel) -> dict[str, Any]:
    """Evaluate every model on every task; writes logs, `summary.json`, `table.txt`; returns the key numbers."""
    tasks = _tasks(config)
    total = sum(len(task.samples) for task in tasks) * len(config.models)
    progress = Progress("eval", total, unit="sample")
    logs: list[EvalLog] = []
    for name, path in config.models.items():
        mark = fingerprint(path)
        work = [_Work(task, name, identify(task, mark)) for task in tasks]
        logs += _run_model(config, work, out=out, progress=progress, open_it=partial(open_model, name, path))
    progress.close()
    lines = compare(logs, {task.name: task.metrics for task in tasks}, seed=config.seed)
    write_json(out / "summary.json", to_json(lines))
    write_text(out / "table.txt", to_text(lines) + "\n")
    return _numbers(lines, logs)


def _tasks(config: EvalConfig) -> list[Task]:
    if not config.models or not config.tasks:
        raise ConfigError("an evaluation needs `models` and `tasks`", remedy="see docs/eval.md for an example")
    tasks = [build_task(row, seed=config.seed) for row in config.tasks]
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two tasks have the name {twice[0]!r}", remedy="give each its own `name`")
    for name in [*names, *config.models]:
        if not name or any(mark in name for mark in "/\\\0") or name.startswith("."):
            raise ConfigError(f"{name!r} cannot be the name of a file", remedy="use letters, digits, - and _")
    return tasks


def _run_model(
    config: EvalConfig,
    work: Sequence[_Work],
    *,
    out: Path,
    progress: Progress,
    open_it: Callable[[], AbstractContextManager[LanguageModel]],
) -> list[EvalLog]:
    """All tasks on one model. The model is not opened when every log is there already."""
    logs = [finished(out, item.task, model=item.model, identity=item.identity) for item in work]
    ready = [log for log in logs if log is not None]
    if len(ready) == len(work):
        progress.update(sum(len(log.samples) for log in ready))
        return ready
    with open_it() as model:
        return asyncio.run(_evaluate_all(config, work, out=out, progress=progress, model=model))


async def _evaluate_all(
    config: EvalConfig, work: Sequence[_Work], *, out: Path, progress: Progress, model: LanguageModel
) -> list[EvalLog]:
    logs = []
    for item in work:
        log = await evaluate(
            item.task,
            model,
            name=item.model,
            identity=item.identity,
            folder=out,
            limits=Limits(config.concurrency, config.timeout),
            on_sample=_counter(progress, item),
        )
        logs.append(log)
    return logs


def _counter(progress: Progress, item: _Work) -> Callable[[SampleLog], None]:
    return lambda log: progress.update(model=item.model, task=item.task.name)


def _numbers(lines: Sequence[Line], logs: Sequence[EvalLog]) -> dict[str, Any]:
    """Key numbers for the lineage: each result with its standard error, and what became of the samples."""
    results: dict[str, dict[str, Mapping[str, float]]] = {}
    for line in lines:
        for model, found in line.results.items():
            cell = {"value": found.value, "stderr": found.stderr, "low": found.low, "high": found.high, "n": found.n}
            results.setdefault(model, {})[f"{line.task}.{line.metric.name}"] = cell
    statuses: dict[str, int] = {}
    for log in logs:
        for status, count in log.counts.items():
            statuses[status] = statuses.get(status, 0) + count
    return {"samples": sum(len(log.samples) for log in logs), "statuses": statuses, "results": results}
