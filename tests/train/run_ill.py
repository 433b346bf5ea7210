"""A toy run in this process, one of several or alone, with one fault: `python -m tests.train.run_ill PLAN`.

PLAN is JSON: {"out", "steps", "fault", "rank", "at", "health", "slow"?}. The fault strikes once, while the batch of
step `at` is drawn on `rank`; a file in `out` remembers that it has struck.

    hang    waits for ever           freeze  stops the whole process (SIGSTOP)       kill  SIGKILL

With "slow", drawing takes 0.2 s longer on that rank from the beginning. For the watchdogs no time passes before the
fault has struck, and after it five times as much as on the wall: a busy machine is no fault.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from puyu.dist import current_world
from puyu.errors import PuyuError
from puyu.train import state
from puyu.train.health import Heartbeat
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.parallel import joined
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys


class Faulty:
    """A source with a fault."""

    def __init__(self, plan):
        self.inner, self.plan, self.drawn = toys.source(tokens_per_batch=160), plan, 0

    def next_batch(self, *, rank=0, world=1):
        self.drawn += 1
        if current_world().rank == self.plan["rank"]:
            time.sleep(0.2 * self.plan.get("slow", False))
            if self.drawn == self.plan["at"]:
                self.strike(Path(self.plan["out"]) / "struck")
        return self.inner.next_batch(rank=rank, world=world)

    def strike(self, mark):
        if mark.exists():
            return
        mark.touch()
        if self.plan["fault"] == "hang":
            threading.Event().wait()
        os.kill(os.getpid(), {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}[self.plan["fault"]])

    def state(self):
        return {"drawn": self.drawn, "rows": self.inner.state()}

    def load(self, state):
        self.drawn = state["drawn"]
        self.inner.load(state["rows"])


def watchdog(trainer, mark):
    before = mark.exists()
    heart = Heartbeat(trainer.out / state.FOLDER, trainer.world, trainer.config.health, trainer.journal)
    heart.clock = lambda: 5 * (time.time() - mark.stat().st_mtime) if mark.exists() and not before else 0.0
    return heart


def main(plan):
    torch.set_num_threads(1)
    config = TrainerConfig(
        steps=plan["steps"], optim=OptimConfig(lr=0.01, warmup=2), checkpoint_every=4, health=plan.get("health", {})
    )
    try:
        with joined(torch.device("cpu")):
            trainer = Trainer(toys.model(), lm_loss, Faulty(plan), config, out=Path(plan["out"]))
            with watchdog(trainer, Path(plan["out"]) / "struck") as trainer.heart:
                trainer.fit()
    except PuyuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
