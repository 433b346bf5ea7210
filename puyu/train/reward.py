"""Reward model: preference pairs -> a scalar model on the SFT trunk, one model for several domains.

    $ puyu reward --base runs/nano/sft --data pairs.jsonl --out runs/nano/reward

Focal ranking loss with log barrier, domain rubrics, score at a reward token: InternLM2's COOL RLHF
(arXiv 2403.17297, section 4.3). Some prompts are held out by hash; accuracy and loss of their pairs are reported per
domain, every `evaluate_every` steps and at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from puyu.configure import dump
from puyu.data.chats import read_preferences
from puyu.data.packing import Pair, PreferenceSource, grouped, pack_pairs
from puyu.errors import ConfigError, InputError
from puyu.files import hash_json
from puyu.model.checkpoint import scalar_from_language
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.evaluate import Latest
from puyu.train.objectives import ranking_loss
from puyu.train.optim import OptimConfig
from puyu.train.scoring import Rubrics, reward_token, scoring_ids
from puyu.train.stage import (
    TrainingConfig,
    begun,
    check_vocabulary,
    finish,
    finished,
    identity_of,
    listed,
    place,
    save,
    tell_torn,
)
from puyu.train.trainer import OnStep, Trainer
from puyu.train.tune import TuneConfig, Tuning
from puyu.types import Preference


class RewardConfig(TrainingConfig):
    """Train a reward model on preference pairs."""

    base: Path
    """Checkpoint to start from (the SFT model)."""
    data: Annotated[list[Path], BeforeValidator(listed)]
    """JSONL files of preference pairs: prompt, chosen, rejected, domain, margin; or another form of
    puyu.data.preferences."""
    limit: int = 0
    """Use only the first pairs of each file; 0: all."""
    domains: dict[str, str] = Field(default_factory=lambda: {"default": ""})
    """Domain -> rubric: the system turn that only the reward model sees; empty text: none."""
    epochs: float = 2.0
    """Passes over the data; used when steps is 0."""
    steps: int = 0
    """Optimizer steps; 0: by epochs."""
    batch_tokens: int = 8192
    """Most tokens of one optimizer step, over all processes."""
    max_tokens: int = 0
    """Longer sequences are cut at the end, the reward token stays; 0: the model's context."""
    gamma: float = 2.0
    """Exponent of the focal ranking loss; 0: plain ranking."""
    penalty: float = 0.02
    """Weight of the log barrier that keeps scores in (-5, 5), as a mean over the two scores."""
    heldout: float = 0.1
    """Share of the prompts kept apart for the pair accuracy."""
    reward_token: str = "<|reward|>"
    """Token that carries the score."""
    tune: TuneConfig = TuneConfig()
    """Which weights train beside the head, and in what form; adapters are merged when the model is written."""
    optim: OptimConfig = OptimConfig(lr=5e-4, weight_decay=0.01)
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _writes_nothing(self) -> Self:
        if self.samples:
            raise ValueError("samples: a reward model writes no text; leave them out")
        return self


def run(config: RewardConfig, *, out: Path, on_step: OnStep | None = None) -> dict[str, Any]:
    """Train (or go on), measure held-out accuracy, save; returns the key numbers."""
    with begun(config, out, name="reward") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer = Tokenizer.load(config.base)
        loaded = scalar_from_language(config.base)
        check_vocabulary(tokenizer, loaded.config.vocab_size, folder=config.base)
        limit = config.max_tokens or loaded.config.max_positions
        rubrics = Rubrics(config.domains, reward_token(tokenizer, config.reward_token), limit)
        pairs = read_pairs(config, rubrics, tokenizer)
        budget = config.batch_tokens // config.accumulate
        source = PreferenceSource(pairs.train, tokens_per_batch=budget, seed=config.seed)
        steps = config.steps or -(-source.steps_for(config.epochs) // config.accumulate)
        tuning = Tuning.of(loaded, config.tune, seed=config.seed, base=config.base)
        settings = tuning.rates(config.trainer(steps, name="reward", identity=identity))
        model = place(loaded, dtype=config.dtype, device=device)
        objective = ranking_loss(gamma=config.gamma, penalty=config.penalty)
        trainer = Trainer(model, objective, source, settings, out=out)
        trainer.on_step, trainer.about, trainer.heart = on_step, {"config": dump(config)}, heart
        heldout = Latest(lambda run: measure(run, pairs.heldout, rubrics, batch_tokens=budget), _in_row)
        trainer.evaluations = [heldout] if pairs.heldout else []
        trainer.meter.enter_whole([len(ids) for pair in source.items for ids in (pair.chosen, pair.rejected)])
        extra = {"reward_token_id": rubrics.reward_id, "reward_domains_hash": rubrics.key()}
        trainer.on_export = lambda folder: save(trainer, folder, tokenizer.save, rubrics.save, extra=extra)
        numbers = trainer.fit()
        numbers["heldout"] = heldout.of(trainer)
        heart.at("writing the model")
        save(trainer, out, tokenizer.save, rubrics.save, extra=extra)
        numbers |= {"pairs": len(source.items), "dropped": source.dropped, "quarantined": pairs.torn}
        numbers |= {"trained_parameters": tuning.trained}
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rendered pairs, split by the hash of their prompt, and the number of torn lines."""

    train: list[Pair]
    heldout: list[Pair]
    torn: int


def read_pairs(config: RewardConfig, rubrics: Rubrics, tokenizer: Tokenizer) -> Pairs:
    """Read, render and split all files; a pair of a domain without a rubric is an error that names it."""
    train: list[Pair] = []
    heldout: list[Pair] = []
    torn = 0
    for path in config.data:
        preferences, bad = read_preferences(path)
        torn += len(bad)
        tell_torn(bad)
        for preference in preferences[: config.limit or None]:
            chosen_part = heldout if _is_heldout(preference, config.heldout) else train
            chosen_part.append(_pair(preference, rubrics, tokenizer, path))
    if not train:
        raise InputError("no preference pair is left for training", remedy="give more data, or lower heldout")
    return Pairs(train, heldout, torn)


def _is_heldout(preference: Preference, share: float) -> bool:
    return int(hash_json(preference.prompt.to_openai()["messages"])[:15], 16) < share * 16**15


def _pair(preference: Preference, rubrics: Rubrics, tokenizer: Tokenizer, path: Path) -> Pair:
    prompt, domain = preference.prompt, preference.domain
    try:
        number = rubrics.number(domain)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", remedy=f"add it under domains; {error.remedy}") from error
    chosen, rejected = (
        scoring_ids(prompt, answer, domain, rubrics, tokenizer) for answer in (preference.chosen, preference.rejected)
    )
    return Pair(chosen, rejected, number, preference.margin)


def measure(
    trainer: Trainer, pairs: Sequence[Pair], rubrics: Rubrics, *, batch_tokens: int
) -> dict[str, dict[str, float]]:
    """Held-out loss, and pair accuracy with its binomial standard error, per domain and over all. Every rank must call
    it."""
    rank, size = trainer.reader.rank, trainer.reader.size
    found: dict[str, tuple[int, dict[str, float]]] = {}
    for number, domain in enumerate(rubrics.domains):
        if chosen := [pair for pair in pairs if pair.domain == number]:
            groups = grouped(chosen, lambda pair: pair.num_tokens, most=batch_tokens)
            found[domain] = len(chosen), trainer.evaluate(pack_pairs(group[rank::size]) for group in groups)
    result = {domain: _means(*row) for domain, row in found.items()}
    if found:
        names = ("weight", "loss", "accuracy", "margin")
        total = {name: sum(sums[name] for _, sums in found.values()) for name in names}
        result["all"] = _means(len(pairs), total)
    return result


def _means(count: int, sums: Mapping[str, float]) -> dict[str, float]:
    accuracy, loss, margin = (sums[name] / sums["weight"] for name in ("accuracy", "loss", "margin"))
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return {"accuracy": accuracy, "stderr": error, "loss": loss, "margin": margin, "pairs": count}


def _in_row(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    row = {f"val_accuracy/{domain}": value["accuracy"] for domain, value in found.items() if domain != "all"}
    return row | {"val_loss": found["all"]["loss"], "val_accuracy": found["all"]["accuracy"]}


def _headline(numbers: dict[str, Any]) -> str:
    found = numbers["heldout"].get("all")
    share = f"{found['accuracy']:.1%} ± {found['stderr']:.1%} of {found['pairs']}" if found else "none"
    return (
        f"{numbers['pairs']:,} pairs, {numbers['steps']} steps, "
        f"loss {numbers['loss_first']:.3f} -> {numbers['loss_last']:.3f}, held-out pairs right: {share}"
    )
