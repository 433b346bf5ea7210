"""train.12a, train.12b: what `puyu plan` says against real steps of the Trainer on this machine's CPU.

    python bench/train_plan.py [--save] [--quick]

Memory: several shapes, precisions, numbers of micro-batches and layouts, in one process and in two; the plan's peak of
live tensor bytes against the largest of the processes', counted operation by operation in the second and later steps.
Time: first the passes of a block and the collectives are measured, on both processes; with them the plan times all
layouts of a small model. Its fastest five, each said to be a tenth slower than the one before, are run several times in
turns; the rank correlation (Spearman) is of the predicted and the median measured seconds.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import torch
from plan_worker import job_of

from puyu.train.layouts.config import LayoutConfig
from puyu.train.planning import calibrate
from puyu.train.planning.memory import peak_of
from puyu.train.planning.search import Row, search, shapes

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
    case(settings={"memory": {"checkpoint": "full"}}),
    case(settings={"memory": {"checkpoint": "selective"}}),
    case(rows=2, settings={"optim": {"kind": "adamw8"}}),
    case(rows=2, settings={"optim": {"kind": "muon"}}),
]
TOGETHER = [case(settings={"layout": layout} | ({"accumulate": 4} if "pipeline" in layout else {})) for layout in (
    {}, {"params": "replica", "grads": "replica"}, {"params": "replica", "grads": "replica", "states": "replica"},
    {"params": "replica"}, {"tensor": 2}, {"sequence": 2}, {"sequence": 2, "attention": "ring"}, {"pipeline": 2},
    {"pipeline": 2, "schedule": "gpipe"}, {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zero-bubble"},
)]  # fmt: skip
TOGETHER += [case(settings={"layout": {"grads": "replica"}, "accumulate": 2})]
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


def memory_errors(notes: dict[str, Any], *, quick: bool) -> list[float]:
    """Relative error of each case."""
    errors = []
    for world, cases in ((1, ALONE), (2, TOGETHER)):
        cases = cases[:2] if quick else cases
        for given, found in zip(cases, measure(cases, world), strict=True):
            settings, (job, accumulate, checkpoint) = given["settings"], job_of(given)
            layout, how = LayoutConfig(**settings.get("layout", {})), {"processes": world, "accumulate": accumulate}
            said = peak_of(job, layout, **how, checkpoint=checkpoint).total
            errors.append(abs(said / found["peak"] - 1))
            name = f"{world} x {given['dtype']} {given['model']['vocab_size']} {json.dumps(settings)}"
            notes[f"{name} rows {given['rows']}"] = {"said": said, "measured": found["peak"]}
            print(f"  {errors[-1]:6.2%}  {name}", file=sys.stderr)
    return errors


APART = 1.1
"""How much slower than the one before a layout must be said to be: no noise may decide the order of two."""


def fastest(given: dict[str, Any], world: int, count: int) -> list[Row]:
    """The plan's best layouts, each `APART` from the one before."""
    job, *_ = job_of(given)
    device = calibrate.cpu(job, shapes(job, world), processes=world, capacity=1e15)
    kept: list[Row] = []
    for row in search(job, device, processes=world, enough=1000).best:
        if not kept or row.seconds.total > APART * kept[-1].seconds.total:
            kept.append(row)
    if len(kept) < count:
        raise SystemExit(f"only {len(kept)} layouts lie apart")
    return kept[:count]


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
    found = [result["seconds"] for result in measure(cases * turns, world)]
    medians = [statistics.median(found[number :: len(rows)]) for number in range(len(rows))]
    for number, (row, median) in enumerate(zip(rows, medians, strict=True)):
        note = {"said": row.seconds.total, "measured": median, "turns": found[number :: len(rows)]}
        notes[f"{world} processes: {row.words}"] = note | {"parts": asdict(row.seconds)}
        print(f"  said {row.seconds.total:.3f} s, measured {median:.3f} s: {row.words}", file=sys.stderr)
    return spearman([row.seconds.total for row in rows], medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two cases of each, one turn: a trial, no result")
    parser.add_argument("--turns", type=int, default=5, help="runs of each layout")
    parser.add_argument("--only-time", action="store_true", help="leave memory out: a trial, no result")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    given = parser.parse_args()
    run = harness.Run("train_plan", versions={"torch": torch.__version__}, before={})
    notes: dict[str, Any] = {}
    errors = [0.0] if given.only_time else memory_errors(notes, quick=given.quick)
    rho = time_correlation(notes, world=2, turns=1 if given.quick else given.turns)
    run.notes = {"cases": dict(Counter(key[0] for key in notes)), **notes}
    samples = [harness.Samples("train.12a", [max(errors)]), harness.Samples("train.12b", [rho])]
    run.finish(samples, save=given.save and not given.quick and not given.only_time)


if __name__ == "__main__":
    main()
