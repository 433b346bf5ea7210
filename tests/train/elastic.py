"""Runs that are killed and go on in another world and layout, with a ledger of every token that was drawn.

Used by test_elastic.py in part and by bench/train_elastic.py in full.
"""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file

from puyu.data.mix import Mixture
from puyu.data.packing import PretrainSource
from puyu.dist import current_world
from puyu.errors import TrainingError
from puyu.model.config import ExpertShape
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.corpus import open_corpus
from puyu.train.layouts import LayoutConfig
from puyu.train.layouts.certify import spawn
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train import toys

DENSE = {"num_layers": 4}
SPARSE = {"num_layers": 4, "family": "mixtral", "experts": ExpertShape(count=4, per_token=2, size=8)}
RING = {"sequence": 2, "attention": "ring"}
HALVES = {"params": "partial", "grads": "partial", "states": "full", "shard_size": 2}
LINE = {"pipeline": 2}
TENSOR = {"tensor": 2}
REPLICA = {"params": "replica", "grads": "replica", "states": "replica"}
MORE = (REPLICA, REPLICA | {"states": "full"}, {"sequence": 2}, LINE | {"schedule": "interleaved"})
TWO = ({}, TENSOR, RING, LINE, *MORE)
FOUR = ({}, HALVES, TENSOR, RING, LINE, {"pipeline": 4}, LINE | TENSOR, TENSOR | {"sequence": 2})
LAYOUTS = {1: ({},), 2: TWO, 3: ({}, REPLICA), 4: FOUR}
"""By the number of processes."""
EXPERT_LAYOUTS = {1: ({},), 2: ({}, {"expert": 2}), 3: ({},), 4: ({"expert": 4}, {"expert": 2}, TENSOR | {"expert": 2})}


@dataclass(frozen=True)
class Attempt:
    """One start of a run: `kill` says who is killed, where (in its n-th draw, or after its n-th step)."""

    world: int
    layout: dict = field(default_factory=dict)
    kill: tuple[int, str, int] | None = None


def prepare(root):
    """What all runs read."""
    toys.tokenizer(root / "tokenizer")
    toys.corpus(root / "data")
    corpus(root)


def corpus(root):
    return open_corpus(root / "data", Tokenizer.load(root / "tokenizer"), root / "shards", heldout=0.1)


class Ledger:
    """A source that writes down what each reader draws, document by document, and may die of it."""

    def __init__(self, inner, path, kill=None):
        self.inner, self.path, self.kill, self.drawn = inner, path, kill, 0

    def next_batch(self, *, rank=0, world=1):
        batch = self.inner.next_batch(rank=rank, world=world)
        if batch.num_tokens > 1:  # a reader without work gets a token that nobody learns
            docs = [batch.tokens_T[a:b].tolist() for a, b in zip(batch.starts_S, batch.ends_S, strict=True)]
            with self.path.open("a") as stream:
                stream.write(json.dumps({"draw": self.drawn, "reader": rank, "docs": docs}) + "\n")
        self.drawn += 1
        die(self.kill, "draw", self.drawn)
        return batch

    def state(self):
        return {"inner": self.inner.state(), "drawn": self.drawn}

    def load(self, state):
        self.inner.load(state["inner"])
        self.drawn = state["drawn"]


def die(kill, where, number):
    if kill == (current_world().rank, where, number):
        os.kill(os.getpid(), signal.SIGKILL)


def train(root, out, number, attempt, sparse=False, steps=12):
    """One process of one attempt."""
    kept = corpus(root).train
    source = PretrainSource(kept, Mixture(kept, {"web": 2.0, "code": 1.0}, seed=0), seq_len=24, rows=3)
    ledger = Ledger(source, out / f"ledger-{number}-{current_world().rank}.jsonl", attempt.kill)
    vocabulary = -(-Tokenizer.load(root / "tokenizer").vocab_size // 4) * 4  # tensor parallel cuts it
    model = toys.model(vocab_size=vocabulary, **(SPARSE if sparse else DENSE))
    config = TrainerConfig(
        steps=steps,
        optim=OptimConfig(lr=0.01, warmup=2, clip=0.5),
        accumulate=2,
        checkpoint_every=2,
        checkpoint_wait=60,
        layout=LayoutConfig(**attempt.layout),
        health={"digest_every": 1},
    )
    trainer = Trainer(model, lm_loss, ledger, config, out=out)
    trainer.on_step = lambda done, _: die(attempt.kill, "step", done)
    trainer.fit()


def run(root, out, attempts, *, sparse=False):
    """All attempts, one after the other; those that kill must end by it."""
    out.mkdir(parents=True)
    for number, attempt in enumerate(attempts):
        try:
            spawn(attempt.world, train, root, out, number, attempt, sparse)
        except TrainingError as error:
            assert attempt.kill and str(-signal.SIGKILL) in str(error), f"{attempt}: {error}"
        else:
            assert attempt.kill is None, f"{attempt} was to be killed"


def drawn(out):
    """Draw -> documents with their counts, as the run that ended has seen them, and tokens that readers of the same
    share did not agree on."""
    found, apart = {}, 0
    for number in range(len({path.name.split("-")[1] for path in out.glob("ledger-*")})):
        shares = {}
        for path in sorted(out.glob(f"ledger-{number}-*")):
            for row in map(json.loads, path.read_text().splitlines()):
                if shares.setdefault((row["draw"], row["reader"]), row["docs"]) != row["docs"]:
                    apart += sum(map(len, row["docs"]))
        again = {draw: Counter() for draw, _ in shares}
        for (draw, _), docs in shares.items():
            again[draw].update(map(tuple, docs))
        first = min(again, default=0)
        found = {draw: docs for draw, docs in found.items() if draw < first or not again} | again
    return found, apart


def differences(one, two):
    """(largest difference of a loss, tokens lost or drawn twice) of two finished runs."""
    losses = [toys.losses(out) for out in (one, two)]
    for path in (out / "train_state" / "health.jsonl" for out in (one, two)):
        assert not path.exists() or "replicas differ" not in path.read_text()
    assert len(losses[0]) == len(losses[1])
    (mine, apart), (wanted, _) = drawn(one), drawn(two)
    tokens = apart
    for draw in mine.keys() | wanted.keys():
        a, b = mine.get(draw, Counter()), wanted.get(draw, Counter())
        tokens += sum(len(doc) * count for doc, count in ((a - b) + (b - a)).items())
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), tokens


def random_attempts(rng, *, sparse, steps=12):
    """Two kills, then to the end; each time in another world or layout."""
    layouts, found = EXPERT_LAYOUTS if sparse else LAYOUTS, []
    for number in range(3):
        world = rng.choice([size for size in (1, 2, 3, 4) if not found or size != found[-1].world or size in (2, 4)])
        layout = rng.choice([one for one in layouts[world] if not found or one != found[-1].layout] or [{}])
        where, early = rng.choice(("draw", "step")), 2 + 4 * number
        at = rng.randint(early, early + 5) * (2 if where == "draw" else 1) - (where == "draw" and rng.random() < 0.5)
        kill = (rng.randrange(world), where, min(at, 2 * steps if where == "draw" else steps)) if number < 2 else None
        found.append(Attempt(world, layout, kill))
    return found


# --- one process, killed from outside ---------------------------------------------------------------------------------


def alone(out, steps, waits=False):
    """A run in float32 whose weights are written when it ends; or it waits in its last step, to be killed."""
    torch.set_num_threads(1)
    config = TrainerConfig(steps=steps, optim=OptimConfig(lr=0.01), checkpoint_every=5, checkpoint_wait=60)
    trainer = Trainer(toys.model(dtype=torch.float32), lm_loss, toys.source(), config, out=out)
    trainer.on_step = lambda done, _: signal.pause() if waits and done == steps else None
    trainer.fit()
    save_file(trainer.full_weights(), out / "weights.safetensors")


def rows(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_and_again(out, *, kills, steps, rng, longest):
    """The same call until it is done, killed at random moments, each time further on; returns the number of kills."""
    context, done = multiprocessing.get_context("forkserver"), 0
    context.set_forkserver_preload([__name__])
    while True:
        process = context.Process(target=alone, args=(out, steps, done < kills))
        process.start()
        while done < kills and process.is_alive() and rows(out) < steps * (done + 1) // (kills + 1):
            time.sleep(0.001)
        if done < kills:
            time.sleep(rng.uniform(0, longest))
            process.kill()
        process.join()
        if process.exitcode == 0:
            return done
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        done += 1
