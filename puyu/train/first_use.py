"""Settings of a fine-tuning that were not given: computed from model, data and memory, each with its reason.

    config, reasons = fill(SFTConfig(base=folder, data=[file], epochs=2), given={"epochs"})

Rates follow two points and a line between them: 1e-3 suits models of a few million parameters (recipes/nano.yaml), 4e-5
is what InternLM2's 7B was fine-tuned with (arXiv 2403.17297, section 4.1); adapters take ten times as much (Schulman et
al. 2025, "LoRA without regret"). Memory is counted from shapes, it is not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from puyu.data.chats import read_conversations
from puyu.data.mix import permuted
from puyu.device import pick_device, pick_dtype, total_memory
from puyu.model.checkpoint import read_config
from puyu.model.config import ModelConfig
from puyu.model.families import inputs_of, joins
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.planning.job import parameters
from puyu.train.sft import SFTConfig
from puyu.train.tune import TuneConfig
from puyu.types import Conversation

_LOOKED_AT = 2000
"""Conversations that are rendered to learn their lengths."""
_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}
"""Of a number in a quantized base: NF4 has a scale of one byte a block of 64, and one of four bytes 256 of those."""
_TRAINED = 16
"""Bytes of a weight that trains: itself, its gradient and AdamW's two moments, in fp32."""
_PROMPTS = 3
_MOST = 4e-3
"""Largest rate of adapters: with more, models of a few million parameters fall apart."""
_SMALL = 100_000_000
"""Models with fewer parameters need more steps to learn what they have never seen."""


class Reason(NamedTuple):
    """One setting that was chosen."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Of model, data and machine."""

    shape: ModelConfig
    parameters: int
    conversations: int
    mean: float
    """Tokens of a conversation."""
    longest: int
    prompts: tuple[str, ...]
    """Beginnings of some conversations."""
    dtype: torch.dtype
    memory: int
    """Bytes of the device."""

    @property
    def tokens(self) -> float:
        """Of all conversations."""
        return self.conversations * self.mean


def fill(config: SFTConfig, *, given: Set[str]) -> tuple[SFTConfig, list[Reason]]:
    """The config with what was left open, and why. `given`: the dotted names of the fields that were set."""
    facts = survey(config)
    reasons = [*_told(config, facts)]
    for choose in (_rate, _batch, _passes, _spared, _watched):
        for reason in choose(config, facts, given):
            config = _with(config, reason.field.split("."), reason.value)
            reasons.append(reason)
    return config, reasons


def survey(config: SFTConfig) -> Facts:
    """Look at the data and the model, without its weights."""
    tokenizer, shape = Tokenizer.load(config.base), read_config(config.base)
    talks: list[Conversation] = []
    weight = 0.0
    for part in config.data:
        found, _ = read_conversations(part.path)
        talks += found
        weight += part.repeat * len(found)
    some = [talks[permuted(at, len(talks), 0)] for at in range(min(len(talks), _LOOKED_AT))]
    lengths = [len(one.ids) for one in render_all(some, tokenizer)]
    device = pick_device(config.device)
    return Facts(
        shape=shape,
        parameters=sum(parameters(shape).values()),
        conversations=max(1, round(weight)),
        mean=sum(lengths) / len(lengths),
        longest=max(lengths),
        prompts=tuple(dict.fromkeys(_question(one) for one in some if _question(one)))[:_PROMPTS],
        dtype=pick_dtype(config.dtype, device),
        memory=total_memory(device),
    )


def _question(conversation: Conversation) -> str:
    """Its first turn, where that is a short one of the user and no tool is on offer."""
    first = conversation.messages[0]
    return first.text if first.role == "user" and len(first.text) <= 200 and not conversation.tools else ""


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) > 1:
        value = _with(getattr(config, path[0]), path[1:], value)
    return config.model_copy(update={path[0]: value})


def _told(config: SFTConfig, facts: Facts) -> list[Reason]:
    """What everything else follows from."""
    shape = facts.shape
    size = f"{facts.parameters / 1e6:,.1f} M parameters, context {max(shape.max_positions, config.context):,}"
    lengths = f"{facts.conversations:,} conversations of {facts.mean:.0f} tokens, the longest {facts.longest:,}"
    return [Reason("base", config.base, f"{shape.family}, {size}"), Reason("data", config.data[0].path, lengths)]


def _rate(config: SFTConfig, facts: Facts, given: Set[str]) -> list[Reason]:
    if "optim.lr" in given:
        return []
    lr = 1e-3 * (facts.parameters / 5e6) ** -(math.log(25) / math.log(1400))
    lr, why = min(1e-3, max(1e-5, lr)), f"for {facts.parameters / 1e6:,.0f} M parameters"
    if config.tune.adapts:
        lr, why = min(_MOST, lr * 10), f"{why}, ten times that of full fine-tuning and at most {_MOST:g}"
    return [Reason("optim.lr", float(f"{lr:.1e}"), why)]


def _batch(config: SFTConfig, facts: Facts, given: Set[str]) -> list[Reason]:
    if "batch_tokens" in given:
        return []
    context = config.max_tokens or max(facts.shape.max_positions, config.context)
    longest, usual = min(facts.longest, context), min(32 * facts.mean, 65_536.0)
    if usual > facts.tokens / 10:
        tokens, why = facts.tokens / 10, "ten steps a pass over little data"
    else:
        tokens, why = usual, "about 32 conversations a step"
    if longest > tokens:
        tokens, why = longest, "the longest conversation"
    return [Reason("batch_tokens", -(-round(tokens) // 64) * 64, why)]


def _passes(config: SFTConfig, facts: Facts, given: Set[str]) -> list[Reason]:
    if given & {"epochs", "steps"}:
        return []
    for least, epochs in ((20_000, 1), (5_000, 2)):
        if facts.conversations >= least:
            return [Reason("epochs", float(epochs), f"{facts.conversations:,} conversations")]
    steps = max(1.0, facts.tokens / config.batch_tokens)
    goal, most = (250, 30) if facts.parameters < _SMALL else (100, 5)
    epochs = min(most, max(3, math.ceil(goal / steps)))
    why = f"little data: towards {goal} steps, at most {most} passes" if epochs > 3 else "the usual for so much data"
    return [Reason("epochs", float(epochs), why)]


def _spared(config: SFTConfig, facts: Facts, given: Set[str]) -> list[Reason]:
    """Less memory, at the cost of time, where it is short."""
    if given & {"accumulate", "memory.checkpoint"}:
        return []
    room, longest = 0.8 * facts.memory, min(facts.longest, config.batch_tokens)
    micro, checkpoint = config.batch_tokens, "none"
    while _all(config.tune, facts, micro, checkpoint=checkpoint) > room:
        if micro // 2 >= longest:
            micro //= 2
        elif checkpoint == "none":
            micro, checkpoint = config.batch_tokens, "full"
        else:
            break
    need, there = _all(config.tune, facts, micro, checkpoint=checkpoint), facts.memory
    sizes = f"about {need / 2**30:.1f} of {there / 2**30:.0f} GiB of memory"
    if need > there:
        sizes += "; likely too much: a smaller --method (lora, qlora), or more processes"
    found = [Reason("accumulate", -(-config.batch_tokens // micro), sizes)]
    if checkpoint != "none":
        found.append(
            Reason("memory.checkpoint", checkpoint, "activations of the step do not fit; it costs a third more")
        )
    return found


def _watched(config: SFTConfig, facts: Facts, given: Set[str]) -> list[Reason]:
    found = []
    if config.validation is None and "heldout" not in given and facts.conversations >= 200:
        found.append(Reason("heldout", 0.05, "kept apart, for the loss on what was not learned"))
    if "samples" not in given and facts.prompts:
        found.append(Reason("samples", list(facts.prompts), "answered before, during and after"))
    if "evaluate_every" not in given:
        steps = config.steps or math.ceil(config.epochs * facts.tokens / config.batch_tokens)
        found.append(Reason("evaluate_every", max(1, steps // 2), "once on the way"))
    return found


def adapter_parameters(shape: ModelConfig, rank: int) -> int:
    """Of adapters on all matrices of the blocks, as the family stores them."""
    found = joins(shape).items()
    return sum(rank * (inputs_of(ours, shape) + rows) for ours, (join, _) in found for rows in join.rows)


def memory_of(
    shape: ModelConfig, tune: TuneConfig, *, tokens: int, dtype: torch.dtype, checkpoint: str = "none"
) -> dict[str, float]:
    """Bytes of a step of `tokens` tokens: of what is kept of the base, of what trains, and of activations.

    Counted from shapes; without room for what the allocator loses and for the pieces that the loss works in.
    """
    kinds, item = parameters(shape), dtype.itemsize
    blocks, whole = kinds["attention"] + kinds["MLP"], sum(kinds.values())
    if tune.adapts:
        weights = blocks * _BYTES.get(tune.base_kind, item) + (whole - blocks) * item
        trained = float(_TRAINED * adapter_parameters(shape, tune.rank))
    elif tune.method == "freeze":
        share = min(1.0, abs(tune.layers) / shape.num_layers)
        weights, trained = (whole - share * blocks) * item, _TRAINED * share * blocks
    else:
        weights, trained = 0.0, float(_TRAINED * whole)
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    mixture = shape.experts  # of which a token sees some
    width = mixture.per_token * mixture.size + mixture.shared_size if mixture else shape.intermediate_size
    block = (5 * shape.hidden_size + heads + 4 * width) * item
    kept = shape.num_layers * (block if checkpoint == "none" else shape.hidden_size * item)
    return {"weights": weights, "training": trained, "activations": float(tokens * (kept + block))}


def _all(tune: TuneConfig, facts: Facts, tokens: int, *, checkpoint: str) -> float:
    return sum(memory_of(facts.shape, tune, tokens=tokens, dtype=facts.dtype, checkpoint=checkpoint).values())


def lines_of(reasons: Sequence[Reason]) -> list[str]:
    """The settings as a person reads them."""
    rows = [(reason.field, _short(reason.value), reason.why) for reason in reasons]
    wide = [max(len(row[at]) for row in rows) for at in (0, 1)]
    return [f"  {field:<{wide[0]}}  {value:<{wide[1]}}  {why}" for field, value, why in rows]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} prompts"
    return f"{value:g}" if isinstance(value, float) else str(value)
