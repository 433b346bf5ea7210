"""train.2, 2b, 3: runs that are killed and go on are the runs that were not.

    python bench/train_elastic.py [--save] [--runs 12] [--kills 20]

train.2: a small model on the packed stream of pretraining, float64, 12 steps of two micro-batches, a state every other
step. A run is started three times, each time with another number of processes (1 to 4) or another layout (data parallel
with any sharding, tensor, sequence, pipeline, experts, and several of them), drawn by chance; twice a process that is
drawn by chance kills itself (SIGKILL) in a draw or after a step that is drawn by chance, and its peers are killed, too.
Losses are compared with one process that was not interrupted. train.2b: every reader writes down what it draws; what
the surviving history has drawn in each step is compared with the same process, document by document.

train.3: one process in float32, killed from outside at random moments of its start, its steps and its saves; the same
call again until it is done. Weights are compared with those of a whole run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file

from tests.train.elastic import (
    Attempt,
    alone,
    differences,
    kill_and_again,
    prepare,
    random_attempts,
    run,
    train,
)


def elastic(root: Path, *, runs: int, seed: int) -> tuple[float, int, list[Any]]:
    """Largest difference of a loss and tokens lost or repeated, over all runs; what was drawn."""
    torch.set_num_threads(1)
    prepare(root)
    for sparse in (False, True):
        whole = root / f"whole-{sparse}"
        whole.mkdir()
        train(root, whole, 0, Attempt(1), sparse)
    rng, loss, tokens, drawn = random.Random(seed), 0.0, 0, []
    for number in range(runs):
        sparse = number % 4 == 3
        attempts, out = random_attempts(rng, sparse=sparse), root / f"run-{number}"
        run(root, out, attempts, sparse=sparse)
        found = differences(out, root / f"whole-{sparse}")
        loss, tokens = max(loss, found[0]), tokens + found[1]
        drawn.append([[one.world, one.layout, one.kill] for one in attempts])
        print(f"  run {number + 1}/{runs}: {found[0]:.2g} nats, {found[1]} tokens, {drawn[-1]}", file=sys.stderr)
    return loss, tokens, drawn


def kills(root: Path, *, count: int, seed: int) -> tuple[int, int]:
    """Tensors that are not bit-equal, and kills."""
    steps, began = 45 * count, time.perf_counter()
    alone(root / "whole", steps)
    longest = (time.perf_counter() - began) / count
    met = kill_and_again(root / "killed", kills=count, steps=steps, rng=random.Random(seed), longest=longest)
    whole, killed = (load_file(root / name / "weights.safetensors") for name in ("whole", "killed"))
    return sum(not torch.equal(whole[name], killed[name]) for name in whole), met


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=12, help="runs that change world and layout")
    parser.add_argument("--kills", type=int, default=20, help="kills of the single process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    result = harness.Run("train_elastic", versions={"torch": torch.__version__}, before={})
    with tempfile.TemporaryDirectory() as name:
        loss, tokens, drawn = elastic(Path(name), runs=arguments.runs, seed=arguments.seed)
        unequal, met = kills(Path(name) / "alone", count=arguments.kills, seed=arguments.seed)
    result.notes = {"runs": drawn, "kills": met}
    found = {"train.2": loss, "train.2b": tokens, "train.3": unequal}
    result.finish([harness.Samples(id, [value]) for id, value in found.items()], save=arguments.save)


if __name__ == "__main__":
    main()
