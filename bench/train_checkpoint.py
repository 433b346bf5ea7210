"""train.9a, 9b, 10: what saved states cost, and whether a crash ever leaves a wrong one.

    python bench/train_checkpoint.py [--save] [--pairs 4] [--every 100]

Cost: the real Trainer trains a model whose weights and AdamW moments are 1.06 GB (fp32, 10 layers, 88 M parameters),
256 tokens a step. Stretches of 100 steps with one save and without any follow each other; a stretch with a save stands
between two without, whose mean it is compared with. A delay is a step's time, the save before it included, less the
median of the steps of the stretches without; of each save the longest delay counts. A save that was left out ends the
bench.

Crashes: the file operations of a save are recorded, and what the disk holds after each of them and after each byte of
each write is loaded, once as it stands and once without all that was not synced; one and two processes, a new state and
one in the place of another of its step (which happens to a torn one). Then each file of a state is cut at each byte,
and each bit of it is turned. Wrong is what loads with other values than those that were saved, and a crash during a new
state that loses the one before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch

from puyu.data.packing import Batch
from puyu.log import logger
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights
from puyu.train import state
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.stage import place
from puyu.train.trainer import Trainer, TrainerConfig
from tests.train.crashes import crashes, loaded, small, write, wrong_files

SHAPE = {"hidden_size": 768, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 2048, "vocab_size": 16384}
TOKENS, WARM = 256, 12


class Rows:
    """A BatchSource of random tokens, one document a step."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(self.drawn)
        self.drawn += 1
        tokens_T = torch.randint(SHAPE["vocab_size"], (TOKENS,), generator=generator)
        positions_T, weights_T = torch.arange(TOKENS), torch.ones(TOKENS)
        return Batch(tokens_T, positions_T, tokens_T.roll(-1), weights_T, (0,))

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.drawn = state["drawn"]


class Clock:
    """Times each step from the end of the one before, what stands between two steps (a save) included."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.seconds, self.writing = trainer, dict[int, float](), Counter[int]()
        self._last = time.perf_counter()

    def step(self, done: int, _: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        self.seconds[done], self._last = now - self._last, now
        every = self.trainer.config.checkpoint_every
        self.writing[done // every * every] += not self.trainer.saver._hot.idle()


def cost(out: Path, *, pairs: int, every: int, layers: int) -> tuple[list[float], list[float], dict[str, Any]]:
    """Share of time (%) and longest delay (s) of each save."""
    model = CausalLM(ModelConfig(num_layers=layers, **SHAPE))
    init_weights(model, seed=0)
    model = place(model, dtype="bfloat16", device=torch.device("cpu"))
    steps = every * (2 * pairs + 2)
    config = TrainerConfig(
        steps=steps, optim=OptimConfig(lr=1e-4), checkpoint_every=2 * every, dtype="bfloat16", keep=1
    )
    trainer = Trainer(model, lm_loss, Rows(), config, out=out)
    trainer.done = every - WARM  # the first stretch has no save
    clock = Clock(trainer)
    trainer.on_step = clock.step
    trainer.saver.prepare()
    size = sum(row.nbytes for row in trainer.saver.staging.rows)
    trainer.fit()
    shares, delays = judged(clock.seconds, pairs=pairs, every=every)
    assert trainer.saver._count == pairs + 1, f"{trainer.saver._count - 1} states of {pairs} were saved"
    step = statistics.median(list(clock.seconds.values())[WARM:])
    notes = {"state GB": size / 1e9, "median step s": step, "steps while writing": dict(clock.writing)}
    return shares, delays, notes


def judged(seconds: Mapping[int, float], *, pairs: int, every: int) -> tuple[list[float], list[float]]:
    """Shares and delays. A stretch is `every` steps; the save of step n is part of the time of step n + 1."""

    def stretch(number: int) -> Sequence[float]:
        return [seconds[step] for step in range(number * every + 1, (number + 1) * every + 1)]

    shares, delays = [], []
    for number in range(2, 2 * pairs + 1, 2):
        before, saving, after = (stretch(number + offset) for offset in (-1, 0, 1))
        shares.append(100 * (2 * sum(saving) / sum([*before, *after]) - 1))
        delays.append(max(saving) - statistics.median([*before, *after]))
    return shares, delays


def wrong_states(tmp: Path, counts: Counter[str], *, stride: int) -> int:
    """Crashes and damages after which something wrong loads, or the state before is lost."""
    wrong = 0
    for name, how in {"new": {}, "two processes": {"processes": 2}, "replaced": {"again": True}}.items():
        for power in (False, True):
            folder = tmp / f"{name}-{power}"
            before = 1
            steps = crashes(folder, lambda size: range(0, size, stride), power=power, **how)
            for step in counted(steps, counts, f"crash, {name}"):
                wrong += step == WRONG or (name != "replaced" and (step or 0) < before)
                before = max(before, step or 0)
    write(tmp / "damaged", small(1))
    folder = state.saved(tmp / "damaged")[0].path
    damages = wrong_files(folder, lambda size: range(0, size, stride), lambda _: range(8))
    steps = (guarded(lambda: loaded(tmp / "damaged")) for _ in damages)
    for step in counted(steps, counts, "damage"):
        wrong += step == WRONG
    assert loaded(tmp / "damaged") == 1
    return wrong


WRONG = -1


def guarded(load: Any) -> int | None:
    try:
        return load()
    except AssertionError:
        return WRONG


def counted(steps: Iterator[int | None], counts: Counter[str], name: str) -> Iterator[int | None]:
    while True:
        try:
            step = next(steps)
        except StopIteration:
            return
        except AssertionError:
            step = WRONG
        counts[name] += 1
        counts[f"{name}, loads {step}"] += 1
        yield step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="stretches with a save")
    parser.add_argument("--every", type=int, default=100, help="steps of a stretch")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--stride", type=int, default=1, help="try each so many bytes")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--only", choices=("cost", "crashes"), help="measure one of the two")
    arguments = parser.parse_args()
    if arguments.only != "cost":
        measure_crashes(arguments)
    if arguments.only != "crashes":
        measure_cost(arguments)


def measure_crashes(arguments: argparse.Namespace) -> None:
    """train.10."""
    run = harness.Run("train_checkpoint_crashes", versions={"torch": torch.__version__}, before={})
    counts: Counter[str] = Counter()
    level = logger.level
    logger.setLevel("ERROR")  # thousands of torn states are named
    with tempfile.TemporaryDirectory() as name:
        wrong = wrong_states(Path(name), counts, stride=arguments.stride)
    logger.setLevel(level)
    run.notes = dict(sorted(counts.items()))
    run.finish([harness.Samples("train.10", [wrong])], save=arguments.save)


def measure_cost(arguments: argparse.Namespace) -> None:
    """train.9a and 9b."""
    run = harness.Run("train_checkpoint", versions={"torch": torch.__version__})
    sizes = {name: getattr(arguments, name) for name in ("pairs", "every", "layers")}
    with tempfile.TemporaryDirectory() as name:
        shares, delays, run.notes = cost(Path(name), **sizes)
    run.notes |= {"shares": shares, "delays": delays}
    found = [harness.Samples("train.9a", shares), harness.Samples("train.9b", [max(delays)])]
    run.finish(found, save=arguments.save)


if __name__ == "__main__":
    main()
