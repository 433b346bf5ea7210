"""Evaluation inside a run, which it must not change: random streams, modes and the data cursor stay as they were.

A callback `(step, trainer) -> values for the row of that step` runs on every process. Text is made by a function that
the caller hands in (the roof passes the engine), because this room knows no engine.

    trainer.evaluations.append(lambda step, trainer: {"val_loss": ...})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import nn

from puyu.data.packing import Doc, grouped, pack_documents
from puyu.device import total_memory
from puyu.dist import barrier
from puyu.errors import ConfigError
from puyu.log import MetricsWriter, say
from puyu.model.adapted import adapted_layers
from puyu.model.heads import CausalLM
from puyu.tokenizer.tokenizer import Tokenizer
from puyu.train.layouts.base import first_of
from puyu.train.monitor import MonitorSettings
from puyu.train.state import saved

if TYPE_CHECKING:
    from puyu.train.trainer import Trainer

_COPY = 0.1
"""Share of the memory that a copy of the model may take, made to be looked at."""
OnEvaluate = Callable[[int, "Trainer"], Mapping[str, float]]
T = TypeVar("T")


class Latest(Generic[T]):
    """A callback that keeps what it found last, so that the end of a run does not measure it again."""

    def __init__(self, measure: Callable[[Trainer], T], in_row: Callable[[T], Mapping[str, float]]) -> None:
        self._measure, self._in_row = measure, in_row
        self._found: tuple[int, T] | None = None

    def __call__(self, step: int, trainer: Trainer) -> Mapping[str, float]:
        self._found = step, self._measure(trainer)
        return self._in_row(self._found[1])

    def of(self, trainer: Trainer) -> T:
        """What was found at the step that the trainer has reached; measured now where it was not. Every process calls
        it."""
        if self._found is None or self._found[0] != trainer.done:
            with undisturbed(trainer.model, trainer.device):
                self._found = trainer.done, self._measure(trainer)
        return self._found[1]


class GoOn(Protocol):
    """Continues prompts by at most `max_tokens` tokens, or with `chat` answers them."""

    def __call__(
        self, model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int, *, chat: bool = False
    ) -> list[str]: ...


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the model evaluate, without dropout; put random states and the modes of all modules back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def copied(model: CausalLM, device: torch.device) -> bool:
    """Whether adapters are merged into a copy before they are looked at: it is quicker, where memory is no matter."""
    if not any(adapted_layers(model)):
        return False
    with torch.device("meta"):
        count = sum(weight.numel() for weight in CausalLM(model.config).parameters())
    return count * (model.trunk.compute_dtype or torch.float32).itemsize <= _COPY * total_memory(device)


def sampling(
    settings: MonitorSettings, tokenizer: Tokenizer, go_on: GoOn | None, *, chat: bool = False
) -> list[OnEvaluate]:
    """The callback that continues the prompts of `samples`, into OUT/samples.jsonl; none where there are none."""
    if not settings.samples:
        return []
    if go_on is None:
        raise ConfigError("samples: this caller brings nothing that makes text", remedy="use `puyu pretrain` or `sft`")

    def sample(step: int, trainer: Trainer) -> dict[str, float]:
        with trainer.whole_model() as model:
            if model is not None:
                texts = go_on(model, tokenizer, settings.samples, settings.sample_tokens, chat=chat)
                _show(step, settings.samples, texts)
                writer = MetricsWriter(trainer.out / "samples.jsonl", from_step=step)
                for prompt, text in zip(settings.samples, texts, strict=True):
                    writer.write(step, {"prompt": prompt, "text": text})
                writer.close()
        barrier()
        return {}

    return [sample]


def _show(step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
    say(f"\n  {f'after step {step}' if step else 'before the first step'}:")
    for prompt, text in zip(prompts, texts, strict=True):
        say(f"    {' '.join(prompt.split())}\n      -> {' '.join(text.split())[:300]}")


def at_first(trainer: Trainer, callbacks: Sequence[OnEvaluate]) -> None:
    """What the callbacks find before the first step, unless the run goes on from a state. Every rank must call it."""
    if first_of("saved" if trainer.world.is_main and saved(trainer.out) else ""):
        return
    with undisturbed(trainer.model, trainer.device):
        for callback in callbacks:
            callback(0, trainer)


def mean_loss(trainer: Trainer, docs: Sequence[Doc], *, batch_tokens: int) -> float:
    """Loss per learned token of some documents, in batches of whole ones. Every rank must call it."""
    rank, size = trainer.reader.rank, trainer.reader.size
    groups = grouped(docs, lambda doc: len(doc[0]), most=batch_tokens)
    sums = trainer.evaluate(pack_documents(group[rank::size]) for group in groups)
    return sums["loss"] / max(sums["weight"], 1e-30)
