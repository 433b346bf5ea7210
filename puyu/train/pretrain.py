"""Pretraining: documents -> a base model, in phases (short then longer context, rotary base raised, mixture changed).

    $ puyu pretrain --data runs/nano/data --tokenizer runs/nano/tokenizer --out runs/nano/pretrain
    $ torchrun --nproc-per-node 2 -m puyu pretrain ...            # the same losses on two processes

Recipe of InternLM2 (arXiv 2403.17297): AdamW(0.9, 0.95), cosine to 10 %, packed documents hidden from each other.
Knows documents only as rows of kept.jsonl; samples and benchmarks come from the caller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field

from puyu.configure import Config, dump
from puyu.data.classes import QualityClasses, epochs_by_source, weights_by_source
from puyu.data.mix import Mixture, check_weights, expected_use
from puyu.data.packing import PretrainSource, grouped, pack_pieces, piece_of
from puyu.data.rows import Packing, Stretch
from puyu.data.shards import TokenShard
from puyu.device import pick_dtype
from puyu.dist import current_world
from puyu.errors import ConfigError
from puyu.log import say
from puyu.model.checkpoint import load_model, read_config, stored_values
from puyu.model.config import ModelConfig
from puyu.model.heads import CausalLM
from puyu.model.init import init_weights, initial_value
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.corpus import Corpus, open_corpus
from puyu.train.evaluate import GoOn, Latest, sampling
from puyu.train.layouts import Blank
from puyu.train.objectives import lm_loss
from puyu.train.optim import OptimConfig
from puyu.train.stage import (
    TrainingConfig,
    begun,
    check_vocabulary,
    count_parameters,
    finish,
    finished,
    identity_of,
    place,
)
from puyu.train.trainer import OnStep, Trainer
from puyu.train.tune import TuneConfig, Tuning


class ModelShape(Config):
    """Shape of a new model (InternLM2 architecture)."""

    vocab_size: int = 0
    """Entries of the vocabulary, the tokenizer's or somewhat more; 0: the tokenizer's."""
    hidden_size: int = 256
    """Width."""
    num_layers: int = 6
    """Blocks."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads (grouped-query attention)."""
    intermediate_size: int = 704
    """Width inside the gated MLP."""
    head_dim: int = 0
    """Width of a head; 0: hidden_size / num_heads."""
    tie_embeddings: bool = False
    """Use the embedding as output head."""
    norm_eps: float = 1e-5
    """RMSNorm's epsilon."""
    family: str = "internlm2"
    """Family of the checkpoint's names and config.json."""


class Phase(Config):
    """A stretch of training with one context length and one mixture."""

    steps: int
    """Optimizer steps."""
    seq_len: int = 512
    """Tokens of a row."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Share of each domain or class (`web/high`), in tokens; empty: by size, times epochs."""
    lr: float = Field(default=0.0, ge=0)
    """Peak rate of a schedule that begins here, with its own warm-up and decay; 0: the schedule before goes on."""
    batch_tokens: int = Field(default=0, ge=0)
    """Tokens of a step in this phase; 0: the run's."""


class Schedule(NamedTuple):
    """A learning-rate schedule over consecutive phases."""

    first: int
    """Its 0-based first step."""
    steps: int
    optim: OptimConfig

    def rate(self, step: int) -> float:
        """The rate of a 0-based step of the run."""
        return self.optim.rate(step - self.first, self.steps)


class BatchRamp(Config):
    """A smaller batch at first, as in InternEvo: `start`, `increment` more after every so many steps."""

    start: int = Field(ge=1)
    """Tokens of the first step."""
    increment: int = Field(ge=1)
    """Tokens more."""
    every: int = Field(ge=1)
    """Steps between increments."""

    def tokens(self, step: int, *, most: int) -> int:
        """Tokens of the 0-based step."""
        return min(self.start + step // self.every * self.increment, most)


class PretrainConfig(TrainingConfig):
    """Train a model from documents."""

    data: Path
    """Folder of the data stage (its kept.jsonl), or a JSONL file with `text`, `domain` and `language`."""
    tokenizer: Path
    """Folder of the tokenizer."""
    model: ModelShape = ModelShape()
    """Shape of the model."""
    base: Path | None = None
    """Checkpoint to go on from (continued pretraining): its shape, and its rope_theta where a phase gives none."""
    phases: list[Phase] = Field(default_factory=lambda: [Phase(steps=300)])
    """Phases in order."""
    classes: dict[str, QualityClasses] = Field(default_factory=dict)
    """Domains that are cut into classes by a score."""
    epochs: dict[str, float] = Field(default_factory=dict)
    """How often a domain or class may be seen, over all phases; without a number, as often as its weight wants."""
    packing: Packing = "hard"
    """hard: rows are always full; soft: documents that fit a row stay whole; document: one document a row."""
    batch_tokens: int = 8192
    """Tokens of one optimizer step, over all processes."""
    tune: TuneConfig = TuneConfig()
    """Which weights of the base train, and in what form."""
    ramp: BatchRamp | None = None
    """Smaller batches at first. Steps and learning rates stay as they are."""
    optim: OptimConfig = OptimConfig(lr=2e-3)
    """Optimizer and schedule."""
    heldout: float = 0.01
    """Share of the documents kept apart for the validation loss."""

    def batch_of(self, phase: Phase) -> int:
        """Tokens of a step in that phase."""
        return phase.batch_tokens or self.batch_tokens

    def schedules(self) -> list[Schedule]:
        """One over all phases, and a new one from each phase with a rate of its own."""
        found: list[Schedule] = []
        for phase in self.phases:
            if phase.lr or not found:
                first = found[-1].first + found[-1].steps if found else 0
                optim = self.optim.model_copy(update={"lr": phase.lr}) if phase.lr else self.optim
                found.append(Schedule(first, phase.steps, optim))
            else:
                found[-1] = found[-1]._replace(steps=found[-1].steps + phase.steps)
        return found

    def rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        return next(s for s in reversed(self.schedules()) if step >= s.first).rate(step)


def run(
    config: PretrainConfig, *, out: Path, on_step: OnStep | None = None, go_on: GoOn | None = None
) -> dict[str, Any]:
    """Train (or go on), validate, save; returns the key numbers. `go_on` makes the text of `samples`."""
    with begun(config, out, name="pretrain") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer = Tokenizer.load(config.tokenizer)
        corpus = open_corpus(
            config.data,
            tokenizer,
            out / "shards",
            heldout=config.heldout,
            classes=config.classes,
            writes=current_world().is_main,
            moved=lambda: heart.at("reading data"),
        )
        model, blank, tuning = first_model(config, tokenizer, device=device)
        parameters = count_parameters(model)
        phases = Phases(config, corpus, model)
        steps = sum(phase.steps for phase in config.phases)
        settings = tuning.rates(config.trainer(steps, name="pretrain", identity=identity))
        trainer = Trainer(model, lm_loss, phases.source, settings, out=out, blank=blank)
        trainer.on_step, trainer.heart = on_step, heart
        trainer.on_export = lambda folder: tuning.save(trainer, folder, tokenizer.save)
        trainer.about = {"config": dump(config), "phases": phases.bands()}

        def enter(step: int) -> int:
            number = phases.enter(step)
            trainer.meter.enter(phases.source.seq_len)
            return number

        def measure(trainer: Trainer) -> dict[str, dict[str, float]]:
            return validate(trainer, corpus, seq_len=phases.source.seq_len, batch_tokens=config.batch_tokens)

        heldout = Latest(measure, in_row)
        trainer.before_step, trainer.rate = enter, config.rate
        trainer.evaluations = [heldout, *sampling(config, tokenizer, go_on)]
        numbers = trainer.fit()
        phases.enter(numbers["steps"] - 1)
        numbers |= {"trained_parameters": tuning.trained}
        numbers |= {"parameters": parameters, "heldout": heldout.of(trainer), **phases.report()}
        heart.at("writing the model")
        tuning.save(trainer, out, tokenizer.save)
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def first_model(
    config: PretrainConfig, tokenizer: Tokenizer, *, device: torch.device
) -> tuple[CausalLM, Blank | None, Tuning]:
    """The model before the first step, the base with room for the longest phase or a new one, and what of it trains.

    On several processes it has no numbers yet where all of it trains: its layout gives each process those of its part.
    """
    base, tune = config.base, config.tune
    if base is None and tune.method != "full":
        raise ConfigError(f"tune.method={tune.method} trains a part of a model, and there is none", remedy="give base")
    shape = base_shape(config, tokenizer) if base else new_shape(config, tokenizer)
    if current_world().size > 1 and tune.method == "full" and not tune.adapters:
        with torch.device("meta"):
            model = CausalLM(shape)
        value = stored_values(model, base) if base else partial(initial_value, seed=config.seed)
        compute = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
        tuning = Tuning.of(model, tune, seed=config.seed, base=base)
        model, blank = place(model, dtype=compute, device=torch.device("meta")), Blank(device, value)
    else:
        model, blank = load_model(base) if base else CausalLM(shape), None
        if not base:
            init_weights(model, seed=config.seed)
        tuning = Tuning.of(model, tune, seed=config.seed, base=base)
        model = place(model, dtype=config.dtype, device=device)
    longest = max((phase.seq_len for phase in config.phases), default=0)
    if longest > shape.max_positions:  # never of a new one
        model.trunk.config = shape.with_(max_positions=longest)
    return model, blank, tuning


def base_shape(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of the checkpoint that continued pretraining begins with; ConfigError or CheckpointError where it
    cannot."""
    assert config.base is not None
    if "model" in config.model_fields_set:
        raise ConfigError("base and model are both given", remedy="leave model out: the base has its own shape")
    shape = read_config(config.base)
    if shape.quantization is not None:
        raise ConfigError(f"base {config.base} is quantized", remedy="go on from the checkpoint it was made of")
    check_vocabulary(tokenizer, shape.vocab_size, folder=config.base)
    return shape


def new_shape(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a new model, with the tokenizer's special ids."""
    if config.model.vocab_size:
        check_vocabulary(tokenizer, config.model.vocab_size, folder=config.tokenizer)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return model_config(config, tokenizer).with_(**ids)


def model_config(config: PretrainConfig, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The shape of the model, also before there is a tokenizer where the config says the vocabulary."""
    if config.base is not None:
        return read_config(config.base)
    given = config.model.model_dump()
    if not given["vocab_size"]:
        given["vocab_size"] = (tokenizer or Tokenizer.load(config.tokenizer)).vocab_size
    theta = config.phases[0].rope_theta if config.phases else 10_000.0
    return ModelConfig(
        rope_theta=theta, max_positions=max((phase.seq_len for phase in config.phases), default=0), **given
    )


class Phases:
    """Source and mixture of a run, moved from phase to phase as steps pass."""

    def __init__(self, config: PretrainConfig, corpus: Corpus, model: CausalLM) -> None:
        if not config.phases:
            raise ConfigError("phases: at least one is needed", remedy="for example phases: [{steps: 300}]")
        self.phases, self.model, self.config = config.phases, model, config
        own = model.config.rope_theta if config.base is not None else None
        self._thetas = [own if own and "rope_theta" not in p.model_fields_set else p.rope_theta for p in config.phases]
        self.empty = dict(corpus.empty)
        self.unscored = {name: count for name, count in corpus.unscored.items() if count}
        epochs = epochs_by_source(config.epochs, config.classes, sources=corpus.train)
        self.sizes = {name: shard.num_tokens * epochs.get(name, 1.0) for name, shard in corpus.train.items()}
        first = config.phases[0]
        self.mixture = Mixture(corpus.train, self._weights(first), seed=config.seed, epochs=epochs)
        self.source = PretrainSource(
            corpus.train, self.mixture, seq_len=first.seq_len, rows=self._rows(first, 0), packing=config.packing
        )
        for phase, band in zip(config.phases, self.bands(), strict=True):
            for step in self._batches(phase, band):
                self._rows(phase, step)
            check_weights(self._weights(phase), corpus.train)
        if epochs and config.packing != "document":  # its rows are not full: what they use shows in the end
            self._check_epochs({name: corpus.train[name].longest for name in epochs})
        if current_world().is_main:
            self.mixture.on_leave = self._tell
            for name, count in self.empty.items():
                say(f"  pretrain: {count} documents of {name} have no text: left out")
            for name, count in self.unscored.items():
                say(f"  pretrain: {count} documents of {name} have no score {config.classes[name].score!r}: no class")

    def _weights(self, phase: Phase) -> dict[str, float]:
        return weights_by_source(phase.weights, self.config.classes, sizes=self.sizes) if phase.weights else self.sizes

    def _check_epochs(self, longest: Mapping[str, int]) -> None:
        """ConfigError when a phase asks for more tokens than the epochs of its sources leave.

        Documents are drawn whole: where a phase ends, each source is up to its longest document ahead of its share, and
        new weights begin new counts.
        """
        left = {name: size if name in longest else math.inf for name, size in self.sizes.items()}
        for number, (phase, band) in enumerate(zip(self.phases, self.bands(), strict=True), 1):
            tokens = sum(self._tokens(phase, step) * count for step, count in self._batches(phase, band).items())
            reserve = (number - 1) * sum(longest.values())
            used = expected_use(left, self._weights(phase), tokens + reserve)
            if sum(used.values()) < tokens + reserve - 1:
                raise ConfigError(
                    f"phase {number} asks for {tokens:,} tokens, but the epochs of its sources leave "
                    f"{max(sum(used.values()) - reserve, 0):,.0f}",
                    remedy="raise epochs, take fewer steps, or give weight to more sources",
                )
            taken = expected_use(left, self._weights(phase), tokens)
            left |= {name: left[name] - count for name, count in taken.items()}

    def _tell(self, name: str) -> None:
        say(f"  pretrain: {name} has been seen as often as its epochs allow; the others share its weight")

    def report(self) -> dict[str, Any]:
        """What was used of each source, how full the rows were, and documents without text or without their score."""
        counts = {"unscored": self.unscored, "empty": self.empty}
        return {"sources": self.mixture.report(), "fill": round(self.source.fill, 5), **counts}

    def _tokens(self, phase: Phase, step: int) -> int:
        """Tokens of the 0-based step, which lies in that phase."""
        ramp, most = self.config.ramp, self.config.batch_of(phase)
        return most if ramp is None else ramp.tokens(step, most=most)

    def _batches(self, phase: Phase, band: Mapping[str, Any]) -> dict[int, int]:
        """A 0-based step of each size of batch of a phase, and how many steps are like it."""
        sizes = [self._tokens(phase, step) for step in range(band["first"] - 1, band["last"])]
        counts = Counter(sizes)
        return {band["first"] - 1 + sizes.index(size): count for size, count in counts.items()}

    def _rows(self, phase: Phase, step: int) -> int:
        tokens = self._tokens(phase, step)
        rows, rest = divmod(tokens, phase.seq_len * self.config.accumulate)
        if rows < 1 or rest:
            size = f"seq_len {phase.seq_len} x accumulate {self.config.accumulate}"
            where = "batch_tokens" if self.config.ramp is None else f"ramp: step {step + 1} has a batch of"
            raise ConfigError(f"{where} {tokens} is not a multiple of {size}")
        return rows

    def bands(self) -> list[dict[str, Any]]:
        """Name, first and last step of each phase."""
        rows: list[dict[str, Any]] = []
        for phase in self.phases:
            first = rows[-1]["last"] + 1 if rows else 1
            rows.append({"name": f"context {phase.seq_len}", "first": first, "last": first + phase.steps - 1})
        return rows

    def enter(self, step: int) -> int:
        """Set everything as the phase of the 0-based `step` wants it; returns the number of the phase."""
        ends = accumulate(phase.steps for phase in self.phases)
        number = min(sum(step >= end for end in ends), len(self.phases) - 1)
        phase = self.phases[number]
        self.model.set_rope_theta(self._thetas[number])
        self.mixture.set_weights(self._weights(phase))
        self.source.set_shape(seq_len=phase.seq_len, rows=self._rows(phase, step))
        return number


def validate(trainer: Trainer, corpus: Corpus, *, seq_len: int, batch_tokens: int) -> dict[str, dict[str, float]]:
    """Loss and bits per byte of each held-out language. Every rank must call it."""
    result = {}
    for language, shard in corpus.heldout.items():
        rank, size = trainer.reader.rank, trainer.reader.size
        groups = grouped(_cuts(language, shard, seq_len), lambda cut: cut.end - cut.begin, most=batch_tokens)
        sums = trainer.evaluate(pack_pieces([piece_of(shard, cut) for cut in group[rank::size]]) for group in groups)
        result[language] = {
            "loss": sums["loss"] / sums["weight"],
            "bits_per_byte": sums["loss"] / math.log(2) / corpus.heldout_bytes[language],
            "documents": shard.num_docs,
            "tokens": shard.num_tokens,
        }
    return result


def in_row(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The same as fields of a row of metrics; `val_loss` is over all languages."""
    weights = {name: row["tokens"] - row["documents"] for name, row in found.items()}
    row = {f"val_loss/{name}": value["loss"] for name, value in found.items()}
    row |= {f"val_bits_per_byte/{name}": value["bits_per_byte"] for name, value in found.items()}
    if total := sum(weights.values()):
        row["val_loss"] = sum(found[name]["loss"] * weight for name, weight in weights.items()) / total
    return row


def _cuts(source: str, shard: TokenShard, seq_len: int) -> Iterator[Stretch]:
    """Documents cut to `seq_len`; every token is predicted once."""
    for doc in range(shard.num_docs):
        length = shard.length(doc)
        for begin in range(0, length, seq_len):
            yield Stretch(source, doc, begin, min(begin + seq_len, length))


def _headline(numbers: dict[str, Any]) -> str:
    heldout = ", ".join(f"{name} {row['bits_per_byte']:.3f}" for name, row in numbers["heldout"].items())
    return (
        f"{numbers['parameters'] / 1e6:.2f} M parameters, {numbers['tokens']:,} tokens, "
        f"loss {numbers['loss_first']:.3f} -> {numbers['loss_last']:.3f}, "
        f"{numbers['tokens_per_s']:,.0f} tokens/s, bits per byte: {heldout or 'nothing held out'}"
    )
