"""One step's schedule -> tensors -> forward -> logits of the tokens that are sampled from.

Sees ids, positions and block tables; knows nothing of requests, text or sampling. All tensors of a step are built
once, from flat lists, and the model's layers share them.

    output = runner.run([Span(tokens=(5, 6, 7), context=0, blocks=(3,))])

`alone` computes every token by itself: its numbers then depend on nothing but the tokens before it, whatever else
is in the step and however a prompt was cut into chunks. The native step does that for many tokens at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puyu.engine.kernels.launch import can_launch
from puyu.engine.native_step import NativeStep
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.lora import AdapterBank
from puyu.model.paged import KVCache, PagedPlan, PagedSequence

if TYPE_CHECKING:
    from puyu.engine.gpu import GpuStep


class Span(NamedTuple):
    """Tokens of one sequence that follow `context` cached ones; `blocks` have room for both.

    Logits are wanted after the last `rows` tokens; the hidden states of all of them if `hidden`.
    """

    tokens: Sequence[int]
    context: int
    blocks: Sequence[int]
    rows: int = 1
    hidden: bool = False
    adapter: str = ""


class Output(NamedTuple):
    """Logits [S, V] of the wanted rows, span after span; hidden states [L, D] by index of the span."""

    logits_SV: Tensor
    hidden: dict[int, Tensor]
    best: list[int] | None = None
    """The likeliest id of each row, -1 where a row is not finite; where the step has found it already."""


class Runner:
    """A model and the cache that its steps write to. Shares the model's weights; never changes them."""

    def __init__(
        self,
        model: CausalLM | ScalarModel,
        cache: KVCache,
        *,
        bank: AdapterBank | None = None,
        alone: bool = False,
        num_ids: int | None = None,
    ) -> None:
        """`num_ids`: only ids below it are ever chosen; None, all."""
        self.model, self.cache, self.bank, self.alone, self.num_ids = model, cache, bank, alone, num_ids
        self.device = cache.device
        self.native = self._native()
        """The quick way on a CPU, where this machine and this model have it; None otherwise."""
        self.gpu = None if alone or not isinstance(model, CausalLM) else _gpu_step(model, cache)
        """The quick way on a GPU, where its kernels know the model; None otherwise."""

    def _native(self) -> NativeStep | None:
        if not isinstance(self.model, CausalLM):
            return None
        return NativeStep.make(self.model, self.cache, invariant=self.alone, num_ids=self.num_ids)

    def renew(self) -> None:
        """Take over weights that have changed: those of quantized layers are kept packed."""
        if self.native is not None:
            self.native = self._native()
        if self.gpu is not None and not self.gpu.renew():
            self.gpu = None

    def release(self) -> None:
        """Give back what was made of the weights; nothing may be run before `renew`."""
        if self.native is not None:
            self.native.release()
        if self.gpu is not None:
            self.gpu.release()

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], feed: Tensor | None = None) -> Output:
        """Compute the tokens of all spans; their keys and values stand in the cache afterwards.

        A token below 0 is a result of the last step that only the device knows: -1 the first of `feed`, and so on.
        """
        if self.gpu is not None and not any(span.hidden or span.adapter for span in spans):
            return Output(self.gpu.run(spans, feed), {})
        if feed is not None:
            spans = [span._replace(tokens=_known(span.tokens, feed)) for span in spans]
        quick = self._quick(spans)
        if self.native is not None and len(quick) == len(spans):
            logits_SV, best = self.native.run(spans)
            return Output(logits_SV, {}, best)
        if not quick:
            return self._slow(spans)
        assert self.native is not None
        slow = [at for at in range(len(spans)) if at not in quick]
        output = self._slow([spans[at] for at in slow])
        logits_SV, _ = self.native.run([spans[at] for at in quick])
        parts = dict(zip(quick, logits_SV.split([spans[at].rows for at in quick]), strict=True))
        parts |= zip(slow, output.logits_SV.split([spans[at].rows for at in slow]), strict=True)
        hidden = {slow[at]: states for at, states in output.hidden.items()}
        return Output(torch.cat([parts[at].float() for at in range(len(spans))]), hidden)

    def _quick(self, spans: Sequence[Span]) -> list[int]:
        """Which spans the native step computes: what it can, where that is faster or has to be."""
        if self.native is None:
            return []
        able = [at for at, span in enumerate(spans) if not span.hidden and not span.adapter]
        lengths = [len(spans[at].tokens) for at in able]
        return able if able and (self.alone or self.native.suits(sum(lengths), max(lengths))) else []

    def _slow(self, spans: Sequence[Span]) -> Output:
        return self._one_by_one(spans) if self.alone else self._forward(spans)

    def _forward(self, spans: Sequence[Span]) -> Output:
        starts = np.cumsum([0] + [len(span.tokens) for span in spans])
        positions = np.concatenate([np.arange(span.context, span.context + len(span.tokens)) for span in spans])
        sequences = [
            PagedSequence(int(start), len(span.tokens), span.context, tuple(span.blocks))
            for start, span in zip(starts, spans, strict=False)
        ]
        plan = PagedPlan.build(self.cache, sequences)
        tokens_T = self._tensor(np.array([token for span in spans for token in span.tokens]))
        adapters = [(span.adapter, len(span.tokens)) for span in spans]
        with contextlib.nullcontext() if self.bank is None else self.bank.using(adapters):
            hidden_TD = self.model.trunk(tokens_T, self._tensor(positions), plan)
        kept = {at: hidden_TD[starts[at] : starts[at + 1]] for at, span in enumerate(spans) if span.hidden}
        rows = [row for end, span in zip(starts[1:], spans, strict=True) for row in range(end - span.rows, end)]
        if len(rows) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD[self._tensor(np.array(rows, dtype=np.int64))]
        return Output(self._logits(hidden_TD), kept)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        if isinstance(self.model, CausalLM):
            return self.model.logits(hidden_SD)
        assert hidden_SD.shape[0] == 0, "a model without a language head has no logits"
        return hidden_SD

    def _one_by_one(self, spans: Sequence[Span]) -> Output:
        """Every token in a forward of its own."""
        logits, hidden = [], {}
        for at, span in enumerate(spans):
            outputs = [self._forward([_single(span, place)]) for place in range(len(span.tokens))]
            logits += [output.logits_SV for output in outputs]
            if span.hidden:
                hidden[at] = torch.cat([output.hidden[0] for output in outputs])
        return Output(torch.cat(logits), hidden)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device, non_blocking=True)


def _single(span: Span, place: int) -> Span:
    """Token `place` of a span as a span of its own."""
    wanted = int(place >= len(span.tokens) - span.rows)
    return span._replace(tokens=[span.tokens[place]], context=span.context + place, rows=wanted)


def _gpu_step(model: CausalLM, cache: KVCache) -> GpuStep | None:
    """Imports the kernels, and Triton with them, only where they can run."""
    if not can_launch(cache.device):
        return None
    from puyu.engine.gpu import GpuStep

    return GpuStep.make(model, cache)


def _known(tokens: Sequence[int], feed: Tensor) -> Sequence[int]:
    return [int(feed[-1 - token]) if token < 0 else token for token in tokens]
