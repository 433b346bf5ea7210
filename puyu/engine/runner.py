"""One step's schedule -> tensors -> forward -> logits of the tokens that are sampled from.

Sees ids, positions and block tables; knows nothing of requests, text or sampling. All tensors of a step are built
once, from flat lists, and the model's layers share them.

    output = runner.run([Span(tokens=(5, 6, 7), context=0, blocks=(3,))])

`alone` computes every token by itself: its numbers then depend on nothing but the tokens before it, whatever else
is in the step and however a prompt was cut into chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puyu.engine.native import MAX_BATCH, NativeStep
from puyu.model.heads import CausalLM, ScalarModel
from puyu.model.lora import AdapterBank
from puyu.model.paged import KVCache, PagedPlan, PagedSequence


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


class Runner:
    """A model and the cache that its steps write to. Shares the model's weights; never changes them."""

    def __init__(
        self, model: CausalLM | ScalarModel, cache: KVCache, *, bank: AdapterBank | None = None, alone: bool = False
    ) -> None:
        self.model, self.cache, self.bank, self.alone = model, cache, bank, alone
        self.device = cache.device
        self.native = NativeStep.make(model, cache) if isinstance(model, CausalLM) else None
        """The quick way for a few decoding sequences, where this machine has it; None otherwise."""

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> Output:
        """Compute the tokens of all spans; their keys and values stand in the cache afterwards."""
        if self.alone:
            return self._one_by_one(spans)
        if self._suits_native(spans):
            return self._decode(spans)
        return self._forward(spans)

    def _suits_native(self, spans: Sequence[Span]) -> bool:
        if self.native is None or len(spans) > MAX_BATCH:
            return False
        return all(len(span.tokens) == 1 and not span.hidden and not span.adapter for span in spans)

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

    def _decode(self, spans: Sequence[Span]) -> Output:
        assert self.native is not None
        logits_BV = self.native.run([s.tokens[0] for s in spans], [s.context for s in spans], [s.blocks for s in spans])
        wanted = [span.rows > 0 for span in spans]
        return Output(logits_BV if all(wanted) else logits_BV[wanted], {})

    def _one_by_one(self, spans: Sequence[Span]) -> Output:
        """Every token alone, or in the native step's batches, whose rows do not depend on each other."""
        logits: dict[tuple[int, int], Tensor] = {}
        hidden: dict[int, list[Tensor]] = {at: [] for at, span in enumerate(spans) if span.hidden}
        for batch in self._waves(spans):
            singles = [_single(spans[at], place) for at, place in batch]
            output = self._decode(singles) if self._suits_native(singles) else self._forward(singles)
            wanted = [key for key, single in zip(batch, singles, strict=True) if single.rows]
            logits |= zip(wanted, output.logits_SV, strict=True)
            for row, states_1D in output.hidden.items():
                hidden[batch[row][0]].append(states_1D)
        rows = [logits[key] for key in sorted(logits)]
        empty = torch.empty(0, self.model.config.vocab_size, device=self.device)
        return Output(torch.stack(rows) if rows else empty, {at: torch.cat(parts) for at, parts in hidden.items()})

    def _waves(self, spans: Sequence[Span]) -> Iterator[list[tuple[int, int]]]:
        """(span, place) in batches. Tokens of one span come one after the other: each needs the keys before it."""
        for place in range(max(len(span.tokens) for span in spans)):
            here = [(at, place) for at, span in enumerate(spans) if place < len(span.tokens)]
            plain = [key for key in here if self._suits_native([_single(spans[key[0]], key[1])])]
            yield from (plain[start : start + MAX_BATCH] for start in range(0, len(plain), MAX_BATCH))
            yield from ([key] for key in here if key not in plain)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device, non_blocking=True)


def _single(span: Span, place: int) -> Span:
    """Token `place` of a span as a span of its own."""
    wanted = int(place >= len(span.tokens) - span.rows)
    return span._replace(tokens=[span.tokens[place]], context=span.context + place, rows=wanted)
