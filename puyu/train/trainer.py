"""Trainer: one loop for every objective. Batch -> loss -> gradients -> update, metrics, states, resume.

It divides by the *global* weight (all ranks, all micro-batches), so that packing, accumulation and the number of
processes do not change the result. It knows nothing of languages, rewards or files of data: those come as `source`,
`objective` and callbacks.

    numbers = Trainer(model, lm_loss, source, TrainerConfig(steps=100), out=folder).fit()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puyu.data.mix import key_of
from puyu.data.packing import Batch
from puyu.dist import current_world
from puyu.errors import ConfigError, ResourceError, RetryError, TrainingError
from puyu.files import write_json
from puyu.log import MetricsWriter, Progress, say
from puyu.model.adapted import plain_state
from puyu.model.heads import CausalLM, ScalarModel
from puyu.train import optim, parallel, state
from puyu.train.evaluate import OnEvaluate, copied, undisturbed
from puyu.train.float8 import use_float8
from puyu.train.folders import export, export_folder, remove
from puyu.train.health import Heartbeat, Journal, Pace, Rows, StopSignal, Verdict, Watch, probe, summarize
from puyu.train.layouts import Blank, make_layout
from puyu.train.memory import keep_freed_pages, spare
from puyu.train.meter import Meter
from puyu.train.monitor import Tracer
from puyu.train.objectives import Objective, means
from puyu.train.pieces import gather_whole
from puyu.train.replicas import Difference, differing
from puyu.train.saver import Saver
from puyu.train.scaler import LossScaler
from puyu.train.settings import RunSettings

Metrics = dict[str, Any]
"""One row of metrics.jsonl: numbers, and `skipped` (why) where the step made no update; then there is no loss."""
OnStep = Callable[[int, Metrics], None]


class BatchSource(Protocol):
    """Global batches in a fixed order. Rank r of the world takes its share; the cursor is the same on every rank."""

    def next_batch(self, *, rank: int, world: int) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any], /) -> None: ...


class Keeps(Protocol):
    """Something small of a run that is saved with it, as JSON."""

    def state(self) -> Any: ...

    def load(self, state: Any, /) -> None: ...


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
        self,
        model: nn.Module,
        objective: Objective,
        source: BatchSource,
        config: TrainerConfig,
        *,
        out: Path,
        blank: Blank | None = None,
    ) -> None:
        """`blank`: the model is on the meta device, and this is what its parameters become."""
        self.model, self.source, self.config, self.out = model, source, config, out
        self.device = blank.device if blank else next(p.device for p in model.parameters() if p.requires_grad)
        self.world = current_world()
        keep_freed_pages(self.device)
        self._check_spared(config)
        if config.precision != "dtype":
            use_float8(model, emulated=config.precision == "float8-emulated", device=self.device)
        spare(model, config.memory)
        self.layout = make_layout(config.layout, model, objective, device=self.device)
        self.layout.check_micro(config.accumulate)
        if blank:
            self.layout.allocate()
        self.layout.make_optimizer(config.optim)
        if blank:
            self.layout.fill(blank)
        self.reader = self.layout.reader
        self.meter = Meter(model, self.device, peak_tflops=config.peak_tflops)
        self.tracer = Tracer(config, out, device=self.device, rank=self.world.rank)
        self.saver = Saver(out, config, layout=self.layout, identity=config.identity)
        self.keeps: dict[str, Keeps] = {}
        """What else is saved, by name."""
        self.scaler = LossScaler() if _compute_dtype(model) == torch.float16 else None
        if self.scaler:
            self.keeps["scaler"] = self.scaler
        self.done = self.tokens = 0
        self.before_step: Callable[[int], object] | None = None
        """Called with the 0-based step before its batch is drawn; what it returns names the phase of the step."""
        self.rate: Callable[[int], float] = lambda step: config.optim.rate(step, config.steps)
        """The learning rate of a 0-based step."""
        self.on_step: OnStep | None = None
        """Called on every rank with the completed steps and the metrics."""
        self.on_export: Callable[[Path], None] | None = None
        """Called on every rank each `export_every` steps with the folder to write."""
        self.evaluations: list[OnEvaluate] = []
        """Called on every rank each `evaluate_every` steps and after the last; their values stand in its row."""
        self.about: dict[str, Any] = {}
        """More for run.json, which says what is being watched: config, phases."""
        self.heart: Heartbeat | None = None
        """The watchdog of the whole stage, which also covers what comes before and after the steps."""
        self.watch = Watch(config.health)
        self._pace, self._reading, self._seconds = Pace(config.health), 0.0, 0.0
        self.journal = Journal(out / state.FOLDER, name=config.name)
        self._rows: Rows | None = None
        self._again = self._tried = False
        self._healed = (0, 0)
        self.saver.on_error = self._make_room

    @staticmethod
    def _check_spared(config: TrainerConfig) -> None:
        """ConfigError where the forward pass of a layer would have two masters."""
        layout = config.layout
        replaced = layout.tensor > 1 or (layout.pipeline > 1 and layout.schedule == "zero-bubble")
        if config.precision != "dtype" and replaced:
            raise ConfigError(
                f"precision {config.precision} works with whole matrices and their own products",
                remedy="set layout.tensor=1 and another layout.schedule than zero-bubble",
            )
        if config.memory.checkpoint != "none" and layout.pipeline > 1 and layout.schedule == "zero-bubble":
            raise ConfigError("memory.checkpoint would be computed again twice", remedy="set layout.schedule=1f1b")

    def resume(self) -> int:
        """Load the newest good state, if there is one; returns the completed steps."""
        if found := self.saver.restore():
            self._load(found[0])
            if self.world.is_main:
                say(f"  {self.config.name}: going on from step {self.done} ({found[1]})")
        return self.done

    def _load(self, progress: state.Progress, *, rolled_back: bool = False) -> None:
        self.source.load(progress.source)
        self.watch.load(progress.extra["health"], rolled_back=progress.step if rolled_back else None)
        for name in self.keeps.keys() & progress.extra.keys():
            self.keeps[name].load(progress.extra[name])
        self.done, self.tokens = progress.step, progress.tokens

    def save(self, *, wait: bool = True, last: bool = False) -> bool:
        """Save the state after the steps done so far; without `wait`, in the background (False: left out)."""
        extra = {"health": self.watch.state(), **{name: value.state() for name, value in self.keeps.items()}}
        progress = state.Progress(self.done, self.tokens, self.source.state(), extra)
        return self.saver.save(progress, wait=wait, last=last)

    def _save(self, *, wait: bool, last: bool, due: bool) -> None:
        """Save; RetryError where a state that must not be missed (`wait`) was not saved at the second try, either."""
        self._again = False
        for self._tried in (False, True) if wait else (not due,):
            self.save(wait=wait, last=last)
            if not wait or self.saver.committed == self.done:
                return
        raise RetryError(
            f"step {self.done}: the state could not be saved, the disk is full",
            remedy=f"free some space on {self.out} and run the same command again",
        )

    def _make_room(self, error: BaseException) -> None:
        """A state was not saved. Where the disk is full, all older states but one go, and it is tried again once; the
        training goes on. Any other error is raised. Called on every process."""
        full = self._agreed({"full": float(isinstance(error, ResourceError))})["full"]
        if not full:
            raise error
        removed = [folder.path for folder in state.saved(self.out)[1:]]
        if self.world.is_main:
            for path in removed:
                remove(path)
        self._again = not self._tried
        room = "older states were removed" if removed else "there is no older state to remove"
        then = "it is tried again" if self._again else "training goes on without"
        self._note("disk full", f"{str(error).partition(chr(10))[0]}; {room}; {then}")

    def fit(self) -> dict[str, Any]:
        """Run (or go on) to the last step; returns steps, tokens, first and last loss, tokens per second."""
        with self._beating() as heart:
            self.saver.prepare()
            self.resume()
            self._export(owed=True)
            self._open_metrics()
            if self.world.is_main:
                write_json(self.out / "run.json", self._description())
            try:
                with StopSignal() as stop:
                    self._loop(stop, heart)
            finally:
                self.saver.close()
                if self._rows:
                    self._rows.close()
            self._check_share()
            heart.at("last evaluation")
        return summarize(self.out / "metrics.jsonl")

    def _check_share(self) -> None:
        """TrainingError when so much was skipped that this is not the run that was asked for."""
        if (count := len(self.watch.skip)) > self.config.steps / 4:
            raise TrainingError(
                f"{count} of {self.config.steps} steps were skipped",
                remedy=f"the reasons are in {self.journal.path}; mend the data or lower optim.lr, run in a new folder",
            )

    def _open_metrics(self) -> None:
        """Rank 0 writes the rows of the steps from here on; rows of steps that are made again go."""
        if self._rows:
            self._rows.close()
        if self.world.is_main:
            self._rows = Rows(self._metrics_from, self.journal, step=self.done + 1)

    def _metrics_from(self, step: int) -> MetricsWriter:
        config, path = self.config, self.out / "metrics.jsonl"
        return MetricsWriter(path, from_step=step, tensorboard=config.tensorboard, wandb=config.wandb)

    def _description(self) -> dict[str, Any]:
        config = self.config
        named = {"name": config.name, "steps": config.steps, "unit": config.unit, "began_at": self.done}
        return {**named, "processes": self.world.size, "device": str(self.device), **self.about}

    @contextmanager
    def _beating(self) -> Iterator[Heartbeat]:
        """The watchdog of the stage, else one for these steps."""
        own = Heartbeat(self.out / state.FOLDER, self.world, self.config.health, self.journal)
        with nullcontext(self.heart) if self.heart else own as heart:
            heart.at("loading a state")
            self.meter.on_span = heart.at
            yield heart

    def _loop(self, stop: StopSignal, heart: Heartbeat) -> None:
        config = self.config
        bar = Progress(config.name, config.steps, unit=config.unit, start=self.done) if self._rows else None
        while self.done < config.steps:
            step = self.done + 1
            heart.begin(step)
            self.tracer.begin(step)
            metrics, asked, verdict = self._step(stop)
            goes_back = self.done < step
            self.tracer.end(step, last=asked or goes_back or step == config.steps)
            if goes_back:
                heart.at("roll back")
                self._roll_back(verdict)
                continue
            last = self.done == config.steps
            stopping = asked and not last  # whoever asked may not wait: the state comes first
            evaluates = bool(self.evaluations) and (last or _due(self.done, config.evaluate_every))
            if evaluates and not stopping:
                metrics |= self._evaluated()
            metrics |= self._compared(metrics)
            if self._rows and bar:
                self._rows.write(self.done, metrics)
                notes = {name: metrics[name] for name in ("loss", "lr") if name in metrics}
                bar.update(self.done - bar.done, work=metrics["step_tokens"], **notes)
            heart.at("callback")
            if self.on_step:
                self.on_step(self.done, metrics)
            exports = not stopping and self._export()
            if evaluates or exports:  # they take long: who asked meanwhile does not wait for another step
                asked = self._agreed({"asked": float(asked or stop.asked)})["asked"] > 0
            # While steps are bad the weights are suspect: no state is saved that a roll-back would go to.
            due = _due(self.done, config.checkpoint_every)
            saves = asked or last or ((due or self._again) and not self.watch.streak)
            if found := self._differing(saves):
                heart.at("roll back")
                self._heal(found)
                continue
            if saves:
                with self.meter.span("save"):
                    self._save(wait=asked or last, last=last, due=due)
            if asked and not last:
                left = ", its evaluation left out" if evaluates and stopping else ""
                text = f"stopped by a signal after step {self.done}{left}, state saved; run again to go on"
                say(f"  {config.name}: {text}")
                raise SystemExit(143)
        if bar:
            bar.close()

    def _export(self, *, owed: bool = False) -> bool:
        """Whether an export of this step was due; it is made, `owed` only where a stop has left it out."""
        if not self.on_export or not self.done or not _due(self.done, self.config.export_every):
            return False
        if owed and not self._agreed({"missing": float(not export_folder(self.out, self.done).exists())})["missing"]:
            return False
        export(self.out, self.done, self.on_export)
        return True

    def _step(self, stop: StopSignal) -> tuple[Metrics, bool, Verdict]:
        """One update, or none; returns its metrics, whether any rank was asked to stop, and how it was judged."""
        span = self.meter.begin()
        with span("data"):
            self.watch.enter(self.before_step(self.done) if self.before_step else None)
            torch.manual_seed(key_of(self.config.seed, self.done, self.reader.rank) >> 1)
            batches = self._draw()
        with span("backward"):
            skipped = self.done + 1 in self.watch.skip  # decided before: its batch is drawn, and not looked at
            count = float(sum(batch.num_tokens for batch in batches)) if self.layout.counts else 0.0
            # The scaler's number is that of a mean loss; the factor on the summed one is the same everywhere.
            scale = self.scaler.scale / self._agreed({"tokens": count})["tokens"] if self.scaler else 1.0
            sums = {"loss": 0.0, "weight": 0.0} if skipped else self.layout.backward(batches, scale=scale)
        sums |= {"tokens": count, "asked": float(stop.asked)}
        with span("reduce"):
            sums = self._agreed(sums | self.saver.flags())
        self.saver.settle(sums)
        tokens, asked = int(sums.pop("tokens")), sums.pop("asked") > 0
        metrics: Metrics = means(sums)
        with span("update"):
            verdict, found = Verdict("skip", "left out"), Metrics()
            if not skipped:
                verdict, found = self._update(metrics["loss"], max(sums["weight"], 1e-30) * scale)
        if verdict.action == "update":
            self.tokens += tokens
            metrics |= found
        else:
            metrics, tokens = {"skipped": verdict.reason, "skipped_tokens": tokens}, 0
        self.done += verdict.action in ("update", "skip")
        metrics |= {"tokens": self.tokens, "step_tokens": tokens, **self.meter.row(tokens)}
        return metrics, asked, verdict

    def _compared(self, metrics: Metrics) -> Metrics:
        """Every so often: which processes were slow since the last time. Every process must call it."""
        self._reading += metrics["time/data"]
        self._seconds += metrics["seconds"]
        every, size = self.config.health.compare_every, self.world.size
        if size == 1 or not every or self.done % every:
            return {}
        mine = [self._reading / every, probe(self.device)]
        table = [0.0] * (2 * self.world.rank) + mine + [0.0] * (2 * (size - self.world.rank - 1))
        table = parallel.agree(table, self.device)
        slow = self._pace.judge([table[i : i + 2] for i in range(0, 2 * size, 2)], step_seconds=self._seconds / every)
        self._reading = self._seconds = 0.0
        found = ", ".join(f"rank {one.rank} takes {one.ratio:.1f} times the median for {one.what}" for one in slow)
        if slow:
            self._note("slow", found, ranks=[one.rank for one in slow])
        return {"slow": found} if slow else {}

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

    def _update(self, loss: float, weight: float) -> tuple[Verdict, Metrics]:
        """Judge; divide gradients by `weight`, clip and step, or drop them. Returns the rate and norms of the mean."""
        rate = self.rate(self.done)
        norm = self.layout.norm() / weight  # a sum over all processes: all judge alike
        if self.scaler and math.isfinite(loss) and not math.isfinite(norm) and self.scaler.overflowed():
            self.layout.drop_gradients()
            return Verdict("skip", f"float16 overflow, loss scale {self.scaler.scale:g} from here on"), {}
        verdict = self.watch.judge(self.done + 1, loss, norm)
        if verdict.action != "update":
            if not (math.isfinite(loss) and math.isfinite(norm)) and (name := self.layout.bad_gradient()):
                verdict = replace(verdict, reason=f"{verdict.reason}, first in the gradient of {name}")
            self.layout.drop_gradients()
            self._note("bad step", f"{verdict.reason}; the update was not made")
            return verdict, {}
        found: Metrics = {"lr": rate, "grad_norm": norm}
        if (every := self.config.group_norms_every) and self.done % every == 0:
            found |= {f"grad_norm/{part}": value / weight for part, value in self.layout.part_norms().items()}
        self.layout.update(optim.clip_factor(norm, clip=self.config.optim.clip) / weight, rate=rate)
        if self.scaler:
            self.scaler.succeeded()
        return verdict, found

    def _roll_back(self, verdict: Verdict) -> None:
        """Go back to a state from before the trouble; TrainingError where there is none, or it has not helped."""
        step, found, saved = self.done + 1, None, self.out / state.FOLDER
        if verdict.action == "roll back":
            found = self.saver.restore(before=verdict.before) or self.saver.restore(before=step)
        if found is None:
            why = "no state was saved before it" if verdict.action == "roll back" else "another try would end like this"
            raise TrainingError(
                f"step {step}: {verdict.reason}; the update was not made, and {why}",
                remedy=f"lower optim.lr or raise optim.warmup, then run again in a new folder; good states: {saved}",
            )
        self._go_back(found[0], f"{step}: {verdict.reason}")

    def _go_back(self, progress: state.Progress, why: str) -> None:
        self._load(progress, rolled_back=True)
        self._open_metrics()
        self._note("roll back", f"went back here from step {why}", left_out=sorted(self.watch.skip))

    def _differing(self, saves: bool) -> Difference | None:
        """What replicas do not agree in, where that is looked at; every state that is saved was."""
        every = self.config.health.digest_every
        if self.world.size == 1 or not every or not (saves or _due(self.done, every)):
            return None
        with self.meter.span("replicas"):
            return differing(self.layout.shares, self.device)

    def _heal(self, found: Difference) -> None:
        """Go back to the last state: it was good. RetryError where there is none, TrainingError where it does not
        help."""
        step, saved = self.done, self.saver.restore(before=self.done)
        self._note("replicas differ", found.text, ranks=list(found.ranks), parameters=list(found.parameters))
        if saved is None:
            raise RetryError(f"step {step}: {found.text}, and no state was saved", remedy="run the same command again")
        place, count = saved[0].step, self._healed[1] + 1 if self._healed[0] == saved[0].step else 1
        self._healed = place, count
        if count > self.config.health.rollbacks:
            remedy = "take the machine of that rank out, then run the same command again: it goes on from that state"
            raise TrainingError(f"step {step}: {found.text}, after {count - 1} returns to step {place}", remedy=remedy)
        self._go_back(saved[0], f"{step}: {found.text}")

    def _note(self, event: str, text: str, **facts: Any) -> None:
        """An event that every process knows, told once."""
        if self.world.is_main:
            self.journal.note(event, text, step=self.done + (event not in ("roll back", "replicas differ")), **facts)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Sums (`loss`, `weight` and metrics) of this reader's share of some batches, over all ranks; no update.

        Every rank must bring the same number of batches.
        """
        return self._agreed(self.layout.forward(batches))

    @contextmanager
    def whole_model(self) -> Iterator[CausalLM | None]:
        """The language model as one process sees it, on rank 0, for looking only; None elsewhere.

        Every rank must enter it. It is a copy, with adapters merged, but for one process that adapts nothing, or whose
        copy would take more than a tenth of the memory: it looks at the model itself.
        """
        model = self.model
        assert isinstance(model, CausalLM)
        if self.world.size == 1 and not copied(model, self.device):
            yield model
            return
        weights = self.full_weights()
        if not self.world.is_main:
            yield None
            return
        weights = plain_state(model, weights)
        with torch.device("meta"):
            copy = CausalLM(model.config)
        dtype = model.trunk.compute_dtype  # which all weights are cast to when they are used
        copy.load_state_dict({name: w.to(device=self.device, dtype=dtype) for name, w in weights.items()}, assign=True)
        copy.set_compute_dtype(dtype)
        yield copy.eval()

    def full_weights(self) -> dict[str, Tensor]:
        """All weights, whole, for saving; every rank must call it, only rank 0 gets them."""
        return gather_whole(self.layout.pieces())


def _compute_dtype(model: nn.Module) -> torch.dtype | None:
    return model.trunk.compute_dtype if isinstance(model, CausalLM | ScalarModel) else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
