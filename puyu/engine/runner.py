"""One step's schedule -> tensors -> forward -> logits of the tokens that are sampled from.

Sees ids, positions and block tables; knows nothing of requests, text or sampling. All tensors of a step are built
once, from flat lists, and the model's layers share them.

    logits_SV = runner.run([Span(tokens=(5, 6, 7), context=0, blocks=(3,), samples=True)])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puyu.engine.kernels.launch import can_launch
from puyu.engine.native import MAX_BATCH, NativeStep
from puyu.model.heads import CausalLM
from puyu.model.paged import KVCache, PagedPlan, PagedSequence

if TYPE_CHECKING:
    from puyu.engine.gpu import GpuStep


class Span(NamedTuple):
    """Tokens of one sequence that follow `context` cached ones; `blocks` have room for both."""

    tokens: Sequence[int]
    context: int
    blocks: Sequence[int]
    samples: bool


class Runner:
    """A model and the cache that its steps write to. Shares the model's weights; never changes them."""

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.device
        self.native = NativeStep.make(model, cache)
        """The quick way for a few decoding sequences, where this machine has it; None otherwise."""
        self.gpu = _gpu_step(model, cache)
        """The quick way for every step, where there is a GPU; None otherwise."""

    @torch.inference_mode()
    def run(self, spans: Sequence[Span], feed: Tensor | None = None) -> Tensor:
        """Logits [S, V] after the last token of each span that samples, in their order.

        A token below 0 is a result of the last step that only the device knows: -1 the first of `feed`, and so on.
        """
        if self.gpu is not None:
            return self.gpu.run(spans, feed)
        if feed is not None:
            spans = [span._replace(tokens=_known(span.tokens, feed)) for span in spans]
        if self.native is not None and len(spans) <= MAX_BATCH and all(len(span.tokens) == 1 for span in spans):
            return self._decode(self.native, spans)
        starts = np.cumsum([0] + [len(span.tokens) for span in spans])
        positions = np.concatenate([np.arange(span.context, span.context + len(span.tokens)) for span in spans])
        sequences = [
            PagedSequence(int(start), len(span.tokens), span.context, tuple(span.blocks))
            for start, span in zip(starts, spans, strict=False)
        ]
        plan = PagedPlan.build(self.cache, sequences)
        tokens_T = self._tensor(np.array([token for span in spans for token in span.tokens]))
        hidden_TD = self.model.trunk(tokens_T, self._tensor(positions), plan)
        last = [int(end) - 1 for end, span in zip(starts[1:], spans, strict=True) if span.samples]
        if len(last) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD[self._tensor(np.array(last, dtype=np.int64))]
        return self.model.logits(hidden_TD)

    def _decode(self, native: NativeStep, spans: Sequence[Span]) -> Tensor:
        logits_BV = native.run([s.tokens[0] for s in spans], [s.context for s in spans], [s.blocks for s in spans])
        return logits_BV if all(span.samples for span in spans) else logits_BV[[span.samples for span in spans]]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device, non_blocking=True)


def _gpu_step(model: CausalLM, cache: KVCache) -> GpuStep | None:
    """Imports the kernels, and Triton with them, only where they can run."""
    if not can_launch(cache.device):
        return None
    from puyu.engine.gpu import GpuStep

    return GpuStep.make(model, cache)


def _known(tokens: Sequence[int], feed: Tensor) -> Sequence[int]:
    return [int(feed[-1 - token]) if token < 0 else token for token in tokens]
