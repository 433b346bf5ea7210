"""Trainer: one loop for every objective. Batch -> loss -> gradients -> update, metrics, states, resume.

It divides by the *global* weight (all ranks, all micro-batches), so that packing, accumulation and the number of
processes do not change the result. It knows nothing of languages, rewards or files of data: those come as `source`,
`objective` and callbacks.

    numbers = Trainer(model, lm_loss, source, TrainerConfig(steps=100), out=folder).fit()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puyu.data.mix import key_of
from puyu.data.packing import Batch
from puyu.dist import current_world
from puyu.files import clear_folder, read_jsonl, write_json
from puyu.log import MetricsWriter, Progress, say
from puyu.model.heads import CausalLM
from puyu.train import health, optim, parallel, state
from puyu.train.evaluate import OnEvaluate, undisturbed
from puyu.train.layouts import make_layout
from puyu.train.memory import keep_freed_pages
from puyu.train.meter import Meter
from puyu.train.monitor import Tracer
from puyu.train.objectives import Objective, means
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
        self.meter = Meter(model, self.device, peak_tflops=config.peak_tflops)
        self.tracer = Tracer(config, out, device=self.device, rank=self.world.rank)
        self.done = self.tokens = 0
        self.before_step: Callable[[int], None] | None = None
        """Called with the 0-based step before its batch is drawn (phases)."""
        self.on_step: OnStep | None = None
        """Called on every rank with the completed steps and the metrics."""
        self.evaluations: list[OnEvaluate] = []
        """Called on every rank each `evaluate_every` steps; what they return stands in the row of that step."""
        self.about: dict[str, Any] = {}
        """More for run.json, which says what is being watched: config, phases."""

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
        if writer:
            write_json(self.out / "run.json", self._description())
        try:
            with health.StopSignal() as stop:
                self._loop(stop, writer)
        finally:
            if writer:
                writer.close()
        return summarize(self.out / "metrics.jsonl")

    def _writer(self) -> MetricsWriter:
        path = self.out / "metrics.jsonl"
        config = self.config
        return MetricsWriter(path, from_step=self.done + 1, tensorboard=config.tensorboard, wandb=config.wandb)

    def _description(self) -> dict[str, Any]:
        config = self.config
        named = {"name": config.name, "steps": config.steps, "unit": config.unit, "began_at": self.done}
        return {**named, "processes": self.world.size, "device": str(self.device), **self.about}

    def _sweep(self) -> None:
        """Remove half-written states of a killed run."""
        if self.world.is_main:
            for leftover in (self.out / state.FOLDER).glob("step-*.tmp-*"):
                clear_folder(leftover)

    def _loop(self, stop: health.StopSignal, writer: MetricsWriter | None) -> None:
        config, saved = self.config, self.done
        bar = Progress(config.name, config.steps, unit=config.unit, start=self.done) if writer else None
        while self.done < config.steps:
            self.tracer.begin(self.done + 1)
            metrics, asked = self._step(stop)
            self.tracer.end(self.done, last=asked or self.done == config.steps)
            if config.evaluate_every and self.done % config.evaluate_every == 0:
                metrics |= self._evaluated()
            if writer and bar:
                writer.write(self.done, metrics)
                bar.update(work=metrics["step_tokens"], loss=metrics["loss"], lr=metrics["lr"])
            if self.on_step:
                self.on_step(self.done, metrics)
            due = config.checkpoint_every and self.done % config.checkpoint_every == 0
            if asked or due or self.done == config.steps:
                with self.meter.span("save"):
                    self.save()
                saved = self.done
            if asked and self.done < config.steps:
                say(f"  {config.name}: stopped by SIGTERM after step {saved}, state saved; run again to go on")
                raise SystemExit(143)
        if bar:
            bar.close()

    def _step(self, stop: health.StopSignal) -> tuple[dict[str, float], bool]:
        """One update; returns its metrics, and whether any rank was asked to stop."""
        span = self.meter.begin()
        with span("data"):
            if self.before_step:
                self.before_step(self.done)
            torch.manual_seed(key_of(self.config.seed, self.done, self.reader.rank) >> 1)
            batches = self._draw()
        with span("backward"):
            sums = self.layout.backward(batches)
        sums["tokens"] = float(sum(batch.num_tokens for batch in batches)) if self.layout.counts else 0.0
        sums["asked"] = float(stop.asked)
        with span("reduce"):
            sums = self._agreed(sums)
        tokens, asked = int(sums.pop("tokens")), sums.pop("asked") > 0
        metrics = means(sums)
        with span("update"):
            metrics |= self._update(metrics["loss"], max(sums["weight"], 1e-30))
        self.tokens += tokens
        return {**metrics, "tokens": self.tokens, "step_tokens": tokens, **self.meter.row(tokens)}, asked

    def _evaluated(self) -> dict[str, float]:
        """What the callbacks say; they leave no trace in the run."""
        found: dict[str, float] = {}
        before = self.source.state()
        with undisturbed(self.model, self.device), self.meter.span("evaluate"):
            for evaluation in self.evaluations:
                found |= evaluation(self.done, self)
        assert self.source.state() == before, "an evaluation moved the data cursor"
        return found | self.meter.spans()

    def _draw(self) -> list[Batch]:
        """This process's micro-batches of the step."""
        rank, size = self.reader.rank, self.reader.size
        return [self.source.next_batch(rank=rank, world=size).to(self.device) for _ in range(self.config.accumulate)]

    def _agreed(self, sums: dict[str, float]) -> dict[str, float]:
        return dict(zip(sums, parallel.agree(list(sums.values()), self.device), strict=True))

    def _update(self, loss: float, weight: float) -> dict[str, float]:
        """Check, average, clip, step; returns the learning rate and norms of the averaged gradient."""
        rate = self.config.optim.rate(self.done, self.config.steps)
        norm = self.layout.norm() / weight
        saved = str(self.out / state.FOLDER)
        health.check_finite(loss, norm, step=self.done + 1, layout=self.layout, saved=saved)
        found = {"lr": rate, "grad_norm": norm}
        if (every := self.config.group_norms_every) and self.done % every == 0:
            found |= {f"grad_norm/{part}": value / weight for part, value in self.layout.part_norms().items()}
        self.layout.update(optim.clip_factor(norm, clip=self.config.optim.clip) / weight, rate=rate)
        self.done += 1
        return found

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Sums (`loss`, `weight` and metrics) of this reader's share of some batches, over all ranks; no update.

        Every rank must bring the same number of batches.
        """
        return self._agreed(self.layout.forward(batches))

    @contextmanager
    def whole_model(self) -> Iterator[CausalLM | None]:
        """The language model as one process sees it, on rank 0, for looking only; None elsewhere.

        Every rank must enter it. It is the model itself where there is one process, else a copy.
        """
        model = self.model
        assert isinstance(model, CausalLM)
        if self.world.size == 1:
            yield model
            return
        weights = self.full_weights()
        if not self.world.is_main:
            yield None
            return
        with torch.device(self.device):
            copy = CausalLM(model.config)
        copy.load_state_dict(weights, assign=False)
        copy.set_compute_dtype(model.trunk.compute_dtype)
        yield copy.eval()

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
