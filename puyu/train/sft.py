"""Supervised fine-tuning: conversations -> a chat model, or an adapter; loss on what the assistant wrote alone.

    $ puyu sft --base runs/nano/pretrain --data chats.jsonl --out runs/nano/sft

Conversations are rendered in the chat format of the base's tokenizer (InternLM2, ChatML, Qwen, Llama 3) and packed
whole; each sees only itself. What trains is `tune`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from puyu.configure import Config, dump
from puyu.data.chats import read_conversations
from puyu.data.mix import key_of, permuted
from puyu.data.packing import ConversationSource, Doc
from puyu.errors import ConfigError
from puyu.files import BadRecord
from puyu.tokenizer.chat import render_all
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.evaluate import GoOn, Latest, mean_loss, sampling
from puyu.train.objectives import lm_loss
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
    steps: int = 0
    """Optimizer steps; 0: by epochs."""
    batch_tokens: int = 8192
    """Most tokens of one optimizer step, over all processes."""
    max_tokens: int = 0
    """Longer conversations are dropped and counted; 0: the model's context."""
    tune: TuneConfig = TuneConfig()
    """Which weights train, and in what form."""
    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.01)
    """Optimizer and schedule. The default suits models of a few million parameters; 7B wants 4e-5."""


def run(config: SFTConfig, *, out: Path, on_step: OnStep | None = None, go_on: GoOn | None = None) -> dict[str, Any]:
    """Train (or go on), save; returns the key numbers. `go_on` answers `samples`."""
    with begun(config, out, name="sft") as (device, heart):
        identity = identity_of(config)
        if numbers := finished(out, identity):
            return numbers
        tokenizer, loaded = opened(config.base)
        docs, torn = read_docs(config.data, tokenizer, seed=config.seed)
        limit = config.max_tokens or loaded.config.max_positions
        source = ConversationSource(
            docs, tokens_per_batch=config.batch_tokens // config.accumulate, max_tokens=limit, seed=config.seed
        )
        steps = config.steps or -(-source.steps_for(config.epochs) // config.accumulate)
        tuning = Tuning.of(loaded, config.tune, seed=config.seed, base=config.base)
        settings = tuning.rates(config.trainer(steps, name="sft", identity=identity))
        model = place(loaded, dtype=config.dtype, device=device)
        trainer = Trainer(model, lm_loss, source, settings, out=out)
        trainer.on_step, trainer.about, trainer.heart = on_step, {"config": dump(config)}, heart
        validation = _validation(config, tokenizer)
        trainer.evaluations = [*([validation] if validation else []), *sampling(config, tokenizer, go_on, chat=True)]
        trainer.meter.enter_whole([len(ids) for ids, _ in source.items])
        trainer.on_export = lambda folder: tuning.save(trainer, folder, tokenizer.save)
        numbers = trainer.fit()
        numbers |= {"val_loss": validation.of(trainer)} if validation else {}
        heart.at("writing the model")
        tuning.save(trainer, out, tokenizer.save)
        numbers |= {"conversations": len(source.items), "dropped": source.dropped, "quarantined": len(torn)}
        return finish(out, identity, {**numbers, "headline": _headline(numbers)})


def _validation(config: SFTConfig, tokenizer: Tokenizer) -> Latest[float] | None:
    if config.validation is None:
        return None
    docs, _ = read_docs([ChatData(path=config.validation)], tokenizer, seed=config.seed)
    return Latest(lambda trainer: mean_loss(trainer, docs, batch_tokens=config.batch_tokens), _in_row)


def _in_row(loss: float) -> dict[str, float]:
    return {"val_loss": loss}


def read_docs(data: Sequence[ChatData], tokenizer: Tokenizer, *, seed: int) -> tuple[list[Doc], list[BadRecord]]:
    """Rendered conversations of all files, repeated as asked, and the torn lines."""
    docs: list[Doc] = []
    torn: list[BadRecord] = []
    for number, part in enumerate(data):
        conversations, bad = read_conversations(part.path)
        order = repeated(len(conversations), part.repeat, key=key_of(seed, number))
        docs += _rendered(conversations, order, tokenizer, path=part.path)
        torn += bad
    tell_torn(torn)
    return docs, torn


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
