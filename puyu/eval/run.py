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
from puyu.documents.contamination import FILE, Contamination, load_contamination
from puyu.errors import ConfigError
from puyu.eval.compare import Line, Subsets, compare, to_json, to_text
from puyu.eval.contamination import check_it_fits, corpora_without, counts_of, files_of, split
from puyu.eval.runner import Limits, evaluate, fingerprint, finished, identify
from puyu.eval.sample import EvalLog, SampleLog
from puyu.eval.task import Task
from puyu.eval.tasks import TaskRow, build_task
from puyu.files import write_json, write_text
from puyu.log import Progress, logger
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
    contamination: Path | None = None
    """Report of `puyu data contamination` (or its folder) for all models; null: those that their lineages lead to."""

    def inputs(self) -> list[tuple[str, Path]]:
        """Besides what stands here, the reports of contamination that the models' lineages lead to."""
        named = [(name, path) for name, path in super().inputs() if name != "contamination"]
        reports = sorted({path for model in self.models for path in self.reports(model)})
        return [*named, *((f"contamination.{number}", path) for number, path in enumerate(reports))]

    def reports(self, model: str) -> list[Path]:
        """The files that say what a model has seen."""
        given = self.contamination
        if given is None:
            return files_of(self.models[model])
        return [given / FILE if given.is_dir() else given]


@dataclass(frozen=True, slots=True)
class _Work:
    """A task on a model."""

    task: Task
    model: str
    identity: str


def run(config: EvalConfig, *, out: Path, open_model: OpenModel) -> dict[str, Any]:
    """Evaluate every model on every task; writes logs, `summary.json`, `table.txt`; returns the key numbers."""
    tasks = _tasks(config)
    subsets = _subsets(config, tasks)
    total = sum(len(task.samples) for task in tasks) * len(config.models)
    progress = Progress("eval", total, unit="sample")
    logs: list[EvalLog] = []
    for name, path in config.models.items():
        mark = fingerprint(path)
        work = [_Work(task, name, identify(task, mark)) for task in tasks]
        logs += _run_model(config, work, out=out, progress=progress, open_it=partial(open_model, name, path))
    progress.close()
    lines = compare(logs, {task.name: task.metrics for task in tasks}, seed=config.seed, subsets=subsets)
    write_json(out / "summary.json", to_json(lines))
    write_text(out / "table.txt", to_text(lines) + "\n")
    return _numbers(lines, logs) | _contamination(subsets)


def _subsets(config: EvalConfig, tasks: Sequence[Task]) -> Subsets:
    """By (task, model), for the models of which a report is known."""
    reports = {path: load_contamination(path) for model in config.models for path in config.reports(model)}
    if config.contamination is not None:
        for path, report in reports.items():
            check_it_fits(report, [row.path for row in config.tasks], path=path)
    found = {}
    for model, checkpoint in config.models.items():
        known: list[Contamination] = [reports[path] for path in config.reports(model)]
        for corpus in corpora_without(checkpoint) if known else ():
            logger.warning("model %r: %s has no report of contamination; what it holds counts as clean", model, corpus)
        for row, task in zip(config.tasks, tasks, strict=True):
            if subsets := split(row.path, [sample.id for sample in task.samples], known):
                found[task.name, model] = subsets
    return found


def _contamination(subsets: Subsets) -> dict[str, Any]:
    """Counts by model and task; nothing where no report is known."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for (task, model), found in subsets.items():
        counts.setdefault(model, {})[task] = counts_of(found)
    return {"contamination": counts} if counts else {}


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
