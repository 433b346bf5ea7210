"""Supervised fine-tuning: conversations -> a chat model, or an adapter; loss on what the assistant wrote alone.

    $ puyu sft --base runs/nano/pretrain --data chats.jsonl --out runs/nano/sft

Conversations are rendered in the chat format of the base's tokenizer (InternLM2, ChatML, Qwen, Llama 3) and packed
whole; each sees only itself. What trains is `tune`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from puyu.configure import Config, dump
from puyu.data.chats import read_conversations
from puyu.data.mix import key_of, permuted
from puyu.data.packing import ConversationSource, Doc
from puyu.errors import ConfigError
from puyu.files import BadRecord, hash_json
from puyu.model.rope import RopeKind
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.evaluate import GoOn, Latest, at_first, mean_loss, sampling
from puyu.train.objectives import lm_loss, noisy
from puyu.train.optim import OptimConfig
from puyu.train.stage import TrainingConfig, begun, finish, finished, identity_of, listed, opened, place, tell_torn
from puyu.train.trainer import OnStep, Trainer
from puyu.train.tune import TuneConfig, Tuning
from puyu.types import Conversation


class ChatData(Config):
    """One file of conversations."""

    path: Path
    """JSONL in OpenAI's form, one conversation a line."""
    repeat: float = 1.0
    """How often an epoch sees it; 0.5 takes a fixed half."""


def _chat_data(value: Any) -> Any:
    items = listed(value)
    return [{"path": item} if isinstance(item, str | Path) else item for item in items] if items is not None else items


class SFTConfig(TrainingConfig):
    """Fine-tune on conversations."""

    base: Path
    """Checkpoint to start from."""
    data: Annotated[list[ChatData], BeforeValidator(_chat_data)]
    """Files of conversations: one, several, or with how often an epoch sees each."""
    epochs: float = 2.0
    """Passes over the data; used when steps is 0."""
    validation: Path | None = None
    """Conversations whose loss is taken every `evaluate_every` steps and at the end."""
    heldout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the conversations, by the hash of their text, that is kept apart for that loss instead."""
    steps: int = 0
    """Optimizer steps; 0: by epochs."""
    batch_tokens: int = 8192
    """Most tokens of one optimizer step, over all processes."""
    max_tokens: int = 0
    """Longer conversations are dropped and counted; 0: the model's context."""
    context: int = 0
    """Make the model one for contexts of so many tokens, if that is more than it has."""
    rope: RopeKind = "yarn"
    """How its positions are then stretched: yarn, linear, ntk, llama3, or none."""
    noise: float = 0.0
    """NEFTune's alpha: noise on the embeddings, 5 to 15; 0: none."""
    tune: TuneConfig = TuneConfig()
    """Which weights train, and in what form."""
    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.01)
    """Optimizer and schedule. The default suits models of a few million parameters; 7B wants 4e-5."""

    @model_validator(mode="after")
    def _held_once(self) -> Self:
        if self.validation is not None and self.heldout:
            raise ValueError("validation and heldout: give one of the two")
        return self


def run(config: SFTConfig, *, out: Path, on_step: OnStep | None = None, go_on: GoOn | None = None) -> dict[str, Any]:
    """Train (or go on), save; returns the key numbers. `go_on` answers `samples`."""
    with begun(config, out, name="sft") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer, loaded = opened(config.base, context=config.context, rope=config.rope)
        docs, held, torn = read_docs(config.data, tokenizer, seed=config.seed, heldout=config.heldout)
        limit = config.max_tokens or loaded.config.max_positions
        source = ConversationSource(
            docs, tokens_per_batch=config.batch_tokens // config.accumulate, max_tokens=limit, seed=config.seed
        )
        steps = config.steps or -(-source.steps_for(config.epochs) // config.accumulate)
        tuning = Tuning.of(loaded, config.tune, seed=config.seed, base=config.base)
        settings = tuning.rates(config.trainer(steps, name="sft", identity=identity))
        model = place(loaded, dtype=config.dtype, device=device)
        objective = noisy(lm_loss, config.noise) if config.noise else lm_loss
        trainer = Trainer(model, objective, source, settings, out=out)
        trainer.on_step, trainer.about, trainer.heart = on_step, {"config": dump(config)}, heart
        validation = _validation(config, tokenizer, held)
        samples = sampling(config, tokenizer, go_on, chat=True)
        trainer.evaluations = [*([validation] if validation else []), *samples]
        trainer.meter.enter_whole([len(ids) for ids, _ in source.items])
        trainer.on_export = lambda folder: tuning.save(trainer, folder, tokenizer.save)
        at_first(trainer, samples)
        numbers = trainer.fit()
        numbers |= {"val_loss": validation.of(trainer)} if validation else {}
        heart.at("writing the model")
        tuning.save(trainer, out, tokenizer.save)
        numbers |= {"conversations": len(source.items), "dropped": source.dropped, "quarantined": len(torn)}
        numbers |= {"trained_parameters": tuning.trained}
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def _validation(config: SFTConfig, tokenizer: Tokenizer, held: list[Doc]) -> Latest[float] | None:
    if config.validation is not None:
        held = read_docs([ChatData(path=config.validation)], tokenizer, seed=config.seed).train
    if not held:
        return None
    return Latest(lambda trainer: mean_loss(trainer, held, batch_tokens=config.batch_tokens), _in_row)


def _in_row(loss: float) -> dict[str, float]:
    return {"val_loss": loss}


class Docs(NamedTuple):
    """Rendered conversations to learn, those kept apart, and the torn lines."""

    train: list[Doc]
    held: list[Doc]
    torn: list[BadRecord]


def read_docs(data: Sequence[ChatData], tokenizer: Tokenizer, *, seed: int, heldout: float = 0.0) -> Docs:
    """The conversations of all files, those to learn as often as asked."""
    found = Docs([], [], [])
    for number, part in enumerate(data):
        conversations, bad = read_conversations(part.path)
        apart = [_is_apart(one, heldout) for one in conversations]
        learned = [at for at, is_apart in enumerate(apart) if not is_apart]
        order = [learned[at] for at in repeated(len(learned), part.repeat, key=key_of(seed, number))]
        found.train.extend(_rendered(conversations, order, tokenizer, path=part.path))
        held = [at for at, is_apart in enumerate(apart) if is_apart]
        found.held.extend(_rendered(conversations, held, tokenizer, path=part.path))
        found.torn.extend(bad)
    tell_torn(found.torn)
    return found


def _is_apart(conversation: Conversation, share: float) -> bool:
    return share > 0 and int(hash_json(conversation.to_openai()["messages"])[:15], 16) < share * 16**15


def _rendered(
    conversations: Sequence[Conversation], order: Sequence[int], tokenizer: Tokenizer, *, path: Path
) -> list[Doc]:
    """Documents in that order; InputError names file and conversation of what the tokenizer's format cannot express."""
    wanted = sorted(set(order))

    def where(number: int) -> str:
        return f"{path}, conversation {wanted[number] + 1}"

    found = render_all((conversations[i] for i in wanted), tokenizer, where=where)
    docs: dict[int, Doc] = {i: (rendered.ids, rendered.loss) for i, rendered in zip(wanted, found, strict=True)}
    return [docs[i] for i in order]


def repeated(count: int, repeat: float, *, key: int) -> list[int]:
    """Indices 0..count-1 as often as `repeat` says; the fraction is a seeded choice."""
    if repeat < 0:
        raise ConfigError(f"repeat must be >= 0, not {repeat}")
    whole, share = divmod(repeat, 1)
    some = sorted(permuted(i, count, key) for i in range(round(share * count)))
    return list(range(count)) * int(whole) + some


def _headline(numbers: dict[str, Any]) -> str:
    dropped = sum(numbers["dropped"].values()) + numbers["quarantined"]
    heldout = f", on held-out conversations {numbers['val_loss']:.3f}" if "val_loss" in numbers else ""
    return (
        f"{numbers['conversations']:,} conversations ({dropped} left out), {numbers['steps']} steps, "
        f"loss {numbers['loss_first']:.3f} -> {numbers['loss_last']:.3f}{heldout}, "
        f"{numbers['tokens_per_s']:,.0f} tokens/s"
    )
