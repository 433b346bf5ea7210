"""How far a quantized model is from the original: both read the same tokens, token by token compared.

Perplexity of both; the mean Kullback-Leibler divergence KL(original || quantized) of the next token's distribution in
nats; and how often both hold the same token for the likeliest.

    distance = compare(original, quantized, documents)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puyu.model.heads import CausalLM
from puyu.model.kv_cache import CacheStorage, KVCache
from puyu.model.packed import PackedPlan
from puyu.model.paged import PagedPlan, PagedSequence
from puyu.quant.calibrate import inputs_of, packed

_TOKENS = 1024
"""Tokens in a forward, or one longer document."""
_ROWS = 1024
"""Tokens whose logits are held in fp32 at once, for both models."""


@dataclass
class Distance:
    """Sums over predicted tokens."""

    tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    divergence: float = 0.0
    agreed: int = 0

    def add(self, before_TV: Tensor, after_TV: Tensor, targets_T: Tensor) -> None:
        """Log-probabilities of both models, and the tokens that came."""
        at = targets_T[:, None]
        self.tokens += len(targets_T)
        self.loss_before -= before_TV.gather(1, at).sum(dtype=torch.float64).item()
        self.loss_after -= after_TV.gather(1, at).sum(dtype=torch.float64).item()
        self.divergence += (before_TV.exp() * (before_TV - after_TV)).sum(dtype=torch.float64).item()
        self.agreed += int((before_TV.argmax(-1) == after_TV.argmax(-1)).sum())

    @property
    def perplexities(self) -> tuple[float, float]:
        """(original, quantized)."""
        return math.exp(self.loss_before / self.tokens), math.exp(self.loss_after / self.tokens)

    def numbers(self) -> dict[str, Any]:
        """The lines of the receipt."""
        before, after = self.perplexities
        return {
            "tokens": self.tokens,
            "perplexity_change": round(after / before - 1, 6),
            "kl": round(self.divergence / self.tokens, 6),
            "top1_agreement": round(self.agreed / self.tokens, 5),
        }


@torch.inference_mode()
def compare(
    original: CausalLM, quantized: CausalLM, documents: Sequence[Sequence[int]], *, cache: CacheStorage = "auto"
) -> Distance:
    """The distance over documents of at least two tokens; `cache`: how the second model keeps keys and values."""
    distance = Distance()
    for batch in packed(documents, tokens=_TOKENS):
        tokens_T, positions_T, starts = inputs_of(batch, original.trunk.device)
        plain = PackedPlan.build(starts, len(tokens_T), tokens_T.device)
        other = plain if cache == "auto" else _cached(quantized, batch, starts, cache)
        hidden = [m.trunk(tokens_T, positions_T, p) for m, p in ((original, plain), (quantized, other))]
        predicts = torch.ones(len(tokens_T), dtype=torch.bool, device=tokens_T.device)
        predicts[[start - 1 for start in [*starts[1:], len(tokens_T)]]] = False
        for where in predicts.nonzero()[:, 0].split(_ROWS):
            pairs = zip((original, quantized), hidden, strict=True)
            before, after = (model.logits(states[where]).float().log_softmax(dim=-1) for model, states in pairs)
            distance.add(before, after, tokens_T[where + 1])
    return distance


def _cached(model: CausalLM, batch: list[list[int]], starts: list[int], storage: CacheStorage) -> PagedPlan:
    """The plan of whole documents that read their keys and values from a cache."""
    weight, count = model.trunk.embedding.weight, sum(map(len, batch))
    cache = KVCache(
        model.config, num_blocks=count, block_size=1, device=weight.device, dtype=weight.dtype, storage=storage
    )
    places = [range(start, start + len(document)) for start, document in zip(starts, batch, strict=True)]
    return PagedPlan.build(cache, [PagedSequence(p.start, len(p), 0, tuple(p)) for p in places])
