"""Several logs -> one table: task x model with intervals, and paired differences between models on the same samples.

Two models are compared on exactly the samples that both were asked (the same ids), with a paired interval. Logs of
different samples are not compared at all: a difference then says nothing.

    print(to_text(compare(logs)))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

from puyu.eval.contamination import SUBSETS, Subset, counts_of
from puyu.eval.sample import EvalLog
from puyu.eval.statistics import Difference, Estimate, paired_difference
from puyu.eval.task import Metric, clusters_of, estimates, metric_value, weights_of

Subsets = Mapping[tuple[str, str], Mapping[str, Subset]]
"""By (task, model): the subset of each sample, by its id; nothing where no report of contamination is known."""


@dataclass(frozen=True, slots=True)
class Pair:
    """How much better or worse model `b` is than model `a`."""

    a: str
    b: str
    difference: Difference


@dataclass(frozen=True, slots=True)
class Part:
    """The samples of one subset: how many there are, and the metric over them (None when none has a value)."""

    samples: int
    result: Estimate | None


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of one task over all models."""

    task: str
    metric: Metric
    results: Mapping[str, Estimate]
    groups: Mapping[str, Mapping[str, Estimate]]
    """By model, then by language."""
    counts: Mapping[str, Mapping[str, int]]
    pairs: tuple[Pair, ...]
    chance: float | None
    parts: Mapping[str, Mapping[Subset, Part]]
    """By model, then by whether its training data hold the sample; without the models of which that is not known."""


def compare(
    logs: Sequence[EvalLog],
    metrics: Mapping[str, Sequence[Metric]],
    *,
    seed: int = 0,
    subsets: Subsets | None = None,
) -> tuple[Line, ...]:
    """One line per task and metric, tasks and models in the order of the logs. `metrics` is by task name."""
    lines = []
    for task in _unique(log.task for log in logs):
        rows = [log for log in logs if log.task == task]
        lines += [_line(task, rows, metric, seed=seed, subsets=subsets or {}) for metric in metrics[task]]
    return tuple(lines)


def _line(task: str, logs: Sequence[EvalLog], metric: Metric, *, seed: int, subsets: Subsets) -> Line:
    pairs = [_pair(a, b, metric, seed=seed) for a, b in combinations(logs, 2)]
    return Line(
        task=task,
        metric=metric,
        results={log.model: log.metrics[metric.name] for log in logs if metric.name in log.metrics},
        groups={
            log.model: {group: found[metric.name] for group, found in log.groups.items() if metric.name in found}
            for log in logs
        },
        counts={log.model: log.counts for log in logs},
        pairs=tuple(pair for pair in pairs if pair is not None),
        chance=logs[0].chance if metric.name in ("acc", "acc_norm") else None,
        parts={log.model: _parts(log, metric, found) for log in logs if (found := subsets.get((task, log.model)))},
    )


def _parts(log: EvalLog, metric: Metric, subsets: Mapping[str, Subset]) -> dict[Subset, Part]:
    """All subsets, also empty ones: their counts add up to the samples."""
    counts, found = counts_of(subsets), {}
    for name in SUBSETS:
        rows = [row for row in log.samples if subsets[row.sample.id] == name]
        found[name] = Part(counts[name], estimates([metric], rows).get(metric.name))
    return found


def _pair(a: EvalLog, b: EvalLog, metric: Metric, *, seed: int) -> Pair | None:
    """The paired difference b - a; None when the two were not asked the same samples or share no value."""
    if [row.sample for row in a.samples] != [row.sample for row in b.samples]:
        return None
    rows = [
        (left, x, y)
        for left, right in zip(a.samples, b.samples, strict=True)
        if (x := metric_value(left, metric)) is not None and (y := metric_value(right, metric)) is not None
    ]
    if not rows:
        return None
    lefts = [(left, x) for left, x, _ in rows]
    difference = paired_difference(
        [x for _, x, _ in rows],
        [y for _, _, y in rows],
        weights=weights_of(lefts),
        clusters=clusters_of(lefts),
        seed=seed,
    )
    return Pair(a.model, b.model, difference)


def to_json(lines: Sequence[Line]) -> dict[str, Any]:
    """The table as `summary.json` holds it."""
    models = _unique(model for line in lines for model in line.results)
    return {"models": models, "lines": [_line_to_json(line) for line in lines]}


def _line_to_json(line: Line) -> dict[str, Any]:
    parts = {model: {name: asdict(part) for name, part in found.items()} for model, found in line.parts.items()}
    return _whole_to_json(line) | ({"contamination": parts} if parts else {})


def _whole_to_json(line: Line) -> dict[str, Any]:
    return {
        "task": line.task,
        "metric": line.metric.name,
        "unit": line.metric.unit,
        "better": line.metric.better,
        "chance": line.chance,
        "results": {model: asdict(estimate) for model, estimate in line.results.items()},
        "groups": {
            model: {group: asdict(estimate) for group, estimate in groups.items()}
            for model, groups in line.groups.items()
            if groups
        },
        "counts": {model: dict(counts) for model, counts in line.counts.items()},
        "differences": [{"a": pair.a, "b": pair.b, **asdict(pair.difference)} for pair in line.pairs],
    }


def to_text(lines: Sequence[Line]) -> str:
    """A table for the terminal: value +- standard error per model, then each model minus the one before it.

    A star marks a difference whose 95 % intervals (normal and bootstrap) both leave out zero. Where reports of
    contamination are known, a row for each subset that is not empty stands below.
    """
    models = _unique(model for line in lines for model in line.results)
    steps = list(pairwise(models))
    head = ["task", "metric", "n", *models, *(f"{b} - {a}" for a, b in steps)]
    rows = []
    for line in lines:
        cells = [_cell(line.results.get(model)) for model in models]
        rows.append([line.task, line.metric.name, _count(line), *cells, *(_step(line, a, b) for a, b in steps)])
        rows += [_part_row(line, name, models) + [""] * len(steps) for name in SUBSETS if _has(line, name)]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _count(line: Line) -> str:
    return str(max((estimate.n for estimate in line.results.values()), default=0))


def _cell(found: Estimate | None) -> str:
    return f"{found.value:.3f} ± {found.stderr:.3f}" if found else "-"


def _has(line: Line, subset: Subset) -> bool:
    return any(parts[subset].samples for parts in line.parts.values())


def _part_row(line: Line, subset: Subset, models: Sequence[str]) -> list[str]:
    """The count of each model where they differ: each has data of its own."""
    parts = [line.parts[model][subset] if model in line.parts else None for model in models]
    counts = [str(part.samples) if part else "-" for part in parts]
    count = counts[0] if len(set(counts)) == 1 else "/".join(counts)
    return ["", f"  {subset}", count, *(_cell(part.result if part else None) for part in parts)]


def _step(line: Line, a: str, b: str) -> str:
    for pair in line.pairs:
        if (pair.a, pair.b) == (a, b):
            found = pair.difference
            star = " *" if found.is_clear else ""
            return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{star}"
    return "-"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
