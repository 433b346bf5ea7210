"""train.12a, train.12b: what `puyu plan` says against real steps of the Trainer on this machine's CPU.

    python bench/train_plan.py [--save] [--quick]

Memory: several shapes, precisions, numbers of micro-batches and layouts, in one process and in two; the plan's peak of
live tensor bytes against the largest of the processes', counted operation by operation in the second and later steps.
Time: the plan's five fastest layouts of a small model on two processes, of different sizes or extents, each run several
times in turns with the others; the rank correlation (Spearman) is of the predicted and the median measured seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch

from puyu.model.config import ModelConfig
from puyu.train.layouts.config import LayoutConfig
from puyu.train.planning.job import Job
from puyu.train.planning.memory import peak_of
from puyu.train.planning.search import Row, search
from puyu.train.planning.speed import probe_cpu

SHAPE = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 352}


def case(
    dtype: str = "float32", *, rows: int = 4, row: int = 128, settings: Any = None, **model: Any
) -> dict[str, Any]:
    """What `plan_worker.measured` reads; `rows` of a micro-batch, over all readers."""
    shape = {"vocab_size": 512, **SHAPE, **model}
    return {"model": shape, "rows": rows, "row": row, "dtype": dtype, "settings": settings or {}}


ALONE = [
    case(),
    case("bfloat16"),
    case("float64", rows=2),
    case(vocab_size=8192),
    case(rows=8, hidden_size=256, intermediate_size=704, vocab_size=128),
    case(rows=2, settings={"accumulate": 3}),
    case("bfloat16", num_layers=1, vocab_size=20000, hidden_size=64),
    case(num_layers=12, rows=2, row=64),
    case(rows=1, row=512, tie_embeddings=True),
]
TOGETHER = [case(settings={"layout": layout} | ({"accumulate": 4} if "pipeline" in layout else {})) for layout in (
    {}, {"params": "replica", "grads": "replica"}, {"params": "replica", "grads": "replica", "states": "replica"},
    {"params": "replica"}, {"tensor": 2}, {"sequence": 2}, {"sequence": 2, "attention": "ring"}, {"pipeline": 2},
    {"pipeline": 2, "schedule": "gpipe"}, {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zero-bubble"},
)]  # fmt: skip
TOGETHER += [case("bfloat16", rows=2, settings={"accumulate": 2}), case(vocab_size=8192)]


def measure(cases: Sequence[dict[str, Any]], world: int) -> list[dict[str, float]]:
    """Of each case the largest of the processes' numbers."""
    worker = Path(__file__).with_name("plan_worker.py")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "cases.json"
        file.write_text(json.dumps(list(cases)))
        command = [sys.executable, str(worker), str(file)]
        running = [
            subprocess.Popen([*command, str(rank), str(world), f"{name}/store"], stdout=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a worker failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [{key: max(row[key] for row in rows) for key in rows[0]} for rows in zip(*found, strict=True)]


def job_of(given: dict[str, Any]) -> Job:
    tokens = given["rows"] * given["row"] * given["settings"].get("accumulate", 1)
    return Job(ModelConfig(**given["model"]), given["row"], tokens, getattr(torch, given["dtype"]), cpu=True)


def memory_errors(notes: dict[str, Any], *, quick: bool) -> list[float]:
    """Relative error of each case."""
    errors = []
    for world, cases in ((1, ALONE), (2, TOGETHER)):
        cases = cases[:2] if quick else cases
        for given, found in zip(cases, measure(cases, world), strict=True):
            settings = given["settings"]
            layout, accumulate = LayoutConfig(**settings.get("layout", {})), settings.get("accumulate", 1)
            said = peak_of(job_of(given), layout, processes=world, accumulate=accumulate).total
            errors.append(abs(said / found["peak"] - 1))
            name = f"{world} x {given['dtype']} {given['model']['vocab_size']} {json.dumps(settings)}"
            notes[f"{name} rows {given['rows']}"] = {"said": said, "measured": found["peak"]}
            print(f"  {errors[-1]:6.2%}  {name}", file=sys.stderr)
    return errors


def fastest(given: dict[str, Any], world: int, count: int) -> list[Row]:
    """The plan's best layouts, one of each set of sizes and extents."""
    job = job_of(given)
    torch.set_num_threads(1)
    device = replace(probe_cpu(job.dtype), capacity=1e15)
    kept: dict[Any, Row] = {}
    for row in search(job, device, processes=world).best:
        kept.setdefault(tuple(row.layout.model_dump(exclude={"attention", "schedule", "grads"}).values()), row)
    return list(kept.values())[:count]


def ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(i) for i in range(len(values))]


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation without ties."""
    count = len(one)
    squares = sum((a - b) ** 2 for a, b in zip(ranks(one), ranks(two), strict=True))
    return 1 - 6 * squares / (count * (count**2 - 1))


def time_correlation(notes: dict[str, Any], *, world: int, turns: int) -> float:
    given = case(rows=4, row=64, hidden_size=512, intermediate_size=1408, num_layers=6, num_heads=8, num_kv_heads=4)
    rows = fastest(given, world, 5)
    cases = []
    for row in rows:
        settings = {"layout": row.layout.model_dump(exclude_defaults=True), "accumulate": row.accumulate}
        cases.append({**given, "rows": given["rows"] // row.accumulate, "settings": settings, "count": False})
    found: list[list[float]] = [[] for _ in rows]
    for _ in range(turns):
        for seconds, result in zip(found, measure(cases, world), strict=True):
            seconds.append(result["seconds"])
    medians = [statistics.median(seconds) for seconds in found]
    for row, median in zip(rows, medians, strict=True):
        notes[f"{world} processes: {row.words}"] = {"said": row.seconds.total, "measured": median}
        print(f"  said {row.seconds.total:.3f} s, measured {median:.3f} s: {row.words}", file=sys.stderr)
    return spearman([row.seconds.total for row in rows], medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cases of each, one turn: a trial, no result")
    parser.add_argument("--turns", type=int, default=3, help="runs of each layout")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("train_plan", versions={"torch": torch.__version__}, before={})
    notes: dict[str, Any] = {}
    errors = memory_errors(notes, quick=given.quick)
    rho = time_correlation(notes, world=2, turns=1 if given.quick else given.turns)
    run.notes = {"cases": dict(Counter(key[0] for key in notes)), **notes}
    samples = [harness.Samples("train.12a", [max(errors)]), harness.Samples("train.12b", [rho])]
    run.finish(samples, save=given.save and not given.quick)


if __name__ == "__main__":
    main()
