"""The runner: samples in flight up to a bound, one counted status for each, a log that a kill cannot hurt.

While a task runs, `<task>/<model>.partial.jsonl` grows by one line per finished sample; a run that starts again with
the same identity asks only for the rest. At the end `<task>/<model>.json` (the EvalLog, samples in the task's order)
replaces it. An item that fails is a result, not an end: only if every item fails in the model is that an error.

    log = await evaluate(task, model, name="ppo", identity=identify(task, fingerprint), folder=Path("eval"))
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from puyu.errors import PuyuError
from puyu.eval.sample import EvalLog, Sample, SampleLog, Status
from puyu.eval.task import Task, judge, reduce
from puyu.files import atomic_write, disk_errors, hash_file, hash_json, read_json, read_jsonl, write_json
from puyu.log import logger
from puyu.types import LanguageModel

VERSION = 1
"""Bumped by hand when solvers, scorers or logs change their meaning; part of every identity."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how long one sample may take."""

    concurrency: int = 16
    seconds: float = 300.0


def identify(task: Task, fingerprint: str) -> str:
    """What a result depends on: samples, settings, metrics, the model's files, the version of this code."""
    metrics = [metric.name for metric in task.metrics]
    samples = [sample.to_json() for sample in task.samples]
    return hash_json([VERSION, task.name, dict(task.settings), metrics, samples, fingerprint])


def fingerprint(path: Path) -> str:
    """Hash of a checkpoint's weights, configs and tokenizer; receipts and metrics do not count.

    A path that is no folder (a hub name, an address) stands for itself.
    """
    if not path.is_dir():
        return str(path)
    apart = {"lineage.json", "metrics.json"}
    kinds = {".safetensors", ".json", ".model", ".jinja", ".gguf"}
    members = sorted(p for p in path.iterdir() if p.suffix in kinds and p.name not in apart)
    return hash_json([[member.name, hash_file(member)] for member in members])


def log_path(folder: Path, task: str, model: str) -> Path:
    """Where the finished log of a task on a model lies."""
    return folder / task / f"{model}.json"


def finished(folder: Path, task: Task, *, model: str, identity: str) -> EvalLog | None:
    """The finished log of exactly this run, or None."""
    path = log_path(folder, task.name, model)
    if not path.is_file():
        return None
    value = read_json(path)
    return EvalLog.from_json(value) if value.get("identity") == identity else None


async def evaluate(
    task: Task,
    model: LanguageModel,
    *,
    name: str,
    identity: str,
    folder: Path,
    limits: Limits = Limits(),
    on_sample: Callable[[SampleLog], None] = lambda log: None,
) -> EvalLog:
    """Ask what is left, judge, log each sample as it ends; returns the finished log (at once if there is one)."""
    if found := finished(folder, task, model=name, identity=identity):
        return found
    partial = log_path(folder, task.name, name).with_suffix(".partial.jsonl")
    done = {log.sample.id: log for log in _read_partial(partial, identity)}
    for log in done.values():
        on_sample(log)
    with _PartialLog(partial, identity, list(done.values())) as stream:

        def keep(log: SampleLog) -> None:
            done[log.sample.id] = log
            stream.append(log)
            on_sample(log)

        await _ask_all(task, model, [s for s in task.samples if s.id not in done], limits=limits, keep=keep)
    logs = [done[sample.id] for sample in task.samples]
    _refuse_total_failure(task, name, logs, partial)
    result = reduce(task, model=name, identity=identity, logs=logs)
    write_json(log_path(folder, task.name, name), result.to_json())
    partial.unlink()
    return result


async def _ask_all(
    task: Task, model: LanguageModel, samples: list[Sample], *, limits: Limits, keep: Callable[[SampleLog], None]
) -> None:
    """A fixed number of workers take samples from one iterator, in order."""
    todo = iter(samples)

    async def work() -> None:
        for sample in todo:
            keep(await ask(task, model, sample, seconds=limits.seconds))

    workers = [asyncio.create_task(work()) for _ in range(min(limits.concurrency, len(samples)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def ask(task: Task, model: LanguageModel, sample: Sample, *, seconds: float) -> SampleLog:
    """One sample to its counted end. What a model or a server can do wrong is counted; our own bugs are raised."""
    try:
        async with asyncio.timeout(seconds):
            output = await task.solver(sample, model)
    except TimeoutError:
        return SampleLog(sample, Status.TIMEOUT, error=f"no answer within {seconds:g} s")
    except (PuyuError, OSError, RuntimeError, ValueError) as error:
        return SampleLog(sample, Status.MODEL_ERROR, error=f"{type(error).__name__}: {error}")
    return judge(task, sample, output)


def _refuse_total_failure(task: Task, name: str, logs: list[SampleLog], partial: Path) -> None:
    failed = [log for log in logs if log.status in (Status.MODEL_ERROR, Status.TIMEOUT)]
    if len(failed) < len(logs):
        return
    partial.unlink()  # these are no results: the next run must ask again
    raise PuyuError(
        f"every sample ({len(logs)}) of task {task.name!r} failed on model {name!r}; the first: {logs[0].error}",
        remedy="check that the model answers (puyu chat), then run the same command again",
    )


# --- the log of a run in progress --------------------------------------------------------------------------------


def _read_partial(path: Path, identity: str) -> Iterator[SampleLog]:
    """Samples that an earlier run with the same identity finished; a torn line is asked again."""
    if not path.is_file():
        return
    rows: Iterator[Any] = read_jsonl(path, quarantine=lambda bad: logger.warning("torn line, asked again: %s", bad))
    header: Any = next(rows, {})
    if not isinstance(header, dict) or header.get("identity") != identity:
        return
    for row in rows:
        yield SampleLog.from_json(row)


class _PartialLog:
    """Appends one line per finished sample, flushed at once; opens with the lines that are already good."""

    def __init__(self, path: Path, identity: str, kept: list[SampleLog]) -> None:
        self.path = path
        with atomic_write(path) as stream:
            stream.write(json.dumps({"identity": identity}) + "\n")
            stream.writelines(_line(log) for log in kept)
        self.stream: TextIO = open(path, "a", encoding="utf-8", errors="surrogatepass")  # noqa: SIM115 - see __exit__

    def append(self, log: SampleLog) -> None:
        with disk_errors(self.path):
            self.stream.write(_line(log))
            self.stream.flush()

    def __enter__(self) -> _PartialLog:
        return self

    def __exit__(self, *unused: object) -> None:
        with disk_errors(self.path):
            os.fsync(self.stream.fileno())
            self.stream.close()


def _line(log: SampleLog) -> str:
    return json.dumps(log.to_json(), ensure_ascii=True) + "\n"
