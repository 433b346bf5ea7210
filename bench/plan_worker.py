"""A worker of train_plan.py: real steps of the Trainer in one or several processes, their time and live tensor bytes.

python bench/plan_worker.py CASES.json RANK WORLD STORE      CASES: a list of what `case_of` reads
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parent.parent))
from puyu.configure import build
from puyu.data.packing import Batch, Piece, pack_pieces
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.train.objectives import lm_loss
from puyu.train.planning.job import Job
from puyu.train.planning.live import LiveBytes
from puyu.train.planning.trace import Checkpoint
from puyu.train.stage import place
from puyu.train.trainer import Trainer, TrainerConfig


class FullRows:
    """Rows of random tokens, one document each; every process reads its share."""

    def __init__(self, rows: int, row: int, vocab: int) -> None:
        self.rows, self.row, self.vocab, self.drawn = rows, row, vocab, 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        ids = torch.randint(self.vocab, (self.rows, self.row + 1), generator=generator)[rank::world].tolist()
        return pack_pieces([Piece(line[:-1], next_id=line[-1]) for line in ids])

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load(self, state: Any, /) -> None:
        self.drawn = state["drawn"]


def job_of(given: dict[str, Any]) -> tuple[Job, int, Checkpoint]:
    """What is planned, micro-batches, and what is computed again."""
    settings = build(TrainerConfig, {"steps": 1} | given["settings"])
    tokens = given["rows"] * given["row"] * settings.accumulate
    model, dtype = ModelConfig(**given["model"]), getattr(torch, given["dtype"])
    job = Job(model, given["row"], tokens, dtype, cpu=True, optim=settings.optim, memory=settings.memory)
    return job, settings.accumulate, settings.memory.checkpoint


def measured(case: dict[str, Any], out: Path, *, count: bool, steps: int = 4) -> dict[str, float]:
    """Of one case: the peak of live bytes in a later step, or the median seconds of a step."""
    model = CausalLM(ModelConfig(**case["model"]))
    init_weights(model, seed=0)
    model = place(model, dtype=case["dtype"], device=torch.device("cpu"))
    source = FullRows(case["rows"], case["row"], case["model"]["vocab_size"])
    settings = build(TrainerConfig, {"steps": steps, "checkpoint_every": 0} | case["settings"])
    peaks: list[int] = []
    seconds: list[float] = []
    trainer = Trainer(model, lm_loss, source, settings, out=out)
    if not count:
        trainer.on_step = lambda done, numbers: seconds.append(numbers["seconds"])
        trainer.fit()
        return {"seconds": statistics.median(seconds[1:])}
    held = [piece.tensor for piece in trainer.layout.pieces()]
    with LiveBytes([*held, *model.buffers()]) as live:
        del held

        def mark(done: int, _: dict[str, float]) -> None:
            peaks.append(live.peak)
            live.mark()

        trainer.on_step = mark
        trainer.fit()
    return {"peak": max(peaks[1:])}


def main(cases: str, rank: str, world: str, store: str) -> None:
    torch.set_num_threads(1)
    if int(world) > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world))
    found = []
    for number, case in enumerate(json.loads(Path(cases).read_text())):
        found.append(measured(case, Path(f"{store}-{number}"), count=case.get("count", True)))
        if int(world) > 1:
            dist.barrier()
    print(json.dumps(found), flush=True)
    if int(world) > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
