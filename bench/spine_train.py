"""spine.4: training tokens a second of our Trainer against a plain transformers loop of the same shape.

    python bench/spine_train.py [--save] [--pairs 7] [--peer-python PATH]

Both train the same checkpoint on the same rows: 16 rows of 512 tokens a step, bf16 products with fp32 weights, fused
AdamW, gradients clipped at 1. A sample is the speed over five steps, everything included that the loop does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import nano_shape

WARM_STEPS, SAMPLE_STEPS = 4, 5


def ours(folder: Path) -> None:
    """The worker of our side: the real Trainer, held between samples by its own callback."""
    import torch
    import worker

    from puyu.model.checkpoint import load_model
    from puyu.train.objectives import lm_loss
    from puyu.train.optim import OptimConfig
    from puyu.train.stage import place
    from puyu.train.trainer import Trainer, TrainerConfig

    device = torch.device("cpu")
    model = place(load_model(folder), dtype="bfloat16", device=device)
    turns = Turns(worker)
    config = TrainerConfig(steps=100_000, optim=OptimConfig(lr=1e-3), checkpoint_every=0, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(model, lm_loss, FixedRows(), config, out=Path(out))
        trainer.on_step = turns.step
        trainer.fit()


class FixedRows:
    """A BatchSource of random rows, the same on both sides (a fresh draw each step, as in training)."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, *, rank: int = 0, world: int = 1) -> Any:
        import torch

        from puyu.data.packing import Batch

        rows_RL = draw_rows(self.drawn)
        self.drawn += 1
        tokens_T, length = rows_RL.flatten(), rows_RL.shape[1]
        weights_RL = torch.ones(rows_RL.shape)
        weights_RL[:, -1] = 0
        return Batch(
            tokens_T=tokens_T,
            positions_T=torch.arange(length).repeat(len(rows_RL)),
            targets_T=tokens_T.roll(-1),
            weights_T=weights_RL.flatten(),
            starts_S=tuple(range(0, len(tokens_T), length)),
        )

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load(self, state: Mapping[str, Any], /) -> None:
        self.drawn = state["drawn"]


def draw_rows(step: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, nano_shape.VOCAB, (nano_shape.ROWS, nano_shape.SEQ_LEN), generator=generator)


class Turns:
    """Called after each step: reports a sample each `SAMPLE_STEPS` steps and waits until it is told to go on."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.began, self.first_loss = worker, 0.0, 0.0

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        import torch

        if done == 1:
            self.first_loss = metrics["loss"]
        if done < WARM_STEPS or (done - WARM_STEPS) % SAMPLE_STEPS:
            return
        if done == WARM_STEPS:
            self.worker.ready(versions={"torch": torch.__version__}, first_loss=self.first_loss)
        else:
            tokens = SAMPLE_STEPS * nano_shape.ROWS * nano_shape.SEQ_LEN
            self.worker.answer(tokens / (time.perf_counter() - self.began))
        if not self.worker.told():
            raise SystemExit(0)
        self.began = time.perf_counter()


def peer(folder: Path) -> None:
    """The worker of the peer, in its own environment: the loop that transformers' documentation shows."""
    import torch
    import transformers
    import worker

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train_step(number: int) -> float:
        rows_RL = draw_rows(number)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows_RL, labels=rows_RL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    first_loss, *_ = (train_step(number) for number in range(WARM_STEPS))
    done = WARM_STEPS
    versions = {"peer torch": torch.__version__, "transformers": transformers.__version__}
    worker.ready(versions=versions, first_loss=first_loss)
    while worker.told():
        began = time.perf_counter()
        for _ in range(SAMPLE_STEPS):
            train_step(done)
            done += 1
        worker.answer(SAMPLE_STEPS * nano_shape.ROWS * nano_shape.SEQ_LEN / (time.perf_counter() - began))


def compare(arguments: argparse.Namespace) -> None:
    python = harness.peer_python("transformers", arguments.peer_python)
    run = harness.Run("spine_train", peer_flags="sdpa, torch.autocast bf16, AdamW fused, loss by labels=")
    with tempfile.TemporaryDirectory() as name:
        nano_shape.save_checkpoint(Path(name))
        us = harness.Worker([sys.executable, __file__, "--worker", "ours", name])
        them = harness.Worker([python, __file__, "--worker", "peer", name])
        found = harness.alternate(us, them, pairs=arguments.pairs)
        us.close()
        them.close()
    run.versions = us.facts["versions"] | them.facts["versions"]
    run.notes = {"first_loss": us.facts["first_loss"], "peer_first_loss": them.facts["first_loss"]}
    same = abs(us.facts["first_loss"] / them.facts["first_loss"] - 1) < 0.005
    assert same, f"the two sides do not compute the same loss: {run.notes}"
    run.finish([harness.Samples("spine.4", *found, unit="tokens/s")], save=arguments.save)


if __name__ == "__main__":
    harness.comparison(__doc__ or "", {"ours": ours, "peer": peer}, compare, pairs=7)
