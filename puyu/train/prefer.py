"""Preference training: DPO and its kin, from pairs of answers to one prompt.

    $ puyu prefer --base runs/nano/sft --data pairs.jsonl --out runs/nano/dpo

The reference is the model as it is before the first step; its log-probabilities of all answers are computed once, so
that no second model is held. Only an answer's own tokens count. What trains is `tune`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BeforeValidator
from torch import Tensor

from puyu.configure import dump
from puyu.data.chats import read_preferences
from puyu.data.packing import Batch, Doc, ItemSource, grouped, pack_documents
from puyu.dist import current_world
from puyu.errors import InputError
from puyu.files import BadRecord
from puyu.model.heads import CausalLM
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.evaluate import GoOn, Latest, sampling
from puyu.train.objectives import LossOutput, Objective, chunked_logprobs, head_weight, hidden_states
from puyu.train.optim import OptimConfig
from puyu.train.preference_losses import FREE_OF_REFERENCE, PairKind, PairValues, PreferenceForm, pair_loss
from puyu.train.stage import TrainingConfig, begun, finish, finished, identity_of, listed, opened, place, tell_torn
from puyu.train.trainer import OnStep, Trainer
from puyu.train.tune import TuneConfig, Tuning
from puyu.types import Conversation, Message, Preference


class PreferConfig(TrainingConfig):
    """Learn from preference pairs."""

    base: Path
    """Checkpoint or adapter to start from, and the reference (the SFT model)."""
    data: Annotated[list[Path], BeforeValidator(listed)]
    """JSONL files of preference pairs: prompt, chosen, rejected; or another form of puyu.data.preferences."""
    validation: Path | None = None
    """Pairs whose loss and accuracy are taken every `evaluate_every` steps."""
    loss: PairKind = "sigmoid"
    """sigmoid is DPO; simpo and orpo need no reference."""
    beta: float = 0.1
    """How far the model may go from the reference; SimPO wants 2 to 10."""
    smoothing: float = 0.0
    """Share of the pairs whose order is taken to be wrong (sigmoid, robust)."""
    margin: float = 1.0
    """simpo: what the better answer must be ahead by."""
    imitation: float = 0.0
    """This times the chosen answers' loss is added."""
    epochs: float = 1.0
    """Passes over the data; used when steps is 0."""
    steps: int = 0
    """Optimizer steps; 0: by epochs."""
    batch_tokens: int = 8192
    """Most tokens of one optimizer step, over all processes."""
    max_tokens: int = 0
    """Pairs with a longer conversation are dropped and counted; 0: the model's context."""
    tune: TuneConfig = TuneConfig()
    """Which weights train, and in what form."""
    optim: OptimConfig = OptimConfig(lr=5e-5, weight_decay=0.0)
    """Optimizer and schedule. The default suits models of a few million parameters; 7B wants 5e-7."""

    @property
    def form(self) -> PreferenceForm:
        return PreferenceForm(self.beta, self.smoothing, self.margin, self.imitation)


@dataclass(frozen=True, slots=True)
class Answers:
    """Two rendered conversations, the better first, that learn their last turn only, and what the reference gives."""

    chosen: Doc
    rejected: Doc
    reference: tuple[float, float] = (0.0, 0.0)


def run(config: PreferConfig, *, out: Path, on_step: OnStep | None = None, go_on: GoOn | None = None) -> dict[str, Any]:
    """Train (or go on), save; returns the key numbers. `go_on` answers `samples`."""
    with begun(config, out, name="prefer") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer, loaded = opened(config.base)
        limit = config.max_tokens or loaded.config.max_positions
        pairs, torn = read_answers(config.data, tokenizer)
        held, _ = read_answers([config.validation] if config.validation else [], tokenizer)
        budget = config.batch_tokens // config.accumulate
        fits = [pair for pair in pairs if _size(pair) <= budget and max(_lengths(pair)) <= limit]
        tuning = Tuning.of(loaded, config.tune, seed=config.seed, base=config.base)
        model = place(loaded, dtype=config.dtype, device=device)
        if config.loss not in FREE_OF_REFERENCE:
            heart.at("log-probabilities of the reference")
            fits, held = (with_reference(model, some, batch_tokens=budget) for some in (fits, held))
        source = ItemSource(fits, pack_answers, _size, tokens_per_batch=budget, seed=config.seed)
        steps = config.steps or -(-source.steps_for(config.epochs) // config.accumulate)
        settings = tuning.rates(config.trainer(steps, name="prefer", identity=identity))
        trainer = Trainer(model, preference_loss(config.loss, config.form), source, settings, out=out)
        trainer.on_step, trainer.about, trainer.heart = on_step, {"config": dump(config)}, heart
        validation = Latest(lambda run: measure(run, held, batch_tokens=budget), _in_row)
        trainer.evaluations = [*([validation] if held else []), *sampling(config, tokenizer, go_on, chat=True)]
        trainer.meter.enter_whole([length for pair in fits for length in _lengths(pair)])
        trainer.on_export = lambda folder: tuning.save(trainer, folder, tokenizer.save)
        numbers = trainer.fit()
        numbers |= {"validation": validation.of(trainer)} if held else {}
        heart.at("writing the model")
        tuning.save(trainer, out, tokenizer.save)
        numbers |= {"pairs": len(fits), "dropped": {"too_long": len(pairs) - len(fits)}, "quarantined": len(torn)}
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def _lengths(pair: Answers) -> tuple[int, int]:
    return len(pair.chosen[0]), len(pair.rejected[0])


def _size(pair: Answers) -> int:
    return sum(_lengths(pair))


def read_answers(paths: Sequence[Path], tokenizer: Tokenizer) -> tuple[list[Answers], list[BadRecord]]:
    """All pairs of some files, rendered, and the torn lines."""
    found: list[Answers] = []
    torn: list[BadRecord] = []
    for path in paths:
        preferences, bad = read_preferences(path)
        torn += bad
        tell_torn(bad)
        talks = [_talk(pair, answer) for pair in preferences for answer in (pair.chosen, pair.rejected)]
        rendered = render_all(talks, tokenizer, where=lambda at, path=path: f"{path}, pair {at // 2 + 1}")  # type: ignore[misc]
        docs: list[Doc] = [(one.ids, last_turn(one.loss)) for one in rendered]
        found += [Answers(better, worse) for better, worse in zip(docs[::2], docs[1::2], strict=True)]
    if paths and not found:
        raise InputError("no preference pair is left for training", remedy="give more data")
    return found, torn


def _talk(pair: Preference, answer: Message) -> Conversation:
    return Conversation((*pair.prompt.messages, answer), pair.prompt.tools)


def last_turn(loss: Sequence[bool]) -> np.ndarray:
    """The mask of the last learned stretch alone: the answer, without those before it."""
    learned = np.asarray(loss, dtype=bool)
    ends = np.flatnonzero(learned)
    if not len(ends):
        return learned
    gaps = np.flatnonzero(~learned[: ends[-1]])
    found = np.zeros_like(learned)
    found[(gaps[-1] + 1 if len(gaps) else 0) : ends[-1] + 1] = True
    return found


def pack_answers(pairs: Sequence[Answers]) -> Batch:
    """Better and worse answers in turn. Extras: `number_T`, the document of each token, and `reference_S`."""
    docs = [doc for pair in pairs for doc in (pair.chosen, pair.rejected)]
    batch = pack_documents(docs)
    lengths_S = [len(ids) for ids, _ in docs] or [1]
    reference_S = torch.tensor([value for pair in pairs for value in pair.reference], dtype=torch.float64)
    number_T = torch.from_numpy(np.repeat(np.arange(len(lengths_S)), lengths_S))
    return replace(batch, extras={"number_T": number_T, "reference_S": reference_S})


def document_logprobs(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each document's learned tokens, and how many they are, [S] each."""
    learned = batch.weights_T.nonzero().squeeze(-1)
    logprobs_P = chunked_logprobs(hidden_states(model, batch)[learned], head_weight(model), batch.targets_T[learned])
    number_P = batch.extras["number_T"][learned]
    zeros_S = logprobs_P.new_zeros(len(batch.starts_S))
    return zeros_S.index_add(0, number_P, logprobs_P), zeros_S.index_add(0, number_P, torch.ones_like(logprobs_P))


def preference_loss(kind: PairKind, form: PreferenceForm) -> Objective:
    """The objective; its weight is the number of pairs."""

    def objective(model: CausalLM, batch: Batch) -> LossOutput:
        sums_S, lengths_S = document_logprobs(model, batch)
        pairs = len(batch.extras["reference_S"]) // 2  # a rank without a pair still takes part in collectives
        sums_P2, lengths_P2, reference_P2 = (
            part[: 2 * pairs].reshape(-1, 2) for part in (sums_S, lengths_S, batch.extras["reference_S"].to(sums_S))
        )
        values = PairValues(*sums_P2.unbind(-1), *reference_P2.unbind(-1), *lengths_P2.unbind(-1))
        losses_P = pair_loss(kind, values, form)
        ahead_P = (values.chosen - values.reference_chosen) - (values.rejected - values.reference_rejected)
        metrics = {"accuracy": (ahead_P > 0).sum(), "margin": ahead_P.sum(), "chosen": values.chosen.sum()}
        metrics = {name: value.detach().to(losses_P.dtype) for name, value in metrics.items()}
        return LossOutput(losses_P.sum() + sums_S.sum() * 0.0, losses_P.new_tensor(float(pairs)), metrics)

    return objective


@torch.no_grad()
def with_reference(model: CausalLM, pairs: Sequence[Answers], *, batch_tokens: int) -> list[Answers]:
    """The pairs with the log-probabilities that the model gives them now; each process computes its share of them."""
    world, device = current_world(), next(model.parameters()).device
    found: dict[int, tuple[float, float]] = {}
    model.eval()
    groups = grouped(range(len(pairs)), lambda at: _size(pairs[at]), most=batch_tokens)
    for group in islice(groups, world.rank, None, world.size):
        values = document_logprobs(model, pack_answers([pairs[at] for at in group]).to(device))[0].tolist()
        found |= dict(zip(group, zip(values[::2], values[1::2], strict=True), strict=True))
    model.train()
    parts = [found] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, found)
    whole = {at: values for part in parts for at, values in part.items()}
    return [replace(pair, reference=whole[at]) for at, pair in enumerate(pairs)]


def measure(trainer: Trainer, pairs: Sequence[Answers], *, batch_tokens: int) -> dict[str, float]:
    """Loss, accuracy and margin of held-out pairs. Every rank must call it."""
    rank, size = trainer.reader.rank, trainer.reader.size
    groups = grouped(pairs, _size, most=batch_tokens)
    sums = trainer.evaluate(pack_answers(group[rank::size]) for group in groups)
    return {name: sums[name] / sums["weight"] for name in ("loss", "accuracy", "margin")}


def _in_row(found: Mapping[str, float]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in found.items()}


def _headline(numbers: dict[str, Any]) -> str:
    dropped = sum(numbers["dropped"].values()) + numbers["quarantined"]
    return (
        f"{numbers['pairs']:,} pairs ({dropped} left out), {numbers['steps']} steps, "
        f"loss {numbers['loss_first']:.3f} -> {numbers['loss_last']:.3f}"
    )
