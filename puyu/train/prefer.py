"""Preference training: DPO and its kin, from pairs of answers to one prompt; KTO, from answers judged one by one.

    $ puyu prefer --base runs/nano/sft --data pairs.jsonl --out runs/nano/dpo

The reference is the model as it is before the first step; its log-probabilities of all answers are computed once, so
that no second model is held. Only an answer's own tokens count. What trains is `tune`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BeforeValidator
from torch import Tensor

from puyu.configure import dump
from puyu.data.chats import read_judged, read_preferences
from puyu.data.packing import Batch, Doc, ItemSource, grouped, pack_documents
from puyu.dist import current_world
from puyu.errors import InputError
from puyu.files import BadRecord
from puyu.model.heads import CausalLM
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.evaluate import GoOn, Latest, at_first, sampling
from puyu.train.objectives import LossOutput, Objective, chunked_logprobs, head_weight, hidden_states, means
from puyu.train.optim import OptimConfig
from puyu.train.preference_losses import (
    FREE_OF_REFERENCE,
    PairKind,
    PairValues,
    PreferenceNumbers,
    SingleKind,
    pair_loss,
    single_loss,
)
from puyu.train.stage import TrainingConfig, begun, finish, finished, identity_of, listed, opened, place, tell_torn
from puyu.train.trainer import OnStep, Trainer
from puyu.train.tune import TuneConfig, Tuning
from puyu.types import Conversation, Judged, Message, Preference

_LOOK_BACK = 64
"""How many records before a judged answer are looked through for one to another prompt."""


class PreferConfig(TrainingConfig, PreferenceNumbers):
    """Learn from preference pairs, or from judged answers."""

    base: Path
    """Checkpoint or adapter to start from, and the reference (the SFT model)."""
    data: Annotated[list[Path], BeforeValidator(listed)]
    """JSONL files of preference pairs: prompt, chosen, rejected; or another form of puyu.data.preferences. The kinds
    that judge answers one by one also read prompt, completion, label (puyu.data.judged)."""
    validation: Path | None = None
    """Pairs whose loss and accuracy are taken every `evaluate_every` steps."""
    loss: PairKind | SingleKind = "sigmoid"
    """sigmoid is DPO; simpo and orpo need no reference; kto and apo_zero_unpaired judge answers one by one."""
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


@dataclass(frozen=True, slots=True)
class Answers:
    """Rendered conversations that learn their last turn only, and the log-probability that the reference gives each.

    Of a pair the better is the first; of a judged answer the second is an answer to another prompt (kto).
    """

    docs: tuple[Doc, ...]
    reference: tuple[float, ...] = ()
    good: bool = True
    """Whether a judged answer is wanted."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.docs]

    @property
    def size(self) -> int:
        return sum(self.lengths)


def run(config: PreferConfig, *, out: Path, on_step: OnStep | None = None, go_on: GoOn | None = None) -> dict[str, Any]:
    """Train (or go on), save; returns the key numbers. `go_on` answers `samples`."""
    with begun(config, out, name="prefer") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer, loaded = opened(config.base)
        limit = config.max_tokens or loaded.config.max_positions
        found, torn = read_answers(config.data, tokenizer, kind=config.loss)
        held, _ = read_answers([config.validation] if config.validation else [], tokenizer, kind=config.loss)
        budget = config.batch_tokens // config.accumulate
        fits = [one for one in found if one.size <= budget and max(one.lengths) <= limit]
        tuning = Tuning.of(loaded, config.tune, seed=config.seed, base=config.base)
        model = place(loaded, dtype=config.dtype, device=device)
        if config.loss not in FREE_OF_REFERENCE:
            heart.at("log-probabilities of the reference")
            fits, held = (with_reference(model, some, batch_tokens=budget) for some in (fits, held))
        source = ItemSource(fits, pack_answers, _size, tokens_per_batch=budget, seed=config.seed)
        steps = config.steps or -(-source.steps_for(config.epochs) // config.accumulate)
        settings = tuning.rates(config.trainer(steps, name="prefer", identity=identity))
        trainer = Trainer(model, preference_loss(config.loss, config), source, settings, out=out)
        trainer.on_step, trainer.about, trainer.heart = on_step, {"config": dump(config)}, heart
        validation = Latest(lambda run: measure(run, held, batch_tokens=budget), _in_row)
        samples = sampling(config, tokenizer, go_on, chat=True)
        trainer.evaluations = [*([validation] if held else []), *samples]
        trainer.meter.enter_whole([length for one in fits for length in one.lengths])
        trainer.on_export = lambda folder: tuning.save(trainer, folder, tokenizer.save)
        at_first(trainer, samples)
        numbers = trainer.fit()
        numbers |= {"validation": validation.of(trainer)} if held else {}
        heart.at("writing the model")
        tuning.save(trainer, out, tokenizer.save)
        what = "answers" if config.loss in get_args(SingleKind) else "pairs"
        numbers |= {what: len(fits), "dropped": {"too_long": len(found) - len(fits)}, "quarantined": len(torn)}
        numbers |= {"trained_parameters": tuning.trained}
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def _size(one: Answers) -> int:
    return one.size


def read_answers(
    paths: Sequence[Path], tokenizer: Tokenizer, *, kind: PairKind | SingleKind = "sigmoid"
) -> tuple[list[Answers], list[BadRecord]]:
    """All pairs of some files (of judged answers, where the kind wants them), rendered, and the torn lines."""
    found: list[Answers] = []
    torn: list[BadRecord] = []
    for path in paths:
        records, bad = read_judged(path) if kind in get_args(SingleKind) else read_preferences(path)
        torn += bad
        tell_torn(bad)
        talks, goods = _talks(records, drifts=kind == "kto"), [getattr(one, "good", True) for one in records]
        width = len(talks) // len(records)
        where = partial(_where, path, width)
        docs: list[Doc] = [(one.ids, last_turn(one.loss)) for one in render_all(talks, tokenizer, where=where)]
        groups = (docs[at : at + width] for at in range(0, len(docs), width))
        found += [Answers(tuple(group), (0.0,) * width, good) for group, good in zip(groups, goods, strict=True)]
    if paths and not found:
        raise InputError("no answer is left for training", remedy="give more data")
    return found, torn


def _where(path: Path, width: int, at: int) -> str:
    return f"{path}, record {at // width + 1}"


def _talks(records: Sequence[Preference | Judged], *, drifts: bool) -> list[Conversation]:
    """The conversations of each record: both answers; or the one, and where the drift is wanted that to another
    prompt."""
    talks: list[Conversation] = []
    for at, one in enumerate(records):
        if isinstance(one, Preference):
            talks += [_talk(one.prompt, one.chosen), _talk(one.prompt, one.rejected)]
            continue
        talks.append(_talk(one.prompt, one.answer))
        if drifts:
            before = (records[at - back] for back in range(1, min(len(records), _LOOK_BACK)))
            others = (other for other in before if other.prompt.messages != one.prompt.messages)
            other = next(others, one)
            assert isinstance(other, Judged)
            talks.append(_talk(one.prompt, other.answer))
    return talks


def _talk(prompt: Conversation, answer: Message) -> Conversation:
    return Conversation((*prompt.messages, answer), prompt.tools)


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


def pack_answers(items: Sequence[Answers]) -> Batch:
    """The first documents of all items, then their second ones. Extras: `number_T`, the document of each token,
    `reference_S` and `good_P`."""
    width = len(items[0].docs) if items else 0
    docs = [one.docs[place] for place in range(width) for one in items]
    batch = pack_documents(docs)
    lengths_S = [len(ids) for ids, _ in docs] or [1]
    reference_S = [one.reference[place] for place in range(width) for one in items]
    extras = {
        "number_T": torch.from_numpy(np.repeat(np.arange(len(lengths_S)), lengths_S)),
        "reference_S": torch.tensor(reference_S, dtype=torch.float64),
        "good_P": torch.tensor([one.good for one in items], dtype=torch.bool),
    }
    return replace(batch, extras=extras)


def document_logprobs(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each document's learned tokens, and how many they are, [S] each."""
    learned = batch.weights_T.nonzero().squeeze(-1)
    logprobs_L = chunked_logprobs(hidden_states(model, batch)[learned], head_weight(model), batch.targets_T[learned])
    number_L = batch.extras["number_T"][learned]
    zeros_S = logprobs_L.new_zeros(len(batch.starts_S))
    return zeros_S.index_add(0, number_L, logprobs_L), zeros_S.index_add(0, number_L, torch.ones_like(logprobs_L))


def preference_loss(kind: PairKind | SingleKind, form: PreferenceNumbers) -> Objective:
    """The objective; its weight is the number of pairs, or of judged answers."""
    if kind == "kto" or kind == "apo_zero_unpaired":
        return partial(_single_objective, kind=kind, form=form)
    return partial(_pair_objective, kind=kind, form=form)


def _pair_objective(model: CausalLM, batch: Batch, *, kind: PairKind, form: PreferenceNumbers) -> LossOutput:
    sums_S, lengths_S = document_logprobs(model, batch)
    pairs = len(batch.extras["good_P"])  # a rank without a pair still takes part in collectives
    sums_2P, lengths_2P, reference_2P = (
        part[: 2 * pairs].reshape(2, -1) for part in (sums_S, lengths_S, batch.extras["reference_S"].to(sums_S))
    )
    values = PairValues(*sums_2P, *reference_2P, *lengths_2P)
    losses_P = pair_loss(kind, values, form)
    ahead_P = (values.chosen - values.reference_chosen) - (values.rejected - values.reference_rejected)
    metrics = {"accuracy": (ahead_P > 0).sum(), "margin": ahead_P.sum(), "chosen": values.chosen.sum()}
    return _summed(losses_P, sums_S, metrics)


def _single_objective(model: CausalLM, batch: Batch, *, kind: SingleKind, form: PreferenceNumbers) -> LossOutput:
    good_P, reference_S = batch.extras["good_P"], batch.extras["reference_S"]
    count, drifts = len(good_P), kind == "kto"
    drift = torch.zeros((), device=reference_S.device)
    if drifts:  # before the pass with gradients: sharded weights are gathered in the order of the last pass
        with torch.no_grad():
            theirs_S = document_logprobs(model, _documents(batch, count, None) if count else batch)[0][:count]
        drift = _mean_of_all(theirs_S - reference_S[count:].to(theirs_S)).clamp(min=0)
    sums_S = document_logprobs(model, _documents(batch, 0, count) if drifts and count else batch)[0]
    ratio_P = sums_S[:count] - reference_S[:count].to(sums_S)
    losses_P = single_loss(kind, ratio_P, good_P, drift=drift, form=form)
    metrics = {"accuracy": ((ratio_P > drift) == good_P).sum(), "drift": drift * count}
    for name, of_P in (("wanted", good_P), ("unwanted", ~good_P)):
        metrics |= {f"ratio/{name}": ratio_P[of_P].sum(), f"weight/{name}": of_P.sum()}
    return _summed(losses_P, sums_S, metrics)


def _summed(losses_P: Tensor, sums_S: Tensor, metrics: Mapping[str, Tensor]) -> LossOutput:
    found = {name: value.detach().to(losses_P.dtype) for name, value in metrics.items()}
    return LossOutput(losses_P.sum() + sums_S.sum() * 0.0, losses_P.new_tensor(float(len(losses_P))), found)


def _documents(batch: Batch, first: int, last: int | None) -> Batch:
    """Some neighboring documents of a batch, numbered from 0."""
    cut = slice(batch.starts_S[first], batch.ends_S[-1 if last is None else last - 1])
    return Batch(
        tokens_T=batch.tokens_T[cut],
        positions_T=batch.positions_T[cut],
        targets_T=batch.targets_T[cut],
        weights_T=batch.weights_T[cut],
        starts_S=tuple(start - cut.start for start in batch.starts_S[first:last]),
        extras={"number_T": batch.extras["number_T"][cut] - first},
    )


def _mean_of_all(values_P: Tensor) -> Tensor:
    """The mean over all processes, which may have different numbers of them."""
    sums_2 = torch.stack((values_P.sum(), values_P.new_tensor(float(len(values_P)))))
    if current_world().size > 1:
        dist.all_reduce(sums_2)
    return sums_2[0] / sums_2[1].clamp(min=1.0)


@torch.no_grad()
def with_reference(model: CausalLM, items: Sequence[Answers], *, batch_tokens: int) -> list[Answers]:
    """The items with the log-probabilities that the model gives them now; each process computes its share of them."""
    world, device = current_world(), model.trunk.device
    found: dict[int, tuple[float, ...]] = {}
    model.eval()
    groups = grouped(range(len(items)), lambda at: items[at].size, most=batch_tokens)
    for group in islice(groups, world.rank, None, world.size):
        sums_S = document_logprobs(model, pack_answers([items[at] for at in group]).to(device))[0]
        found |= dict(zip(group, map(tuple, sums_S.reshape(-1, len(group)).T.tolist()), strict=True))
    model.train()
    parts = [found] * world.size
    if world.size > 1:
        dist.all_gather_object(parts, found)
    whole = {at: values for part in parts for at, values in part.items()}
    return [replace(one, reference=whole[at]) for at, one in enumerate(items)]


def measure(trainer: Trainer, items: Sequence[Answers], *, batch_tokens: int) -> dict[str, float]:
    """Loss, accuracy and more of what is held out. Every rank must call it."""
    rank, size = trainer.reader.rank, trainer.reader.size
    groups = grouped(items, _size, most=batch_tokens)
    return means(trainer.evaluate(pack_answers(group[rank::size]) for group in groups))


def _in_row(found: Mapping[str, float]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in found.items()}


def _headline(numbers: dict[str, Any]) -> str:
    dropped = sum(numbers["dropped"].values()) + numbers["quarantined"]
    what = "pairs" if "pairs" in numbers else "answers"
    return (
        f"{numbers[what]:,} {what} ({dropped} left out), {numbers['steps']} steps, "
        f"loss {numbers['loss_first']:.3f} -> {numbers['loss_last']:.3f}"
    )
