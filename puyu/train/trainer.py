"""Trainer: one loop for every objective. Batch -> loss -> gradients -> update, metrics, states, resume.

It divides by the *global* weight (all ranks, all micro-batches), so that packing, accumulation and the number of
processes do not change the result. It knows nothing of languages, rewards or files of data: those come as `source`,
`objective` and callbacks.

    numbers = Trainer(model, lm_loss, source, TrainerConfig(steps=100), out=folder).fit()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puyu.data.mix import key_of
from puyu.data.packing import Batch
from puyu.dist import current_world
from puyu.files import clear_folder, read_jsonl
from puyu.log import MetricsWriter, Progress, say
from puyu.train import health, optim, parallel, state
from puyu.train.layouts import make_layout
from puyu.train.memory import keep_freed_pages
from puyu.train.objectives import Objective
from puyu.train.pieces import gather_whole
from puyu.train.settings import RunSettings

OnStep = Callable[[int, dict[str, float]], None]


class BatchSource(Protocol):
    """Global batches in a fixed order. Rank r of the world takes its share; the cursor is the same on every rank."""

    def next_batch(self, *, rank: int, world: int) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any], /) -> None: ...


class TrainerConfig(RunSettings):
    """How long, how fast, and how often to save."""

    steps: int
    """Optimizer steps in all."""
    identity: str = ""
    """Names config and inputs; a saved state with another one is refused."""
    name: str = "train"
    """Shown in the progress line."""
    unit: str = "tok"
    """What the rate counts."""


class Trainer:
    """Owns model, optimizer and source for the length of a run."""

    def __init__(
        self, model: nn.Module, objective: Objective, source: BatchSource, config: TrainerConfig, *, out: Path
    ) -> None:
        self.model, self.source, self.config, self.out = model, source, config, out
        self.device = next(model.parameters()).device
        self.world = current_world()
        keep_freed_pages(self.device)
        self.layout = make_layout(config.layout, model, objective, device=self.device)
        self.layout.make_optimizer(config.optim)
        self.reader = self.layout.reader
        self.done = self.tokens = 0
        self.before_step: Callable[[int], None] | None = None
        """Called with the 0-based step before its batch is drawn (phases)."""
        self.on_step: OnStep | None = None
        """Called on every rank with the completed steps and the metrics."""

    def resume(self) -> int:
        """Load the newest good state, if there is one; returns the completed steps."""
        if folder := state.find_state(self.out):
            found = state.load_state(folder, layout=self.layout, identity=self.config.identity)
            self.source.load(found.source)
            self.done, self.tokens = found.step, found.tokens
            if self.world.is_main:
                say(f"  {self.config.name}: going on from step {self.done} ({folder})")
        return self.done

    def save(self) -> Path:
        """Save the state after the steps done so far."""
        progress = state.Progress(self.done, self.tokens, self.source.state())
        config = self.config
        return state.save_state(self.out, progress, layout=self.layout, identity=config.identity, keep=config.keep)

    def fit(self) -> dict[str, Any]:
        """Run (or go on) to the last step; returns steps, tokens, first and last loss, tokens per second."""
        self._sweep()
        self.resume()
        writer = self._writer() if self.world.is_main else None
        try:
            with health.StopSignal() as stop:
                self._loop(stop, writer)
        finally:
            if writer:
                writer.close()
        return summarize(self.out / "metrics.jsonl")

    def _writer(self) -> MetricsWriter:
        path = self.out / "metrics.jsonl"
        return MetricsWriter(path, from_step=self.done + 1, tensorboard=self.config.tensorboard)

    def _sweep(self) -> None:
        """Remove half-written states of a killed run."""
        if self.world.is_main:
            for leftover in (self.out / state.FOLDER).glob("step-*.tmp-*"):
                clear_folder(leftover)

    def _loop(self, stop: health.StopSignal, writer: MetricsWriter | None) -> None:
        config, saved = self.config, self.done
        bar = Progress(config.name, config.steps, unit=config.unit, start=self.done) if writer else None
        while self.done < config.steps:
            metrics, asked = self._step(stop)
            if writer and bar:
                writer.write(self.done, metrics)
                bar.update(work=metrics["step_tokens"], loss=metrics["loss"], lr=metrics["lr"])
            if self.on_step:
                self.on_step(self.done, metrics)
            due = config.checkpoint_every and self.done % config.checkpoint_every == 0
            if asked or due or self.done == config.steps:
                self.save()
                saved = self.done
            if asked and self.done < config.steps:
                say(f"  {config.name}: stopped by SIGTERM after step {saved}, state saved; run again to go on")
                raise SystemExit(143)
        if bar:
            bar.close()

    def _step(self, stop: health.StopSignal) -> tuple[dict[str, float], bool]:
        """One update; returns its metrics, and whether any rank was asked to stop."""
        began = time.perf_counter()
        if self.before_step:
            self.before_step(self.done)
        torch.manual_seed(key_of(self.config.seed, self.done, self.reader.rank) >> 1)
        batches = self._draw()
        drawn = time.perf_counter()
        sums = self.layout.backward(batches)
        sums["tokens"] = float(sum(batch.num_tokens for batch in batches)) if self.layout.counts else 0.0
        sums["asked"] = float(stop.asked)
        sums = self._agreed(sums)
        weight, tokens, asked = max(sums.pop("weight"), 1e-30), int(sums.pop("tokens")), sums.pop("asked") > 0
        means = {name: value / weight for name, value in sums.items()}
        rate, norm = self._update(means["loss"], weight)
        self.tokens += tokens
        seconds = time.perf_counter() - began
        metrics = {**means, "lr": rate, "grad_norm": norm, "tokens": self.tokens, "step_tokens": tokens}
        metrics |= {"tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 6)}
        return metrics | {"data_seconds": round(drawn - began, 6)}, asked

    def _draw(self) -> list[Batch]:
        """This process's micro-batches of the step."""
        rank, size = self.reader.rank, self.reader.size
        return [self.source.next_batch(rank=rank, world=size).to(self.device) for _ in range(self.config.accumulate)]

    def _agreed(self, sums: dict[str, float]) -> dict[str, float]:
        return dict(zip(sums, parallel.agree(list(sums.values()), self.device), strict=True))

    def _update(self, loss: float, weight: float) -> tuple[float, float]:
        """Check, average, clip, step; returns the learning rate and the norm of the averaged gradient."""
        rate = self.config.optim.rate(self.done, self.config.steps)
        norm = self.layout.norm() / weight
        saved = str(self.out / state.FOLDER)
        health.check_finite(loss, norm, step=self.done + 1, layout=self.layout, saved=saved)
        self.layout.update(optim.clip_factor(norm, clip=self.config.optim.clip) / weight, rate=rate)
        self.done += 1
        return rate, norm

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Sums (`loss`, `weight` and metrics) of this reader's share of some batches, over all ranks; no update.

        Every rank must bring the same number of batches.
        """
        return self._agreed(self.layout.forward(batches))

    def full_weights(self) -> dict[str, Tensor]:
        """All weights, whole, for saving; every rank must call it, only rank 0 gets them."""
        return gather_whole(self.layout.pieces())


def summarize(metrics: Path) -> dict[str, Any]:
    """Key numbers of a run, from its metrics file."""
    rows = list(read_jsonl(metrics))
    tail = rows[-max(1, len(rows) // 20) :]
    seconds = sum(row["seconds"] for row in rows)
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "loss_first": rows[0]["loss"],
        "loss_last": sum(row["loss"] for row in tail) / len(tail),
        "tokens_per_s": round(sum(row["step_tokens"] for row in rows) / max(seconds, 1e-9), 1),
        "train_seconds": round(seconds, 1),
    }
